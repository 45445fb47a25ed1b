-- For a note about a task of queue $1: whether the queue is paused, the queues of all live workers, and the types of
-- those live workers that serve the queue. It reads a few rows and counts nothing.
SELECT EXISTS (SELECT FROM notifyq.queue WHERE name = $1::text AND paused) AS paused,
       ARRAY(SELECT DISTINCT unnest(queues) FROM notifyq.worker
             WHERE notifyq.is_alive(seen_at, lease)) AS queues,
       ARRAY(SELECT DISTINCT unnest(types) FROM notifyq.worker
             WHERE notifyq.is_alive(seen_at, lease) AND $1::text = ANY (queues)) AS types
