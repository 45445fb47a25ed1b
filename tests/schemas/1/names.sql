-- For "did you mean": every queue and every type that the database knows. Two scans of all, 0.3 s a million.
SELECT ARRAY(SELECT DISTINCT queue FROM notifyq.all_tasks) AS queues,
       ARRAY(SELECT DISTINCT type FROM notifyq.all_tasks) AS types
