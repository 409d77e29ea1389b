"""`ngrokd events`, `logs` and `log-level`: what happens, and what is said about it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from typing import Any, Final

import click

from ngrokd.ask import Subscription
from ngrokd.cli.columns import table_of
from ngrokd.cli.context import Context, command
from ngrokd.cli.output import clean, paint, print_lines, terminal_width, truncate, wall_time

LEVELS: Final = ("debug", "info", "warning", "error")
_COLOURS: Final = {"warning": "yellow", "error": "red", "critical": "red", "debug": "dim"}
_SHOWN_ELSEWHERE: Final = frozenset({"seq", "time", "event", "level", "message"})


@command("events", epilog="docs/events.md lists the events and their fields.")
@click.option("--since", metavar="N", type=click.IntRange(min=0), help="Begin behind number N, with what is kept.")
@click.option("--no-follow", is_flag=True, help="Stop when all that is kept was shown.")
@click.option(
    "--name", "names", metavar="NAME", multiple=True, help='Only these, or those below: "flow.refused", "api".'
)
def events(context: Context, since: int | None, no_follow: bool, names: tuple[str, ...]) -> None:
    """Follow what happens: connections opened and refused, endpoints that come and go, answers of the API.

    Begins with what happens next, unless --since says otherwise; 0 is everything kept. Numbers have no gaps, unless
    events were missed. With --json each line is one event.
    """
    if no_follow and since is None:
        since = 0
    arguments = [f"follow={int(not no_follow)}", *([] if since is None else [f"since={since}"])]
    with Subscription(context.socket_path(), "events", tuple(arguments)) as subscription:
        for line in subscription:
            event = table_of(line)
            name = str(event.get("event", ""))
            if names and not any(name == each or name.startswith(f"{each}.") for each in names):
                continue
            if context.as_json:
                _print_json_line(context, event)
            else:
                print_lines([_event_line(event)])


def _print_json_line(context: Context, members: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps({"schema": f"ngrokd.{context.command}/1", **members}) + "\n")
    sys.stdout.flush()


def _event_line(event: Mapping[str, Any]) -> str:
    flow = str(event.get("event", "")).startswith("flow.")  # of all else the message says what the fields do
    fields = " ".join(
        f"{name}={clean(value)}"
        for name, value in event.items()
        if flow and name not in _SHOWN_ELSEWHERE and value != ""
    )
    level, message = str(event.get("level", "")), clean(event.get("message") or "")
    name = clean(event.get("event", ""))
    text = f"{_clock(event.get('time'))} {name.ljust(18)} {message}{' ' if message and fields else ''}"
    return _shade(text, fields, level)


def _shade(text: str, fields: str, level: str) -> str:
    """The line, cut to the terminal; the fields paler than the words."""
    width = terminal_width()
    if width is not None:
        text = truncate(text, width)
        fields = truncate(fields, width - len(text)) if width - len(text) > 8 else ""
    colour = _COLOURS.get(level)
    return (paint(text, colour) if colour else text) + (paint(fields, "dim") if fields else "")


def _clock(stamp: object) -> str:
    """The local time of day, with the day where that is not today's."""
    moment = wall_time(stamp)
    if moment is None:
        return clean(stamp)
    local = time.localtime(moment)
    today = time.localtime()[:3] == local[:3]
    return time.strftime("%H:%M:%S" if today else "%Y-%m-%d %H:%M:%S", local)


@command("logs")
@click.option("-f", "--follow", is_flag=True, help="Go on with what is said next.")
@click.option("-n", "--lines", metavar="N", type=click.IntRange(min=0), default=100, show_default=True, help="So many.")
@click.option("--level", metavar="LEVEL", type=click.Choice(LEVELS), default="debug", help="Of this level and above.")
def logs(context: Context, follow: bool, lines: int, level: str) -> None:
    """Print the last lines of the daemon's log. It keeps 2000, wherever stderr goes."""
    arguments = (f"lines={lines}", f"level={level}", f"follow={int(follow)}")
    with Subscription(context.socket_path(), "logs", arguments) as subscription:
        for line in subscription:
            entry = table_of(line)
            if context.as_json:
                _print_json_line(context, entry)
            else:
                print_lines([_log_line(entry)])


def _log_line(entry: Mapping[str, Any]) -> str:
    level = clean(entry.get("level", ""))
    shown = paint(f"{level}:", _COLOURS[level]) + " " if level in _COLOURS else ""
    return f"{_clock(entry.get('time'))} {shown}{clean(entry.get('message', ''))}"


@command("log-level")
@click.argument("level", type=click.Choice(LEVELS), required=False)
@click.option("--for", "duration", metavar="TIME", help='Go back to the configured level after this time, say "10m".')
def log_level(context: Context, level: str | None, duration: str | None) -> None:
    """Show what is logged now, or change it until the next reload or start. Changing is for root."""
    if level is None:
        if duration is not None:
            raise click.UsageError("--for goes with a level: ngrokd log-level debug --for 10m")
        data = table_of(context.ask("log-level").data)
    else:
        arguments = [f"level={level}"]
        if duration is not None:
            arguments.append(f"for={parse_time(duration)}")
        data = table_of(context.ask("set-log-level", *arguments).data)
    if context.as_json:
        context.print_document(data)
        return
    left = data.get("for_s")
    until = f", for {left:.0f} s more" if isinstance(left, (int, float)) else ""
    print_lines([f"{clean(data.get('level', ''))}{until}"])


def parse_time(text: str) -> float:
    """Seconds of "10m", "1h30m", "500ms". Raises click.UsageError."""
    from ngrokd.config.readers import parse_duration

    try:
        return parse_duration(text)
    except ValueError as error:
        raise click.UsageError(f"{text!r} is not a time such as 30s, 10m or 1h: {error}") from None
