"""The application of ``worker.py``, for one of its variants; run as a program it publishes."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import redis
from celery import Celery, signals

BROKER = os.environ["BENCHMARK_BROKER"]
VARIANT = os.environ["BENCHMARK_VARIANT"]
QUEUE = "run"

app = Celery("benchmark", broker=BROKER)
app.conf.task_ignore_result = True
app.conf.task_default_queue = QUEUE
app.conf.worker_send_task_events = app.conf.task_send_sent_event = VARIANT == "events"


@app.task(name="noop")
def noop() -> None:
    """What is measured."""


@app.task(name="mark")
def mark() -> None:
    """Tell the benchmark when this was run, by a clock that all processes share."""
    now = time.monotonic_ns()
    with redis.Redis.from_url(BROKER) as client:
        client.rpush("marks", now)


def trace(**_: Any) -> None:
    """OpenTelemetry as its documentation says, but spans are dropped instead of sent."""
    from opentelemetry import trace as api
    from opentelemetry.instrumentation.celery import CeleryInstrumentor
    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

    class Drop(SpanExporter):
        """Counts, once for each batch, so that the benchmark knows that there were spans."""

        client = redis.Redis.from_url(BROKER)

        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            self.client.incrby("spans", len(spans))
            return SpanExportResult.SUCCESS

    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(Drop()))
    # A pool child runs no atexit handlers.
    signals.worker_process_shutdown.connect(lambda **_: provider.shutdown(), weak=False)
    api.set_tracer_provider(provider)
    CeleryInstrumentor().instrument()


if VARIANT == "celery_influx":
    import celery_influx

    app.conf.influx_databases = {
        "metrics": {
            "host": "127.0.0.1",
            "udp_port": int(os.environ["BENCHMARK_UDP_PORT"]),
            "http_port": 0,
        }
    }
    celery_influx.install(app)
elif VARIANT == "opentelemetry":
    if __name__ == "__main__":
        trace()  # so that the messages carry the publisher's context
    else:
        signals.worker_process_init.connect(trace, weak=False)


if __name__ == "__main__":
    with app.producer_pool.acquire() as producer:
        mark.apply_async(producer=producer)
        for _ in range(int(sys.argv[1])):
            noop.apply_async(producer=producer)
        mark.apply_async(producer=producer)
