-- The heartbeat of worker $1, sent on another connection while the heartbeat's own connection is lost or gives no
-- answer.
UPDATE notifyq.worker SET seen_at = clock_timestamp() WHERE id = $1
