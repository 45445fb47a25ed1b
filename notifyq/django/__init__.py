"""Django Tasks on notifyq: `TASKS = {"default": {"BACKEND": "notifyq.django.TaskBackend"}}`.

framework  Django's own words, from Django 6 or from django-tasks
declared   the tasks that are declared for the backend: what may be run, each with a type of its own
backend    enqueue, on Django's connection, and results
handlers   what a worker does with one
worker     notifyq.django.worker:app, for `notifyq worker`; the only one that imports a project
"""

from .backend import TaskBackend
from .handlers import add_tasks

__all__ = ["TaskBackend", "add_tasks"]
