"""The helper tasks: registered with one app, plain JSON, errors that a result backend carries."""

from __future__ import annotations

import json
import pickle

import pytest
from celery import Celery
from celery.backends.base import Backend

import celery_influx
from celery_influx import errors, tasks
from tests.servers import Influxd


def make_app(influxd: Influxd, database: str, **config: object) -> Celery:
    """An app with the helper tasks registered, as in a worker."""
    app = Celery("app", broker="memory://", backend="cache+memory://", set_as_current=False)
    url = f"http://127.0.0.1:{influxd.http_port}/{database}"
    app.conf.influx_databases = {"main": url, "gone": "http://127.0.0.1:9/x"}
    app.conf.update(config)
    tasks.register(app, celery_influx.install(app))
    app.finalize()
    return app


def call(app: Celery, name: str, *args: object, **kwargs: object) -> object:
    """Run a helper task here, and send its result through JSON."""
    result = app.tasks[f"celery_influx.{name}"].apply(args=args, kwargs=kwargs).get()
    return json.loads(json.dumps(result))


def test_ping_gives_version_and_seconds(influxd: Influxd, database: str) -> None:
    app = make_app(influxd, database)

    answer = call(app, "ping", "main")

    assert isinstance(answer, dict)
    assert answer["version"].startswith("1.")
    assert 0 < answer["seconds"] < 5


def test_query_binds_its_params_and_takes_querys_options(influxd: Influxd, database: str) -> None:
    app = make_app(influxd, database)
    influxd.write(b"m,t=a f=1.5 1000000000\nm,t=b f=2.5 2000000000", database)

    answer = call(app, "query", "SELECT f FROM m WHERE t = $t", params={"t": "b"}, epoch="s")

    assert answer == {
        "series": [{"name": "m", "tags": {}, "columns": ["time", "f"], "values": [[2, 2.5]]}],
        "partial": False,
        "messages": [],
    }


def test_post_is_there_only_where_it_is_allowed(influxd: Influxd, database: str) -> None:
    refusing = make_app(influxd, database)
    allowing = make_app(influxd, database, influx_allow_post=True)
    influxd.write(b"m f=1 1", database)

    answer = call(allowing, "post", "DROP MEASUREMENT m")

    assert answer == {"series": [], "partial": False, "messages": []}
    assert influxd.count("m", "f", database) == 0
    assert "celery_influx.post" not in refusing.tasks
    with pytest.raises(celery_influx.QueryError, match="DROP"):
        call(allowing, "query", "DROP MEASUREMENT m")


def test_an_app_made_later_has_nothing_of_the_first_ones(influxd: Influxd, database: str) -> None:
    make_app(influxd, database, influx_allow_post=True)
    without = Celery("without", broker="memory://", set_as_current=False)
    without.finalize()

    second = make_app(influxd, "another")

    assert not [name for name in without.tasks if name.startswith("celery_influx.")]
    with pytest.raises(celery_influx.QueryError, match="another"):
        call(second, "query", "SELECT f FROM m")


def test_their_results_are_kept_where_results_are_ignored_by_rule(
    influxd: Influxd, database: str
) -> None:
    app = make_app(influxd, database, task_ignore_result=True)

    assert app.tasks["celery_influx.ping"].ignore_result is False
    assert app.tasks["celery_influx.query"].ignore_result is False


ERRORS = [
    errors.InfluxError("reason"),
    errors.ConfigError("reason"),
    errors.PointError("reason"),
    errors.FieldError("reason"),
    errors.DecodeError("reason"),
    errors.SendError("reason", "ECONNREFUSED"),
    errors.QueryError("reason"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("serializer", ["json", "pickle"])
def test_every_error_survives_the_result_backend(
    error: errors.InfluxError, serializer: str
) -> None:
    app = Celery("app", set_as_current=False)
    app.conf.update(result_serializer=serializer, accept_content=[serializer])
    backend = Backend(app)

    stored = backend.decode(backend.encode(backend.prepare_exception(error)))
    found = backend.exception_to_python(stored)

    assert type(found) is type(error)
    assert str(found) == "reason"
    assert type(pickle.loads(pickle.dumps(error))) is type(error)


def test_every_error_of_the_package_is_tried_above() -> None:
    defined = {
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, errors.InfluxError)
    }

    assert {type(error) for error in ERRORS} == defined
