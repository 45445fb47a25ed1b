-- For tests: the number of tasks by type and state.
SELECT type, state, count(*) AS n FROM notifyq.all_tasks GROUP BY type, state ORDER BY type, state
