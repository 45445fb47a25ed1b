-- For people: every task that hasn't ended, to see whether it can be decoded.
SELECT id, type, payload FROM notifyq.task ORDER BY id
