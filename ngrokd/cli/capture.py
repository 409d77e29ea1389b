"""`ngrokd capture`: the apps' packets as a pcapng file, or as a pipe that Wireshark reads along.

The daemon sends the file in pieces that may end anywhere. Files that are rotated must each be whole, so the pieces are
put together to blocks here, and a new file begins with a copy of those that introduce the packets.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from base64 import b64decode
from collections.abc import Iterator
from typing import Any, Final, Protocol

import click

from ngrokd.ask import Subscription
from ngrokd.cli.columns import size_text, table_of
from ngrokd.cli.context import Context, command
from ngrokd.cli.events import parse_time
from ngrokd.cli.offers import endpoint_names
from ngrokd.errors import Exit, NgrokdError

SECTION_HEADER: Final = 0x0A0D0D0A
INTERFACE: Final = 1
PACKET: Final = 6
MEGABYTE: Final = 1_000_000  # as tcpdump counts for -C
MAX_BLOCK: Final = 16 << 20


class CaptureError(NgrokdError):
    """The file cannot be written."""

    exit_code = Exit.CANNOT_CREATE


class Blocks:
    """Puts pcapng blocks together from pieces. Ours are little-endian, each with its length in front."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, piece: bytes) -> Iterator[tuple[int, bytes]]:
        """The blocks that are whole now, each with its type. Raises CaptureError for what is no pcapng."""
        self._rest += piece
        while len(self._rest) >= 12:
            length = int.from_bytes(self._rest[4:8], "little")
            if not 12 <= length <= MAX_BLOCK or length % 4:
                raise CaptureError("the daemon sends something else than a capture")
            if len(self._rest) < length:
                return
            block = bytes(self._rest[:length])
            del self._rest[:length]
            yield int.from_bytes(block[:4], "little"), block


class Output(Protocol):
    """Where blocks go."""

    def write(self, kind: int, block: bytes) -> None:
        """Take one block. Raises OSError."""
        ...

    def flush(self) -> None:
        """Let whoever reads along see what was written."""
        ...

    def close(self) -> None:
        """Be done."""
        ...


class Stream:
    """A pipe, or whatever stdout is."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._waiting = bytearray()

    def write(self, _kind: int, block: bytes) -> None:
        """Take one block."""
        self._waiting += block

    def flush(self) -> None:
        """Write what was taken; a reader that is slow is waited for."""
        view = memoryview(bytes(self._waiting))
        self._waiting.clear()
        while view:
            view = view[os.write(self._descriptor, view) :]

    def close(self) -> None:
        """Nothing to do."""


class Files:
    """A file, or several in turn: as tcpdump's -C (so many megabytes, then the next) and -W (so many files)."""

    def __init__(self, path: str, megabytes: int = 0, most: int = 0) -> None:
        self._path = path
        self._limit = megabytes * MEGABYTE
        self._most = most
        self._number = 0
        self._size = 0
        self._introduction: list[bytes] = []
        self._stream = self._open()

    def write(self, kind: int, block: bytes) -> None:
        """Take one block, into the next file if it would make this one too large."""
        if kind in (SECTION_HEADER, INTERFACE):
            self._introduction.append(block)
        elif self._limit and self._size + len(block) > self._limit and self._holds_packets:
            self._next()
        self._size += len(block)
        self._stream.write(kind, block)

    @property
    def _holds_packets(self) -> bool:
        return self._size > sum(map(len, self._introduction))

    def _next(self) -> None:
        self.close()
        self._number = (self._number + 1) % self._most if self._most else self._number + 1
        self._stream = self._open()
        for block in self._introduction:
            self._stream.write(INTERFACE, block)
        self._size = sum(map(len, self._introduction))

    def _open(self) -> Stream:
        path = self._path
        if self._most:
            path += str(self._number).zfill(len(str(self._most - 1)))
        elif self._number:
            path += str(self._number)
        try:
            # What apps say to each other is in it: for nobody else, and not through somebody's symbolic link.
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            self._descriptor = os.open(path, flags, 0o600)
        except OSError as error:
            raise CaptureError(f"cannot write {path}: {error.strerror}") from error
        return Stream(self._descriptor)

    def flush(self) -> None:
        """Write what was taken."""
        self._stream.flush()

    def close(self) -> None:
        """Write the rest and close the file."""
        try:
            self._stream.flush()
        finally:
            os.close(self._descriptor)


@command(
    "capture",
    epilog="As in: ngrokd capture -w - | wireshark -k -i -      ngrokd capture -w app.pcapng --endpoint my-api.prod",
)
@click.option(
    "-w",
    "--write",
    "path",
    metavar="FILE|-",
    type=click.Path(),
    help='Write here; "-" is stdout, and what a pipe gets anyway.',
)
@click.option(
    "--endpoint",
    "endpoints",
    metavar="NAME",
    multiple=True,
    shell_complete=endpoint_names,
    help="Only this endpoint's packets.",
)
@click.option("--address", "addresses", metavar="CIDR", multiple=True, help="Only from or to this address or network.")
@click.option("--port", "ports", metavar="PORT", multiple=True, type=click.IntRange(1, 65535), help="Likewise, a port.")
@click.option("-s", "--snaplen", metavar="N", type=click.IntRange(min=1), help="Of each packet only N bytes.")
@click.option("--count", metavar="N", type=click.IntRange(min=1), help="End after N packets.")
@click.option("--duration", metavar="TIME", help='End after this time, say "1m".')
@click.option("-C", "megabytes", metavar="MB", type=click.IntRange(min=1), help="Begin another file after so many MB.")
@click.option("-W", "most", metavar="N", type=click.IntRange(min=1), help="With -C: N files, then the first again.")
def capture(
    context: Context,
    path: str | None,
    endpoints: tuple[str, ...],
    addresses: tuple[str, ...],
    ports: tuple[int, ...],
    snaplen: int | None,
    count: int | None,
    duration: str | None,
    megabytes: int | None,
    most: int | None,
) -> int:
    """Record the packets between apps and the daemon, as its TCP sees them, until ^C. For root.

    What is carried to ngrok is inside of TLS and not in it. The file is pcapng, of mode 0600.
    """
    path = _checked_path(path, megabytes, most)
    arguments = [
        *(f"endpoint={each}" for each in endpoints),
        *(f"address={each}" for each in addresses),
        *(f"port={each}" for each in ports),
        *([f"snaplen={snaplen}"] if snaplen else []),
        *([f"count={count}"] if count else []),
        *([f"duration={parse_time(duration)}"] if duration else []),
    ]
    with Subscription(context.socket_path(), "capture", tuple(arguments)) as subscription:
        output: Output = Stream(sys.stdout.fileno()) if path == "-" else Files(path, megabytes or 0, most or 0)
        summary = _record(subscription, output)
    if context.as_json:
        if path == "-":
            return Exit.OK
        context.print_document({"file": path, **summary})
    else:
        dropped = f", {summary['dropped']} lost: too fast for whoever writes" if summary["dropped"] else ""
        click.echo(f"{summary['packets']} packets, {size_text(summary['bytes'])}{dropped}", err=True)
    return Exit.OK


def _checked_path(path: str | None, megabytes: int | None, most: int | None) -> str:
    if path is None:
        if sys.stdout.isatty():
            raise click.UsageError("where to? -w FILE, or -w - into a pipe")
        path = "-"
    if path == "-" and sys.stdout.isatty():
        raise click.UsageError("a terminal cannot show a capture; give it a FILE, or a program that reads it")
    if megabytes and path == "-":
        raise click.UsageError("-C takes a FILE")
    if most and not megabytes:
        raise click.UsageError("-W goes with -C")
    return path


def _record(subscription: Subscription, output: Output) -> dict[str, int]:
    """Write until the daemon ends it, the reader of the pipe leaves, or somebody presses ^C."""
    blocks = Blocks()
    packets = size = dropped = 0
    lines: Iterator[Any] = iter(subscription)
    with contextlib.suppress(BrokenPipeError, KeyboardInterrupt), _until_told():
        try:
            for line in lines:
                told = table_of(line)
                dropped = int(told.get("dropped", dropped))
                for kind, block in blocks.feed(b64decode(told.get("pcapng", ""))):
                    output.write(kind, block)
                    packets += kind == PACKET
                    size += len(block)
                output.flush()
        finally:
            output.close()
    return {"packets": packets, "bytes": size, "dropped": dropped}


@contextlib.contextmanager
def _until_told() -> Iterator[None]:
    """SIGTERM ends it as ^C does, so that the file is whole."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
