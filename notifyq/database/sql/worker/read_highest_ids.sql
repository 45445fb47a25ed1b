-- Read the highest id of all tasks, live or finished, and the last id that the sequence gave. If the first is higher,
-- ids will be given twice: the sequence was set back, or wasn't restored with the tables.
SELECT greatest((SELECT max(id) FROM notifyq.task), (SELECT max(id) FROM notifyq.finished), 0) AS highest,
       s.last_value AS last
FROM notifyq.task_id_seq s
