-- The safety net under free.sql: some keys at which tasks wait, from $1 on, are looked at again. Returns where to go on.
SELECT notifyq.stir($1::text) AS last
