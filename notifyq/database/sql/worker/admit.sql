-- Decide which of the tasks $2, attempts $3, that worker $1 has just claimed may run. The function in schema.sql says
-- what the answer means; see also "Limits and order" there. seconds_left is the time until expires_at, which may be
-- infinite. Both are NULL for a task that doesn't expire.
SELECT id, waits_for, CASE WHEN expires_at IS NOT NULL THEN notifyq.readable_time(expires_at) END AS expires_at,
       extract(epoch FROM expires_at)::float8 - extract(epoch FROM clock_timestamp())::float8 AS seconds_left
FROM notifyq.admit($1::integer, $2::bigint[], $3::smallint[])
