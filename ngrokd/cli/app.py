"""The group of all commands, loaded on use, and the boundary where every error becomes a line and an exit code."""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import click

from ngrokd import __version__
from ngrokd.ask import RemoteError
from ngrokd.cli.context import Context, common_options
from ngrokd.cli.output import print_error, wants_colour
from ngrokd.errors import ConfigError, Exit, NgrokdError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

# name -> (module, attribute, what it does in one line). The lines stand here so that --help imports nothing.
COMMANDS: Final = {
    "run": ("ngrokd.cli.run", "run", "Run the daemon in the foreground."),
    "demo": ("ngrokd.cli.demo", "demo", "Try everything with a made-up ngrok on this machine."),
    "status": ("ngrokd.cli.status", "status", "Show how the daemon is."),
    "list": ("ngrokd.cli.status", "list_endpoints", "List the endpoints and their addresses here (ls)."),
    "health": ("ngrokd.cli.status", "health", "Check whether the daemon is well, or ready; exit 0 or 1."),
    "wait": ("ngrokd.cli.waiting", "wait", "Wait until the daemon is ready, or an endpoint is served."),
    "flows": ("ngrokd.cli.flows", "flows", "List connections: program, endpoint, bytes, rate; close one."),
    "top": ("ngrokd.cli.top", "top", "Watch the connections that carry most."),
    "ping": ("ngrokd.cli.ping", "ping", "Go the way to an endpoint, and time each part of it."),
    "events": ("ngrokd.cli.events", "events", "Follow what happens."),
    "logs": ("ngrokd.cli.events", "logs", "Print the daemon's log."),
    "log-level": ("ngrokd.cli.events", "log_level", "Show or change what is logged, for a while."),
    "capture": ("ngrokd.cli.capture", "capture", "Record packets for Wireshark."),
    "metrics": ("ngrokd.cli.metrics", "metrics", "Print the metrics, or write them into a file."),
    "set-api-key": ("ngrokd.cli.key", "set_api_key", "Give the daemon an API key, and store it."),
    "refresh": ("ngrokd.cli.refresh", "refresh", "Ask ngrok for the endpoints now."),
    "refresh-cert": ("ngrokd.cli.refresh", "refresh_cert", "Renew the client certificate if it is due."),
    "plan": ("ngrokd.cli.plan", "plan", "Show what a run changes here, and who is in its way."),
    "cleanup": ("ngrokd.cli.plan", "cleanup", "Remove what a killed daemon left."),
    "doctor": ("ngrokd.cli.doctor", "doctor", "Say what is wrong, and what to do about it."),
    "config": ("ngrokd.cli.config", "config", "Show, change and check the configuration."),
    "pause": ("ngrokd.cli.pause", "pause", "Refuse new connections; names stay."),
    "resume": ("ngrokd.cli.pause", "resume", "Take new connections again."),
    "reload": ("ngrokd.cli.refresh", "reload", "Have the daemon read its configuration now."),
    "service": ("ngrokd.cli.service", "service", "Let the machine start the daemon (systemd)."),
    "migrate": ("ngrokd.cli.migrate", "migrate", "Take the place of the Go ngrokd, or give it back."),
    "completion": ("ngrokd.cli.completion", "completion", "Complete commands and names with the tab key."),
    "version": ("ngrokd.cli.version", "version", "Print versions."),
    "help": ("ngrokd.cli.version", "show_help", "Print help, on a command where one is named."),
}
ALIASES: Final = {"ls": "list"}
GROUPS: Final = ("config", "flows", "metrics", "service")  # commands that have commands
INTERRUPTED: Final = 130  # 128 + SIGINT, as a shell says it
READER_GONE: Final = 141  # 128 + SIGPIPE, likewise

# The Go daemon's flags have one dash or two; as click reads it, "-config=F" would be "-c onfig=F".
_GO_FLAG: Final = re.compile(r"-(config|version|help|socket|json)(=.*)?", re.DOTALL)


class LazyGroup(click.Group):
    """Commands that are imported when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click calls it so
        """The names, in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - likewise
        """Import one command."""
        name = ALIASES.get(cmd_name, cmd_name)
        if name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[name]
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; an unknown one is a usage error that names the nearest."""
        command = self.get_command(ctx, args[0])
        if command is None and not args[0].startswith("-") and not ctx.resilient_parsing:
            from difflib import get_close_matches

            near = get_close_matches(args[0], [*self.list_commands(ctx), *ALIASES], n=1)
            raise click.UsageError(
                f"there is no command {args[0]!r}" + (f" (did you mean {near[0]!r}?)" if near else ""), ctx
            )
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem[str]]:
        """What the tab key offers, from the table, importing no command."""
        from click.shell_completion import CompletionItem

        found = [CompletionItem(name, help=line) for name, (_, _, line) in COMMANDS.items()]
        options = click.Command.shell_complete(self, ctx, incomplete)
        return [*(item for item in found if item.value.startswith(incomplete)), *options]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands from the table, importing none."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][2]) for name in self.list_commands(ctx)])


def _print_version(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        click.echo(f"ngrokd version {__version__}")
        ctx.exit()


@click.group(
    cls=LazyGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Options may stand before or after the command. Exit codes: 0 ok, 1 a check said no, 2 usage, "
    "3 not running, 69 unreachable, 70 internal, 73 taken, 74 output lost, 75 try again, 77 not permitted, "
    "78 configuration.",
)
@common_options
@click.option(
    "-V",
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Print the version.",
)
@click.pass_context
def group(ctx: click.Context) -> int | None:
    """Reach ngrok's kubernetes-bound endpoints by name from any program on this machine.

    Start the daemon with "sudo ngrokd run", give it a key with "sudo ngrokd set-api-key", and look with
    "ngrokd status" and "ngrokd list". Without a command, ngrokd runs the daemon.
    """
    if ctx.invoked_subcommand is not None:
        return None
    context = ctx.find_object(Context)
    assert context is not None, "invoke() made one"
    if context.program == "ngrokctl":
        click.echo(ctx.get_help())
        return None
    run = group.get_command(ctx, "run")
    assert run is not None
    result = ctx.invoke(run)
    assert result is None or isinstance(result, int)
    return result


def _output_lost(error: OSError) -> str:
    """Why nothing could be written to stdout, "" where it is another error."""
    said = error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
    return f"cannot write the output: {error.strerror}" if said else ""


def _forget_output() -> None:
    """Lead stdout to nowhere: what is left in its buffer is written once more at the end, and would fail again."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def normalise(arguments: Sequence[str]) -> list[str]:
    """The Go daemon's single-dash flags with two dashes; what follows "--" is left alone."""
    end = list(arguments).index("--") if "--" in arguments else len(arguments)
    return [
        f"-{argument}" if index < end and _GO_FLAG.fullmatch(argument) else argument
        for index, argument in enumerate(arguments)
    ]


def invoke(program: str, arguments: Sequence[str]) -> int:
    """Carry out one command line and return its exit code.

    Raises nothing but click's SystemExit, when a shell asks for completions.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal without UTF-8 gets an escape, not an error
    # Until the options are parsed, an error must know already how to be said.
    context = Context(program=program, as_json="--json" in arguments, command=_named(arguments))
    stdout = sys.stdout
    try:
        result: object = group.main(
            normalise(arguments), prog_name=program, standalone_mode=False, obj=context, color=wants_colour(sys.stdout)
        )
    except SystemExit:
        # click's way to end when the reader of a pipe has gone; the only mark of it is another stdout, for what is
        # left to be flushed. Its 1 would say that a check answered no.
        if sys.stdout is not stdout:
            return READER_GONE
        raise
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return Exit.USAGE
    except click.ClickException as error:
        hint = f"see: {_command_path(error, program)} --help"
        return _fail(context, error, Exit.USAGE, error.format_message(), hint)
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except NgrokdError as error:
        code = error.code if isinstance(error, RemoteError) else error.exit_code
        return _fail(context, error, code, str(error), error.remedy)
    except OSError as error:
        if message := _output_lost(error):
            _forget_output()
            return _fail(replace(context, as_json=False), error, Exit.OUTPUT, message, "")
        return _bug(context, error)
    except Exception as error:  # noqa: BLE001 - the outermost boundary: a bug is said in one line too
        return _bug(context, error)
    return result if isinstance(result, int) else 0


def _bug(context: Context, error: Exception) -> int:
    message = f"internal error: {type(error).__name__}: {error}"
    return _fail(context, error, Exit.INTERNAL, message, "this is a bug; -vv shows where it happened")


def _named(arguments: Sequence[str]) -> str:
    words = [ALIASES.get(word, word) for word in arguments if not word.startswith("-")]
    for number, word in enumerate(words):
        if word in COMMANDS:
            return ".".join([word, *words[number + 1 : number + 2]]) if word in GROUPS else word
    return "ngrokd"


def _command_path(error: click.ClickException, program: str) -> str:
    ctx: Any = getattr(error, "ctx", None)  # only some of click's errors have one
    return str(ctx.command_path) if ctx is not None else program


def _fail(context: Context, error: BaseException, code: int, message: str, remedy: str) -> int:
    if f"_{context.program.upper()}_COMPLETE" in context.environ:
        return code  # the tab key was pressed, and there is no place to say it
    if context.verbosity >= 2:
        import traceback

        traceback.print_exception(error)
    if context.as_json:
        mistakes = error.mistakes if isinstance(error, ConfigError) else ()
        context.print_failure(code, message, remedy, mistakes)
    else:
        print_error(message, remedy)
    return code
