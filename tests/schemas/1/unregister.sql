-- Worker $1 leaves. It stays, for others to rescue, if it still holds a task.
DELETE FROM notifyq.worker w WHERE w.id = $1 AND NOT EXISTS (SELECT FROM notifyq.task t WHERE t.worker = w.id)
