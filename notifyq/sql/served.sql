-- For a note to who enqueues by hand: the queues and the types of the workers that live. A few rows are read, none counted.
SELECT ARRAY(SELECT DISTINCT unnest(queues) FROM notifyq.worker
             WHERE seen_at > statement_timestamp() - lease) AS queues,
       ARRAY(SELECT DISTINCT unnest(types) FROM notifyq.worker
             WHERE seen_at > statement_timestamp() - lease) AS types
