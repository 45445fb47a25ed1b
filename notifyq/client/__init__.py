"""The client wing: it enqueues tasks and waits for their results. It imports nothing of the worker wing.

options        what one enqueue may say: delay, keys, limits, uniqueness
enqueue        from a task to the statement that inserts it
bulk           many tasks in one statement
drivers        the connections of other drivers that enqueue accepts
pool           the pool that an App keeps for its own statements
sync, sync_pool  SyncClient: the same for code that isn't async
results        results, ends and progress of tasks, for all that wait in this process
"""
