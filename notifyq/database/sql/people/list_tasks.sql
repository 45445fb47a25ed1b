-- For people: the newest $4 tasks in state $1, of queue $2, of type $3 (NULL: any). Each row has the task as JSON,
-- without its large columns unless $5; and the seconds from now to the time that matters in its state, or NULL if that
-- is infinity, which can't be subtracted before version 17. json, unlike jsonb, keeps the order of its keys.
--
-- The ids come from the primary keys of both of the view's tables, backwards and merged. So it reads $4 rows if nothing
-- is filtered. With a filter it reads until it has $4 rows: at most all of them, at 0.3 s per million.
SELECT to_json(t)::text AS task,
       CASE WHEN isfinite(m.moment) THEN extract(epoch FROM m.moment - statement_timestamp())::float8 END AS seconds
FROM (
    SELECT id, queue, type, state, priority, attempts, max_attempts, created_at, run_at, processing_at, processed_at,
           CASE WHEN $5 THEN payload END AS payload, error,
           CASE WHEN $5 THEN result END AS result, worker, waits_for,
           CASE WHEN $5 THEN errors END AS errors, progress, note
    FROM notifyq.all_tasks
    WHERE ($1::text IS NULL OR state = $1) AND ($2::text IS NULL OR queue = $2) AND ($3::text IS NULL OR type = $3)
    ORDER BY id DESC
    LIMIT $4::bigint
) AS t
CROSS JOIN LATERAL (SELECT CASE t.state WHEN 'scheduled' THEN t.run_at
                                        WHEN 'ready' THEN greatest(t.run_at, t.created_at)
                                        WHEN 'running' THEN t.processing_at
                                        ELSE t.processed_at END AS moment) AS m
