"""`ngrokd pause` and `ngrokd resume`: no new connections for a while, and all names as they are."""

from __future__ import annotations

from ngrokd.cli.context import Context, command
from ngrokd.cli.output import clean, print_lines


@command("pause")
def pause(context: Context) -> None:
    """Refuse new connections; those that live go on, and names stay. A restart ends it, and so does "resume"."""
    _tell(context, "pause")


@command("resume")
def resume(context: Context) -> None:
    """Take new connections again."""
    _tell(context, "resume")


def _tell(context: Context, order: str) -> None:
    data = context.ask(order).data
    if context.as_json:
        context.print_document(data)
    else:
        print_lines([clean(data)])
