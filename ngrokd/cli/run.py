"""`ngrokd run`."""

from __future__ import annotations

import os

import click
import msgspec

from ngrokd.cli.context import Context, command


@command("run")
@click.option(
    "--log-level", metavar="LEVEL", type=click.Choice(["debug", "info", "warning", "error"]), help="Log this."
)
@click.option("--log-format", metavar="FORMAT", type=click.Choice(["auto", "text", "json"]), help="Log in this form.")
def run(context: Context, log_level: str | None = None, log_format: str | None = None) -> int:
    """Run the daemon in the foreground, until SIGTERM, SIGINT or ^C.

    One line starting with "[ready]" is printed on stdout once the endpoints can be reached by name; the log goes to
    stderr. SIGHUP reads the configuration again. With -v the log says more.
    """
    settings = context.load_settings()
    level = log_level or ("debug" if context.verbosity else settings.log.level)
    log = msgspec.structs.replace(settings.log, level=level, format=log_format or settings.log.format)
    from ngrokd.daemon import run_daemon

    return run_daemon(
        msgspec.structs.replace(settings, log=log),
        config_path=os.path.abspath(context.config) if context.config else None,
        environ=context.environ,
    )
