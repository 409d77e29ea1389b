"""`ngrokd version` and `ngrokd help`."""

from __future__ import annotations

import platform
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec

import click

from ngrokd import __version__
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
        "compiled": _is_compiled(),
    }
    if context.as_json:
        context.print_document(versions)
        return
    pairs = [
        ("Python", f"{versions['python']} ({sys.executable})"),
        ("OpenSSL", str(versions["openssl"]).removeprefix("OpenSSL ")),
        ("Platform", str(versions["platform"])),
        ("Packet path", "compiled" if versions["compiled"] else "pure Python"),
    ]
    print_lines([f"ngrokd version {__version__}", *fields(pairs, terminal_width())])


def _is_compiled() -> bool:
    """Whether the packet path is an extension module; looked up, not imported."""
    spec = find_spec("tun.seq")
    return spec is not None and (spec.origin or "").endswith(tuple(EXTENSION_SUFFIXES))


@command("help")
@click.argument("name", metavar="[COMMAND]", required=False)
def show_help(_context: Context, name: str | None) -> None:
    """Print help, on a command where one is named."""
    root = click.get_current_context().find_root()
    if name is None:
        print_lines([root.get_help()])
        return
    assert isinstance(root.command, click.Group)
    _, found, _ = root.command.resolve_command(root, [name])
    assert found is not None
    print_lines([found.get_help(click.Context(found, info_name=name, parent=root))])
