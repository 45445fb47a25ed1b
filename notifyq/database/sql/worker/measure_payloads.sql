-- Of tasks $2, attempts $3, which worker $1 has claimed without their payloads: how many bytes each payload has as
-- text. It goes through them in their order, until they are $4 bytes or more together: at least one, and no payload is
-- read that won't be fetched. bytes is NULL if the worker doesn't hold the lease any more. A payload above 16 MiB on
-- disk is too large in any case, so that size is returned, and the payload isn't read.
WITH RECURSIVE measured AS (
    SELECT 0 AS n, NULL::bigint AS id, NULL::bigint AS bytes, 0::bigint AS total
    UNION ALL
    SELECT m.n + 1, ($2::bigint[])[m.n + 1], s.bytes,
           m.total + CASE WHEN s.bytes <= 16777216 THEN s.bytes ELSE 0 END
    FROM measured m
    LEFT JOIN LATERAL (
        SELECT CASE WHEN pg_column_size(t.payload) > 16777216 THEN pg_column_size(t.payload)
                    ELSE octet_length(t.payload::text) END::bigint AS bytes
        FROM notifyq.task t
        WHERE t.id = ANY (ARRAY[($2::bigint[])[m.n + 1]]) AND t.worker IS NOT DISTINCT FROM $1::integer
          AND t.attempts = ($3::smallint[])[m.n + 1]
    ) AS s ON true
    WHERE m.n < cardinality($2::bigint[]) AND m.total < $4::bigint
)
SELECT id, bytes FROM measured WHERE n > 0
