-- For people: all tasks that haven't ended, so that the caller can check whether they decode.
SELECT id, type, payload FROM notifyq.task ORDER BY id
