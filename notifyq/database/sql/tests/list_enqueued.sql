-- For tests: the tasks of type $1 that haven't ended, the oldest first. The payload is text, whatever codec the
-- connection has for jsonb. The delay is the one given at the enqueue, or the wait for the next attempt.
SELECT id, queue, state, priority, least(greatest(run_at, '0001-01-03Z'), '9999-12-30Z') AS run_at,
       payload::text AS payload,
       CASE WHEN isfinite(run_at) AND isfinite(created_at)
            THEN greatest(extract(epoch FROM run_at - created_at)::float8, 0) END AS delay
FROM notifyq.all_tasks
WHERE type = $1 AND state IN ('scheduled', 'ready', 'running')
ORDER BY id
