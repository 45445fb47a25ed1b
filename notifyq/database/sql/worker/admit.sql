-- Of the tasks $2, with attempts $3, that worker $1 has just claimed: which may run (waits_for is NULL), and what the
-- others wait for. See "Tasks that wait" in schema.sql.
SELECT id, waits_for FROM notifyq.admit($1::integer, $2::bigint[], $3::smallint[])
