-- Worker $1 serves the crons $2.
UPDATE notifyq.worker SET crons = $2 WHERE id = $1
