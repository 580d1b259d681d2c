"""The Celery application: its configuration, and the one line that switches the plugin on."""

import os

from celery import Celery

import celery_influx
from example_project import folder_broker

folder_broker.register()  # only for a broker without a server; with redis:// it is not needed

app = Celery(
    "example_project",
    broker=os.environ.get("BROKER") or folder_broker.DEFAULT,
    include=["example_project.tasks"],
)
app.conf.task_default_queue = "example_project"
app.conf.task_ignore_result = True
app.conf.influx_databases = {"celery": os.environ.get("INFLUX") or "udp://localhost:8089"}
app.conf.influx_tags = {"app": "example_project"}

celery_influx.install(app)
