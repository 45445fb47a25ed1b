-- Check some keys again at which tasks wait, from key $1 on: the safety net under release_waiters.sql. Returns the key
-- to go on with.
SELECT notifyq.recheck_waiting($1::text) AS last
