"""`ngrokd flows` and `ngrokd flows close`: the apps' connections, whose they are, and why the last ones ended."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import click

from ngrokd.cli.columns import Column, fit, milliseconds_text, rate_text, rows_of, size_text, table_of, time_text
from ngrokd.cli.context import Context, command, common_options
from ngrokd.cli.offers import endpoint_names, flow_ids
from ngrokd.cli.output import clean, paint, print_lines, since, terminal_width
from ngrokd.cli.programs import Programs

RATE_S: Final = 0.5  # between the two looks that a rate takes
LOOK_S: Final = 15.0  # many flows, and many processes to look through

# RFC 9293's states in words that fit; --json has them as they are.
STATES: Final = {
    "DIALING": "dialing",
    "SYN-RECEIVED": "opening",
    "ESTABLISHED": "open",
    "FIN-WAIT-1": "closing",
    "FIN-WAIT-2": "half-closed",
    "CLOSE-WAIT": "half-closed",
    "CLOSING": "closing",
    "LAST-ACK": "closing",
    "TIME-WAIT": "closed",
    "CLOSED": "closed",
}


@click.group("flows", invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@common_options
@click.option(
    "--endpoint", metavar="TEXT", shell_complete=endpoint_names, help="Only those whose endpoint contains TEXT."
)
@click.option("--process", metavar="TEXT", help="Only those of programs whose name contains TEXT.")
@click.option("--ended", is_flag=True, help="The last 200 that ended or were refused, and why, newest first.")
@click.pass_context
def flows(ctx: click.Context, endpoint: str | None, process: str | None, ended: bool) -> None:
    """List the connections of apps: program, endpoint, state, what the app sent and received, rate, round trip, age.

    The rate is that of half a second. "ngrokd flows close ID" ends a connection.
    """
    context = ctx.find_object(Context)
    assert context is not None, "invoke() made one"
    if ctx.invoked_subcommand is not None:
        return
    context.command = "flows"
    if ended:
        data = table_of(context.ask("flows", "ended=1", timeout_s=LOOK_S).data)
        shown = [row for row in rows_of(data.get("ended")) if _matches(row, endpoint, None)]
        _show_ended(context, shown)
        return
    shown = [row for row in _look(context) if _matches(row, endpoint, process)]
    if context.as_json:
        context.print_document(shown)
    elif shown:
        heading, *lines = flow_lines(shown, terminal_width())
        print_lines([paint(heading, "dim"), *lines])
    else:
        click.echo("no connections" + (" like this" if endpoint or process else ""), err=True)


def _look(context: Context) -> list[dict[str, Any]]:
    """The flows, with rates."""
    first = rows_of(table_of(context.ask("flows", timeout_s=LOOK_S).data).get("flows"))
    if not first:
        return []
    begun = time.monotonic()
    time.sleep(RATE_S)
    second = rows_of(table_of(context.ask("flows", timeout_s=LOOK_S).data).get("flows"))
    took = time.monotonic() - begun
    before = {row.get("id"): row for row in first}
    for row in second:
        old = before.get(row.get("id"))
        for way in ("from_app", "to_app"):
            count = row.get(f"bytes_{way}")
            earlier = old.get(f"bytes_{way}") if old is not None else None
            both = isinstance(count, int) and isinstance(earlier, int)
            row[f"rate_{way}"] = round((int(count or 0) - int(earlier or 0)) / took) if both else None
    Programs().name(second)
    return second


def _matches(row: Mapping[str, Any], endpoint: str | None, process: str | None) -> bool:
    return (endpoint or "").lower() in str(row.get("endpoint", "")).lower() and (process or "").lower() in str(
        row.get("process", "")
    ).lower()


COLUMNS: Final = (
    Column("ID", right=True),
    Column("PROGRAM", least=8),
    Column("USER", least=6, worth=3),
    Column("ENDPOINT", least=16),
    Column("STATE", worth=5),
    Column("SENT", right=True, worth=6),
    Column("RECEIVED", right=True, worth=6),
    Column("RATE", right=True, worth=8),
    Column("RTT", right=True, worth=2),
    Column("AGE", right=True, worth=7),
    Column("FROM", worth=1),
)


def flow_lines(rows: Iterable[Mapping[str, Any]], width: int | None) -> list[str]:
    """The table of flows."""
    return fit(COLUMNS, [_cells(row) for row in rows], width)


def _cells(row: Mapping[str, Any]) -> Sequence[str]:
    program = str(row.get("process") or "?")
    pid = row.get("pid")
    rate = sum(value for way in ("from_app", "to_app") if isinstance(value := row.get(f"rate_{way}"), (int, float)))
    return (
        str(row.get("id", "")),
        f"{program}/{pid}" if isinstance(pid, int) else program,
        user_name(row.get("uid")),
        str(row.get("endpoint", "")),
        STATES.get(str(row.get("state")), str(row.get("state", ""))),
        size_text(row.get("bytes_from_app")),
        size_text(row.get("bytes_to_app")),
        rate_text(rate),
        milliseconds_text(row.get("rtt_ms")),
        time_text(row.get("age_s")),
        str(row.get("source", "")),
    )


@functools.cache
def user_name(uid: object) -> str:
    """The name of a user as this machine knows it, else the number; "" for none."""
    if not isinstance(uid, int) or isinstance(uid, bool):
        return ""
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except (KeyError, OverflowError):
        return str(uid)


_ENDED_COLUMNS: Final = (
    Column("ID", right=True),
    Column("ENDED", worth=5),
    Column("ENDPOINT", least=16),
    Column("WHY", least=12),
    Column("SENT", right=True, worth=3),
    Column("RECEIVED", right=True, worth=3),
    Column("AGE", right=True, worth=4),
    Column("FROM", worth=1),
    Column("SAID", least=20, worth=2),
)


def _show_ended(context: Context, rows: list[dict[str, Any]]) -> None:
    if context.as_json:
        context.print_document(rows)
        return
    if not rows:
        click.echo("no connection has ended yet", err=True)
        return
    heading, *lines = fit(_ENDED_COLUMNS, [_ended_cells(row) for row in rows], terminal_width())
    print_lines([paint(heading, "dim"), *lines])


def _ended_cells(row: Mapping[str, Any]) -> Sequence[str]:
    outcome, reason = str(row.get("outcome", "")), str(row.get("reason", "")).replace("_", " ")
    return (
        str(row.get("id", "")),
        since(row.get("ended_at")),
        str(row.get("endpoint", "")),
        f"refused: {reason}" if outcome == "refused" else reason,
        size_text(row.get("bytes_from_app")),
        size_text(row.get("bytes_to_app")),
        time_text(row.get("age_s")),
        str(row.get("source", "")),
        str(row.get("message", "")),
    )


def _close_flows(context: Context, numbers: tuple[int, ...]) -> None:
    """Reset connections, both ways: the app and the endpoint see it. For root."""
    answer = context.ask("close-flow", *map(str, numbers))
    if context.as_json:
        context.print_document(answer.data)
    else:
        print_lines([clean(answer.data if isinstance(answer.data, str) else "closed")])


_numbers = click.argument(
    "numbers", metavar="ID...", nargs=-1, required=True, type=click.IntRange(min=1), shell_complete=flow_ids
)
flows.add_command(command("flows close")(_numbers(_close_flows)))
