"""`ngrokd refresh`, `ngrokd refresh-cert` and `ngrokd reload`: do now what would be done anyway."""

from __future__ import annotations

import click

from ngrokd.ask import Answer
from ngrokd.cli.context import Context, command
from ngrokd.cli.output import clean, print_lines

WORK_S = 60.0  # the daemon asks ngrok before it answers


@command("refresh")
def refresh(context: Context) -> None:
    """Ask ngrok for the endpoints now instead of at the next poll."""
    _report(context, context.ask("refresh", timeout_s=WORK_S), "asked ngrok for the endpoints")


@command("refresh-cert")
@click.option("--force", is_flag=True, help="Renew it even if it is not due.")
def refresh_cert(context: Context, force: bool) -> None:
    """Renew the client certificate if it is due. Connections that are open stay as they are."""
    arguments = ("--force",) if force else ()
    _report(context, context.ask("refresh-cert", *arguments, timeout_s=WORK_S), "asked for a renewal")


@command("reload")
def reload(context: Context) -> None:
    """Have the daemon read its configuration now, and say what that changes. A wrong one changes nothing: exit 78."""
    data = context.ask("reload", timeout_s=WORK_S).data
    if context.as_json:
        context.print_document(data)
        return
    found = data if isinstance(data, dict) else {}
    lines = []
    for field, said in (
        ("live", "changed"),
        ("new_flows", "changed, for new connections"),
        ("needs_restart", "from the next start"),
    ):
        keys = found.get(field)
        if isinstance(keys, list) and keys:
            lines.append(f"{said}: {', '.join(map(clean, keys))}")
    print_lines(lines or ["nothing has changed"])


def _report(context: Context, answer: Answer, otherwise: str) -> None:
    if context.as_json:
        context.print_document(answer.data)
    else:
        print_lines([clean(answer.data if isinstance(answer.data, str) else otherwise)])
