-- What became of transaction $1, whose COMMIT went unanswered: committed, aborted, or in progress. Exact, while the row
-- alone would not be: it is as gone when others took it and were done with it.
SELECT pg_xact_status($1::text::xid8) AS status
