"""The managed section of the hosts file: bytes in, bytes out.

The file belongs to the administrator; a part of it is lent to us, between two exact lines:

    # BEGIN ngrokd managed section
    10.107.0.2<TAB>my-api.prod
    # END ngrokd managed section

These are the Go daemon's markers, so each daemon finds the other's section. An instance on another interface than
ngrokd0 has ` (NAME)` after both. Everything else is foreign and leaves byte for byte as it came: CRLF, binary junk,
lines of any length, a byte order mark, a missing final newline.

Rules of this file:
- `remove(render(f)) == f` for every foreign `f`, and `render` twice is `render` once. (Where `f` does not end in a
  newline, one is needed before our section; a comment inside the section remembers to take it away again.)
- A marker is a whole line, never a substring. A closed section (BEGIN, no marker, END) is ours but for lines that are
  not `ADDRESS<TAB>NAME`: somebody wrote those there, and they stay. An unclosed section has no known extent: the
  marker goes, and of the lines below only those in our subnet, or when that is not told, the unbroken run after the
  marker. Losing the user's own `127.0.1.1<TAB>myhost` to a lost END line would be worse than leaving a line behind.
- A section that must change is written anew at the end of the file, where a tail write leaves every other byte
  untouched; a section that is right stays where it is.
- Two walls stand before the file: names were judged when they came from the API, and here every finished line is
  matched once more against a pattern of its own. One line that fails refuses the whole section.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Final, TypeAlias

from ngrokd.endpoints import printable
from ngrokd.errors import NgrokdError

DEFAULT_INSTANCE: Final = "ngrokd0"
"""The interface whose instance has bare markers, as the Go daemon's are."""

Address: TypeAlias = IPv4Address | IPv6Address | str
Subnets: TypeAlias = IPv4Network | IPv6Network | tuple[IPv4Network | IPv6Network, ...] | None


class HostsRefused(NgrokdError):  # noqa: N818 - a verdict
    """A line that is not exactly ADDRESS<TAB>NAME was about to be written; nothing is."""


@dataclass(frozen=True, slots=True)
class Survey:
    """Who claims which name in a hosts file. Names are lower case, without trailing dot.

    Attributes:
        foreign: every word outside managed sections and comments (names, and the addresses with them).
        own: address by name in this instance's section.
        elsewhere: instance by name in the sections of other instances.
    """

    foreign: frozenset[str]
    own: Mapping[str, str]
    elsewhere: Mapping[str, str]


def render(
    text: bytes,
    entries: Iterable[tuple[Address, str]],
    instance: str | None = None,
    *,
    subnet: Subnets = None,
) -> bytes:
    """The file with our section in it; the same bytes when it is right already.

    Args:
        text: the file as it is.
        entries: address and name, in any order; without any the section is removed.
        instance: name of the interface; None is the same as ngrokd0.
        subnet: our addresses, in one network or several; tells our lines from others where the END marker is lost.

    Raises:
        HostsRefused: an entry is not what may stand in the file; nothing must be written.
    """
    label = _label(instance)
    lines = _lines(entries)
    if not lines:
        return remove(text, instance, subnet=subnet)
    begin, end = _marker(b"BEGIN", label), _marker(b"END", label)
    block = begin + lines + end
    flagged = begin + _NO_NEWLINE + lines + end
    pieces = [piece for piece in _pieces(text) if piece.label == label]
    if len(pieces) == 1 and text[pieces[0].start : pieces[0].end] in (block, flagged):
        return text
    base = remove(text, instance, subnet=subnet)
    if base and not base.endswith(b"\n"):
        return b"".join((base, b"\n", flagged))
    return base + block


def remove(text: bytes, instance: str | None = None, *, subnet: Subnets = None) -> bytes:
    """The file without this instance's section and markers, closed, unclosed, nested or repeated."""
    label = _label(instance)
    kept: list[bytes] = []
    position = 0
    borrowed = -1  # index in `kept` up to which a newline was lent to us, if nothing follows
    for piece in _pieces(text):
        if piece.label != label:
            continue
        kept.append(text[position : piece.start])
        position = piece.end
        body = text[piece.body : piece.body_end]
        if piece.closed and body.startswith(_NO_NEWLINE):
            borrowed = len(kept)
        kept.extend(line for line, ours in _judge(body, piece.closed, subnet) if ours is None)
    kept.append(text[position:])
    if borrowed > 0 and not any(kept[borrowed:]):
        kept = [b"".join(kept[:borrowed]).removesuffix(b"\n")]
    return b"".join(kept)


def survey(text: bytes, instance: str | None = None, *, subnet: Subnets = None) -> Survey:
    """Find out who claims which name; see `Survey`. Commented lines claim nothing."""
    label = _label(instance)
    rest: list[bytes] = []
    own: dict[str, str] = {}
    elsewhere: dict[str, str] = {}
    position = 0
    for piece in _pieces(text):
        rest.append(text[position : piece.start])
        position = piece.end
        for line, ours in _judge(text[piece.body : piece.body_end], piece.closed, subnet):
            if ours is None:
                rest.append(line)
            elif ours:
                address, name = ours
                if piece.label == label:
                    own.setdefault(_folded(name), address.decode("ascii"))
                else:
                    elsewhere.setdefault(_folded(name), piece.label)
    rest.append(text[position:])
    words = set(_COMMENT.sub(b"", b"".join(rest)).lower().split())
    # One decode for all: a blocklist of 10 MiB has half a million names, and latin-1 never fails.
    foreign = b"\n".join(words).decode("latin-1").split("\n") if words else []
    return Survey(frozenset(word.removesuffix(".") for word in foreign), own, elsewhere)


def foreign_names(text: bytes, instance: str | None = None, *, subnet: Subnets = None) -> set[str]:
    """Every name that somebody else has: in the foreign part, and in the sections of other instances."""
    found = survey(text, instance, subnet=subnet)
    return set(found.foreign).union(found.elsewhere)


def tail_offset(old: bytes, new: bytes) -> int:
    """Where writing in place must begin: the start of the first line that differs (the length when none does).

    Everything before stays untouched on disk, so a reader never sees it torn. As our section is written at the end,
    that is the whole foreign part, unless the section had to move there from further up.
    """
    low, high = 0, min(len(old), len(new))
    while low < high:  # by halves: comparing slices is memcmp, comparing bytes one by one is Python
        middle = (low + high + 1) // 2
        if old[low:middle] == new[low:middle]:
            low = middle
        else:
            high = middle - 1
    if low == len(old) == len(new):
        return low
    return new.rfind(b"\n", 0, low) + 1


# Writing


def _lines(entries: Iterable[tuple[Address, str]]) -> bytes:
    ranked: dict[tuple[int, str], None] = {}  # as a set that keeps the order: what comes sorted is sorted quickly
    for address, name in entries:
        try:
            value = ip_address(address) if isinstance(address, str) else address
        except ValueError:
            raise HostsRefused(f"{printable(str(address), 60)!r} is not an address") from None
        ranked[int(value) + (_AFTER_V4 if value.version == 6 else 0), f"{value}\t{name}\n"] = None
    lines = [line for _, line in sorted(ranked)]
    wall = _WALL.fullmatch
    for line in lines:
        if wall(line) is None or len(line) > 301:
            raise HostsRefused(f"refused to write {printable(line, 120)} to the hosts file")
    return "".join(lines).encode("ascii")


def _marker(kind: bytes, label: str) -> bytes:
    suffix = b"" if label == DEFAULT_INSTANCE else f" ({label})".encode("ascii")
    return b"# " + kind + _MANAGED + suffix + b"\n"


def _label(instance: str | None) -> str:
    label = instance or DEFAULT_INSTANCE
    if _INSTANCE.fullmatch(label) is None:
        raise HostsRefused(f"{printable(label, 60)!r} cannot stand in a marker line")
    return label


# Reading


@dataclass(frozen=True, slots=True)
class _Piece:
    """A BEGIN marker with what it may cover, or a stray END marker (with an empty body)."""

    label: str
    start: int
    body: int
    body_end: int
    end: int
    closed: bool


def _pieces(text: bytes) -> Iterator[_Piece]:
    """Everything that markers mark, of all instances, in file order, not overlapping."""
    opened: tuple[str, int, int] | None = None
    for kind, label, start, end in _markers(text):
        if opened is not None:
            name, begin, body = opened
            opened = None
            if kind == b"END" and name == label:
                yield _Piece(label, begin, body, start, end, True)
                continue
            yield _Piece(name, begin, body, start, start, False)
        if kind == b"BEGIN":
            opened = (label, start, end)
        else:
            yield _Piece(label, start, end, end, end, False)
    if opened is not None:
        name, begin, body = opened
        yield _Piece(name, begin, body, len(text), len(text), False)


def _markers(text: bytes) -> Iterator[tuple[bytes, str, int, int]]:
    # find() instead of a pattern over the whole file: foreign parts may be large, and lines a megabyte long.
    at = text.find(_MANAGED)
    while at >= 0:
        rest = _MARKER_REST.match(text, at)
        if rest is not None and rest[1] != DEFAULT_INSTANCE.encode():
            for kind in (b"BEGIN", b"END"):
                start = at - len(kind) - 2
                if start >= 0 and text[start:at] == b"# " + kind and (start == 0 or text[start - 1] == _NEWLINE):
                    yield kind, (rest[1] or DEFAULT_INSTANCE.encode()).decode("ascii"), start, rest.end()
        at = text.find(_MANAGED, at + len(_MANAGED))


def _judge(body: bytes, closed: bool, subnet: Subnets) -> Iterator[tuple[bytes, Sequence[bytes] | None]]:
    """Each line of a section with (address, name) when it is the section's own, () for its comment, None if foreign."""
    unbroken = True
    for match in _ANY_LINE.finditer(body):
        line = match[0]
        ours = _OUR_LINE.fullmatch(line)
        if ours is not None and (closed or (_within(ours[1], subnet) if subnet is not None else unbroken)):
            yield line, ours.groups()
        elif closed and match.start() == 0 and line == _NO_NEWLINE:
            yield line, ()
        else:
            unbroken = False
            yield line, None


def _within(address: bytes, subnet: IPv4Network | IPv6Network | tuple[IPv4Network | IPv6Network, ...]) -> bool:
    try:
        found = ip_address(address.decode("ascii"))
    except ValueError:
        return False
    return any(found in network for network in (subnet if isinstance(subnet, tuple) else (subnet,)))


def _folded(name: bytes) -> str:
    return name.decode("ascii").lower().removesuffix(".")


_NEWLINE: Final = 10
_AFTER_V4: Final = 1 << 128
_MANAGED: Final = b" ngrokd managed section"
_MARKER_REST: Final = re.compile(_MANAGED + rb"(?: \(([!-'*-~]{1,64})\))?\r?(?:\n|\Z)")
_INSTANCE: Final = re.compile(r"[!-'*-~]{1,64}")
_NO_NEWLINE: Final = b"# (the text above ends without a newline)\n"
_COMMENT: Final = re.compile(rb"#[^\n]*")
_ANY_LINE: Final = re.compile(rb"[^\n]*\n|[^\n]+\Z")
# What the Go daemon and we have ever written: it took names in upper case and wildcards as they came. The loopback
# lines every system is born with are never ours, wherever they were pasted.
_OUR_LINE: Final = re.compile(
    rb"(?!(?:127\.0\.0\.1|::1)\t(?:localhost|broadcasthost|ip6-))"
    rb"([0-9]{1,3}(?:\.[0-9]{1,3}){3}|[0-9a-f]{0,4}:[0-9a-f:.]{1,40})\t([A-Za-z0-9_.*-]{1,255})\r?\n?"
)
# The second wall. Written apart from the grammar of host names on purpose: one mistake must not open both.
_OCTET: Final = r"(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_WALL: Final = re.compile(
    rf"(?:{_OCTET}(?:\.{_OCTET}){{3}}|(?=[0-9a-f:.]*:)[0-9a-f:.]{{2,45}})\t"
    r"(?!localhost\n|ip6-|.*\.\.|.*\.localhost\n)[a-z0-9_](?:[a-z0-9_.-]{0,251}[a-z0-9])?\n"
)
