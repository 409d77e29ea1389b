"""`ngrokd run`."""

from __future__ import annotations

import os

import click

from ngrokd.cli.context import Context, command
from ngrokd.config import load


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
    # As variables they hold for every later reading of the file as well.
    options = {
        "NGROKD_SOCKET": os.path.abspath(context.socket) if context.socket else None,
        "NGROKD_LOG_LEVEL": log_level or ("debug" if context.verbosity else None),
        "NGROKD_LOG_FORMAT": log_format,
    }
    environ = {**context.environ, **{name: value for name, value in options.items() if value}}
    path = os.path.abspath(context.config) if context.config else None
    settings = load(path, environ)
    from ngrokd.daemon import run_daemon

    return run_daemon(settings, config_path=path, environ=environ)
