"""The shared words: what an endpoint is, what a host name may be, and how foreign text is shown.

Everything ngrok's API says is hostile until this module has looked at it. One wrong name in the hosts file
redirects every program on the machine, so the rules are strict in characters and judged on the raw text: no URL
library sees it first, because those repair, decode and normalise, and what they repair differs from library to
library. One bad endpoint raises `BadEndpoint` with a reason fit for a terminal; the others live.

A daemon may hold 65,000 of them for ever. `Endpoint` is therefore a msgspec structure that the garbage collector does
not look at: it holds texts and numbers only, so it can be in no cycle, and each full collection, which holds up every
packet, is spared the walk over it.

Pure: no I/O, no clock, no name resolution.
"""

from __future__ import annotations

import hmac
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from sys import intern
from typing import Final, NoReturn

import msgspec

from ngrokd.errors import NgrokdError

DEFAULT_PORTS: Final[Mapping[str, int | None]] = {"http": 80, "https": 443, "tls": 443, "tcp": None}
"""The schemes we serve. A tcp URL without a port names no service (ngrok requires one as well)."""

ALWAYS_DENIED: Final = frozenset({"api.ngrok.com", "kubernetes-binding-ingress.ngrok.io"})
"""ngrok's own doors: naming one of them here would send the daemon's own connections back into itself."""

MAX_URL: Final = 2048
"""Characters. The longest valid URL is below 300; the rest is slack for reasons that quote it."""

MAX_HOSTNAME: Final = 253
"""Characters of the textual form without the trailing dot (RFC 1035 2.3.4: 255 bytes on the wire)."""


class BadEndpoint(NgrokdError):  # noqa: N818 - a verdict on what was received
    """An endpoint or host name from outside cannot be served; the message is the reason and is printable."""


class Endpoint(msgspec.Struct, frozen=True, gc=False):
    """One kubernetes-bound endpoint, as the API lists it and after it was found fit.

    Attributes:
        id: ngrok's identifier, printable ASCII.
        url: as the API gave it (printable ASCII; case and a trailing "/" are kept).
        scheme: "http", "https", "tcp" or "tls". The bytes are carried unchanged whatever it says.
        host: lower case, without trailing dot; goes into the binding header and the hosts file.
        port: the public port, 1..65535.
        proto: what the API calls the protocol, else the scheme.
        name: ngrok's name of it, printable, may be "".
        description: the owner's words, printable, may be "".
    """

    id: str
    url: str
    scheme: str
    host: str
    port: int
    proto: str
    name: str = ""
    description: str = ""


@dataclass(frozen=True, slots=True)
class Credentials:
    """The client certificate that opens the ingress, as PEM.

    Attributes:
        key_pem: the private key; never shown.
        certificate_pem: the certificate, chain included where there is one.
        not_before: start of its validity, wall clock seconds since 1970; 0 when unknown.
        not_after: end of its validity, wall clock seconds since 1970; infinite when unknown.
    """

    key_pem: bytes = field(repr=False)
    certificate_pem: bytes = field(repr=False)
    not_before: float = 0.0
    not_after: float = math.inf


class Secret:
    """A text that no log, traceback, format string or answer shows: all of them see `***`.

    It refuses to be pickled, because pickles end up in files.
    """

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """The text itself. Callers hand it straight to where it is needed and keep no copy."""
        return self._value

    def __repr__(self) -> str:
        return "***"

    def __str__(self) -> str:
        return "***"

    def __format__(self, spec: str) -> str:
        return "***"

    def __bool__(self) -> bool:
        return bool(self._value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        # Compared in constant time: the control socket lets callers offer keys.
        return hmac.compare_digest(
            self._value.encode("utf-8", "surrogatepass"), other._value.encode("utf-8", "surrogatepass")
        )

    def __hash__(self) -> int:
        return hash((Secret, self._value))

    def __copy__(self) -> Secret:
        return self

    def __deepcopy__(self, memo: object) -> Secret:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Secret is not pickled")


def printable(text: str, limit: int = 200) -> str:
    """Make foreign text safe for a log line and a terminal.

    Control characters, line separators, bidirectional and zero-width characters, private and lone surrogate code
    points become backslash escapes; what is too long ends in "...". Text that is printable already comes back as it
    is, so doing it twice (a reason that quotes a reason) does no harm; the price is that a backslash may be either.

    Args:
        text: anything.
        limit: the longest result in characters, at least 3.
    """
    # Each character yields at least one, so nothing beyond the limit can be shown: a 64 MiB text costs no more.
    head = text[: limit + 1]
    if not head.isprintable():
        head = "".join(map(_escape, head))
    if len(head) <= limit and len(text) <= limit:
        return head
    return head[: limit - 3] + "..."


def check_hostname(text: str) -> str:
    """Judge a host name by grammar and by the names nobody may take over.

    Labels of letters, digits and inner hyphens, 1..63 long, joined by dots, at most 253 in all; underscores only
    before the last label (as in `_grpc.api.prod`); a last label that is a number would be read as an address. One
    trailing dot is stripped and upper case is lowered. International names must come as A-labels (`xn--`).
    What depends on this machine (its own name, its hosts file, the configured servers) is not judged here.

    Returns:
        The name in lower case without trailing dot.

    Raises:
        BadEndpoint: with a printable reason.
    """
    if not text.isascii():
        raise BadEndpoint(
            f"host name {_quote(text)} has non-ASCII characters (international names come as xn-- labels)"
        )
    name = text.removesuffix(".").lower()
    if not name:
        raise BadEndpoint("the host name is empty")
    if len(name) > MAX_HOSTNAME:
        raise BadEndpoint(f"host name {_quote(text, 80)} is longer than {MAX_HOSTNAME} characters")
    if "*" in name:
        raise BadEndpoint(f"wildcard {_quote(text)} is not served yet")
    if _HOSTNAME.fullmatch(name) is None:
        raise BadEndpoint(f"host name {_quote(text)} {_what_is_wrong(name)}")
    if name in _DENIED_NAMES or name.endswith(_DENIED_SUFFIXES) or name.startswith("ip6-"):
        raise BadEndpoint(f"host name {name} has a meaning of its own on every machine and is never taken over")
    return name


def parse_endpoint(obj: object) -> Endpoint:
    """Read one object of the bound endpoints list.

    Fields read: `id`, `url` (else the deprecated `public_url`), `proto`, `name`, `description`; null is the same as
    absent, unknown fields are ignored. `scheme://host[:port][/]` and nothing else is a URL here.

    Args:
        obj: a decoded JSON value of any type.

    Raises:
        BadEndpoint: the only error, with a printable reason.
    """
    if not isinstance(obj, dict):
        raise BadEndpoint(f"the endpoint is {_kind(obj)}, not an object")
    id_ = _text(obj, "id")
    if _ID.fullmatch(id_) is None:
        raise BadEndpoint(f"the id {_quote(id_)} is not 1 to 128 printable ASCII characters" if id_ else "it has no id")
    url = _text(obj, "url") or _text(obj, "public_url")
    if not url:
        raise BadEndpoint("it has no url")
    scheme, host, port = parse_url(url)
    proto = _text(obj, "proto")
    if proto and _PROTO.fullmatch(proto) is None:
        raise BadEndpoint(f"the proto {_quote(proto)} is not a word")
    return Endpoint(
        id=id_,
        url=url,
        scheme=scheme,
        host=host,
        port=port,
        proto=intern(proto.lower()) or scheme,
        name=printable(_text(obj, "name")),
        description=printable(_text(obj, "description"), 255),
    )


def parse_url(url: str) -> tuple[str, str, int]:
    """Read `scheme://host[:port][/]`.

    Returns:
        Scheme (lower case), host (as `check_hostname` returns it), port.

    Raises:
        BadEndpoint: the only error, with a printable reason.
    """
    if len(url) > MAX_URL:
        raise BadEndpoint(f"the url is longer than {MAX_URL} characters")
    # Before anything else looks at the text: what is invisible or looks like something else never gets further.
    if _RAW.fullmatch(url) is None:
        raise BadEndpoint(f"the url {_quote(shown_url(url))} has blanks, control or non-ASCII characters")
    parts = _URL.fullmatch(url)
    if parts is None:
        raise BadEndpoint(f"the url {_quote(shown_url(url))} is not scheme://host[:port]")
    scheme = intern(parts["scheme"].lower())
    if scheme not in DEFAULT_PORTS:
        raise BadEndpoint(f"the scheme of {_quote(shown_url(url))} is none of http, https, tcp, tls")
    authority, rest = parts["authority"], parts["rest"]
    if "@" in authority:
        raise BadEndpoint(f"the url {_quote(shown_url(url))} has user info")
    if "#" in rest:
        raise BadEndpoint(f"the url {_quote(shown_url(url))} has a fragment")
    if "?" in rest:
        raise BadEndpoint(f"the url {_quote(shown_url(url))} has a query")
    if rest not in ("", "/"):
        raise BadEndpoint(f"the url {_quote(shown_url(url))} has a path")
    if "[" in authority or "]" in authority:
        raise BadEndpoint(f"the url {_quote(shown_url(url))} has an address instead of a name")
    text, colon, digits = authority.partition(":")
    host = check_hostname(text)
    if colon:
        return scheme, host, _port(digits, url)
    default = DEFAULT_PORTS[scheme]
    if default is None:
        raise BadEndpoint(f"the url {_quote(shown_url(url))} needs a port: {scheme} has none by default")
    return scheme, host, default


def shown_url(url: str) -> str:
    """The URL with its user info, which may hold a password, replaced by `***`. Not yet printable."""
    return _USER_INFO.sub("://***@", url[:MAX_URL])


_RAW: Final = re.compile(r"[\x21-\x7e]*")
_URL: Final = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<authority>[^/?#]*)(?P<rest>.*)")
_USER_INFO: Final = re.compile(r"://[^/?#]*@")
_PORT: Final = re.compile(r"[1-9][0-9]{0,4}")
_ID: Final = re.compile(r"[\x21-\x7e]{1,128}")
_PROTO: Final = re.compile(r"[A-Za-z][A-Za-z0-9+._-]{0,31}")
_HOSTNAME: Final = re.compile(
    r"(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\.)*"
    # A last label of digits, or 0x and hex digits, makes inet_aton() and browsers read an address.
    r"(?!(?:[0-9]+|0x[0-9a-f]*)$)[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
)
# Debian's, Fedora's and macOS's own lines in the hosts file; mDNS (RFC 6762); reverse names (RFC 3172).
_DENIED_NAMES: Final = frozenset(
    {
        "localhost", "localhost4", "localhost6", "localhost.localdomain", "localhost4.localdomain4",
        "localhost6.localdomain6", "broadcasthost", "local", "arpa",
    }
)  # fmt: skip
_DENIED_SUFFIXES: Final = (".localhost", ".local", ".arpa")


def _escape(char: str) -> str:
    return char if char.isprintable() else char.encode("unicode_escape").decode("ascii")


def _quote(text: str, limit: int = 120) -> str:
    # Non-ASCII is escaped here although it may be printable: a look-alike letter must look wrong in the reason.
    shown = ascii(text[: limit + 1])[1:-1]
    return f'"{shown}"' if len(text) <= limit and len(shown) <= limit else f'"{shown[: limit - 3]}..."'


def _what_is_wrong(name: str) -> str:
    labels = name.split(".")
    if "" in labels:
        return "has an empty label"
    if any(len(label) > 63 for label in labels):
        return "has a label longer than 63 characters"
    if re.search(r"[^a-z0-9_.-]", name):
        return "has characters other than letters, digits, hyphens and dots"
    if any(label[0] == "-" or label[-1] == "-" for label in labels):
        return "has a label that begins or ends with a hyphen"
    if "_" in labels[-1]:
        return "has an underscore in its last label"
    return "ends in a number and would be read as an address"


def _port(digits: str, url: str) -> int:
    if _PORT.fullmatch(digits) is None or int(digits) > 65535:
        raise BadEndpoint(f"the port of {_quote(shown_url(url))} is not 1 to 65535")
    return int(digits)


def _text(obj: Mapping[object, object], key: str) -> str:
    value = obj.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadEndpoint(f"its {key} is {_kind(value)}, not a text")
    return value


def _kind(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "a text"
    if isinstance(value, dict):
        return "an object"
    return "a list" if isinstance(value, list | tuple) else f"a {type(value).__name__}"
