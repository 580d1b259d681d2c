"""Each figure of celery_influx beside its peers', measured in the same run; see README.md."""
