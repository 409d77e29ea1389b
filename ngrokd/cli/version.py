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


def _command_names(ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """What the tab key offers: the commands of the last group that is named already."""
    root = ctx.find_root()
    inner: click.Command | None = root.command
    for name in ctx.params.get("names") or ():
        inner = inner.get_command(root, name) if isinstance(inner, click.Group) else None
    if not isinstance(inner, click.Group):
        return []
    return [name for name in inner.list_commands(root) if name.startswith(incomplete)]


@command("help")
@click.argument("names", metavar="[COMMAND]...", nargs=-1, shell_complete=_command_names)
def show_help(context: Context, names: tuple[str, ...]) -> None:
    """Print help, on a command where one is named, as in "help config set"."""
    ctx = click.get_current_context().find_root()
    command: click.Command = ctx.command
    for name in names:
        if not isinstance(command, click.Group):
            raise click.UsageError(f"{command.name} has no commands of its own")
        _, found, _ = command.resolve_command(ctx, [name])
        assert found is not None
        command, ctx = found, click.Context(found, info_name=name, parent=ctx)
    text = command.get_help(ctx)
    if context.as_json:
        context.print_document({"command": ctx.command_path, "text": text})
    else:
        print_lines([text])
