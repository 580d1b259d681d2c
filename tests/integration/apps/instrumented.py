"""Tasks in a worker with Sentry's and OpenTelemetry's instrumentation attached as well."""

from __future__ import annotations

import time
from typing import Any

import sentry_sdk
from celery import Task
from opentelemetry import trace
from opentelemetry.instrumentation.celery import CeleryInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from sentry_sdk.integrations.celery import CeleryIntegration
from sentry_sdk.transport import Transport

import celery_influx
from tests.integration.apps.base import make_app, store


class Nowhere(Transport):
    """Takes what Sentry sends, and sends nothing."""

    def capture_envelope(self, envelope: Any) -> None:
        """Count it."""
        store().incr("envelopes")


def _instrument() -> None:
    sentry_sdk.init(
        dsn="http://key@127.0.0.1:9/1",
        transport=Nowhere,
        traces_sample_rate=1.0,
        integrations=[CeleryIntegration()],
    )
    trace.set_tracer_provider(TracerProvider())
    CeleryInstrumentor().instrument()


_instrument()


app = make_app("instrumented")
influx = celery_influx.install(app)


@app.task(name="instrumented.outer", bind=True)
def outer(self: Task) -> dict[str, Any]:
    """Send two tasks, one of them with this one's own headers; what is known of the traces."""
    time.sleep(0.2)
    times = [time.time()]
    fresh = inner.apply_async(headers={"mine": "kept"}).id
    times.append(time.time())
    handed = inner.apply_async(headers=self.request.headers).id
    times.append(time.time())
    context = trace.get_current_span().get_span_context()
    return {
        "fresh": fresh,
        "fresh published": times[:2],
        "handed": handed,
        "handed published": times[1:],
        "otel": f"{context.trace_id:032x}",
        "sentry": sentry_sdk.get_current_span().trace_id,
    }


@app.task(name="instrumented.inner", bind=True, max_retries=1)
def inner(self: Task) -> dict[str, Any]:
    """In the second run: what both runs were given."""
    store().rpush(f"began {self.request.id}", repr(time.time()))
    if self.request.retries < 1:
        raise self.retry(countdown=0.2)
    return {"headers": self.request.headers, "traceparent": self.request.get("traceparent")}
