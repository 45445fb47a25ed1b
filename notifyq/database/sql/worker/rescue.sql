-- Take back up to $2 tasks of worker $1 if it is dead. Its last heartbeat is still $3, as send_heartbeat.sql told it,
-- and that hasn't changed for $4 seconds by the rescuer's own clock: for 2 seconds, while its advisory lock is free,
-- or for the length of its lease, lock or no lock. The server's clock isn't asked, as it may be stepped: a step
-- forward would make all workers look silent, and after a step back a dead one's last heartbeat would lie in the
-- future.
--
-- With $5, of those tasks only: left_out.py passes it after a refusal. Whether a task crashed alone is decided by all
-- that the worker held, not by $5.
--
-- It stops after the task with which 64 MB of payloads and errors are moved or rewritten, so that it isn't held up for
-- long.
--
-- A task is ready again after its first crash, and the bell rings; from the second crash on it is parked until a worker
-- runs it isolated. If the worker held other tasks, the attempt doesn't count. If it held only this one, the attempt
-- counts, and after the third such, or the last one that is allowed, the task is dead. See "Tasks whose worker
-- vanished" in schema.sql. The worker's row is deleted by the round that finds no task of it. Its status, vanished,
-- tells a later round that the worker held more than that round sees.
--
-- Returns one row: the worker's name (NULL: it lives, or another rescues it), how many tasks are ready again or parked,
-- how many are dead. A rescuer that finds the worker's row locked by another leaves it alone. It steps over tasks that
-- the worker, not quite dead, is settling at this moment, and leaves them to the next round. finish.sql explains
-- ANY (ARRAY[...]).
WITH corpse AS MATERIALIZED (
    SELECT w.id, w.name, w.types, w.max_attempts,
           w.status <> 'vanished'
           AND (SELECT count(*) FROM (SELECT FROM notifyq.task t WHERE t.worker = $1 LIMIT 2) AS two) = 1 AS alone
    FROM notifyq.worker w
    WHERE w.id = $1 AND extract(epoch FROM w.seen_at)::float8 = $3
      AND CASE WHEN $4::float8 >= extract(epoch FROM w.lease) THEN true
               WHEN $4::float8 >= 2 THEN pg_try_advisory_xact_lock(1852990827, w.id::integer)
               ELSE false END
    FOR UPDATE SKIP LOCKED
), found AS MATERIALIZED (
    SELECT t.id, pg_column_size(t.payload) + coalesce(pg_column_size(t.errors), 0) AS size, corpse.alone,
           corpse.alone AND (
               coalesce(t.crashes_alone, 0) >= 2
               OR t.attempts - coalesce(t.crashes, 0) >= coalesce(
                   t.max_attempts,
                   (SELECT k.allowed FROM unnest(corpse.types, corpse.max_attempts) AS k (type, allowed)
                    WHERE k.type = t.type LIMIT 1), 10)) AS spent,
           coalesce(t.crashes, 0) + coalesce(t.crashes_alone, 0) > 0 AS suspect,
           jsonb_build_object(
               'attempt', t.attempts, 'at', clock_timestamp(),
               'error', 'its worker ' || corpse.name || ' vanished while it ran this task'
                        || CASE WHEN NOT corpse.alone THEN ' and others'
                                WHEN t.crashes_alone > 0 THEN ' alone, ' || t.crashes_alone + 1 || ' times by now'
                                ELSE ' alone' END) AS error
    FROM corpse JOIN notifyq.task t ON t.worker = $1
    WHERE $5::bigint[] IS NULL OR t.id = ANY ($5)
    ORDER BY t.id
    LIMIT $2::integer
    FOR UPDATE OF t SKIP LOCKED
), held AS MATERIALIZED (
    SELECT f.*
    FROM (SELECT f.*, sum(f.size) OVER (ORDER BY f.id) - f.size AS before FROM found f) AS f
    WHERE f.before < 67108864
), again AS (
    UPDATE notifyq.task t
    SET worker = NULL, run_at = t.run_at, processed_at = clock_timestamp(), progress = NULL, note = NULL,
        errors = notifyq.append_error(t.errors, h.error),
        crashes = CASE WHEN h.alone THEN t.crashes ELSE least(coalesce(t.crashes, 0), 32766) + 1 END,
        crashes_alone = CASE WHEN h.alone THEN coalesce(t.crashes_alone, 0) + 1 ELSE t.crashes_alone END,
        withheld = t.withheld OR h.suspect,
        parked = CASE WHEN h.suspect THEN 'crashed' ELSE t.parked END,
        waiting_on = CASE WHEN h.suspect THEN 'crashed:' || t.queue ELSE t.waiting_on END
    FROM held h
    WHERE t.id = ANY (ARRAY[h.id]) AND NOT h.spent
    RETURNING t.watched AND notifyq.note_lease_given_up(t)
), gone AS (
    DELETE FROM notifyq.task t USING held h WHERE t.id = ANY (ARRAY[h.id]) AND h.spent RETURNING t AS task, h.error
), outcome AS MATERIALIZED (
    SELECT notifyq.write_outcome(g.task, 'dead', corpse.name, (g.task).attempts,
                                 notifyq.append_error((g.task).errors, g.error))
    FROM gone g, corpse
), noted AS (
    UPDATE notifyq.worker w SET status = 'vanished'
    FROM corpse
    WHERE w.id = corpse.id AND w.status <> 'vanished' AND EXISTS (SELECT FROM notifyq.task t WHERE t.worker = $1)
      AND (NOT corpse.alone OR EXISTS (SELECT FROM held))  -- the only one, left for a later round, was still alone
), buried AS (
    DELETE FROM notifyq.worker w
    USING corpse
    WHERE w.id = corpse.id AND NOT EXISTS (SELECT FROM notifyq.task t WHERE t.worker = $1)
)
SELECT (SELECT name FROM corpse) AS name,
       (SELECT count(*) FROM again)::integer AS ready,
       (SELECT count(*) FROM outcome)::integer AS dead
