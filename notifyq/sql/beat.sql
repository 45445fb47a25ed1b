-- The heartbeat of worker $1 on another connection than its keeper's, which has none at the moment or gets no answer.
UPDATE notifyq.worker SET seen_at = clock_timestamp() WHERE id = $1
