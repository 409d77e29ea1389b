"""Readers: one TOML value to one typed value, or a sentence on what would be right.

Each key of the schema has a reader. It converts, it says what it had expected, and it shows the value again in the
form in which it is written. Durations and sizes are texts with units, because a bare 30 has been read as seconds,
milliseconds and minutes by somebody. A secret is never repeated, not even when it is wrong.
"""

# ruff: noqa: D102 - the docstring of each class says what `read` takes and gives

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, Protocol, TypeVar

import tomli

from ngrokd.endpoints import Secret, printable

MAX_PATH_BYTES: Final = 4095  # PATH_MAX less its NUL
MAX_SOCKET_PATH_BYTES: Final = 103  # sun_path of macOS; Linux would take 107
MAX_KEY_CHARS: Final = 4096  # ngrok's keys have about 50; an HTTP header line must hold it

T = TypeVar("T")


class Wrong(Exception):  # noqa: N818 - a verdict on one value
    """One value is not what its key takes. `hint` follows the sentence in brackets."""

    def __init__(self, expected: str, *, got: str | None = None, hint: str = "") -> None:
        super().__init__(expected)
        self.expected = expected
        self.got = got
        self.hint = hint


class Reader(Protocol[T]):
    """How one key is read, and shown again in the form in which it is written."""

    live: bool
    only_new: bool

    def read(self, value: object) -> T:
        """Convert, or raise `Wrong`."""
        ...

    def show(self, value: T) -> object:
        """The value as it would be written in the file."""
        ...

    def json_schema(self) -> dict[str, object]:
        """What is written there, for editors: a JSON Schema that takes whatever `read` takes, and perhaps more."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Key(Generic[T]):
    """What all readers have.

    Attributes:
        live: a running daemon takes a new value over.
        only_new: of connections, only those feel it that are made from then on.
    """

    live: bool = False
    only_new: bool = False

    def read(self, value: object) -> T:
        raise NotImplementedError

    def show(self, value: T) -> object:
        return value

    def json_schema(self) -> dict[str, object]:
        raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag(_Key[bool]):
    """true or false."""

    def read(self, value: object) -> bool:
        if isinstance(value, bool):
            return value
        hint = value.lower() if isinstance(value, str) and value.lower() in ("true", "false") else ""
        raise Wrong("true or false", hint=f"did you mean {hint} without quotes?" if hint else "")

    def json_schema(self) -> dict[str, object]:
        return {"type": "boolean"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Count(_Key[int]):
    """An integer from `low` to `high`; `zero` names what 0 means where 0 is allowed besides."""

    low: int
    high: int
    zero: str = ""

    def read(self, value: object) -> int:
        expected = f"an integer from {self.low} to {self.high}" + (f", or 0 for {self.zero}" if self.zero else "")
        if isinstance(value, bool) or not isinstance(value, int):
            quoted = isinstance(value, str) and value.isascii() and value.isdecimal()
            raise Wrong(expected, hint=f"did you mean {value} without quotes?" if quoted else "")
        if self.low <= value <= self.high or (self.zero and value == 0):
            return value
        raise Wrong(expected)

    def json_schema(self) -> dict[str, object]:
        numbers: dict[str, object] = {"type": "integer", "minimum": self.low, "maximum": self.high}
        return {"anyOf": [numbers, {"const": 0}]} if self.zero and self.low > 0 else numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers(_Key[int]):
    """A number of processes from 1 to `high`, or "auto", which reads as 0."""

    high: int

    def read(self, value: object) -> int:
        if value == "auto":
            return 0
        expected = f'an integer from 1 to {self.high}, or "auto"'
        if isinstance(value, bool) or not isinstance(value, int):
            quoted = isinstance(value, str) and value.isascii() and value.isdecimal()
            raise Wrong(expected, hint=f"did you mean {value} without quotes?" if quoted else "")
        if 1 <= value <= self.high:
            return value
        raise Wrong(expected)

    def show(self, value: int) -> object:
        return value or "auto"

    def json_schema(self) -> dict[str, object]:
        return {"anyOf": [{"type": "integer", "minimum": 1, "maximum": self.high}, {"const": "auto"}]}


_DURATION_UNITS: Final = {
    "us": 1e-6,
    "µs": 1e-6,
    "μs": 1e-6,
    "ms": 1e-3,
    "s": 1.0,
    "m": 60.0,
    "h": 3600.0,
    "d": 86400.0,
}
_DURATION_PART: Final = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,9})?)(us|µs|μs|ms|s|m|h|d)", re.ASCII)


def parse_duration(text: str) -> float:
    """ "1h30m" -> 5400.0 seconds. Units: us, ms, s, m, h, d. Raises ValueError."""
    seconds, position = 0.0, 0
    while found := _DURATION_PART.match(text, position):
        seconds += float(found[1]) * _DURATION_UNITS[found[2]]
        position = found.end()
    if position == 0 or position != len(text):
        raise ValueError(f"not a duration: {text!r}")
    return seconds


def format_duration(seconds: float) -> str:
    """The shortest exact text that `parse_duration` reads back: 5400.0 -> "1h30m"."""
    microseconds = round(seconds * 1_000_000)
    text = ""
    for unit, size in (("h", 3_600_000_000), ("m", 60_000_000), ("s", 1_000_000), ("ms", 1000), ("us", 1)):
        count, microseconds = divmod(microseconds, size)
        text += f"{count}{unit}" if count else ""
    return text or "0s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Duration(_Key[float]):
    """A text such as "30s", in seconds."""

    low: float
    high: float

    def read(self, value: object) -> float:
        expected = 'a duration such as "30s", "5m" or "1h30m"'
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            raise Wrong(expected, hint=f'did you mean "{value}s"?' if 0 <= value < 10**9 else "")
        if not isinstance(value, str):
            raise Wrong(expected)
        try:
            seconds = parse_duration(value)
        except ValueError:
            hint = f'did you mean "{value}s"?' if re.fullmatch(r"[0-9]{1,9}", value) else ""
            raise Wrong(expected, hint=hint) from None
        if not self.low <= seconds <= self.high:
            raise Wrong(f"a duration from {format_duration(self.low)} to {format_duration(self.high)}")
        return seconds

    def show(self, value: float) -> object:
        return format_duration(value)

    def json_schema(self) -> dict[str, object]:
        return {"type": "string", "pattern": f"^(?:{_DURATION_PART.pattern})+$"}


_SIZE_UNITS: Final = {
    "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30,
}  # fmt: skip
_SIZE: Final = re.compile(r"([0-9]{1,12})([A-Za-z]{1,3})", re.ASCII)


def format_size(size: int) -> str:
    """The size in the largest binary unit that holds it exactly: 524288 -> "512KiB"."""
    for unit in ("GiB", "MiB", "KiB"):
        if size and size % _SIZE_UNITS[unit] == 0:
            return f"{size // _SIZE_UNITS[unit]}{unit}"
    return f"{size}B"


@dataclass(frozen=True, slots=True, kw_only=True)
class Size(_Key[int]):
    """A text such as "512KiB", in bytes."""

    low: int
    high: int

    def read(self, value: object) -> int:
        expected = 'a size such as "512KiB" or "256MiB"'
        if isinstance(value, int) and not isinstance(value, bool):
            fits = self.low <= value <= self.high
            # Python refuses to write integers of thousands of digits, which hexadecimal ones can have.
            guess = self._guess(str(value)) if 0 <= value < 10**12 else ""
            raise Wrong(expected, hint=f'did you mean "{format_size(value)}"?' if fits else guess)
        if not isinstance(value, str):
            raise Wrong(expected)
        found = _SIZE.fullmatch(value)
        if not found or found[2] not in _SIZE_UNITS:
            raise Wrong(expected, hint=self._guess(value))
        size = int(found[1]) * _SIZE_UNITS[found[2]]
        if not self.low <= size <= self.high:
            raise Wrong(f"a size from {format_size(self.low)} to {format_size(self.high)}")
        return size

    def _guess(self, value: str) -> str:
        """The size that was probably meant; one that may stand there, or none."""
        found = re.fullmatch(r"\s*([0-9]{1,12})\s*([kmg]?)i?b?\s*", value, re.ASCII | re.IGNORECASE)
        if not found:
            return ""
        units = {"k": ("KiB",), "m": ("MiB",), "g": ("GiB",), "": ("B", "KiB", "MiB", "GiB")}[found[2].lower()]
        fits = [unit for unit in units if self.low <= int(found[1]) * _SIZE_UNITS[unit] <= self.high]
        return f'did you mean "{found[1]}{fits[0]}"?' if fits else ""

    def show(self, value: int) -> object:
        return format_size(value)

    def json_schema(self) -> dict[str, object]:
        return {"type": "string", "pattern": f"^[0-9]{{1,12}}(?:{'|'.join(_SIZE_UNITS)})$"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Word(_Key[str]):
    """One of a few words."""

    words: tuple[str, ...]

    def read(self, value: object) -> str:
        if isinstance(value, str) and value in self.words:
            return value
        hint = meant(value, self.words) if isinstance(value, str) else ""
        raise Wrong("one of " + ", ".join(f'"{word}"' for word in self.words), hint=hint)

    def json_schema(self) -> dict[str, object]:
        return {"enum": list(self.words)}


def _text(value: object, expected: str) -> str:
    if not isinstance(value, str):
        raise Wrong(expected)
    if not value.isprintable():
        raise Wrong(expected + " of printable characters")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Hidden(_Key[Secret]):
    """A secret; what was written is never repeated."""

    def read(self, value: object) -> Secret:
        if not isinstance(value, str):
            raise Wrong("a text", got=type_name(value))
        if not value:
            return Secret("")
        problem = key_problem(value)
        if problem:
            raise Wrong("an API key", got=f"a text that {problem}")
        return Secret(value.strip())

    def show(self, value: Secret) -> object:
        return "***" if value.reveal() else ""

    def json_schema(self) -> dict[str, object]:
        return {"type": "string"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Path(_Key[str]):
    """An absolute path; `socket` bounds its length to what a socket address holds.

    `private`: a secret is easily written there by mistake, so what is no path is not repeated.
    """

    optional: bool = False
    socket: bool = False
    private: bool = False

    def read(self, value: object) -> str:
        expected = 'an absolute path, or ""' if self.optional else "an absolute path"
        path = _text(value, expected)
        if not path and self.optional:
            return ""
        if not path.startswith("/"):
            raise Wrong(expected, got='a text that does not begin with "/"' if self.private else None)
        if ".." in path.split("/"):
            raise Wrong(expected + ' without ".."')
        limit = MAX_SOCKET_PATH_BYTES if self.socket else MAX_PATH_BYTES
        if len(os.fsencode(path)) > limit:
            raise Wrong(f"a path of at most {limit} bytes", got=f"{len(os.fsencode(path))} bytes")
        normal = "/" + os.path.normpath(path).lstrip("/")
        if normal == "/":
            raise Wrong("an absolute path below /")
        return normal

    def json_schema(self) -> dict[str, object]:
        return {"type": "string", "pattern": "^(?:/.+)?$" if self.optional else "^/.+$"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin(_Key[str]):
    """An https:// URL of a server: scheme, host, perhaps a port, nothing else."""

    def read(self, value: object) -> str:
        expected = 'a URL such as "https://api.ngrok.com"'
        text = _text(value, expected)
        scheme, separator, rest = text.partition("://")
        if separator and scheme.lower() == "http":
            raise Wrong("an https:// URL", hint="the API key would travel in the clear")
        if not separator or scheme.lower() != "https":
            raise Wrong(expected)
        try:
            host, port = split_address(rest.removesuffix("/"), 443)
        except ValueError as error:
            raise Wrong(f"{expected} ({error})") from None
        return "https://" + join_address(host, port if port != 443 else None)

    def json_schema(self) -> dict[str, object]:
        return {"type": "string", "pattern": "^[Hh][Tt][Tt][Pp][Ss]://[^/]+/?$"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Address(_Key[str]):
    """HOST:PORT, the port perhaps by default; "" where `optional`; only IP addresses and localhost where `local`."""

    default_port: int | None
    optional: bool = True
    local: bool = False

    def read(self, value: object) -> str:
        example = "127.0.0.1:8081" if self.local else "ingress.example.com:443"
        expected = f'an address such as "{example}"' + (', or ""' if self.optional else "")
        text = _text(value, expected)
        if not text and self.optional:
            return ""
        try:
            host, port = split_address(text, self.default_port, zero=self.local)
        except ValueError as error:
            raise Wrong(f"{expected} ({error})") from None
        if self.local and not (host == "localhost" or _is_ip(host)):
            raise Wrong(f"{expected} (an IP address of this machine, or localhost)")
        return join_address(host, port)

    def json_schema(self) -> dict[str, object]:
        return {"type": "string"} if self.optional else {"type": "string", "minLength": 1}


_INTERFACE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,14}", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface(_Key[str]):
    """A name that the kernel takes for a network interface (IFNAMSIZ 16), fit for file names and comments too."""

    def read(self, value: object) -> str:
        expected = "an interface name of 1 to 15 letters, digits, '-', '_' or '.'"
        if not isinstance(value, str) or not _INTERFACE.fullmatch(value) or value in ("lo", "all", "default"):
            raise Wrong(expected)
        return value

    def json_schema(self) -> dict[str, object]:
        return {"type": "string", "pattern": f"^{_INTERFACE.pattern}$"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Subnet(_Key[str]):
    """An IPv4 network to serve from: .1 is ours, endpoints from .2 upwards, so at least a /30."""

    def read(self, value: object) -> str:
        expected = 'an IPv4 network such as "10.107.0.0/16"'
        text = _text(value, expected)
        if "/" not in text and _is_ip(text):  # its zeros at the end tell how large a network was meant
            address = ipaddress.ip_address(text).packed
            prefix = 8 * len(address.rstrip(b"\0"))
            hint = f'did you mean "{text}/{prefix}"?' if len(address) == 4 and 8 <= prefix < 32 else ""
            raise Wrong(expected, hint=hint)
        network = _network(text, expected, versions=(4,))
        if not 8 <= network.prefixlen <= 30:
            raise Wrong("an IPv4 network from /8 to /30")
        if (
            network.is_loopback
            or network.is_multicast
            or network.is_link_local
            or network.network_address.packed[0] == 0
        ):
            raise Wrong(f"{expected}, not a loopback, link-local or multicast one")
        return str(network)

    def json_schema(self) -> dict[str, object]:
        return {"type": "string", "pattern": r"^[0-9.]+/[0-9.]+$"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Subnet6(_Key[str]):
    """The IPv6 network beside it, "auto" for one of our own, or "off"."""

    def read(self, value: object) -> str:
        expected = '"auto", "off" or an IPv6 network such as "fd12:3456:789a::/64"'
        text = _text(value, expected)
        if text in ("auto", "off"):
            return text
        network = _network(text, expected, versions=(6,))
        if not 8 <= network.prefixlen <= 112:
            raise Wrong("an IPv6 network from /8 to /112")
        if network.is_multicast or network.is_link_local or network.network_address.packed[:12] == bytes(12):
            raise Wrong(f"{expected}, not a loopback, link-local or multicast one")
        return str(network)

    def json_schema(self) -> dict[str, object]:
        return {"anyOf": [{"enum": ["auto", "off"]}, {"type": "string", "pattern": "^[0-9A-Fa-f:.]+/[0-9]+$"}]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Networks(_Key[tuple[str, ...]]):
    """A list of networks, of either IP version."""

    def read(self, value: object) -> tuple[str, ...]:
        expected = 'a list of networks such as ["192.168.0.0/16"]'
        return tuple(str(_network(text, expected)) for text in _texts(value, expected))

    def show(self, value: tuple[str, ...]) -> object:
        return list(value)

    def json_schema(self) -> dict[str, object]:
        return {"type": "array", "items": {"type": "string", "pattern": "/"}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprints(_Key[tuple[str, ...]]):
    """A list of SHA-256 fingerprints, read with or without colons, kept as 64 lower-case digits."""

    def read(self, value: object) -> tuple[str, ...]:
        expected = "a list of SHA-256 fingerprints (64 hexadecimal digits, colons allowed)"
        prints = tuple(text.replace(":", "").lower() for text in _texts(value, expected))
        if any(not re.fullmatch(r"[0-9a-f]{64}", each) for each in prints):
            raise Wrong(expected)
        return prints

    def show(self, value: tuple[str, ...]) -> object:
        return list(value)

    def json_schema(self) -> dict[str, object]:
        return {"type": "array", "items": {"type": "string", "pattern": "^:*(?:[0-9A-Fa-f]:*){64}$"}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts(_Key[tuple[str, ...]]):
    """A list of at least one text, such as the selectors."""

    example: str
    most: int = 100

    def read(self, value: object) -> tuple[str, ...]:
        expected = f"a list of texts such as {self.example}"
        texts = tuple(_texts(value, expected))
        if not texts or not all(texts) or len(texts) > self.most:
            raise Wrong(f"{expected}, 1 to {self.most} of them")
        return texts

    def show(self, value: tuple[str, ...]) -> object:
        return list(value)

    def json_schema(self) -> dict[str, object]:
        items = {"type": "string", "minLength": 1}
        return {"type": "array", "items": items, "minItems": 1, "maxItems": self.most}


@dataclass(frozen=True, slots=True, kw_only=True)
class Group(_Key[str]):
    """The name or number of a user group, or ""."""

    def read(self, value: object) -> str:
        if not isinstance(value, str) or not re.fullmatch(r"([A-Za-z0-9_][A-Za-z0-9._-]{0,63}\$?)?", value, re.ASCII):
            raise Wrong('the name of a group, or ""')
        return value

    def json_schema(self) -> dict[str, object]:
        return {"type": "string", "pattern": r"^[A-Za-z0-9_]?[A-Za-z0-9._-]*\$?$"}


def is_private(reader: Reader[Any]) -> bool:
    """Whether what is written there must not be repeated."""
    return isinstance(reader, Hidden) or (isinstance(reader, Path) and reader.private)


def from_text(reader: Reader[Any], text: str) -> object:
    """The TOML value that somebody means who writes a text where TOML cannot be asked for: a shell, a variable.

    What the reader does not take as a text may be a number or truth value; a list begins with "[", or has one item.
    """
    if isinstance(reader, _LISTS):
        value = _parsed(text) if text.lstrip().startswith("[") else [text]
        return text if value is None else value
    try:
        reader.read(text)
    except Wrong:
        value = _parsed(text)
        return value if isinstance(value, (bool, int)) else text
    return text


def _parsed(text: str) -> object:
    """The value of a text that is one in TOML; None for what is not."""
    try:
        return tomli.loads(f"value = {text}")["value"]
    except (tomli.TOMLDecodeError, RecursionError, ValueError):
        return None


_LISTS: Final = (Networks, Fingerprints, Texts)


def _texts(value: object, expected: str) -> list[str]:
    if not isinstance(value, list):
        raise Wrong(expected, hint=f"did you mean [{shown_toml(value)}]?" if isinstance(value, str) else "")
    return [_text(item, expected) for item in value]


def _network(
    text: str, expected: str, *, versions: tuple[int, ...] = (4, 6)
) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise Wrong(expected, got=shown_toml(text)) from None
    if network.version not in versions or "/" not in text:
        hint = f'did you mean "{network}"?' if "/" not in text and network.version in versions else ""
        raise Wrong(expected, got=shown_toml(text), hint=hint)
    if ipaddress.ip_address(text.partition("/")[0]) != network.network_address:
        raise Wrong(expected, got=shown_toml(text), hint=f'did you mean "{network}"?')
    return network


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


_HOST_LABEL: Final = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)", re.ASCII)


def split_address(text: str, default_port: int | None, *, zero: bool = False) -> tuple[str, int]:
    """ "host:port", "host", "[::1]:port" -> (host in lower case without brackets, port).

    Args:
        text: what somebody wrote, or what the API returned.
        default_port: for a text without a port; None: a port is required.
        zero: port 0 ("any free one") is allowed.

    Raises:
        ValueError: with a sentence on what is wrong.
    """
    bracketed = re.fullmatch(r"\[([^\[\]]*)\](?::([^:]*))?", text)
    if bracketed:
        host, port_text = bracketed[1], bracketed[2]
        if ":" not in host:
            raise ValueError("only IPv6 addresses stand in brackets")
    elif text.count(":") > 1:
        raise ValueError("an IPv6 address stands in brackets: [2001:db8::1]:443")
    else:
        host, colon, rest = text.partition(":")
        port_text = rest if colon else None
    host = host.lower()
    if not _is_ip(host):
        labels = host.removesuffix(".").split(".")
        if len(host) > 253 or not all(_HOST_LABEL.fullmatch(label) for label in labels):
            raise ValueError("not a host name")
        if labels[-1].isdigit():
            raise ValueError("not an IP address")
    if port_text is None:
        if default_port is None:
            raise ValueError("a port is missing")
        return host, default_port
    if not re.fullmatch(r"[0-9]{1,5}", port_text, re.ASCII) or not (0 if zero else 1) <= int(port_text) <= 65535:
        raise ValueError(f"the port is a number from {0 if zero else 1} to 65535")
    return host, int(port_text)


def join_address(host: str, port: int | None) -> str:
    """The text form of an address; IPv6 in brackets."""
    shown = f"[{host}]" if ":" in host else host
    return shown if port is None else f"{shown}:{port}"


def key_problem(text: str) -> str:
    """Why a text cannot be an API key ("is empty", ...), or "". Surrounding white space is forgiven."""
    key = text.strip()
    if not key:
        return "is empty"
    if len(key) > MAX_KEY_CHARS:
        return f"is longer than {MAX_KEY_CHARS} characters"
    if not (key.isascii() and key.isprintable()) or " " in key:
        return "holds spaces or unprintable characters"
    return ""


# Words for messages


def nearest(word: str, words: Sequence[str] | Mapping[str, object]) -> str:
    """The word that `word` was probably meant to be, or ""."""
    from difflib import get_close_matches  # only a mistake pays for it

    found = get_close_matches(word[:100].lower(), list(words), n=1, cutoff=0.6)
    return found[0] if found else ""


def meant(word: str, words: Sequence[str] | Mapping[str, object]) -> str:
    """The hint 'did you mean "..."?', or ""."""
    near = nearest(word, words)
    return f'did you mean "{near}"?' if near else ""


def type_name(value: object) -> str:
    """What kind of TOML value this is, with its article."""
    names = ((bool, "a boolean"), (int, "an integer"), (float, "a number"), (str, "a text"), (list, "a list"))
    for kind, name in names:
        if isinstance(value, kind):
            return name
    return "a table" if isinstance(value, dict) else "a date or time"


def shown_toml(value: object) -> str:
    """What was written, as TOML, short."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f'"{printable(value, 100)}"'
    if isinstance(value, int):
        return str(value) if abs(value) < 10**18 else "an integer that is too big"
    if isinstance(value, list) and len(value) <= 4 and all(isinstance(item, (str, int)) for item in value):
        return "[" + ", ".join(shown_toml(item) for item in value) + "]"
    return str(value) if isinstance(value, float) else type_name(value)
