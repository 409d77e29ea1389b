"""What every command shares: the options that stand before or after it, and the two ways to speak.

A command is written with `command()` instead of `click.command()`; it takes the `Context` as its first argument.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from ngrokd import ask as client
from ngrokd.cli.output import print_lines

if TYPE_CHECKING:
    from ngrokd.config import Given, Settings
    from ngrokd.errors import Mistake

DEFAULT_CONFIG: Final = "/etc/ngrokd/config.toml"  # as in ngrokd.config, which costs more than most commands do
SERVICE_SOCKET: Final = "/run/ngrokd/ngrokd.sock"  # of the daemon that systemd runs; see host/units.py

AnyCallable = TypeVar("AnyCallable", bound=Callable[..., Any])


@dataclass(slots=True)
class Context:
    """The options that hold for all commands, and how they are answered.

    Attributes:
        program: "ngrokd" or "ngrokctl".
        config: the file of --config, "" where it was not given.
        socket: the path of --socket, "" where it was not given.
        as_json: stdout holds one JSON document and nothing else.
        verbosity: how often -v was given; from 2 on errors come with a traceback.
        command: the command being carried out, for the name of the JSON schema.
        environ: the environment.
        settings: what other options of a command say that stands in the configuration too.
    """

    program: str = "ngrokd"
    config: str = ""
    socket: str = ""
    as_json: bool = False
    verbosity: int = 0
    command: str = "ngrokd"
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    settings: list[Given] = field(default_factory=list)

    def load_settings(self) -> Settings:
        """The configuration, with the options of the command line put in. Raises ConfigError."""
        from ngrokd import config

        return config.load(self.config or None, self.environ, self.given())

    def given(self) -> list[Given]:
        """What the options of the command line say that stands in the configuration too."""
        from ngrokd.config import Given

        socket = [Given("control.socket", os.path.abspath(self.socket), "--socket")] if self.socket else []
        return [*self.settings, *socket]

    def load_daemons_settings(self) -> Settings:
        """The configuration with the control socket of the daemon that runs, if one does. Raises ConfigError."""
        from ngrokd import config

        environ = {**self.environ, "NGROKD_SOCKET": self.socket_path()}
        return config.load(self.config or None, environ, self.given())

    def socket_path(self) -> str:
        """The control socket: --socket, $NGROKD_SOCKET, the configuration's, the default one.

        The default configuration belongs to root, and who may ask the daemon may not always read it: then the default
        socket it is. A file that was asked for must be readable. Where none was, and nobody listens there, it is the
        socket of the service. Raises ConfigError.
        """
        if self.socket:
            return os.path.abspath(self.socket)
        if self.environ.get("NGROKD_SOCKET"):
            return self.environ["NGROKD_SOCKET"]
        if self.config or self.environ.get("NGROKD_CONFIG"):
            return self.load_settings().control.socket
        path = self._default_socket()
        return SERVICE_SOCKET if os.path.exists(SERVICE_SOCKET) and not client.listens(path) else path

    def _default_socket(self) -> str:
        try:
            os.close(os.open(DEFAULT_CONFIG, os.O_RDONLY | os.O_NONBLOCK))
        except OSError:
            if not os.access(os.path.join(os.path.dirname(DEFAULT_CONFIG), "conf.d"), os.R_OK | os.X_OK):
                return client.DEFAULT_SOCKET
        return self.load_settings().control.socket

    def ask(self, command: str, *arguments: str, timeout_s: float = client.TIMEOUT_S) -> client.Answer:
        """Give the daemon a command. Raises as `ngrokd.ask.ask`."""
        return client.ask(self.socket_path(), command, arguments, timeout_s=timeout_s)

    def print_document(self, data: object) -> None:
        """The one JSON document of a command that worked."""
        self._print_json({"schema": f"ngrokd.{self.command}/1", "data": data})

    def print_failure(self, code: int, message: str, remedy: str = "", mistakes: Sequence[Mistake] = ()) -> None:
        """The one JSON document of a command that did not."""
        error: dict[str, object] = {"code": int(code), "message": message}
        if remedy:
            error["hint"] = remedy
        if mistakes:
            error["mistakes"] = [
                {"file": each.file, "line": each.line, "key": each.key, "message": each.text} for each in mistakes
            ]
        self._print_json({"schema": f"ngrokd.{self.command}/1", "error": error})

    @staticmethod
    def _print_json(document: Mapping[str, object]) -> None:
        # ASCII only: escapes keep whatever is in the data away from the terminal.
        indent = 2 if sys.stdout.isatty() else None
        print_lines([json.dumps(document, indent=indent)])


def _keep(ctx: click.Context, parameter: click.Parameter, value: object) -> None:
    """Put an option into the Context, wherever on the line it stood; one that was not given changes nothing."""
    context = ctx.find_object(Context)
    if not value or context is None:  # none: a page of help is made
        return
    assert parameter.name is not None
    if parameter.name == "verbosity":
        assert isinstance(value, int)
        value += context.verbosity
    setattr(context, parameter.name, value)


_FILE: Final = click.Path()  # for the tab key: any path will do here
_OPTIONS: Final = (
    click.option(
        "-c",
        "--config",
        metavar="FILE",
        type=_FILE,
        expose_value=False,
        callback=_keep,
        help="Read this configuration file.",
    ),
    click.option(
        "--socket",
        metavar="PATH",
        type=_FILE,
        expose_value=False,
        callback=_keep,
        help="Ask the daemon at this control socket.",
    ),
    click.option(
        "--json", "as_json", is_flag=True, expose_value=False, callback=_keep, help="Print one JSON document."
    ),
    click.option(
        "-v",
        "--verbose",
        "verbosity",
        count=True,
        expose_value=False,
        callback=_keep,
        help="Say more; -vv: tracebacks.",
    ),
)


def common_options(function: AnyCallable) -> AnyCallable:
    """Let a command take the options that all take."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def _keep_setting(ctx: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> None:
    """Put each KEY=VALUE into the Context."""
    if not values or ctx.resilient_parsing:
        return
    from ngrokd.config import Given

    context = ctx.find_object(Context)
    assert context is not None, "invoke() made one"
    for value in values:
        key, separator, text = value.partition("=")
        if not separator:
            raise click.BadParameter(f"{value!r} is not KEY=VALUE", ctx)
        context.settings.append(Given(key.strip(), text.strip(), f"--set {key.strip()}"))


def setting_option(function: AnyCallable) -> AnyCallable:
    """Let a command take `--set KEY=VALUE`, which goes before files and environment."""
    help_text = 'Let this hold instead of what the configuration says, say "net.drain=10s". May be repeated.'
    option = click.option(
        "--set", "set_", metavar="KEY=VALUE", multiple=True, expose_value=False, callback=_keep_setting, help=help_text
    )
    return option(function)


def command(name: str, *, epilog: str | None = None) -> Callable[[Callable[..., int | None]], click.Command]:
    """A command with the common options; its function gets the Context first and returns an exit code, None for 0.

    A command of a group has both names, as in "config show".
    """

    def make(function: Callable[..., int | None]) -> click.Command:
        @functools.wraps(function)
        def call(*args: object, **kwargs: object) -> int | None:
            context = click.get_current_context().find_object(Context)
            assert context is not None, "invoke() made one"
            context.command = name.replace(" ", ".")
            return function(context, *args, **kwargs)

        settings = {"help_option_names": ["-h", "--help"]}
        return click.command(name.rpartition(" ")[2], epilog=epilog, context_settings=settings)(common_options(call))

    return make
