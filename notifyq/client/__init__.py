"""The client wing: it enqueues tasks and waits for their results. It imports nothing of the worker wing.

options        the options of one call of enqueue: checked, and joined with what the task's class says
enqueue        validates a task, builds the statement that inserts it, and sends it
bulk           many tasks in one call, some of which may be unique
drivers        connections of other libraries that enqueue accepts
calls          checks of a call before it is awaited: the event loop, the kind of connection
pool           the pool that a connected App keeps
crons          a cron's row: the task that each slot enqueues
sync, sync_pool  SyncClient: the same for code that isn't async, and its pool
ref, cancel    an enqueued task, to wait for and to cancel
clock          how far tests have moved the times of tasks
results        waits for the results, ends and progress of tasks, for all callers in this process
values         decodes a result
"""
