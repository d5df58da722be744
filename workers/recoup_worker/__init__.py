"""The worker: Celery takes hints, a supervisor holds the claim, a runner process does the work."""
