"""The Celery side: signals, the cached task, remote control and the command line."""
