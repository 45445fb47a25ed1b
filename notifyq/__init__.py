"""Background tasks on PostgreSQL: a task is a row, a trigger rings, a worker wakes."""

from .app import App
from .errors import ConfigError, DatabaseError, NotifyqError, SchemaError, TaskCancelled, TaskDead, TaskFailed
from .options import EnqueueOptions
from .sync import SyncClient
from .task import Cancel, Context, Dead, Ids, Progress, Ref, Retry, Task
from .worker import WorkerInfo

__all__ = [
    "App",
    "Cancel",
    "ConfigError",
    "Context",
    "DatabaseError",
    "Dead",
    "EnqueueOptions",
    "Ids",
    "NotifyqError",
    "Progress",
    "Ref",
    "Retry",
    "SchemaError",
    "SyncClient",
    "Task",
    "TaskCancelled",
    "TaskDead",
    "TaskFailed",
    "WorkerInfo",
]
