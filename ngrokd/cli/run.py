"""`ngrokd run`."""

from __future__ import annotations

import os

import click

from ngrokd.cli.context import Context, command, setting_option
from ngrokd.config import Given, load


@command("run")
@click.option(
    "--log-level", metavar="LEVEL", type=click.Choice(["debug", "info", "warning", "error"]), help="Log this."
)
@click.option("--log-format", metavar="FORMAT", type=click.Choice(["auto", "text", "json"]), help="Log in this form.")
@setting_option
def run(context: Context, log_level: str | None = None, log_format: str | None = None) -> int:
    """Run the daemon in the foreground, until SIGTERM, SIGINT or ^C.

    One line starting with "[ready]" is printed on stdout once the endpoints can be reached by name; the log goes to
    stderr. The configuration is read again when it changes and on SIGHUP; what options say goes before it for good.
    With -v the log says more.
    """
    options = [
        Given("log.level", log_level or ("debug" if context.verbosity else ""), "--log-level" if log_level else "-v"),
        Given("log.format", log_format or "", "--log-format"),
    ]
    given = [*context.given(), *(option for option in options if option.text)]
    path = os.path.abspath(context.config) if context.config else None
    settings = load(path, context.environ, given)
    from ngrokd.daemon import run_daemon

    return run_daemon(settings, config_path=path, environ=context.environ, given=given)
