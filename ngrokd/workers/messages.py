"""What the daemon and its workers say to each other: frames of bytes, and what they mean. Pure.

A frame is four bytes of length (big-endian) and that many bytes of MessagePack: an array of the message's name, a
number, and the message itself as a map of its fields. The number is 0, or joins what belongs together: a question, its
answers, and the `Done` that ends them. Pickle would let one side run code in the other; here only values travel, of
types that are listed.

    to a worker                                         from a worker
    `Begin`, `Attach` (with a descriptor), all orders,  `Hello`, all reports of the data plane, `Said`
    `Run`, later orders
    a question                                          its answers, `Done`
    `Drain`                                             `Drained`, when its flows are over
    `End`, when those of all are                        `Failed`, whenever it cannot go on

The directory is the one order that does not travel as it is: 65,000 endpoints in one message would hold up the packets
of the worker that decodes it for a tenth of a second (docs/adr/0019). It travels as `Entries`, the changes since what
the worker was told last, in pieces, and counts when `Commit` has come: all of it or nothing.

To add a message: an order or a report is added to the unions of `ngrokd.dataplane`, and travels by itself; a question
is a class here, in QUESTIONS, its answer in FROM_WORKER, and `worker.Worker` says who answers it. What a message may
hold: numbers of at most 64 bits, texts, bytes, tuples, lists, dicts, frozensets, dataclasses of these, `Endpoint`,
`Twins`, and Nones beside them. Names and fields may change at any time: both sides are the same program, which `Hello`
makes sure of.

A worker has no rights and reads what apps and the ingress send; so the daemon takes nothing from it for granted. What
is too long, unknown, not of its type, or not for this direction raises `BadMessage`, and ends the worker.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from ipaddress import IPv4Network, IPv6Network
from struct import Struct
from typing import Any, Final, TypeAlias, get_args

import msgspec

from ngrokd.dataplane import DataPlaneSettings, FlowInfo, Order, RecordOrder, Report, Serve
from ngrokd.endpoints import Endpoint
from ngrokd.errors import NgrokdError
from ngrokd.names.twins import Twins
from ngrokd.relay.ingress import Probe

MOST_TO_WORKER: Final = 64 << 20  # bytes of a frame: the certificates of a whole system, and nothing is near it
MOST_FROM_WORKER: Final = 1 << 20
# Of the directory in one frame: decoding and adding them takes a millisecond.
ENTRIES: Final = 250
# Of a listing of flows in one frame.
ROWS: Final = 250

_LENGTH: Final = Struct(">I")


class BadMessage(NgrokdError):  # noqa: N818 - a verdict on what was received
    """What came over the socket is no message for this side."""


# -- to a worker


@dataclass(frozen=True, slots=True)
class Begin:
    """The first message: who the worker is, and what does not change while it runs; see `begin` and `settings_of`."""

    index: int
    version: str
    settings: DataPlaneSettings
    network6: bytes
    mask6: bytes


@dataclass(frozen=True, slots=True)
class Attach:
    """The device to work on from now on; the descriptor comes with the message."""

    name: str
    mtu: int
    offload: bool


@dataclass(frozen=True, slots=True)
class Entries:
    """A piece of what changes in the directory.

    Attributes:
        put: endpoints by packed address; one at the same address and port is replaced.
        drop: packed addresses and ports where nothing is served any more.
    """

    put: tuple[tuple[bytes, Endpoint], ...] = ()
    drop: tuple[tuple[bytes, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Commit:
    """Serve what all pieces so far make; see `Serve`."""

    linger_s: float


@dataclass(frozen=True, slots=True)
class Run:
    """All that there is to tell has been told: begin to read packets."""


@dataclass(frozen=True, slots=True)
class Drain:
    """See `DataPlane.drain`. Until `End` new flows are refused all the same."""

    seconds: float


@dataclass(frozen=True, slots=True)
class End:
    """Nobody has flows any more."""


# -- questions


@dataclass(frozen=True, slots=True)
class AskCounts:
    """How is it going? Answered by one `Counts`. As it is answered in turn, all orders before it are in force then."""


@dataclass(frozen=True, slots=True)
class AskFlows:
    """Which flows are there? Answered by any number of `Flows`."""


@dataclass(frozen=True, slots=True)
class CloseFlow:
    """End the flow of this number. Answered by one `Truth`: whether there was one."""

    flow: int


@dataclass(frozen=True, slots=True)
class AskProbe:
    """Go the way of a flow once. Answered by one `Probed`."""

    host: str
    port: int


@dataclass(frozen=True, slots=True)
class StartTape:
    """Record packets; see `DataPlane.record`. Answered by nothing but `Done`."""

    tape: int
    order: RecordOrder


@dataclass(frozen=True, slots=True)
class ReadTape:
    """The next bytes of this recording, when there are some. Answered by one `Taped`."""

    tape: int


@dataclass(frozen=True, slots=True)
class StopTape:
    """Nobody wants this recording any more. Answered by nothing but `Done`."""

    tape: int


Question: TypeAlias = AskCounts | AskFlows | CloseFlow | AskProbe | StartTape | ReadTape | StopTape


# -- from a worker


@dataclass(frozen=True, slots=True)
class Hello:
    """The worker stands, without rights, and waits for `Begin`."""

    version: str
    pid: int


@dataclass(frozen=True, slots=True)
class Counts:
    """Numbers of one worker: see `DataPlane.counters` and `describe_pool`."""

    counters: dict[str, int]
    pool: dict[str, bool | int | float | str | None]
    problem: str


@dataclass(frozen=True, slots=True)
class Flows:
    """Some flows of one worker."""

    rows: tuple[FlowInfo, ...]


@dataclass(frozen=True, slots=True)
class Truth:
    """Yes or no."""

    truth: bool


@dataclass(frozen=True, slots=True)
class Probed:
    """What a probe saw."""

    probe: Probe


@dataclass(frozen=True, slots=True)
class Taped:
    """Bytes of a recording, b"" when it is over; and see `Recording`."""

    data: bytes
    recorded: int = 0
    dropped: int = 0
    ended: str = ""


@dataclass(frozen=True, slots=True)
class Done:
    """A question has been answered, or `problem` says why not."""

    problem: str = ""
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Said:
    """A line for the log."""

    level: int
    logger: str
    message: str


@dataclass(frozen=True, slots=True)
class Lost:
    """So many reports were thrown away since the last time, because the daemon did not read."""

    reports: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The worker cannot go on and ends."""

    problem: str
    remedy: str = ""
    code: int = 70


@dataclass(frozen=True, slots=True)
class Drained:
    """The flows of this worker are over."""


QUESTIONS: Final = get_args(Question)
ORDERS: Final = tuple(kind for kind in get_args(Order) if kind is not Serve)
TO_WORKER: Final[tuple[type, ...]] = (Begin, Attach, Entries, Commit, Run, Drain, End, *ORDERS, *QUESTIONS)
FROM_WORKER: Final[tuple[type, ...]] = (
    Hello, Counts, Flows, Truth, Probed, Taped, Done, Said, Lost, Failed, Drained, *get_args(Report),
)  # fmt: skip

Message: TypeAlias = Any  # one of the types above; each side looks


# -- the settings, whose IPv6 network is a number of 128 bits


def begin(index: int, version: str, settings: DataPlaneSettings) -> Begin:
    """The first message to a worker."""
    stack = settings.stack
    return Begin(
        index,
        version,
        replace(settings, stack=replace(stack, network6=0, mask6=0)),
        stack.network6.to_bytes(16, "big"),
        stack.mask6.to_bytes(16, "big"),
    )


def settings_of(message: Begin) -> DataPlaneSettings:
    """The settings that `begin` was given."""
    network6, mask6 = int.from_bytes(message.network6, "big"), int.from_bytes(message.mask6, "big")
    return replace(message.settings, stack=replace(message.settings.stack, network6=network6, mask6=mask6))


# -- frames


def encode(message: Message, number: int = 0) -> bytes:
    """A frame. Raises OverflowError or TypeError for what cannot travel, which is our own mistake."""
    body = _ENCODER.encode((type(message).__name__, number, message))
    return _LENGTH.pack(len(body)) + body


class Frames:
    """Takes bytes as they come, gives messages.

    Args:
        kinds: what may come: TO_WORKER or FROM_WORKER.
        most: bytes of a frame.
    """

    def __init__(self, kinds: Iterable[type], most: int) -> None:
        self._decoders = {kind.__name__: _decoder(kind) for kind in kinds}
        self._most = most
        self._buffer = bytearray()
        self._start = 0

    @property
    def unfinished(self) -> bool:
        """Whether a part of a frame waits for its rest."""
        return len(self._buffer) > self._start

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[tuple[int, Message]]:
        """Add received bytes; yields number and message of each frame that they complete, decoded when asked for.

        Raises: BadMessage; after that nothing can be read any more.
        """
        del self._buffer[: self._start]
        self._start = 0
        self._buffer += data
        while len(self._buffer) - self._start >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self._buffer, self._start)
            if size > self._most:
                raise BadMessage(f"a message of {size} bytes")
            begin_at = self._start + _LENGTH.size
            if len(self._buffer) - begin_at < size:
                return
            body = bytes(memoryview(self._buffer)[begin_at : begin_at + size])
            self._start = begin_at + size
            yield self._decode(body)

    def _decode(self, body: bytes) -> tuple[int, Message]:
        try:
            name, number, content = _ENVELOPE.decode(body)
            decoder = self._decoders.get(name)
            if decoder is None:
                raise BadMessage(f"a message called {name[:40]!r}")
            return number, decoder(content)
        except (msgspec.DecodeError, ValueError, TypeError, RecursionError) as error:
            raise BadMessage(f"a message that cannot be read: {str(error)[:200]}") from None


def _decoder(kind: type) -> Callable[[msgspec.Raw], Message]:
    return msgspec.msgpack.Decoder(kind, dec_hook=_read_other).decode


def _write_other(value: Any) -> Any:  # Any: msgspec's hooks
    if isinstance(value, Twins):
        return str(value.subnet), str(value.subnet6)
    raise TypeError(f"{type(value).__name__} does not travel")


def _read_other(kind: type, value: Any) -> Any:
    if kind is Twins:
        subnet, subnet6 = value
        return Twins(IPv4Network(subnet), IPv6Network(subnet6))
    raise TypeError(f"{kind.__name__} does not travel")


_ENCODER: Final = msgspec.msgpack.Encoder(enc_hook=_write_other)
_ENVELOPE: Final = msgspec.msgpack.Decoder(tuple[str, int, msgspec.Raw])
