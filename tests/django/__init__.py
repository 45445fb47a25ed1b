"""The backend for the tasks of Django, and the project it is tried in (site)."""
