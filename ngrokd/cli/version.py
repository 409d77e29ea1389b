"""`ngrokd version` and `ngrokd help`."""

from __future__ import annotations

import platform
import sys

import click

from ngrokd import __version__, core_is_compiled
from ngrokd.cli.context import Context, command
from ngrokd.cli.output import fields, print_lines, terminal_width


@command("version")
def version(context: Context) -> None:
    """Print the versions of ngrokd and of what it stands on."""
    import ssl

    versions = {
        "version": __version__,
        "python": platform.python_version(),
        "openssl": ssl.OPENSSL_VERSION,
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "compiled": core_is_compiled(),
    }
    if context.as_json:
        context.print_document(versions)
        return
    pairs = [
        ("Python", f"{versions['python']} ({sys.executable})"),
        ("OpenSSL", str(versions["openssl"]).removeprefix("OpenSSL ")),
        ("Platform", str(versions["platform"])),
        ("TCP core", "compiled" if versions["compiled"] else "pure Python"),
    ]
    print_lines([f"ngrokd version {__version__}", *fields(pairs, terminal_width())])


@command("help")
@click.argument("names", metavar="[COMMAND]...", nargs=-1)
def show_help(_context: Context, names: tuple[str, ...]) -> None:
    """Print help, on a command where one is named, as in "help config set"."""
    ctx = click.get_current_context().find_root()
    command: click.Command = ctx.command
    for name in names:
        if not isinstance(command, click.Group):
            raise click.UsageError(f"{command.name} has no commands of its own")
        _, found, _ = command.resolve_command(ctx, [name])
        assert found is not None
        command, ctx = found, click.Context(found, info_name=name, parent=ctx)
    print_lines([command.get_help(ctx)])
