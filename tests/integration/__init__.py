"""Tests against real servers: influxd, VictoriaMetrics, brokers and workers."""
