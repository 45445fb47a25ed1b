-- The highest id that a task has, or has had, as far as it is known; and the last one that was given. If the first is
-- higher, ids are given a second time: somebody has set the sequence back, or not brought it along.
SELECT greatest((SELECT max(id) FROM notifyq.task), (SELECT max(id) FROM notifyq.finished), 0) AS highest,
       s.last_value AS last
FROM notifyq.task_id_seq s
