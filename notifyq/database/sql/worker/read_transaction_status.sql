-- Read what became of transaction $1, whose COMMIT got no answer: committed, aborted, or in progress. The task's row
-- couldn't tell: it is also gone if another worker took the task and finished it.
SELECT pg_xact_status($1::text::xid8) AS status
