-- For "did you mean": the queues and the types of all tasks. It scans both tables: 0.3 s per million tasks.
SELECT ARRAY(SELECT DISTINCT queue FROM notifyq.all_tasks) AS queues,
       ARRAY(SELECT DISTINCT type FROM notifyq.all_tasks) AS types
