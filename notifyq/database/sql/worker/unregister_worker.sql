-- Worker $1 leaves. If it still holds a task, its row stays, so that others rescue the task.
DELETE FROM notifyq.worker w WHERE w.id = $1 AND NOT EXISTS (SELECT FROM notifyq.task t WHERE t.worker = w.id)
