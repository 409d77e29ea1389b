"""What the tab key offers for arguments that only the running daemon knows.

It is asked quickly, and says nothing when it cannot be: a completion has no place for an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import click

from ngrokd.cli.context import Context
from ngrokd.errors import NgrokdError

WAIT_S: Final = 0.5
MOST: Final = 500  # a shell that is offered more asks whether to show them


def endpoint_names(ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """The host names of the endpoints that begin so. Without ports, since shells break words at a colon."""
    names = {str(row.get("hostname", "")) for row in _rows(ctx, "list")}
    return sorted(name for name in names if name and name.isprintable() and name.startswith(incomplete.lower()))[:MOST]


def flow_ids(ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """The numbers of the connections."""
    numbers = sorted(number for row in _rows(ctx, "flows") if isinstance(number := row.get("id"), int))
    return [str(number) for number in numbers if str(number).startswith(incomplete)][:MOST]


def _rows(ctx: click.Context, question: str) -> Iterator[dict[str, object]]:
    context = ctx.find_object(Context) or Context()
    try:
        data = context.ask(question, timeout_s=WAIT_S).data
    except NgrokdError:
        return
    rows = data.get("flows") if isinstance(data, dict) else data
    yield from (row for row in rows if isinstance(row, dict)) if isinstance(rows, list) else ()
