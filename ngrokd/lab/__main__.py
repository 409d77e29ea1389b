"""`python -m ngrokd.lab`: the lab by itself, in the foreground, for daemons that run elsewhere.

The first line on stdout is one JSON object with everything a daemon needs. Then every line on stdin is a command (see
`ngrokd.lab.commands`), answered by one JSON line. The end of stdin, SIGINT or SIGTERM end the lab.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import sys
import tempfile
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from pathlib import Path

import trio

from ngrokd.lab.commands import Commands
from ngrokd.lab.control_plane import DEFAULT_KEY
from ngrokd.lab.world import open_lab


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the lab until it is told to stop."""
    parser = argparse.ArgumentParser(prog="python -m ngrokd.lab", description="ngrok in miniature, for tests")
    parser.add_argument("--host", default="127.0.0.1", help="numeric address to listen on (default: %(default)s)")
    parser.add_argument(
        "--directory", type=Path, help="write config.toml and lab-ca.pem here (default: a temporary one)"
    )
    parser.add_argument("--demo", action="store_true", help="bind the demo's endpoints")
    parser.add_argument("--endpoint", action="append", default=[], metavar="URL=BACKEND", help="bind this endpoint")
    parser.add_argument("--do", action="append", default=[], metavar="COMMAND", help="execute this command first")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=JSON", help="put this into config.toml"
    )
    parser.add_argument("--trust", choices=("ca_file", "fingerprint", "nothing"), default="ca_file")
    chosen = parser.parse_args(arguments)
    settings: dict[str, dict[str, object]] = {}
    for assignment in chosen.set:
        name, _, value = assignment.partition("=")
        section, _, key = name.partition(".")
        settings.setdefault(section, {})[key] = json.loads(value)
    # Twenty thousand idle flows are as many sockets here.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory(prefix="ngrokd-lab-") as directory:
        if problem := trio.run(_run, chosen, settings, chosen.directory or Path(directory)):
            parser.error(problem)


async def _run(chosen: argparse.Namespace, settings: dict[str, dict[str, object]], directory: Path) -> str:
    """Run the lab; returns what is wrong with the command line, "" in the end when nothing was."""
    async with open_lab(host=chosen.host) as lab:
        commands = Commands(lab)
        if chosen.demo:
            lab.add_demo_endpoints()
        for first in [*(f"add {spec.replace('=', ' ', 1)}" for spec in chosen.endpoint), *chosen.do]:
            answer = commands.execute(first)
            if not answer["ok"]:
                return f"{first}: {answer['error']}"
        config = lab.write_config(directory, trust=chosen.trust, settings=settings)
        _say(
            {
                "api_url": lab.api_url,
                "api_key": DEFAULT_KEY,
                "ingress_address": lab.ingress_address,
                "ca_file": str(directory / "lab-ca.pem"),
                "ca_fingerprint": lab.servers.intermediate_fingerprint,
                "config": str(config),
                "pid": os.getpid(),
            }
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_on_signal, nursery.cancel_scope)
            async with aclosing(_lines()) as lines:
                async for line in lines:
                    if line.strip() == "quit":
                        break
                    _say(commands.execute(line))
            nursery.cancel_scope.cancel()
    return ""


async def _cancel_on_signal(scope: trio.CancelScope) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for _ in signals:
            scope.cancel()


async def _lines() -> AsyncGenerator[str, None]:
    """The lines of stdin, read in a thread because it may be a file or a terminal."""
    pending = b""
    # os.read and not sys.stdin: a thread that is left waiting holds no lock that the interpreter wants at its end.
    while data := await trio.to_thread.run_sync(os.read, 0, 65536, abandon_on_cancel=True):
        *lines, pending = (pending + data).split(b"\n")
        for line in lines:
            yield line.decode(errors="replace")
    if pending:
        yield pending.decode(errors="replace")


def _say(answer: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
