-- The payload of task $2, which worker $1 has claimed without it; NULL if it is too large. Of the sizes: claim.sql.
SELECT CASE WHEN pg_column_size(t.payload) <= 16777216 AND pg_column_size(ARRAY[t.payload]) <= 67108864
            THEN t.payload END AS payload
FROM notifyq.task t
WHERE t.id = $2 AND t.worker IS NOT DISTINCT FROM $1
