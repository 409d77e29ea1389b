"""Asking the running daemon: a blocking client of its control socket, of the standard library only.

It is what `ngrokd status` pays for, so it imports neither Trio nor anything of ours but the errors. The daemon at the
other end may be hung, of another version, or the Go daemon: every wait has one deadline, every size a bound, and an
answer without our own fields is understood as well.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar, Final, Self

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
            raise _no_answer(path, timeout_s) from None
        except OSError as error:
            raise _broke_off(path, error) from error
    return _judge(reply, path)


def _no_answer(path: str, timeout_s: float) -> NoAnswerError:
    return NoAnswerError(
        f"the daemon at {path} does not answer within {timeout_s:g} s",
        remedy="look at its log; kill it and start it again if it hangs",
    )


def _broke_off(path: str, error: OSError) -> NoAnswerError:
    return NoAnswerError(f"the daemon at {path} broke off: {error.strerror or error}")


class Subscription:
    """An answer that goes on: `data` of its first line, and then one value for each further line.

    A context manager; leaving it tells the daemon that nobody listens any more. Those who wait for other things as well
    wait for `fileno` unless `has_line`, and then take what `ready` gives.

    Attributes:
        data: what the daemon returned first, decoded from JSON.
    """

    def __init__(self, path: str, command: str, arguments: tuple[str, ...] = (), *, timeout_s: float = TIMEOUT_S):
        """Give the daemon a command that goes on. Raises as `ask`; `timeout_s` is for the first line."""
        self._path = path
        self._rest = bytearray()
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        request = {"command": command, "args": list(arguments)}
        deadline = time.monotonic() + timeout_s
        try:
            self._connection.settimeout(timeout_s)
            _connect(self._connection, path)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self._connection.sendall(json.dumps(request).encode())
            self.data = _judge(self._first_line(deadline), path).data
            self._connection.settimeout(None)
        except TimeoutError:
            self.close()
            raise _no_answer(path, timeout_s) from None
        except OSError as error:
            self.close()
            raise _broke_off(path, error) from error
        except BaseException:
            self.close()
            raise

    def _first_line(self, deadline: float) -> bytes:
        while b"\n" not in self._rest:
            self._connection.settimeout(_remaining(deadline))
            if not self._receive():
                return bytes(self._rest)
        return self._take_line() or b""

    def _receive(self) -> bool:
        piece = self._connection.recv(1 << 18)
        self._rest += piece
        if len(self._rest) > ANSWER_BYTES:
            raise NoAnswerError(f"a line of the answer is longer than {ANSWER_BYTES >> 20} MiB")
        return bool(piece)

    def _take_line(self) -> bytes | None:
        end = self._rest.find(b"\n")
        if end < 0:
            return None
        line = bytes(self._rest[:end])
        del self._rest[: end + 1]
        return line

    def fileno(self) -> int:
        """The descriptor to wait on, for reading."""
        return self._connection.fileno()

    @property
    def has_line(self) -> bool:
        """A whole line has come already."""
        return b"\n" in self._rest

    def ready(self) -> Iterator[Any]:
        """The lines that have come by now, perhaps none; waits only while no byte has.

        Raises NoAnswerError when the daemon has ended the answer.
        """
        try:
            if not self.has_line and not self._receive():
                raise NoAnswerError(f"the daemon at {self._path} has ended")
        except OSError as error:
            raise _broke_off(self._path, error) from error
        while (line := self._take_line()) is not None:
            yield _decode(line, self._path)

    def __iter__(self) -> Iterator[Any]:
        """Each further line, until the daemon ends the answer. Raises RemoteError when that ends with an error."""
        while True:
            while (line := self._take_line()) is not None:
                yield _decode(line, self._path)
            try:
                if not self._receive():
                    return
            except OSError as error:
                raise _broke_off(self._path, error) from error

    def close(self) -> None:
        """Stop listening. Idempotent."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _decode(line: bytes, path: str) -> Any:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise NoAnswerError(f"what answers at {path} sends lines that make no sense") from None
    error = value.get("error") if isinstance(value, dict) else None
    if isinstance(error, dict):
        raise _remote_error(error.get("message"), error.get("hint"), error.get("code"))
    return value


def listens(path: str) -> bool:
    """Whether anybody listens on this socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(TIMEOUT_S)
        try:
            connection.connect(path)
        except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
            return False
        except OSError:  # it is closed to this user, or busy
            return True
    return True


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
    raise _remote_error(answer.get("error"), answer.get("hint"), answer.get("code"))


def _remote_error(error: object, hint: object, code: object) -> RemoteError:
    return RemoteError(
        error if isinstance(error, str) and error else "the daemon failed and did not say why",
        code=code if isinstance(code, int) and 0 < code < 256 else int(Exit.NO),
        remedy=hint if isinstance(hint, str) else "",
    )
