"""`ngrokd wait`: come back when the daemon is ready, or when an endpoint is served."""

from __future__ import annotations

import time
from typing import Final

import click

from ngrokd.ask import RemoteError
from ngrokd.cli.columns import rows_of, table_of
from ngrokd.cli.context import Context, command
from ngrokd.cli.events import parse_time
from ngrokd.cli.offers import endpoint_names
from ngrokd.cli.output import clean, print_lines
from ngrokd.errors import Exit, NgrokdError, NotRunningError

LOOK_S: Final = 0.2
LEISURE: Final = 4  # times as long as a look took: one at tens of thousands of endpoints costs the daemon something


@command("wait")
@click.option(
    "--for",
    "what",
    type=click.Choice(["ready", "endpoint"]),
    default="ready",
    show_default=True,
    help="Wait for all conditions of readiness, or for the endpoint NAME to be served.",
)
@click.argument("name", metavar="[NAME]", required=False, shell_complete=endpoint_names)
@click.option("--timeout", metavar="TIME", default="60s", show_default=True, help='Give up after this time, say "5m".')
def wait(context: Context, what: str, name: str | None, timeout: str) -> int:
    """Wait until the daemon is ready; it need not be running yet. Exit 1 when it takes too long.

    As in: ngrokd wait --timeout 30s && curl http://my-api.prod/
    """
    if (what == "endpoint") is (name is None):
        raise click.UsageError("--for endpoint takes a NAME, and --for ready takes none")
    begun = time.monotonic()
    deadline = begun + parse_time(timeout)
    while True:
        looked_at = time.monotonic()
        try:
            missing = _missing(context, name)
        except NotRunningError as error:
            missing = str(error)
        now = time.monotonic()
        if not missing or now >= deadline:
            break
        time.sleep(min(max(LOOK_S, LEISURE * (now - looked_at)), deadline - now))
    waited = round(time.monotonic() - begun, 3)
    if context.as_json:
        context.print_document({"for": name or what, "ok": not missing, "waited_s": waited, "missing": missing})
    elif missing:
        click.echo(f"not {'served' if name else 'ready'} after {timeout}: {clean(missing)}", err=True)
    else:
        print_lines([f"{clean(name) if name else 'ngrokd'} is {'served' if name else 'ready'}"])
    return Exit.NO if missing else Exit.OK


def _missing(context: Context, name: str | None) -> str:
    """What is still missing, "" when nothing is. Raises NotRunningError, and what waiting does not mend."""
    try:
        if name is not None:
            served = rows_of(context.ask("list").data)
            return "" if any(_is_meant(row, name) for row in served) else f"no endpoint {name} is served"
        data = table_of(context.ask("health").data)
    except NotRunningError:
        raise
    except NgrokdError as error:
        if (error.code if isinstance(error, RemoteError) else error.exit_code) == Exit.TEMPORARY:
            return str(error)
        raise
    conditions = table_of(data.get("conditions"))
    unmet = [f"{word}: {table_of(each).get('message', '')}" for word, each in conditions.items() if not _holds(each)]
    return "" if data.get("ready") is True else "; ".join(unmet) or "not ready"


def _holds(condition: object) -> bool:
    return table_of(condition).get("ok") is True


def _is_meant(row: dict[str, object], name: str) -> bool:
    host, port = str(row.get("hostname", "")), row.get("port")
    return name.lower() in (host, f"{host}:{port}", str(row.get("url", "")), str(row.get("id", "")))
