"""The app of a Django project: `DJANGO_SETTINGS_MODULE=site.settings notifyq worker notifyq.django.worker:app`.

It imports the module `tasks` of each of INSTALLED_APPS, where Django projects declare their tasks.
"""

from __future__ import annotations

import django
from django.utils.module_loading import autodiscover_modules

from notifyq.app import App

from .handlers import add_tasks

django.setup()
autodiscover_modules("tasks")

app = App()
add_tasks(app)
