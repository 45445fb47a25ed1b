-- Settle failed attempts of worker $1 that will be tried again: ids $2, attempts $3, delays in seconds $4, errors $5.
-- Returns the ids that it applied to, and for each whether it left a row in notifyq.slot_released. It sets run_at, so
-- that the bell rings: a worker must set a timer.
UPDATE notifyq.task t
SET worker = NULL, run_at = clock_timestamp() + make_interval(secs => o.delay), promoted = o.delay <= 0,
    processed_at = clock_timestamp(), progress = NULL, note = NULL,
    errors = notifyq.append_error(t.errors, jsonb_set(o.error, '{at}', to_jsonb(clock_timestamp())))
FROM unnest($2::bigint[], $3::smallint[], $4::float8[], $5::jsonb[]) AS o (id, attempt, delay, error)
WHERE t.id = ANY (ARRAY[o.id]) AND t.worker IS NOT DISTINCT FROM $1 AND t.attempts = o.attempt
RETURNING t.id, t.watched AND notifyq.note_lease_given_up(t) AS slot_released
