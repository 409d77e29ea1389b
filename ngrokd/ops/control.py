"""The control socket: how `ngrokd status` and its like ask the running daemon.

Theory of operation
-------------------
A client sends one JSON object and is answered with one line of JSON, then the connection is closed. Nothing marks the
end of the object but its own last bracket, since clients of the Go daemon send no newline and do not half-close; so a
`JsonScanner` looks at every byte as it comes and knows when the object is whole, or can no longer become one.

A command may also answer for as long as the client stays: after the line that says it worked come further lines of
JSON. Such a client leaves by closing or half-closing. It costs a task, and so these are counted apart from those that
only ask; one that does not take what is sent to it within WRITE_S is let go, and nobody else notices.

Whoever can connect may be hostile: sizes, depth, time and the number of connections are bounded, per user as well,
and each request is judged by the credentials that the kernel vouches for, not by the mode of the file alone. The
group may look; only root and the daemon's own user may change things.

The socket is made with its final mode in one step, under a lock that lives as long as it does: so of two daemons that
start at once exactly one gets the path, and a file is only ever removed when it is a socket that nobody answers on.
"""

from __future__ import annotations

import grp
import json
import logging
import os
import re
import socket
import stat
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar, Final, Self, TypeAlias

import trio

from ngrokd import files
from ngrokd.endpoints import printable
from ngrokd.errors import Exit, NgrokdError, PermissionMissingError, StateError, TakenError
from ngrokd.metrics import Counters
from ngrokd.ops.accepting import accept
from ngrokd.ops.answers import json_pieces
from ngrokd.ops.peers import Peer, peer_of, process_name

log = logging.getLogger(__name__)

REQUEST_BYTES: Final = 64 << 10
READ_S: Final = 5.0  # for the whole request
WRITE_S: Final = 5.0  # for the whole answer
CONNECTIONS: Final = 64
CONNECTIONS_PER_USER: Final = 8
STREAMS: Final = 32
STREAMS_PER_USER: Final = 16
DEPTH: Final = 32
BACKLOG: Final = 128
MODE: Final = 0o660
_PROBE_S: Final = 1.0  # for a living daemon's kernel to accept a connection


class ControlError(NgrokdError):
    """A command failed in a way that has its own exit code and, for clients of the Go daemon, its own words."""

    exit_code: ClassVar[Exit] = Exit.NO

    def __init__(self, message: str, *, code: Exit = Exit.NO, remedy: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.code = code


class SocketError(NgrokdError):
    """The control socket cannot be made."""

    exit_code: ClassVar[Exit] = Exit.CANNOT_CREATE


@dataclass(frozen=True, slots=True)
class Command:
    """One command of the control protocol.

    Attributes:
        handler: gets the arguments and who asks; returns what JSON can show (what may be long as an iterator), or
            raises NgrokdError. It is not interrupted when the client leaves.
        changes: only root and the daemon's own user may give it, unless `for_group`.
        for_group: members of the group may give it, although it changes something.
    """

    handler: Callable[[list[str], Peer], Awaitable[object]]
    changes: bool = False
    for_group: bool = False


Send: TypeAlias = Callable[[bytes], Awaitable[None]]
Start: TypeAlias = Callable[[object], Awaitable[Send]]


@dataclass(frozen=True, slots=True)
class Streaming:
    """A command whose answer goes on.

    Attributes:
        handler: gets the arguments, who asks, and `start`. It calls `start(data)` once, which sends the line that says
            that it worked, and gets what sends further lines (whole ones, with their ends). NgrokdError before that is
            an ordinary failure, afterwards a last line with `error`. It is cancelled when the client leaves.
        changes, for_group: see Command.
    """

    handler: Callable[[list[str], Peer, Start], Awaitable[None]]
    changes: bool = False
    for_group: bool = False


# One request


class BadRequest(NgrokdError):  # noqa: N818 - a verdict on what was received
    """The request is not one JSON object of the right form; the message says why."""

    exit_code: ClassVar[Exit] = Exit.USAGE


class JsonScanner:
    """Finds the end of one JSON object in bytes that arrive in pieces, without parsing it.

    It looks only at brackets and quotes; whether the object is valid is for the parser to say. `feed` returns True
    when the object is whole; its bytes are then `data`. Work is linear in what arrives.
    """

    _TOKENS = re.compile(rb'["\\{}\[\]]')
    _STRING_TOKENS = re.compile(rb'["\\]')

    def __init__(self, limit: int = REQUEST_BYTES, depth: int = DEPTH) -> None:
        self._limit = limit
        self._most_depth = depth
        self._data = bytearray()
        self._position = 0
        self._depth = 0
        self._in_string = False

    @property
    def data(self) -> bytes:
        """What has arrived of the object, without white space before it and anything behind it."""
        return bytes(self._data)

    def feed(self, piece: bytes) -> bool:
        """Look at more bytes. Raises BadRequest once it is clear that this is no acceptable object."""
        if not self._data:
            piece = piece.lstrip(b" \t\r\n")
        self._data += piece
        if not self._data:
            return False
        if self._data[0] != ord("{"):
            raise BadRequest("not a JSON object")
        whole = self._scan()
        if len(self._data) > self._limit:
            raise BadRequest(f"longer than {self._limit} bytes")
        return whole

    def _scan(self) -> bool:
        while True:
            tokens = self._STRING_TOKENS if self._in_string else self._TOKENS
            found = tokens.search(self._data, self._position)
            if found is None:
                self._position = len(self._data)
                return False
            token = found[0]
            if token == b"\\":
                if found.end() == len(self._data):  # what it escapes has not arrived
                    self._position = found.start()
                    return False
                self._position = found.end() + 1
                continue
            self._position = found.end()
            if token == b'"':
                self._in_string = not self._in_string
            elif token in b"{[":
                self._depth += 1
                if self._depth > self._most_depth:
                    raise BadRequest(f"nested more than {self._most_depth} levels deep")
            else:
                self._depth -= 1
                if self._depth == 0:
                    del self._data[self._position :]
                    return True


def parse_request(data: bytes) -> tuple[str, list[str]]:
    """One whole request -> the command and its arguments. Raises BadRequest and nothing else.

    Unknown members are ignored, as the Go daemon does; a member given twice, NaN and Infinity are refused.
    """
    try:
        request = json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise BadRequest("not UTF-8") from None
    except ValueError as error:  # JSONDecodeError too; and an integer of too many digits
        raise BadRequest(str(error)[:200]) from None
    except RecursionError:
        raise BadRequest("nested too deeply") from None
    if not isinstance(request, dict):
        raise BadRequest("not a JSON object")
    command = request.get("command", "")
    arguments = request.get("args")
    if not isinstance(command, str):
        raise BadRequest("command is not a string")
    if arguments is None:
        arguments = []
    if not isinstance(arguments, list) or not all(isinstance(argument, str) for argument in arguments):
        raise BadRequest("args is not a list of strings")
    return command, arguments


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:  # Any: whatever JSON holds
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a member is given twice")
    return members


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def success(data: object) -> dict[str, object]:
    """The answer to a command that worked: the Go daemon's fields, then ours."""
    return {"success": True, "data": data, "code": int(Exit.OK), "message": data if isinstance(data, str) else "ok"}


def failure(error: str, code: int, remedy: str = "") -> dict[str, object]:
    """The answer to a command that did not: `error` as the Go daemon words it, `message` with what to do next."""
    answer: dict[str, object] = {"success": False, "error": error, "code": code, "message": error}
    if remedy:
        answer["hint"] = remedy
    return answer


def failure_of(error: NgrokdError) -> dict[str, object]:
    """The answer that says what an error says."""
    code = error.code if isinstance(error, ControlError) else error.exit_code
    return failure(str(error), int(code), error.remedy)


def encode_answer(answer: Mapping[str, object]) -> Iterator[bytes]:
    """The answer as one line, in pieces that are made one by one (see `ngrokd.ops.answers`).

    `data` must be what JSON can show; surrogates are escaped, so it is always ASCII.
    """
    last = b""
    for piece in json_pieces(answer):
        if last:
            yield last
        last = piece
    yield last + b"\n"


# The server


class _Places:
    """So many may be inside at a time, and so many of one user. Invariant: who is inside is counted once."""

    def __init__(self, most: int, per_user: int) -> None:
        self._most = most
        self._per_user = per_user
        self._taken = 0
        self._by_user: Counter[int] = Counter()

    @contextmanager
    def take(self, uid: int) -> Iterator[bool]:
        """One of the places, while inside; False when there is none left."""
        if self._taken >= self._most or self._by_user[uid] >= self._per_user:
            yield False
            return
        self._taken += 1
        self._by_user[uid] += 1
        try:
            yield True
        finally:
            self._taken -= 1
            self._by_user[uid] -= 1
            if not self._by_user[uid]:
                del self._by_user[uid]


class ControlServer:
    """Answers requests, one per connection.

    Errors of one client end that client. `strict` lets a bug in a handler rise instead of answering "internal error":
    for tests.
    """

    def __init__(
        self, commands: Mapping[str, Command | Streaming], *, own_uid: int | None = None, strict: bool = False
    ) -> None:
        self._commands = dict(commands)
        self._own_uid = os.geteuid() if own_uid is None else own_uid
        self._strict = strict
        self._asking = _Places(CONNECTIONS, CONNECTIONS_PER_USER)
        self._listening = _Places(STREAMS, STREAMS_PER_USER)
        self.counters = Counters(("requests", "refused", "failed", "malformed", "turned_away", "too_slow"))

    async def serve(
        self, control: ControlSocket, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Accept clients for ever. Cancelled, it closes their connections; the socket stays the caller's."""
        async with trio.open_nursery() as clients:  # a client's error is handled within its task
            task_status.started()
            while True:
                connection = await accept(control.listener, "control socket")
                clients.start_soon(self._serve_connection, connection, control.gid)

    async def _serve_connection(self, connection: trio.socket.SocketType, gid: int) -> None:
        try:
            peer = peer_of(connection)
        except OSError:  # it has left already
            connection.close()
            return
        await self.serve_stream(trio.SocketStream(connection), peer, gid)

    async def serve_stream(self, stream: trio.abc.Stream, peer: Peer, gid: int | None = None) -> None:
        """Answer the one request of one client, and close its stream.

        Args:
            stream: any stream.
            peer: who it is.
            gid: the group that may look, besides root and our own user.
        """
        try:
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError):
                await self._converse(stream, peer, gid)
        finally:
            await trio.aclose_forcefully(stream)

    async def _converse(self, stream: trio.abc.Stream, peer: Peer, gid: int | None) -> None:
        with self._asking.take(peer.uid) as has_place:
            if not has_place:
                await self._turn_away(stream)
                return
            answer = await self._answer(stream, peer, gid)
            if answer is None:
                return
            if not isinstance(answer, _Subscription):
                await _send_answer(stream, answer)
                return
        with self._listening.take(peer.uid) as has_place:
            if not has_place:
                await self._turn_away(stream)
                return
            await self._keep_telling(stream, peer, answer)

    async def _turn_away(self, stream: trio.abc.Stream) -> None:
        self.counters.add("turned_away")
        await _send_answer(stream, failure("too many connections", Exit.TEMPORARY, "try again in some seconds"))

    async def _keep_telling(self, stream: trio.abc.Stream, peer: Peer, subscription: _Subscription) -> None:
        """Carry out a streaming command until it is over or the client leaves."""

        async def listen() -> None:
            # Whatever else it says is not for us; one that says much is not listening.
            heard = 0
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                while heard < REQUEST_BYTES and (piece := await stream.receive_some(4096)):
                    heard += len(piece)
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:  # the command's errors are handled within
            nursery.start_soon(listen)
            await self._tell(stream, peer, subscription)
            nursery.cancel_scope.cancel()

    async def _tell(self, stream: trio.abc.Stream, peer: Peer, subscription: _Subscription) -> None:
        started = False

        async def send(data: bytes) -> None:
            with trio.fail_after(WRITE_S):
                await stream.send_all(data)

        async def start(data: object) -> Send:
            nonlocal started
            started = True
            for piece in encode_answer(success(data)):
                await send(piece)
            return send

        try:
            await subscription.command.handler(subscription.arguments, peer, start)
            return
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return
        except trio.TooSlowError:
            self.counters.add("too_slow")
            log.warning("control socket: %s for %s was ended: it does not read", subscription.name, peer)
            return
        except NgrokdError as error:
            answer = failure_of(error)
        except Exception as error:
            if self._strict:
                raise
            log.exception("control socket: %s failed", subscription.name)
            answer = failure(
                f"internal error: {type(error).__name__}", Exit.INTERNAL, "the log of the daemon says more"
            )
        self.counters.add("failed")
        if started:
            answer = {"error": {name: answer[name] for name in ("code", "message", "hint") if name in answer}}
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await _send_answer(stream, answer)

    async def _answer(
        self, stream: trio.abc.Stream, peer: Peer, gid: int | None
    ) -> dict[str, object] | _Subscription | None:
        """The answer, or None for a client that left without a word."""
        try:
            data = await self._receive(stream)
            if data is None:
                return None
            command, arguments = parse_request(data)
        except BadRequest as error:
            self.counters.add("malformed")
            return failure(f"failed to decode command: {error}", Exit.USAGE)
        self.counters.add("requests")
        return await self._carry_out(command, arguments, peer, gid)

    @staticmethod
    async def _receive(stream: trio.abc.Stream) -> bytes | None:
        scanner = JsonScanner()
        with trio.move_on_after(READ_S):
            while True:
                piece = await stream.receive_some(16384)
                if not piece:
                    if not scanner.data:
                        return None
                    raise BadRequest("unexpected EOF")
                if scanner.feed(bytes(piece)):
                    return scanner.data
        raise BadRequest(f"not whole after {READ_S:g} s")

    async def _carry_out(
        self, name: str, arguments: list[str], peer: Peer, gid: int | None
    ) -> dict[str, object] | _Subscription:
        command = self._commands.get(name)
        if command is None:
            return failure(f"unknown command: {printable(name)}", Exit.USAGE)
        refusal = refuse(peer, command, self._own_uid, gid)
        if refusal is not None:
            self.counters.add("refused")
            log.warning("control socket: %s refused to %s", name, peer)
            return refusal
        if command.changes:
            log.info("control socket: %s by %s", name, peer)
        if isinstance(command, Streaming):
            return _Subscription(name, command, arguments)
        try:
            return success(await command.handler(arguments, peer))
        except NgrokdError as error:
            self.counters.add("failed")
            return failure_of(error)
        except Exception as error:
            if self._strict:
                raise
            self.counters.add("failed")
            log.exception("control socket: %s failed", name)
            return failure(f"internal error: {type(error).__name__}", Exit.INTERNAL, "the log of the daemon says more")


@dataclass(frozen=True, slots=True)
class _Subscription:
    """A streaming command that was asked for by somebody who may."""

    name: str
    command: Streaming
    arguments: list[str]


async def _send_answer(stream: trio.abc.Stream, answer: Mapping[str, object]) -> None:
    with trio.move_on_after(WRITE_S):
        for piece in encode_answer(answer):
            await stream.send_all(piece)


def refuse(peer: Peer, command: Command | Streaming, own_uid: int, gid: int | None) -> dict[str, object] | None:
    """The answer to somebody who may not give this command; None: he may."""
    if peer.uid in (0, own_uid):
        return None
    if command.changes and not command.for_group:
        return failure("permission denied: only root may do this", Exit.NOT_PERMITTED, "give the command with sudo")
    if gid is not None and (peer.gid == gid or gid in peer.groups):
        return None
    remedy = "give the command with sudo, or join the group that control.group names"
    return failure("permission denied", Exit.NOT_PERMITTED, remedy)


# The socket


class ControlSocket:
    """The listening socket, its file and the lock beside it. A context manager; leaving it removes both files.

    Attributes:
        path: where it is.
        gid: the group whose members may look.
        listener: accepts clients; non-blocking, for use in a Trio task.
    """

    def __init__(self, path: str, group: str = "") -> None:
        self.path = path
        self.gid = _find_group(group)
        self._lock = files.Lock(path + ".lock", f"control socket {path}")
        self._take_lock()
        try:
            _remove_stale(path)
            listener, self._identity = _bind(path, self.gid)
        except BaseException:
            self._lock.release()
            raise
        self.listener = trio.socket.from_stdlib_socket(listener)

    def _take_lock(self) -> None:
        try:
            self._lock.acquire()
        except TakenError as error:
            owner = files.lock_owner(self._lock.path)
            who = process_name(owner.pid) if owner is not None and owner.pid else "another process"
            raise _taken(self.path, who) from error
        except StateError as error:
            directory = os.path.dirname(self.path)
            missing = f"make the directory: mkdir -p {directory}" if not os.path.isdir(directory) else error.remedy
            raise SocketError(f"cannot make the control socket {self.path}: {error}", remedy=missing) from error

    def close(self) -> None:
        """Stop listening and remove the files, unless somebody has put others in their place."""
        self.listener.close()
        with suppress(OSError):
            status = os.lstat(self.path)
            if (status.st_dev, status.st_ino) == self._identity:
                os.unlink(self.path)
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _find_group(name: str) -> int:
    if not name:
        return os.getegid()
    try:
        return int(name) if name.isdecimal() else grp.getgrnam(name).gr_gid
    except KeyError:
        raise SocketError(
            f"there is no group {name!r}, which control.group names", remedy=f"make it with: sudo groupadd {name}"
        ) from None


def _remove_stale(path: str) -> None:
    """Remove the socket of a daemon that is gone. Anything else at the path is left alone, as an error."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise SocketError(f"cannot look at {path}: {error.strerror}") from error
    if not stat.S_ISSOCK(mode):
        raise TakenError(
            f"{path} is not a socket, so it is not replaced by the control socket",
            remedy="move it away, or set control.socket to another path",
        )
    owner = socket_owner(path)
    if owner is not None:
        raise _taken(path, owner)
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise SocketError(f"cannot remove the dead socket {path}: {error.strerror}") from error


def socket_owner(path: str) -> str | None:
    """Who answers on the socket at this path, in words; None when nobody does. Raises PermissionMissingError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_PROBE_S)
        try:
            probe.connect(path)
            pid = peer_of(probe).pid
        except (ConnectionRefusedError, FileNotFoundError):
            return None
        except PermissionError as error:
            raise PermissionMissingError(
                f"{path} exists and may not be connected to, so nobody can tell whether it is in use",
                remedy="run as root, or set control.socket to another path",
            ) from error
        except OSError:  # its queue is full: somebody is there, and busy
            return "another process"
    return process_name(pid) if pid else "another process"


def _taken(path: str, owner: str) -> TakenError:
    return TakenError(
        f"the control socket {path} belongs to {owner}", remedy="stop it first, or give this daemon a control.socket"
    )


def _bind(path: str, gid: int) -> tuple[socket.socket, tuple[int, int]]:
    """A listening socket with its final mode and group from the first moment anybody can connect."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    bound = False
    try:
        listener.setblocking(False)
        before = os.umask(0o777 & ~MODE)
        try:
            listener.bind(path)
        finally:
            os.umask(before)
        bound = True
        status = os.lstat(path)
        if status.st_gid != gid:
            os.chown(path, -1, gid, follow_symlinks=False)
        listener.listen(BACKLOG)  # before this, connecting is refused
    except OSError as error:
        listener.close()
        if bound:
            with suppress(OSError):
                os.unlink(path)
        raise SocketError(f"cannot make the control socket {path}: {error.strerror or error}") from error
    return listener, (status.st_dev, status.st_ino)
