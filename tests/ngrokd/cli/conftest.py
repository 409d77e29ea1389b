"""A daemon's control socket with canned answers, and a command line to ask it with."""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio

from ngrokd.cli.app import invoke
from ngrokd.errors import NgrokdError
from ngrokd.ops.control import Command, ControlServer, ControlSocket, Start, Streaming
from ngrokd.ops.peers import Peer


@dataclass
class Lines:
    """An answer that goes on: what the first line says, the further lines, and an error at the end."""

    lines: list[object]
    data: object = None
    error: NgrokdError | None = None


@dataclass
class FakeDaemon:
    """Answers each command with what is in `answers`: data, Lines, or an error to raise. It notes what it was asked."""

    socket: str
    answers: dict[str, object] = field(default_factory=dict)
    asked: list[tuple[str, list[str]]] = field(default_factory=list)

    def commands(self) -> dict[str, Command | Streaming]:
        """Every name that is answered when the client comes."""

        def make(name: str) -> Command | Streaming:
            async def stream(arguments: list[str], _peer: Peer, start: Start) -> None:
                self.asked.append((name, arguments))
                answer = self.answers[name]
                assert isinstance(answer, Lines)
                send = await start(answer.data)
                for line in answer.lines:
                    await send(json.dumps(line).encode() + b"\n")
                if answer.error is not None:
                    raise answer.error

            if isinstance(self.answers[name], Lines):
                return Streaming(stream)

            async def handler(arguments: list[str], _peer: Peer) -> object:
                self.asked.append((name, arguments))
                answer = self.answers[name]
                if isinstance(answer, NgrokdError):
                    raise answer
                return answer

            return Command(handler)

        return {name: make(name) for name in self.answers}


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ng") as path:
        yield Path(path)


@pytest.fixture
def daemon(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., FakeDaemon]]:
    """Start the control server of the real daemon in a thread: `daemon(status={...})`; $NGROKD_SOCKET leads to it."""
    stop: list[Callable[[], object]] = []

    def start(**answers: object) -> FakeDaemon:
        fake = FakeDaemon(str(folder / "s"), {name.replace("_", "-"): data for name, data in answers.items()})
        listening = threading.Event()
        tokens: list[trio.lowlevel.TrioToken] = []
        scope = trio.CancelScope()

        async def main() -> None:
            with ControlSocket(fake.socket) as socket, scope:
                tokens.append(trio.lowlevel.current_trio_token())
                async with trio.open_nursery() as nursery:
                    await nursery.start(ControlServer(fake.commands(), strict=True).serve, socket)
                    listening.set()

        thread = threading.Thread(target=trio.run, args=(main,))
        thread.start()
        assert listening.wait(10)

        def end() -> None:
            tokens[0].run_sync_soon(scope.cancel)
            thread.join(10)

        stop.append(end)
        monkeypatch.setenv("NGROKD_SOCKET", fake.socket)
        return fake

    yield start
    for end in stop:
        end()


@dataclass(frozen=True)
class Outcome:
    """What one command line did."""

    code: int
    out: str
    err: str

    def document(self) -> dict[str, Any]:
        """The one JSON document on stdout."""
        document = json.loads(self.out)
        assert isinstance(document, dict)
        return document


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path) -> Callable[..., Outcome]:
    """Carry out a command line in this process, as if on a machine without ngrokd."""
    for name in ("NGROKD_CONFIG", "NGROKD_HOSTS_PATH", "NGROKD_LOG_LEVEL", "NGROK_API_KEY", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NGROKD_SOCKET", str(folder / "nobody"))
    monkeypatch.setattr("ngrokd.cli.context.DEFAULT_CONFIG", str(folder / "config.toml"))
    monkeypatch.setattr("ngrokd.config.loading.DEFAULT_PATH", str(folder / "config.toml"))

    def run(*arguments: str, program: str = "ngrokd") -> Outcome:
        code = invoke(program, arguments)
        captured = capfd.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run
