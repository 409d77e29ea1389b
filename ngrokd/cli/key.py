"""`ngrokd set-api-key`: a secret travels from a person to the daemon, touching as little as possible on its way."""

from __future__ import annotations

import sys

import click

from ngrokd.cli.context import Context, command
from ngrokd.cli.output import clean, print_lines, warn

CHECK_S = 120.0  # the daemon registers with ngrok before it answers
MAX_STDIN_CHARS = 64 << 10


@command("set-api-key", epilog="Make a key at https://dashboard.ngrok.com/api-keys.")
@click.argument("key", required=False)
@click.option("--stdin", "from_stdin", is_flag=True, help="Read the key from standard input.")
@click.option("--file", "path", metavar="FILE", type=click.Path(), help="Read the key from a file.")
def set_api_key(context: Context, key: str | None, from_stdin: bool, path: str | None) -> None:
    """Give the daemon an API key. It is checked with ngrok, used at once and stored for the next start.

    Without an argument the key is asked for and not shown. As an argument it is visible to other users and in the
    history of the shell.
    """
    if sum((key is not None, from_stdin, path is not None)) > 1:
        raise click.UsageError("give the key in one way: as an argument, with --stdin or with --file")
    text = _read_key(key, from_stdin, path)
    from ngrokd.config import key_problem

    problem = key_problem(text)
    if problem:
        raise click.UsageError(f"the key {problem}")
    if sys.stderr.isatty() and not context.as_json:
        print("checking the key with ngrok ...", file=sys.stderr)
    answer = context.ask("set-api-key", text.strip(), timeout_s=CHECK_S)
    if context.as_json:
        context.print_document(answer.data)
    else:
        print_lines([clean(answer.data if isinstance(answer.data, str) else "API key set successfully")])


def _read_key(key: str | None, from_stdin: bool, path: str | None) -> str:
    if key is not None:
        warn("an argument is visible to other users (ps) and in the shell's history; better: set-api-key --stdin")
        return key
    if path is not None:
        from ngrokd.config import read_key_file

        try:
            return read_key_file(path)[0]
        except FileNotFoundError:
            raise click.UsageError(f"there is no file {path}") from None
    if from_stdin or not sys.stdin.isatty():
        return sys.stdin.read(MAX_STDIN_CHARS)
    entered: str = click.prompt("API key", hide_input=True, err=True)
    return entered
