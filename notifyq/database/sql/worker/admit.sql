-- Decide which of the tasks $2, attempts $3, that worker $1 has just claimed may run: waits_for is NULL for these, and
-- says what each of the others waits for. See "Limits and order" in schema.sql.
SELECT id, waits_for FROM notifyq.admit($1::integer, $2::bigint[], $3::smallint[])
