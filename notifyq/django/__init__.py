"""Django Tasks on notifyq: `TASKS = {"default": {"BACKEND": "notifyq.django.TaskBackend"}}`.

framework  Django's names, from Django 6 or from django-tasks
declared   the tasks that are declared for the backend, each with a type of its own
backend    enqueues on Django's connection, and reads results
handlers   runs a declared task in a worker
worker     notifyq.django.worker:app, for `notifyq worker`; only this module imports the project
"""

from .backend import TaskBackend
from .handlers import add_tasks

__all__ = ["TaskBackend", "add_tasks"]
