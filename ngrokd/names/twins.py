"""The IPv6 twin of each IPv4 address: one table of names serves both versions.

A name's IPv6 address is the IPv6 subnet with its IPv4 address in the last 32 bits, or, in a subnet that leaves fewer,
as many of its bits as there are (Teleport's VNet does the same). So nothing more has to be remembered, and who sees
one address can tell the other.

The twin of the IPv4 broadcast address is nobody's, for ever: it is where the daemon itself knocks to learn whether the
way over IPv6 is open (`probe`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Final

_NO_PORTS: Final[frozenset[int]] = frozenset()


class Twins:
    """The pairs of one IPv4 and one IPv6 subnet.

    Attributes:
        subnet, subnet6: the two.
        probe: an address of `subnet6` that no name ever has.

    Raises: ValueError when `subnet6` is too small for a twin of each address.
    """

    __slots__ = ("_base", "_base4", "_span", "probe", "subnet", "subnet6")

    def __init__(self, subnet: IPv4Network, subnet6: IPv6Network) -> None:
        if subnet6.max_prefixlen - subnet6.prefixlen < subnet.max_prefixlen - subnet.prefixlen:
            raise ValueError(f"{subnet6} has fewer addresses than {subnet}")
        self.subnet: Final = subnet
        self.subnet6: Final = subnet6
        self._base4 = int(subnet.network_address)
        self._span = int(subnet.hostmask)
        self._base = int(subnet6.network_address) | (self._base4 & int(subnet6.hostmask))
        self.probe: Final = self.of(subnet.broadcast_address)

    def of(self, address: IPv4Address) -> IPv6Address:
        """The twin of an address of `subnet`."""
        return IPv6Address(self._base | (int(address) & self._span))

    def original(self, packed: bytes) -> bytes | None:
        """The packed IPv4 address whose twin this is, None when it is nobody's. Four bytes are their own original."""
        if len(packed) == 4:
            return packed
        offset = int.from_bytes(packed, "big") - self._base
        return (self._base4 + offset).to_bytes(4, "big") if 0 <= offset <= self._span else None


class ServedTwice(Mapping[bytes, frozenset[int]]):
    """Ports by packed address, of either version: what the TCP stack is told. A view, so it costs no memory.

    Iteration and length are of the IPv4 addresses alone; `probe` is an address without ports.
    """

    __slots__ = ("_probe", "_served", "_twins")

    def __init__(self, served: Mapping[bytes, frozenset[int]], twins: Twins) -> None:
        self._served = served
        self._twins = twins
        self._probe = twins.probe.packed

    def __getitem__(self, packed: bytes) -> frozenset[int]:
        original = self._twins.original(packed)
        found = self._served.get(original) if original is not None else None
        if found is not None:
            return found
        if packed == self._probe:
            return _NO_PORTS
        raise KeyError(packed)

    def __contains__(self, packed: object) -> bool:
        if not isinstance(packed, bytes):
            return False
        return self._twins.original(packed) in self._served or packed == self._probe

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._served)

    def __len__(self) -> int:
        return len(self._served)
