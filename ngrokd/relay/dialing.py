"""TCP to the ingress: which addresses, in which order, and which failures may pass.

Happy eyeballs (RFC 8305): the addresses are tried in their order, the one that answered last first, the next one
250 ms after the one before, or at once when that has failed. Nothing is looked up here. Addresses within our own
networks are refused, because a connection to them would come back to us as a flow, which would dial again, without end.

A failure is a verdict or a passing one. When every address has refused, nobody listens there, and the app shall hear
that now, as it would from the ingress itself. A reset, a route that is missing, a port or a descriptor that is not to
be had may be otherwise in a moment, so these are worth another try (docs/adr/0021-verdicts-and-second-tries.md).
"""

from __future__ import annotations

import errno
import ipaddress
from typing import TYPE_CHECKING, Final, TypeAlias

import trio

from ngrokd.errors import IngressUnreachable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence

    from ngrokd.relay.transport import Transport

    Dial: TypeAlias = Callable[[str, int], Awaitable[Transport]]

STAGGER_S: Final = 0.25  # RFC 8305 5: "Connection Attempt Delay"
CHECK_OUTBOUND: Final = "check that connections to it can leave this machine"

# Never an ingress: "this network", multicast, broadcast. Loopback may be one, if that is what is configured.
_NEVER: Final = ("0.0.0.0/8", "224.0.0.0/4", "255.255.255.255/32", "::/128", "ff00::/8")
_PASSING: Final = frozenset(
    {
        errno.ECONNRESET,
        errno.ECONNABORTED,
        errno.EPIPE,
        errno.ENETUNREACH,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.EHOSTDOWN,
        errno.EADDRNOTAVAIL,  # no local port is free
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOBUFS,
        errno.ENOMEM,
    }
)


class MayPass(IngressUnreachable):
    """The ingress was not reached, for a reason that may be gone in a moment."""


class Addresses:
    """Where the ingress is, and how to connect to it.

    Args:
        dial: connects to a numeric address and port. Raises OSError; cancelled, it must leave nothing behind.
        refused_networks: CIDRs that are never dialled: our own subnets.

    Attributes:
        host: lower case, without a dot at the end.
        port: the same for all addresses.
    """

    def __init__(self, dial: Dial, refused_networks: Iterable[str]) -> None:
        self._dial = dial
        self._refused = [ipaddress.ip_network(each, strict=False) for each in (*_NEVER, *refused_networks)]
        self._addresses: tuple[str, ...] = ()
        self._allowed: tuple[str, ...] = ()
        self._preferred = ""  # the address that answered last
        self.host = ""
        self.port = 0

    def set(self, host: str, port: int, addresses: Sequence[str]) -> bool:
        """Dial these numeric addresses, in this order. Returns whether anything but the order is new."""
        before = self.host, self.port, frozenset(self._addresses)
        self.host = host.rstrip(".").lower()
        self.port = port
        self._addresses = tuple(addresses)
        self._allowed = tuple(each for each in self._addresses if not self._is_refused(each))
        return before != (self.host, self.port, frozenset(addresses))

    def __contains__(self, address: str) -> bool:
        return address in self._addresses

    def __bool__(self) -> bool:
        return bool(self._addresses)

    @property
    def name(self) -> str:
        """HOST:PORT, as messages say it."""
        return f"{self.host}:{self.port}"

    async def connect(self) -> tuple[Transport, str]:
        """Connect to the first address that answers; returns it too. Raises IngressUnreachable, MayPass."""
        addresses = self._dialable()
        if self._preferred in addresses:
            addresses.remove(self._preferred)
            addresses.insert(0, self._preferred)
        name, failures = self.name, _Failures()
        transport: Transport | None = None
        if len(addresses) == 1:
            transport = await self._dial_one(addresses[0], self.port, failures)
            winner = addresses[0]
        else:
            transport, winner = await _Race(self._dial_one, addresses, self.port, failures).run()
        if transport is None:
            kind = MayPass if failures.may_pass else IngressUnreachable
            raise kind(f"cannot reach the ingress {name}: {', '.join(failures.reasons)}", remedy=CHECK_OUTBOUND)
        self._preferred = winner
        return transport, winner

    async def _dial_one(self, address: str, port: int, failures: _Failures) -> Transport | None:
        try:
            return await self._dial(address, port)
        except (OSError, trio.BrokenResourceError) as error:
            failures.reasons.append(f"{address}: {getattr(error, 'strerror', None) or error}")
            failures.may_pass |= getattr(error, "errno", None) in _PASSING
            return None

    def _dialable(self) -> list[str]:
        """Return the addresses that may be dialled. Raises IngressUnreachable when there is none."""
        if not self._addresses:
            raise IngressUnreachable(
                f"no address of the ingress {self.name} is known", remedy="check that this machine resolves names"
            )
        if not self._allowed:
            raise IngressUnreachable(
                f"the ingress {self.name} resolves to {', '.join(self._addresses)}, which is never dialled: "
                "it is multicast, no address at all, or in our own subnet",
                remedy="check ingress.address, net.subnet and what resolves names for this machine",
            )
        return list(self._allowed)

    def _is_refused(self, address: str) -> bool:
        try:
            ip = ipaddress.ip_address(address)
        except ValueError:
            return True
        if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        return any(ip in network for network in self._refused)


class _Failures:
    """Why the addresses did not answer, one reason each."""

    __slots__ = ("may_pass", "reasons")

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.may_pass = False


class _Race:
    """Dials several addresses, each STAGGER_S after the one before or as soon as that has failed; the first wins."""

    def __init__(
        self,
        dial: Callable[[str, int, _Failures], Awaitable[Transport | None]],
        addresses: Sequence[str],
        port: int,
        failures: _Failures,
    ) -> None:
        self._dial = dial
        self._addresses = addresses
        self._port = port
        self._failures = failures
        self._winner: tuple[Transport, str] | None = None

    async def run(self) -> tuple[Transport | None, str]:
        """Return the winner, None when all failed. Cancelled, no connection is left."""
        try:
            async with trio.open_nursery() as nursery:
                for address in self._addresses:
                    failed = trio.Event()
                    nursery.start_soon(self._run_one, address, failed, nursery.cancel_scope)
                    with trio.move_on_after(STAGGER_S):
                        await failed.wait()
        except BaseException:
            if self._winner is not None:
                self._winner[0].abort()
            raise
        return self._winner or (None, "")

    async def _run_one(self, address: str, failed: trio.Event, race: trio.CancelScope) -> None:
        transport = await self._dial(address, self._port, self._failures)
        if transport is None:
            failed.set()
        elif self._winner is None:
            self._winner = (transport, address)
            race.cancel()
        else:  # two at once
            transport.abort()


__all__ = ["CHECK_OUTBOUND", "Addresses", "MayPass"]
