"""``celery influx …``: commands of Celery's own command line, by its entry point celery.commands.

``celery`` imports this at each of its starts, whatever it is to do: so it imports click alone.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from celery_influx.plugin import Influx

_KEPT = re.compile(r"([1-9]\d{0,8})([mhdw])|INF", re.ASCII)
_SECONDS = {"m": 60, "h": 3_600, "d": 86_400, "w": 604_800}
_LEAST = 3_600  # InfluxDB's


def _duration(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    """``30d``, ``52w``, or ``INF`` for ever, as a retention policy takes it."""
    match = _KEPT.fullmatch("INF" if value is None else value)
    if not match or (match[1] and int(match[1]) * _SECONDS[match[2]] < _LEAST):
        raise click.BadParameter(
            f"{value!r}: expected 30d, 52w or the like, of 1h at least, or INF"
        )
    return value


def _downsample(
    context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> list[tuple[str, str]]:
    """``5m:52w``: one point for 5 minutes, kept for 52 weeks."""
    found = []
    for value in values:
        every, _, kept = value.partition(":")
        match = _KEPT.fullmatch(every)
        if not match or not match[1] or not kept:
            raise click.BadParameter(f"{value!r}: expected 5m:52w or the like")
        _duration(context, parameter, kept)
        found.append((every, kept))
    return found


@click.group()
def influx(**_: Any) -> None:  # Celery may hand the app's own options on
    """InfluxDB, where this app's influx_databases say that it is."""


@influx.command()
@click.argument("entries", nargs=-1)
@click.option(
    "--duration",
    callback=_duration,
    metavar="DURATION",
    help="How long points are kept; default: for ever, where nothing is there yet.",
)
@click.option(
    "--downsample",
    callback=_downsample,
    multiple=True,
    metavar="INTERVAL:DURATION",
    help="Keep means, maxima and counts longer: 5m:52w for one point every 5 minutes, 52 weeks.",
)
@click.option(
    "--alter",
    is_flag=True,
    help="Change what is there and differs. A shorter duration deletes the older points.",
)
@click.option("--dry-run", is_flag=True, help="Print the statements and send nothing.")
@click.pass_context
def setup(
    context: click.Context,
    entries: tuple[str, ...],
    duration: str | None,
    downsample: list[tuple[str, str]],
    alter: bool,
    dry_run: bool,
) -> None:
    """Make ENTRIES of influx_databases in InfluxDB 1.x; without any, all of them.

    Creates what is missing: the database, its retention policy and, if asked, continuous queries
    that downsample. Then it prints what the server's own configuration needs. What is there stays
    as it is, so a second run changes nothing.
    """
    from celery_influx.errors import InfluxError
    from celery_influx.server_setup import Setup, configuration

    plugin = _plugin(context)
    failed = False
    try:
        databases = [plugin[name] for name in entries] if entries else list(plugin)
    except InfluxError as error:
        raise click.ClickException(str(error)) from None
    for database in databases:
        click.echo(f"# {database.name}: {database.address}")
        try:
            done = Setup(database, alter=alter, dry_run=dry_run, say=click.echo)
            failed |= not done.run(duration, downsample)
            click.echo(configuration(database.options, is_telegraf=done.is_telegraf))
        except InfluxError as error:
            click.echo(f"Error: {database.name}: {error}", err=True)
            failed = True
    context.exit(int(failed))


def _plugin(context: click.Context) -> Influx:
    from celery_influx.plugin import find

    app = getattr(context.obj, "app", None)
    found = find(app)
    if found is None:
        raise click.ClickException(
            f"the app {getattr(app, 'main', None)!r} has no celery_influx; expected celery -A and "
            "the name of a module whose app is given to celery_influx.install"
        )
    return found
