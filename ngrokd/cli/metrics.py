"""`ngrokd metrics` and `ngrokd metrics write`: the page for Prometheus, for those who do not ask over HTTP."""

from __future__ import annotations

import sys
from typing import Final

import click

from ngrokd.cli.columns import table_of
from ngrokd.cli.context import Context, command, common_options
from ngrokd.errors import Exit, NotRunningError

DOWN: Final = "# HELP ngrokd_up 1 while the daemon answers.\n# TYPE ngrokd_up gauge\nngrokd_up 0\n"


@click.group("metrics", invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@common_options
@click.pass_context
def metrics(ctx: click.Context) -> None:
    """Print the metrics as Prometheus reads them; http.listen serves the same page at /metrics."""
    context = ctx.find_object(Context)
    assert context is not None, "invoke() made one"
    if ctx.invoked_subcommand is not None:
        return
    context.command = "metrics"
    page = _page(context)
    if context.as_json:
        context.print_document({"page": page})
    else:
        sys.stdout.write(page)
        sys.stdout.flush()


@command("metrics write")
@click.argument("file", metavar="FILE", type=click.Path(dir_okay=False))
def _write(context: Context, file: str) -> int:
    """Write the metrics into a file that node_exporter's textfile collector reads (its name ends in .prom).

    The file is replaced as a whole. When the daemon is not running it says "ngrokd_up 0", and the exit code is 3.
    """
    from ngrokd.files import atomic_write

    try:
        page, code = _page(context), Exit.OK
    except NotRunningError:
        page, code = DOWN, Exit.NOT_RUNNING
    atomic_write(file, page.encode(), 0o644)
    if context.as_json:
        context.print_document({"file": file, "up": code is Exit.OK})
    elif code:
        click.echo("ngrokd is not running, and the file says so", err=True)
    return code


def _page(context: Context) -> str:
    return str(table_of(context.ask("metrics").data).get("page", ""))


metrics.add_command(_write)
