-- Of the tasks $2, attempts $3, that worker $1 has just claimed, which may run: those with waits_for NULL; schema.sql tells.
SELECT id, waits_for FROM notifyq.admit($1::integer, $2::bigint[], $3::smallint[])
