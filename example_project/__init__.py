"""A small Celery project with celery_influx, and a run that shows what it writes."""
