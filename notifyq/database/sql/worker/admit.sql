-- Decide which of the tasks $2, attempts $3, that worker $1 has just claimed may run. The function in schema.sql says
-- what the answer means; see also "Limits and order" there.
SELECT id, waits_for FROM notifyq.admit($1::integer, $2::bigint[], $3::smallint[])
