"""Background tasks on PostgreSQL: a task is a row, a trigger rings, a worker wakes."""

from .app import App
from .client.options import EnqueueOptions
from .client.ref import Ids, Ref
from .client.sync import SyncClient
from .errors import ConfigError, DatabaseError, NotifyqError, SchemaError, TaskCancelled, TaskDead, TaskFailed
from .task import Cancel, Context, Dead, Progress, Retry, Task
from .worker.worker import WorkerInfo

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
