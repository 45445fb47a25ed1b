-- The safety net under release_waiters.sql: check again some keys at which tasks wait, from $1 on. Returns the key to go on with.
SELECT notifyq.recheck_waiting($1::text) AS last
