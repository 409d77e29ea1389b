"""One end of the socket between the daemon and a worker: frames both ways, descriptors one way.

A descriptor travels with the first byte of its frame (SCM_RIGHTS, unix(7)), and the kernel gives it out with that byte
or before. So they are taken in the order of the frames that have one.
"""

from __future__ import annotations

import array
import os
import socket
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Final, Self

import trio

from ngrokd.workers.messages import BadMessage, Frames, Message

READ_BYTES: Final = 256 * 1024
_DESCRIPTORS: Final = 4  # in one read, at most; there is one for each `Attach`


class Channel:
    """Sends and receives messages. One task at a time may send, and one receive; whoever has it closes it.

    Args:
        connected: one of a pair of connected stream sockets; it belongs to the channel from now on.
        kinds: what may come; see `Frames`.
        most: see `Frames`.
        descriptors: whether descriptors are taken; else the kernel throws them away.
    """

    def __init__(self, connected: socket.socket, kinds: Iterable[type], most: int, *, descriptors: bool) -> None:
        self._socket = trio.socket.from_stdlib_socket(connected)
        self._frames = Frames(kinds, most)
        self._messages: Iterator[tuple[int, Message]] = iter(())
        self._room = socket.CMSG_SPACE(_DESCRIPTORS * array.array("i").itemsize) if descriptors else 0
        self._descriptors: deque[int] = deque()

    async def send(self, data: bytes, descriptor: int | None = None) -> None:
        """Send whole frames; the descriptor with the first of them, and it stays the caller's.

        Cancelled, a part may have been sent: then the channel can only be closed. Raises OSError when the other side
        is gone.
        """
        view = memoryview(data)
        if descriptor is not None:
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))
            view = view[await self._socket.sendmsg([view], [rights]) :]
        while view:
            view = view[await self._socket.send(view) :]

    async def receive(self) -> tuple[int, Message] | None:
        """The next number and message; None when the other side is gone. Cancelled, nothing is lost.

        Raises: BadMessage.
        """
        while True:
            for number, message in self._messages:
                await trio.lowlevel.checkpoint()
                return number, message
            try:
                data = await self._read()
            except OSError:  # a socket that was closed with something unread resets its peer
                data = b""
            if not data:
                return None
            self._messages = self._frames.feed(data)

    async def _read(self) -> bytes:
        if not self._room:
            return await self._socket.recv(READ_BYTES)
        data, rights, flags, _ = await self._socket.recvmsg(READ_BYTES, self._room, socket.MSG_CMSG_CLOEXEC)
        for level, kind, content in rights:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                found = array.array("i")
                found.frombytes(content[: len(content) - len(content) % found.itemsize])
                self._descriptors.extend(found)
        if flags & socket.MSG_CTRUNC:
            raise BadMessage("a descriptor was lost on its way: too many files are open")
        return data

    def take_descriptor(self) -> int:
        """The descriptor of the first message that has one and whose was not taken yet. Raises BadMessage."""
        if not self._descriptors:
            raise BadMessage("a message without its descriptor")
        return self._descriptors.popleft()

    def close(self) -> None:
        """Close the socket, and descriptors that nobody took. Idempotent."""
        self._socket.close()
        while self._descriptors:
            os.close(self._descriptors.popleft())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
