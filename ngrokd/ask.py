"""Asking the running daemon: a blocking client of its control socket, of the standard library only.

It is what `ngrokd status` pays for, so it imports neither Trio nor anything of ours but the errors. The daemon at the
other end may be hung, of another version, or the Go daemon: every wait has one deadline, every size a bound, and an
answer without our own fields is understood as well.
"""

from __future__ import annotations

import json
import socket
import time
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from ngrokd.errors import Exit, NgrokdError, NotRunningError, PermissionMissingError

DEFAULT_SOCKET: Final = "/var/run/ngrokd.sock"
TIMEOUT_S: Final = 5.0
ANSWER_BYTES: Final = 64 << 20  # 65,000 endpoints take about 20 MiB


class RemoteError(NgrokdError):
    """The daemon answered, and the answer is no.

    Attributes:
        code: its code, an exit code of ours where the daemon is ours.
    """

    def __init__(self, message: str, *, code: int, remedy: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.code = code


class NoAnswerError(NgrokdError):
    """Somebody listens, and does not answer, or not as ngrokd does. Trying again may help."""

    exit_code: ClassVar[Exit] = Exit.TEMPORARY


@dataclass(frozen=True, slots=True)
class Answer:
    """A command that worked.

    Attributes:
        data: what the daemon returned, decoded from JSON.
        message: one sentence for people, or "".
    """

    data: Any  # whatever JSON holds: callers look before they use it
    message: str = ""


def ask(path: str, command: str, arguments: tuple[str, ...] = (), *, timeout_s: float = TIMEOUT_S) -> Answer:
    """Give the daemon one command and wait for the answer.

    Args:
        path: the control socket.
        command: its name.
        arguments: what it takes.
        timeout_s: for everything together.

    Raises:
        NotRunningError: nobody listens there.
        PermissionMissingError: the socket is closed to this user.
        NoAnswerError: no answer in time, or none that makes sense.
        RemoteError: the daemon refused, or failed.
    """
    deadline = time.monotonic() + timeout_s
    request: dict[str, object] = {"command": command}
    if arguments:
        request["args"] = list(arguments)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            connection.settimeout(timeout_s)
            _connect(connection, path)
            reply = _exchange(connection, json.dumps(request).encode(), deadline)
        except TimeoutError:
            raise NoAnswerError(
                f"the daemon at {path} does not answer within {timeout_s:g} s",
                remedy="look at its log; kill it and start it again if it hangs",
            ) from None
        except OSError as error:
            raise NoAnswerError(f"the daemon at {path} broke off: {error.strerror or error}") from error
    return _judge(reply, path)


def _connect(connection: socket.socket, path: str) -> None:
    try:
        connection.connect(path)
    except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError) as error:
        raise NotRunningError(
            f"ngrokd is not running (nobody answers at {path})", remedy="start it with: sudo ngrokd run"
        ) from error
    except PermissionError as error:
        raise PermissionMissingError(
            f"no permission to ask the daemon at {path}",
            remedy="use sudo, or become a member of the group that control.group names",
        ) from error
    except BlockingIOError as error:  # Linux: the queue of the listener is full
        raise TimeoutError from error


def _exchange(connection: socket.socket, request: bytes, deadline: float) -> bytes:
    try:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
    except (BrokenPipeError, ConnectionResetError):
        pass  # turned away before it read: the reason may have arrived
    reply = bytearray()
    while not reply.endswith(b"\n"):
        connection.settimeout(_remaining(deadline))
        piece = connection.recv(1 << 16)
        if not piece:
            break
        reply += piece
        if len(reply) > ANSWER_BYTES:
            raise NoAnswerError(f"the answer is longer than {ANSWER_BYTES >> 20} MiB")
    return bytes(reply)


def _remaining(deadline: float) -> float:
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise TimeoutError
    return remaining


def _judge(reply: bytes, path: str) -> Answer:
    if not reply:
        raise NoAnswerError(f"the daemon at {path} closed the connection without an answer", remedy="try again")
    try:
        answer = json.loads(reply)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict) or not isinstance(answer.get("success"), bool):
        raise NoAnswerError(f"what answers at {path} is not ngrokd", remedy="check control.socket, or name another")
    message = answer.get("message")
    if answer["success"]:
        return Answer(answer.get("data"), message if isinstance(message, str) else "")
    error, hint, code = answer.get("error"), answer.get("hint"), answer.get("code")
    raise RemoteError(
        error if isinstance(error, str) and error else "the daemon failed and did not say why",
        code=code if isinstance(code, int) and 0 < code < 256 else int(Exit.NO),
        remedy=hint if isinstance(hint, str) else "",
    )
