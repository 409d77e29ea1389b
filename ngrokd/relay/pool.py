"""Connections that are ready: verified, with no endpoint asked for yet, kept until somebody needs one.

How many, and when to dial, is decided by `Stock`; this is the waiting part. One task orders: it sleeps until a request
came, or something ended. Each connection is dialled by a task of its own. One that nobody has taken WATCH_AFTER_S
later gets a task that reads from it: an ingress that hangs up is noticed at once, and an idle pool costs no wake-up.
(With many requests hardly any connection waits that long, and the tasks would cost a tenth of the whole work.) Whoever
takes one reads first, so it is alive as far as this side can know.

A request takes the newest, because that one is the most likely to be alive; the others age behind it, as a reserve.
Finding none, it takes the next that gets ready, if one is being dialled that nobody waits for yet. Thus every dial in
flight for the pool may become that of a flow in need, in order of arrival. The dials of the pool are bounded by what it
may hold, those that flows begin by a bound of their own, so that neither is ever in the other's way.

Filling begins FILL_DELAY_S after the request that made it necessary, so that the request's own work goes first.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import trio

from ngrokd.errors import RelayError, StreamTruncated
from ngrokd.relay.stock import PROVEN_S

if TYPE_CHECKING:
    import ssl
    from collections.abc import Awaitable, Callable

    from ngrokd.relay.stock import Stock
    from ngrokd.relay.tls import TlsStream

FILL_DELAY_S: Final = 0.004
WATCH_AFTER_S: Final = 0.5


@dataclass(slots=True, eq=False)
class Connection:
    """A verified TLS connection to the ingress that no endpoint has been asked for on.

    Attributes:
        stream: whoever has it must close or abort it.
        context: what it was verified under.
        generation: of the credentials and anchors.
        host, port, address: where it leads.
        dialled_at: when it was ready, Trio's clock.
        verified_at: when the certificate was verified: later than `dialled_at` never, earlier where it was resumed.
        resumed: by an abbreviated handshake.
        has_ticket: its session was kept for others.
    """

    stream: TlsStream
    context: ssl.SSLContext
    generation: int
    host: str
    port: int
    address: str
    dialled_at: float
    verified_at: float
    resumed: bool
    has_ticket: bool = False


@dataclass(slots=True, eq=False)
class _Kept:
    """A connection on the shelf, since when and until when. `scope` is that of the task that watches it."""

    connection: Connection
    since: float
    until: float
    scope: trio.CancelScope | None = None
    gone: bool = False  # the task may still be about to run, and must not touch it any more


@dataclass(slots=True, eq=False)
class _Waiter:
    """A flow that waits for a connection which is being dialled for the pool."""

    told: trio.Event = field(default_factory=trio.Event)
    connection: Connection | None = None


class Pool:
    """The shelf. `take` and `adopt` work without `run`; then there is nothing on it.

    Args:
        stock: decides.
        connect: makes a connection, within its own time. Raises RelayError.
        is_current: whether a connection is what would be made now (credentials, anchors, addresses).
        on_read: called when something was received on a waiting connection: tickets, most likely.
        strict: let a defect in making a connection rise instead of taking it for a failed dial, for tests.

    Attributes:
        dialing: connections being made for the pool.
        counts: hits, adopted, misses (of requests); ordered, failed, dead, aged, surplus (of connections).
        problem: why a connection could not be made, or was ended while it waited; "" once one has been of use.
    """

    def __init__(
        self,
        stock: Stock,
        connect: Callable[[], Awaitable[Connection]],
        is_current: Callable[[Connection], bool],
        on_read: Callable[[Connection], object],
        *,
        strict: bool = False,
    ) -> None:
        self._stock = stock
        self._connect = connect
        self._is_current = is_current
        self._on_read = on_read
        self._strict = strict
        self._shelf: list[_Kept] = []  # oldest first
        self._waiting: deque[_Waiter] = deque()
        self._nursery: trio.Nursery | None = None
        self._wake = trio.Event()
        self.dialing = 0
        self.counts: Counter[str] = Counter()
        self.problem = ""

    def __len__(self) -> int:
        return len(self._shelf)

    # -- taking

    def take(self) -> Connection | None:
        """Take a connection that is ready and alive, as far as can be known without asking. Call it per request."""
        self._stock.note_request(trio.current_time())
        self._wake.set()
        while self._shelf:
            connection = self._remove(self._shelf[-1])
            if self._is_alive(connection):
                self.counts["hits"] += 1
                return connection
            self._note_dead(connection)
        return None

    async def adopt(self) -> Connection | None:
        """Take the next connection that gets ready, if one is being dialled that nobody waits for.

        Returns: None when there is none, or when its dial failed. Cancelled, nothing is lost.
        """
        if self.dialing <= len(self._waiting):
            self.counts["misses"] += 1
            return None
        waiter = _Waiter()
        self._waiting.append(waiter)
        try:
            await waiter.told.wait()
        except trio.Cancelled:
            if waiter.connection is not None:  # given to it when it was cancelled, but had not run yet
                self._put(waiter.connection)
            elif waiter in self._waiting:
                self._waiting.remove(waiter)
            raise
        self.counts["misses" if waiter.connection is None else "adopted"] += 1
        return waiter.connection

    # -- what changes

    def wake(self) -> None:
        """Look again whether connections are to be made or let go."""
        self._wake.set()

    def note_proof(self) -> None:
        """A connection has proved its worth; see Stock."""
        self._stock.note_proof()
        self.problem = ""

    def discard(self, unwanted: Callable[[Connection], bool]) -> None:
        """Let go of the unwanted ones."""
        for kept in [each for each in self._shelf if unwanted(each.connection)]:
            self._remove(kept).stream.close_nowait()
        self._wake.set()

    async def run(self) -> None:
        """Keep the shelf filled; for ever. Cancelled, all that is on it is closed."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                while True:
                    self._wake = trio.Event()
                    with trio.move_on_at(min(self._balance(nursery), self._watch_all(nursery))):
                        await self._wake.wait()
                    await trio.sleep(FILL_DELAY_S)
        finally:
            self._nursery = None  # nothing is put on the shelf any more
            self.discard(lambda _: True)
            self._excuse_waiters()

    # -- making

    def _balance(self, nursery: trio.Nursery) -> float:
        """Order what is missing and let go of what is too much. Returns when to look again."""
        now = trio.current_time()
        for kept in self._shelf[: self._stock.surplus(now, len(self._shelf), self.dialing)]:
            self.counts["surplus"] += 1
            self._remove(kept).stream.close_nowait()
        orders, again_at = self._stock.orders(now, len(self._shelf), self.dialing)
        for _ in range(orders):
            self.dialing += 1
            self.counts["ordered"] += 1
            nursery.start_soon(self._make, now)
        return again_at

    async def _make(self, ordered_at: float) -> None:
        """Make one connection, give it to whom it may concern, or keep it until somebody comes."""
        connection: Connection | None = None
        try:
            connection = await self._connect()
            if not self._stock.is_failing:
                self.problem = ""
        except RelayError as error:
            self.problem = str(error)
        except Exception as error:  # a pool that cannot be filled must end nothing else
            self.problem = f"{type(error).__name__}: {error}"
            if self._strict:
                raise
        finally:
            self.dialing -= 1
            self._wake.set()
        now = trio.current_time()
        if connection is None:
            self.counts["failed"] += 1
            self._stock.note_failure(now)
            self._excuse_waiters()
        elif not self._is_current(connection):
            connection.stream.close_nowait()
            self._excuse_waiters()
        else:
            self._stock.note_lead(now - ordered_at + FILL_DELAY_S)
            if self._waiting:
                waiter = self._waiting.popleft()
                waiter.connection = connection
                waiter.told.set()
            else:
                self._put(connection)

    def _excuse_waiters(self) -> None:
        """Tell flows that wait for more than is being dialled to dial themselves; those who came last."""
        while len(self._waiting) > self.dialing:
            self._waiting.pop().told.set()

    # -- keeping

    def _put(self, connection: Connection) -> None:
        """Put a connection on the shelf."""
        if self._nursery is None:  # nobody would ever take it down
            connection.stream.close_nowait()
            return
        now = trio.current_time()
        self._shelf.append(_Kept(connection, now, now + self._stock.lifetime_s(now)))
        self._wake.set()

    def _watch_all(self, nursery: trio.Nursery) -> float:
        """Begin to watch those that have been waiting for a while. Returns when the next one will have."""
        due = trio.current_time() - WATCH_AFTER_S
        for kept in self._shelf:
            if kept.scope is None:
                if kept.since > due:
                    return kept.since + WATCH_AFTER_S
                kept.scope = trio.CancelScope(deadline=kept.until)
                nursery.start_soon(self._keep, kept, kept.scope)
        return math.inf

    async def _keep(self, kept: _Kept, scope: trio.CancelScope) -> None:
        """Hold a connection until it is taken, dies, or is too old."""
        alive = True
        try:
            with scope:
                with trio.move_on_at(kept.since + PROVEN_S):
                    alive = await self._watch(kept)
                if alive and not kept.gone:
                    self.note_proof()
                    self._wake.set()
                    alive = await self._watch(kept)
        finally:
            if not kept.gone:
                self._remove(kept)
                self._wake.set()
                if alive:
                    self.counts["aged"] += 1
                    kept.connection.stream.close_nowait()
                else:
                    self._note_dead(kept.connection)

    def _remove(self, kept: _Kept) -> Connection:
        self._shelf.remove(kept)
        kept.gone = True
        if kept.scope is not None:
            kept.scope.cancel()
        return kept.connection

    async def _watch(self, kept: _Kept) -> bool:
        """Read what comes, until it is gone (True) or dead (False)."""
        stream = kept.connection.stream
        while not kept.gone:
            with contextlib.suppress(trio.ClosedResourceError):
                await stream.transport.wait_readable()
            if not kept.gone:  # taken or closed while this task was about to run
                if not self._is_alive(kept.connection):
                    return False
                self._on_read(kept.connection)
        return True

    def _is_alive(self, connection: Connection) -> bool:
        """Read what has come. Nothing that is for us can come before the header, so bytes are as bad as an end."""
        try:
            return connection.stream.receive_nowait() is None
        except StreamTruncated as error:
            self.problem = str(error)
            return False

    def _note_dead(self, connection: Connection) -> None:
        now = trio.current_time()
        self.counts["dead"] += 1
        self._stock.note_death(now - connection.dialled_at, now)
        connection.stream.close_nowait()


__all__ = ["Connection", "Pool"]
