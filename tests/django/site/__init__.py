"""A Django project that test_django.py runs, in its own process and in a worker's: settings and tasks."""
