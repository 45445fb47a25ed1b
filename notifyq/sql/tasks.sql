-- For people: the newest $4 tasks in state $1, of queue $2, of type $3 (NULL: any). A row each: all of it as JSON,
-- without what can be large unless $5; and the seconds from now to what matters in its state, NULL for infinity, from which
-- nothing can be subtracted before version 17. json, unlike jsonb, keeps the order of its keys. The ids of both of the view's tables come from their primary keys, backwards and merged, so that
-- it reads $4 rows without a filter, and with one until it has $4: all, where there are fewer, in 0.3 s a million.
SELECT to_json(t)::text AS task,
       CASE WHEN isfinite(m.moment) THEN extract(epoch FROM m.moment - statement_timestamp())::float8 END AS seconds
FROM (
    SELECT id, queue, type, state, priority, attempts, max_attempts, created_at, run_at, processing_at, processed_at,
           CASE WHEN $5 THEN payload END AS payload, error,
           CASE WHEN $5 THEN result END AS result, worker, waits_for, CASE WHEN $5 THEN errors END AS errors, progress, note
    FROM notifyq.all_tasks
    WHERE ($1::text IS NULL OR state = $1) AND ($2::text IS NULL OR queue = $2) AND ($3::text IS NULL OR type = $3)
    ORDER BY id DESC
    LIMIT $4::bigint
) AS t
CROSS JOIN LATERAL (SELECT CASE t.state WHEN 'scheduled' THEN t.run_at
                                        WHEN 'ready' THEN greatest(t.run_at, t.created_at)
                                        WHEN 'running' THEN t.processing_at
                                        ELSE t.processed_at END AS moment) AS m
