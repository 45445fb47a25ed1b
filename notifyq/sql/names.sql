-- What the database knows the names of, for "did you mean": every queue and every type.
SELECT ARRAY(SELECT DISTINCT queue FROM notifyq.all_tasks) AS queues, ARRAY(SELECT DISTINCT type FROM notifyq.all_tasks) AS types
