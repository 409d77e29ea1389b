"""The daemon's errors, and the exit codes that name them to scripts.

Every message is for the person at 3 a.m.: what happened, to which endpoint or file, what to do next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar


class Exit(IntEnum):
    """Exit codes of the command line, and the `code` of control answers (docs/protocol.md lists both)."""

    OK = 0
    NO = 1  # a check answered no
    USAGE = 2
    NOT_RUNNING = 3
    UNREACHABLE = 69  # the API or the ingress
    INTERNAL = 70
    CANNOT_CREATE = 73  # device, socket, file, or it is taken
    OUTPUT = 74  # what it prints cannot be written: the disk is full
    TEMPORARY = 75
    NOT_PERMITTED = 77
    CONFIG = 78


class NgrokdError(Exception):
    """The family. `remedy` is what to do next, one sentence, or ""; `exit_code` is what the command line returns."""

    exit_code: ClassVar[Exit] = Exit.INTERNAL

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.remedy = remedy


@dataclass(frozen=True, slots=True)
class Mistake:
    """One thing that is wrong in the configuration.

    Attributes:
        file: where it is written, or "$VARIABLE" or "--option".
        line: from 1; 0 where it is no file.
        key: dotted, printable; "" where it is no key's.
        text: what is wrong and what would be right.
        column: from 1; 0 where only the line is known.
    """

    file: str
    line: int
    key: str
    text: str
    column: int = 0

    def __str__(self) -> str:
        place = self.file + (f":{self.line}" if self.line else "") + (f":{self.column}" if self.column else "")
        return f"{place}: {self.key}: {self.text}" if self.key else f"{place}: {self.text}"


class ConfigError(NgrokdError):
    """The configuration is wrong; the message names file, line, key, value and what would be right, all at once.

    Attributes:
        mistakes: the same for programs, where they are known one by one.
    """

    exit_code = Exit.CONFIG

    def __init__(self, message: str, *, remedy: str = "", mistakes: Sequence[Mistake] = ()) -> None:
        super().__init__(message, remedy=remedy)
        self.mistakes = tuple(mistakes)


class StateError(NgrokdError):
    """A file of the state directory cannot be read, trusted or written."""

    exit_code = Exit.CANNOT_CREATE


class TakenError(NgrokdError):
    """Something we need belongs to somebody else, who is named: interface, subnet, lock, socket, port."""

    exit_code = Exit.CANNOT_CREATE


class PermissionMissingError(NgrokdError):
    """A right is missing (not: "you are not root"); the message says which and for what."""

    exit_code = Exit.NOT_PERMITTED


class NotRunningError(NgrokdError):
    """Nobody answers on the control socket."""

    exit_code = Exit.NOT_RUNNING


class ApiError(NgrokdError):
    """ngrok's API refused, or could not be understood or reached.

    Attributes:
        status: the HTTP status, 0 where there was no answer.
        code: ngrok's error code ("ERR_NGROK_226"), "" where it gave none.
        retry_after_s: how long the API asked us to wait, seconds, or None.
    """

    exit_code = Exit.UNREACHABLE

    def __init__(
        self, message: str, *, status: int = 0, code: str = "", retry_after_s: float | None = None, remedy: str = ""
    ) -> None:
        super().__init__(message, remedy=remedy)
        self.status = status
        self.code = code
        self.retry_after_s = retry_after_s


class RelayError(NgrokdError):
    """This flow failed; the others live. `reason` is a stable word for counters and `status`."""

    exit_code = Exit.UNREACHABLE
    reason: ClassVar[str] = "relay"


class IngressUnreachable(RelayError):  # noqa: N818 - a verdict, as the design calls it
    """Nobody answered at the ingress: name, connection, handshake or header ran out of time or was refused."""

    reason = "ingress_unreachable"


class IngressUntrusted(RelayError):  # noqa: N818
    """Somebody answered, and it is not ngrok: chain, dates or host name did not verify. Nothing was sent."""

    reason = "ingress_untrusted"


class BindingRefused(RelayError):  # noqa: N818
    """The ingress is ngrok's and said no; `code` and the message are its own, made printable."""

    reason = "binding_refused"

    def __init__(self, message: str, *, code: str = "", remedy: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.code = code


class StreamTruncated(RelayError):  # noqa: N818
    """The TLS stream ended without close_notify: bytes are missing, and the app must see a reset, not an end."""

    reason = "stream_truncated"
