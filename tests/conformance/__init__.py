"""The line protocol against influxd itself and against influxdata/line-protocol-corpus."""
