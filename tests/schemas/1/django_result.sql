-- id. What a Django TaskResult is made of, JSON as text, since each driver and each project has its own jsonb.
SELECT type, queue, priority, state, attempts, created_at, run_at, processing_at, processed_at, payload::text, result::text,
       worker, errors::text
FROM notifyq.all_tasks WHERE id = $1
