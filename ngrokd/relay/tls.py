"""TLS over a transport, made for a packet path: half-close both ways, no task of its own, no copy that can be avoided.

Trio's SSLStream cannot end one direction and keep reading, and each of its calls waits. Here `TlsSession` is OpenSSL
between two memory buffers, and `TlsStream` ties it to a transport:

Sending is synchronous. `send_nowait` encrypts what it is given (records of 16 KiB; small views are joined first) and
moves the ciphertext to the transport at once. What the transport did not take is the backlog. Above BACKLOG_LIMIT
bytes of it nothing more is taken, which is the back-pressure: the flow keeps its bytes, its TCP window closes. Somebody
must move the backlog on, with `drain` or `wait_sendable`; an attached stream does it by itself.

Receiving takes what the transport has, once, and decrypts all complete records in it into memory that is allocated for
them and never touched again: TCP holds views of it until the app has acknowledged them. Nothing is kept between calls
but the beginning of an incomplete record (inside OpenSSL), so an idle stream is small, and so close_notify can be sent
at any moment: OpenSSL, asked to shut down while application data waits in its buffer, would throw that data away.

There are two ways to use a stream. Tasks wait for it (`handshake`, `receive_view`, `drain`). Or it is attached: a
poller calls it when the transport is ready, and it hands what it decrypted to a sink, without a task in between.

The end of a stream is close_notify and nothing else. A connection that ends or breaks without it is StreamTruncated,
because bytes may be missing. Bytes that arrived before the break are delivered first.
"""

from __future__ import annotations

import contextlib
import operator
import ssl
from typing import TYPE_CHECKING, Final, cast

import trio

from ngrokd.errors import StreamTruncated

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence

    from ngrokd.relay.transport import Poller, Transport

# Bytes of ciphertext that may wait for the transport; one more write may end above it. With what the kernel holds
# unsent it bridges the time until this process looks at the stream again; 64 to 256 KiB were equally fast, and a
# stalled flow keeps this much. So much is also given to the transport at one go: each send wakes the other side, and on
# a busy machine that takes the core away from here. 32 KiB at a time were a tenth slower.
BACKLOG_LIMIT: Final = 128 * 1024
# Bytes of ciphertext per receive into shared memory. At most 15 full records, whose plaintext makes four segments of
# 64,240 bytes to an app whose device has offload; a sixteenth would make a fifth segment of 5 KB. 64 KiB at a time were
# a third slower over the whole path, 512 KiB not much faster.
SCRATCH: Final = 240 * 1024
CHUNK: Final = 64 * 1024  # bytes of ciphertext per receive where there is no shared memory
# OpenSSL's memory buffers grow by a third more than what is put in, and never shrink. So this much goes through them at
# a time: plaintext before the ciphertext is taken, ciphertext before the plaintext is.
FEED: Final = 32 * 1024
RECORD: Final = 16 * 1024  # most plaintext in a record (RFC 8446 5.1)
RECORD_HEADER: Final = 5  # type, version, length (RFC 8446 5.1)
APPLICATION_DATA: Final = 23
TLS_MAJOR: Final = 3
# Most ciphertext of an unfinished record that OpenSSL may hold from earlier calls: header, record, TLS 1.2's expansion.
HELD: Final = 5 + RECORD + 2048
# Below this much ciphertext one read of exact size is cheaper than a buffer with room for everything.
SMALL: Final = RECORD // 2
DISCARD_AT_CLOSE: Final = 256 * 1024  # bytes; a peer that has more to say to nobody may well see a reset

_EMPTY: Final = memoryview(b"")


class TlsAlert(StreamTruncated):
    """The other side ended the TLS connection with an alert; `alert` is OpenSSL's word for it, in lower case.

    A client certificate that a TLS 1.3 server rejects shows up like this, at the first read after the handshake.
    """

    def __init__(self, message: str, *, alert: str) -> None:
        super().__init__(message)
        self.alert = alert


class TlsSession:
    """OpenSSL between two memory buffers: bytes in, bytes out, no I/O.

    Attributes:
        object: the SSLObject, for certificates, version and session.
        received_eof: close_notify has arrived; nothing more can be decrypted.
        sent_eof: close_notify has been made; nothing more can be encrypted.
        failure: why nothing more can be decrypted although close_notify has not arrived, or None.
    """

    __slots__ = ("_incoming", "_missing", "_outgoing", "failure", "object", "received_eof", "sent_eof")

    def __init__(
        self,
        context: ssl.SSLContext,
        *,
        server_side: bool = False,
        server_hostname: str | None = None,
        session: ssl.SSLSession | None = None,
    ) -> None:
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._missing = 0  # bytes of the record that has begun to arrive, as far as can be told
        self.object = context.wrap_bio(self._incoming, self._outgoing, server_side, server_hostname, session)
        self.received_eof = False
        self.sent_eof = False
        self.failure: ssl.SSLError | None = None

    @property
    def pending_in(self) -> int:
        """Bytes of ciphertext that wait to be decrypted."""
        return self._incoming.pending

    @property
    def pending_out(self) -> int:
        """Bytes of ciphertext that wait to be sent."""
        return self._outgoing.pending

    def handshake_step(self) -> bool:
        """Go on with the handshake as far as the received bytes reach; True when it is complete on our side.

        Raises: ssl.SSLError.
        """
        try:
            self.object.do_handshake()
        except ssl.SSLWantReadError:
            return False
        return True

    def feed(self, ciphertext: bytes | memoryview) -> None:
        """Add received bytes."""
        self._incoming.write(ciphertext)

    def take(self) -> bytes:
        """Take the bytes to send."""
        return self._outgoing.read()

    def encrypt(self, plaintext: bytes | memoryview) -> None:
        """Turn all of `plaintext` (not empty) into records to send. Raises ssl.SSLError."""
        written = self.object.write(plaintext)
        while written < len(plaintext):
            written += self.object.write(memoryview(plaintext)[written:])

    def decrypt(self, ciphertext: memoryview) -> memoryview:
        """Decrypt all records that `ciphertext` completes, into memory that nobody writes to again.

        Never raises: what went wrong is in `failure`, and what was decrypted before is returned. Afterwards nothing
        waits to be decrypted.

        Returns: the plaintext, empty when no record was completed, or at the end.
        """
        incoming = self._incoming
        size = len(ciphertext)
        start = filled = 0
        waiting = incoming.pending
        data = b""
        if size <= SMALL and not waiting:
            incoming.write(ciphertext)
            start = size
            data = self._read_record()
            waiting = incoming.pending
            if not data:
                self._pace(ciphertext)
                return _EMPTY
            if not waiting:
                self._missing = 0
                return memoryview(data)
            # Several small records, or the rest of a big one and more: gather the others behind the first.
            filled = len(data)
        view = memoryview(bytearray(filled + waiting + size - start + HELD))
        view[:filled] = data
        filled = self._read_records(view, filled)
        end, stride = self._pace(ciphertext)
        while start < size and not self.received_eof and self.failure is None:
            incoming.write(ciphertext[start:end])
            start = end
            end += stride
            filled = self._read_records(view, filled)
        return view[:filled]

    def _pace(self, ciphertext: memoryview) -> tuple[int, int]:
        """Where to cut what is fed to OpenSSL: between records, if all are as large as the first one that begins here.

        OpenSSL says by an exception that it waits for the rest of a record, which costs as much as a third of one. In a
        long transfer nearly all records have the same size. Nothing depends on it: where they have not, it is slower.

        Returns: the end of the first piece, and the size of the others.
        """
        at, size = self._missing, len(ciphertext)
        if at >= size:
            self._missing = at - size
            return FEED, FEED
        if at + RECORD_HEADER <= size and ciphertext[at] == APPLICATION_DATA and ciphertext[at + 1] == TLS_MAJOR:
            record = RECORD_HEADER + (ciphertext[at + 3] << 8 | ciphertext[at + 4])
            stride = max(FEED // record, 1) * record
            self._missing = (at - size) % record
            return at + stride, stride
        self._missing = 0
        return FEED, FEED

    def _read_record(self) -> bytes:
        try:
            data = self.object.read(RECORD)
        except ssl.SSLWantReadError:
            return b""
        except ssl.SSLZeroReturnError:  # both directions have ended
            data = b""
        except ssl.SSLError as error:
            self.failure = error.with_traceback(None)
            return b""
        if not data:
            self.received_eof = True
        return data

    def _read_records(self, view: memoryview, filled: int) -> int:
        read = cast("Callable[[int, memoryview], int]", self.object.read)  # the stubs know the other form only
        incoming = self._incoming
        room = len(view)
        try:
            while incoming.pending:  # asking an empty buffer costs an exception
                count = read(room - filled, view[filled:])
                if not count:
                    self.received_eof = True
                    break
                filled += count
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            self.received_eof = True
        except ssl.SSLError as error:
            # Kept, because OpenSSL, asked again, would take a fatal alert for an end; without the frames, because they
            # would keep us.
            self.failure = error.with_traceback(None)
        return filled

    def close_notify(self) -> None:
        """Make close_notify, once. Everything received must have been decrypted before, or it is lost.

        Raises: ssl.SSLError.
        """
        if self.sent_eof:
            return
        self.sent_eof = True
        with contextlib.suppress(ssl.SSLWantReadError):  # it is made; the answer comes when the other side is done too
            self.object.unwrap()


class TlsStream:
    """A TLS stream over a transport that it owns.

    `send_nowait` and `receive_nowait` never wait and need no task. One task at a time may receive; any number may wait
    for the backlog. The bytes a receiver gets are never modified afterwards.

    Attributes:
        backlog: bytes of ciphertext that the transport has not taken.
        refused: the sink has left bytes here, see `attach`.
        bytes_sent, bytes_received: plaintext.
    """

    __slots__ = (
        "_backlog",
        "_broken",
        "_closed",
        "_drained",
        "_draining",
        "_handing",
        "_on_change",
        "_on_error",
        "_poller",
        "_progress",
        "_ready",
        "_receive_error",
        "_room",
        "_scratch",
        "_session",
        "_sink",
        "_transport",
        "_watching",
        "backlog",
        "bytes_received",
        "bytes_sent",
        "refused",
    )

    def __init__(self, transport: Transport, session: TlsSession, *, scratch: memoryview | None = None) -> None:
        """Take over `transport`.

        Args:
            transport: the connection.
            session: a new session, before its handshake.
            scratch: memory to receive ciphertext into, used within a call only, so that many streams of one thread
                can share it; without it each call that receives something allocates its own.
        """
        self._transport = transport
        self._session = session
        self._scratch = scratch
        self._ready: list[memoryview] = []  # decrypted or given back, not yet delivered
        self._drained = True  # the last receive got less than it could have
        self._receive_error: _Cut | None = None
        self._broken: _Cut | None = None  # why nothing can be sent any more
        self._closed = False
        self._backlog: list[memoryview] = []
        self.backlog = 0  # bytes of ciphertext that the transport has not taken
        self._draining = False
        self._progress: trio.Event | None = None
        self._poller: Poller | None = None  # while attached
        self._sink: Callable[[memoryview], int] | None = None
        self._room: Callable[[], int] | None = None
        self._on_change: Callable[[], object] | None = None
        self._on_error: Callable[[Exception], object] | None = None
        self._watching = (False, False)
        self._handing = False
        self.refused = False
        self.bytes_sent = 0
        self.bytes_received = 0

    def __repr__(self) -> str:
        return f"<TlsStream over {self._transport!r} backlog={self.backlog} eof={self.received_eof}/{self.sent_eof}>"

    @property
    def transport(self) -> Transport:
        """What it runs over, to be waited for by somebody else; only the stream reads, writes and closes it."""
        return self._transport

    @property
    def ssl_object(self) -> ssl.SSLObject:
        """For certificates, version, cipher and session."""
        return self._session.object

    @property
    def received_eof(self) -> bool:
        """The other side's close_notify has arrived (bytes before it may still wait here)."""
        return self._session.received_eof

    @property
    def sent_eof(self) -> bool:
        """Our close_notify is made."""
        return self._session.sent_eof

    # -- opening

    async def handshake(self, turn: Callable[[], Awaitable[None]] | None = None) -> None:
        """Do the TLS handshake. Cancelled or failed, the stream can only be aborted.

        Args:
            turn: awaited before each step that follows on something received; those cost up to a millisecond.

        Raises:
            ssl.SSLError: the handshake failed, SSLCertVerificationError where we did not trust the other side.
            StreamTruncated: the connection ended or broke.
        """
        session = self._session
        while True:
            try:
                complete = session.handshake_step()
            except ssl.SSLError:
                self._send_ciphertext()  # the alert, if it can go now: it tells the other side why
                raise
            self._send_ciphertext()
            await self.drain()
            if complete:
                self._drained = not session.pending_in  # the first application data may have come along
                return
            while (ciphertext := self._receive_ciphertext("during the TLS handshake")) is None:
                await self._transport.wait_readable()
            session.feed(ciphertext)
            if turn is not None:
                await turn()

    # -- sending

    def send_nowait(self, views: Sequence[memoryview | bytes]) -> int:
        """Encrypt and send a prefix of `views`; fits as the sink of a flow. Never raises, never waits.

        Returns: the bytes taken: fewer than given, 0 included, when the backlog is full, and after close_notify or a
            failure, which `wait_sendable` then raises.
        """
        if self._broken is not None or self._closed or self._session.sent_eof or self.backlog >= BACKLOG_LIMIT:
            return 0
        if len(views) == 1 and 0 < len(views[0]) < RECORD and not self.backlog:
            return self._send_small(views[0])
        taken = size = 0
        encrypt, take = self._session.encrypt, self._session.take
        made: list[bytes] = []
        try:
            for piece in _pieces(views):
                encrypt(piece)
                taken += len(piece)
                data = take()
                made.append(data)
                size += len(data)
                if self.backlog + size >= BACKLOG_LIMIT:
                    self._send(made, size)
                    made, size = [], 0
                    if self.backlog >= BACKLOG_LIMIT or self._broken is not None:
                        break
        except ssl.SSLError as error:
            self._break(_Cut(f"TLS failed while sending: {_reason(error)}"))
        if made:
            self._send(made, size)
        self.bytes_sent += taken
        return taken

    def _send_small(self, view: memoryview | bytes) -> int:
        """What a question or an answer is most often: one piece, in one record, and nothing before it."""
        session = self._session
        try:
            session.encrypt(view)
        except ssl.SSLError as error:
            self._break(_Cut(f"TLS failed while sending: {_reason(error)}"))
            return 0
        data = session.take()
        self._send((data,), len(data))
        self.bytes_sent += len(view)
        return len(view)

    async def wait_sendable(self) -> None:
        """Wait until `send_nowait` takes bytes again: until the backlog is below half its limit.

        Raises:
            StreamTruncated: the connection is broken.
            trio.ClosedResourceError: it was closed here, or close_notify was sent.
        """
        if self._session.sent_eof:
            raise trio.ClosedResourceError("this direction of the TLS stream has ended")
        await self.drain(BACKLOG_LIMIT // 2 - 1)

    async def drain(self, limit: int = 0) -> None:
        """Send the backlog until at most `limit` bytes of it are left. Several tasks may wait; one of them sends.

        Raises:
            StreamTruncated: the connection is broken.
            trio.ClosedResourceError: it was closed here.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            if self._closed:
                raise trio.ClosedResourceError("this TLS stream was closed")
            if self._broken is not None:
                raise self._broken.error()
            if self.backlog <= limit:
                return
            if self._draining:  # by another task; look again when it got somewhere
                if self._progress is None:
                    self._progress = trio.Event()
                await self._progress.wait()
                continue
            self._draining = True
            try:
                await self._transport.wait_writable()
                self._flush()
            finally:
                self._draining = False
                self._wake()

    def send_eof_nowait(self) -> None:
        """Queue close_notify: our direction ends, the other goes on. Once; `drain` sees it leave."""
        session = self._session
        if session.sent_eof or self._closed or self._broken is not None:
            return
        if session.pending_in:  # what has come with the handshake would be lost in it
            view = self._decrypt(_EMPTY)
            if view:
                self._ready.append(view)
        try:
            session.close_notify()
        except ssl.SSLError as error:
            self._break(_Cut(f"TLS failed while ending the stream: {_reason(error)}"))
        else:
            self._send_ciphertext()

    async def send_eof(self) -> None:
        """Send close_notify and wait until it has left. Raises as `drain` does."""
        self.send_eof_nowait()
        await self.drain()

    # -- receiving

    def receive_nowait(self, limit: int = SCRATCH) -> memoryview | None:
        """Receive what is there: all complete records that the transport gives at one go.

        Args:
            limit: take no more bytes from the transport; a record that they complete may have begun before.

        Returns: plaintext that is never modified again; empty when the other side has ended the stream with
            close_notify; None when there is nothing now. `drained` tells whether asking again may give more.
        Raises:
            StreamTruncated: the connection ended or broke without close_notify (TlsAlert: with an alert).
            trio.ClosedResourceError: it was closed here.
        """
        if self._ready:
            view = self._ready.pop(0)
            self.bytes_received += len(view)
            return view
        if self._closed:
            raise trio.ClosedResourceError("this TLS stream was closed")
        if not self._at_end():
            if self._session.pending_in:
                ciphertext: memoryview | None = _EMPTY
                self._drained = False
            else:
                ciphertext = self._receive_ciphertext("without the end of the TLS stream", limit)
            if ciphertext is None:
                return None
            view = self._decrypt(ciphertext)
            if view:
                self.bytes_received += len(view)
                return view
            if not self._at_end():
                return None
        return _EMPTY

    def _at_end(self) -> bool:
        """Whether the stream has ended; raises when it was cut."""
        if self._receive_error is not None:
            raise self._receive_error.error()
        return self._session.received_eof

    @property
    def drained(self) -> bool:
        """The last receive emptied the transport: wait for it before asking again."""
        return self._drained and not self._ready

    async def receive_view(self) -> memoryview:
        """Wait for plaintext; empty at close_notify. See `receive_nowait`. Cancelled, nothing is lost."""
        while True:
            ended = self._session.received_eof or self._receive_error is not None
            if ended or self._ready or not self._drained:
                await trio.lowlevel.checkpoint()
            else:
                await self._transport.wait_readable()
            view = self.receive_nowait()
            if view is not None:
                return view

    def unread(self, view: memoryview) -> None:
        """Give back bytes; they are received again before all others."""
        if view:
            self._ready.insert(0, view)
            self.bytes_received -= len(view)

    # -- attached

    def attach(
        self,
        poller: Poller,
        sink: Callable[[memoryview], int],
        room: Callable[[], int],
        on_change: Callable[[], object],
        on_error: Callable[[Exception], object],
    ) -> None:
        """Have what is received handed to `sink`, and the backlog moved on, whenever `poller` finds it possible.

        `sink(view)` returns how many bytes it took (0..all); it must not wait. When it leaves some (`refused`), nothing
        more is received until `offer`. `room()` tells beforehand how many bytes may be received at most; 0 counts as if
        the sink had left some. `on_change()` is called when the stream has ended (`received_eof`) or was cut
        (`cut`), when the backlog has fallen below half its limit and when it is gone; perhaps more often. What has been
        received already is offered at once. `on_error` gets what a defect of ours raised within the poller, which
        would otherwise end what other streams wait for.

        Until `detach` no task may wait for the stream.
        """
        self._poller, self._sink, self._room = poller, sink, room
        self._on_change, self._on_error = on_change, on_error
        self.offer()

    def detach(self) -> None:
        """End what `attach` began: tasks may wait for the stream again. What the sink has left is received next."""
        self._sink = self._room = self._on_change = None
        self._watch()
        self._poller = self._on_error = None

    def offer(self) -> None:
        """Offer the sink what it left before, and go on receiving. Call it when the sink has room again."""
        self.refused = False
        self._hand_on()
        self._watch()

    @property
    def sendable(self) -> bool:
        """Whether `send_nowait` takes bytes, with some room to spare after a backlog."""
        return (
            self.backlog < BACKLOG_LIMIT // 2
            and self._broken is None
            and not self._closed
            and not self._session.sent_eof
        )

    @property
    def ended(self) -> bool:
        """The other side's close_notify has arrived, and all bytes before it are taken."""
        return self._session.received_eof and not self._ready

    @property
    def cut(self) -> StreamTruncated | None:
        """Why nothing more can be received although the stream has not ended, once all bytes before it are taken."""
        return None if self._receive_error is None or self._ready else self._receive_error.error()

    @property
    def broken(self) -> StreamTruncated | None:
        """Why nothing more can be sent."""
        return None if self._broken is None else self._broken.error()

    def _on_readable(self) -> None:
        """For the poller."""
        try:
            self._hand_on()
            if self.refused or self._over():
                self._watch()
        except Exception as error:  # noqa: BLE001 - the boundary between one stream and the poller of all
            self._give_up(error)

    def _hand_on(self) -> None:
        """Receive once and hand on; the poller says whether the transport has more."""
        sink, room = self._sink, self._room
        if sink is None or room is None:
            return
        self._handing = True
        try:
            while not self.refused:
                limit = room()
                if limit <= 0:
                    self.refused = True
                    break
                view = self.receive_nowait(limit)
                if not view:
                    break
                taken = sink(view)
                if taken < len(view):
                    self.unread(view[taken:])
                    self.refused = True
                    break
                if not self._ready and not self._session.pending_in:
                    break
        except StreamTruncated:
            pass  # it is kept, and told below
        finally:
            self._handing = False
        if self._over():
            self._tell()

    def _over(self) -> bool:
        return self._session.received_eof or self._receive_error is not None or self._broken is not None

    def _on_writable(self) -> None:
        """For the poller."""
        try:
            full = self.backlog >= BACKLOG_LIMIT // 2
            self._flush()
            if not self.backlog:
                self._watch()
            if not self.backlog or (full and self.backlog < BACKLOG_LIMIT // 2):
                self._tell()
        except Exception as error:  # noqa: BLE001 - as above
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        if self._on_error is None:
            raise error
        self._on_error(error)

    def _watch(self) -> None:
        """Have the poller look for what there is to do."""
        if self._poller is None or self._closed:
            return
        ended = self._session.received_eof or self._receive_error is not None
        wanted = self._sink is not None and not self.refused and not ended, self._sink is not None and self.backlog > 0
        if wanted != self._watching:
            self._watching = wanted
            self._transport.watch(
                self._poller, self._on_readable if wanted[0] else None, self._on_writable if wanted[1] else None
            )

    def _tell(self) -> None:
        # What was decrypted before a failure has its way to the app first.
        if self._on_change is not None and not self._handing:
            self._on_change()

    # -- ending

    async def aclose(self) -> None:
        """End gracefully: the backlog and close_notify are sent, then the connection is closed.

        A broken connection is just closed. Cancelled, it is aborted.
        """
        if self._closed:
            await trio.lowlevel.checkpoint()
            return
        try:
            await self.send_eof()
        except StreamTruncated:
            pass
        except BaseException:
            self.abort()
            raise
        self._closed = True
        self._wake()
        self._discard_received()
        self._transport.close()

    def close_nowait(self) -> None:
        """End as gracefully as is possible without waiting: close_notify if it can go at once, then close."""
        if not self._closed:
            self.send_eof_nowait()
            self._closed = True
            self._wake()
            self._discard_received()
            self._transport.close()
            self._forget()

    def _discard_received(self) -> None:
        """Read what has come and nobody asked for (TLS 1.3 tickets).

        Closed with unread bytes, a socket answers with a reset, which destroys what we sent and the other side has
        not read yet.
        """
        scratch = self._scratch or memoryview(bytearray(CHUNK))
        with contextlib.suppress(OSError):
            for _ in range(DISCARD_AT_CLOSE // len(scratch) + 1):
                if not self._transport.receive_into_nowait(scratch):
                    break

    def abort(self) -> None:
        """Cut the connection: the other side sees a reset and no close_notify."""
        if not self._closed:
            self._closed = True
            self._wake()
            self._transport.abort()
            self._forget()

    def _forget(self) -> None:
        self._backlog.clear()
        self.backlog = 0
        self._ready.clear()

    # -- between the session and the transport

    def _send_ciphertext(self) -> None:
        """Move what the session made to the transport, behind the backlog."""
        if not self._session.pending_out:
            return
        data = self._session.take()
        self._send([data], len(data))

    def _send(self, pieces: Sequence[bytes], size: int) -> None:
        """Move `size` bytes of ciphertext to the transport, behind the backlog."""
        if self._broken is not None:
            return
        sent = 0
        if not self.backlog:
            transport = self._transport
            try:
                sent = transport.send_nowait(pieces[0]) if len(pieces) == 1 else transport.send_pieces_nowait(pieces)
            except OSError as error:
                self._break(_cut_by(error, "while sending"))
                return
            if sent == size:
                return
        self.backlog += size - sent
        for piece in pieces:
            if sent < len(piece):
                self._backlog.append(memoryview(piece)[sent:])
                sent = 0
            else:
                sent -= len(piece)
        self._watch()

    def _flush(self) -> None:
        """Move as much of the backlog as the transport takes now."""
        backlog = self._backlog
        if self._closed:
            return
        index = 0
        try:
            while index < len(backlog):
                view = backlog[index]
                sent = self._transport.send_nowait(view)
                self.backlog -= sent
                if sent < len(view):
                    backlog[index] = view[sent:]
                    break
                index += 1
        except OSError as error:
            self._break(_cut_by(error, "while sending"))
        del backlog[:index]

    def _receive_ciphertext(self, when: str, limit: int = SCRATCH) -> memoryview | None:
        """Take what the transport has, once, into memory that is used again; None when it has nothing now."""
        scratch = self._scratch
        if scratch is None:
            scratch = memoryview(bytearray(CHUNK))
        if limit < len(scratch):
            scratch = scratch[:limit]
        try:
            count = self._transport.receive_into_nowait(scratch)
        except OSError as error:
            self._receive_error = _cut_by(error, when)
            self._break(self._receive_error)
            raise self._receive_error.error() from error
        if count is None:
            self._drained = True
            return None
        if not count:
            self._receive_error = _Cut(f"the connection was closed by the other side {when}")
            raise self._receive_error.error()
        self._drained = count < len(scratch)
        return scratch[:count]

    def _decrypt(self, ciphertext: memoryview) -> memoryview:
        """Decrypt what was received; a failure is kept for the reader, who gets what was before it first."""
        session = self._session
        view = session.decrypt(ciphertext)
        self._send_ciphertext()  # an answer to a key update, or the alert that says what we did not like
        if session.failure is not None and self._receive_error is None:
            self._receive_error = _failure(session.failure)
            self._break(self._receive_error)
        return view

    def _break(self, cut: _Cut) -> None:
        first = self._broken is None
        if first:
            self._broken = cut
        self._backlog.clear()
        self.backlog = 0
        self._wake()
        if first:
            self._watch()
            self._tell()

    def _wake(self) -> None:
        if self._progress is not None:
            self._progress.set()
            self._progress = None


def _pieces(views: Iterable[memoryview | bytes]) -> Iterable[memoryview | bytes]:
    """Cut and join to pieces of at most FEED bytes: records of 16 KiB cost OpenSSL a third of small ones."""
    small: list[memoryview | bytes] = []
    gathered = 0
    for view in views:
        size = len(view)
        if size >= RECORD:
            if small:
                yield small[0] if len(small) == 1 else b"".join(small)
                small, gathered = [], 0
            if size <= FEED:
                yield view
            else:
                whole = memoryview(view)
                for start in range(0, size, FEED):
                    yield whole[start : start + FEED]
        elif size:
            if gathered + size > FEED:
                yield b"".join(small)
                small, gathered = [], 0
            small.append(view)
            gathered += size
    if small:
        yield small[0] if len(small) == 1 else b"".join(small)


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or str(error)).lower().replace("_", " ")


class _Cut:
    """Why a stream broke. The exception is made when it is raised: a kept one would keep frames, and so this stream."""

    __slots__ = ("_alert", "_message")

    def __init__(self, message: str, alert: str = "") -> None:
        self._message = message
        self._alert = alert

    def error(self) -> StreamTruncated:
        return TlsAlert(self._message, alert=self._alert) if self._alert else StreamTruncated(self._message)


def _cut_by(error: OSError, when: str) -> _Cut:
    return _Cut(f"the connection broke {when}: {error.strerror or error}")


def _failure(error: ssl.SSLError) -> _Cut:
    _, is_alert, alert = (error.reason or "").lower().partition("alert_")
    if is_alert:
        return _Cut(f"the other side ended the TLS connection: {alert.replace('_', ' ')}", alert)
    return _Cut(f"what arrived is not the TLS stream that was begun: {_reason(error)}")


class TlsTrioStream(trio.abc.HalfCloseableStream):
    """A TlsStream as Trio's abstract stream, for code that knows nothing of views and sinks."""

    def __init__(self, stream: TlsStream) -> None:
        self.stream = stream
        self._sending = False
        self._receiving = False
        self._leftover = _EMPTY

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send everything. Cancelled, a part of it may have been sent."""
        if self._sending:
            raise trio.BusyResourceError("another task is sending")
        self._sending = True
        try:
            await self._wait_sendable()
            view = memoryview(data)
            while view:
                view = view[self.stream.send_nowait([view]) :]
                await self._wait_sendable()
            await self._translate_drain()
        finally:
            self._sending = False

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until `send_all` would begin at once."""
        if self._sending:
            raise trio.BusyResourceError("another task is sending")
        self._sending = True
        try:
            await self._wait_sendable()
        finally:
            self._sending = False

    async def send_eof(self) -> None:
        """Send close_notify; receiving goes on."""
        if self._sending:
            raise trio.BusyResourceError("another task is sending")
        self._sending = True
        try:
            await trio.lowlevel.checkpoint()
            self.stream.send_eof_nowait()
            await self._translate_drain()
        finally:
            self._sending = False

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Receive at least one byte, or b"" at close_notify.

        Raises: trio.BrokenResourceError when the stream was cut, with StreamTruncated as its cause.
        """
        if max_bytes is not None and operator.index(max_bytes) < 1:
            raise ValueError("max_bytes must be at least 1")
        if self._receiving:
            raise trio.BusyResourceError("another task is receiving")
        self._receiving = True
        try:
            if self._leftover and not self.stream._closed:
                await trio.lowlevel.checkpoint()
                view = self._leftover
            else:
                try:
                    view = await self.stream.receive_view()
                except StreamTruncated as error:
                    raise trio.BrokenResourceError(str(error)) from error
            size = len(view) if max_bytes is None else max_bytes
            self._leftover = view[size:]
            return bytes(view[:size])
        finally:
            self._receiving = False

    async def aclose(self) -> None:
        """Close gracefully; cancelled, abort."""
        await self.stream.aclose()
        await trio.lowlevel.checkpoint()

    async def _wait_sendable(self) -> None:
        await trio.lowlevel.checkpoint()
        try:
            await self.stream.wait_sendable()
        except StreamTruncated as error:
            raise trio.BrokenResourceError(str(error)) from error

    async def _translate_drain(self) -> None:
        try:
            await self.stream.drain()
        except StreamTruncated as error:
            raise trio.BrokenResourceError(str(error)) from error


__all__ = ["TlsSession", "TlsStream", "TlsTrioStream", "TlsAlert", "BACKLOG_LIMIT"]
