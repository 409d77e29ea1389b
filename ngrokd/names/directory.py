"""Who answers at (address, port): one immutable snapshot at a time.

The data plane asks once for each new connection and is handed a whole new Directory when something changes, so it
never sees half a change. 65,000 endpoints fit in a few megabytes: one key object per address, port sets shared by all
addresses with the same ports, and no container where an address has a single port. All that takes time is done when
a Directory is made, which may be in a thread; what the data plane asks of it takes microseconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from ipaddress import IPv4Address, IPv6Address, ip_address
from types import MappingProxyType
from typing import TypeAlias

from ngrokd.endpoints import Endpoint

Address: TypeAlias = IPv4Address | IPv6Address


class Directory:
    """Endpoints by address and port. Never changes once made; may be shared between tasks and pickled.

    Args:
        entries: address and endpoint; the port is the endpoint's. A second endpoint at the same place is our own bug.
    """

    __slots__ = ("_at", "_count", "_served")

    def __init__(self, entries: Iterable[tuple[Address, Endpoint]] = ()) -> None:
        self._at: dict[bytes, Endpoint | tuple[Endpoint, ...]] = {}
        self._count = 0
        for address, endpoint in entries:
            key = address.packed
            present = self._at.get(key)
            if present is None:
                self._at[key] = endpoint
            else:
                several = present if isinstance(present, tuple) else (present,)
                assert all(other.port != endpoint.port for other in several), (address, endpoint)
                self._at[key] = (*several, endpoint)
            self._count += 1
        self._served = _ports(self._at)

    @classmethod
    def empty(cls) -> Directory:
        """Nothing is served."""
        return cls()

    def lookup(self, destination: tuple[str | bytes, int]) -> Endpoint | None:
        """The endpoint served there.

        Args:
            destination: address and port. The address is textual, as connection requests carry it, or packed (4 or 16
                bytes).
        """
        address, port = destination
        found = self._at.get(address if isinstance(address, bytes) else _packed(address))
        if found is None:
            return None
        if isinstance(found, tuple):
            return next((endpoint for endpoint in found if endpoint.port == port), None)
        return found if found.port == port else None

    def served(self) -> Mapping[bytes, frozenset[int]]:
        """The ports by packed address, in the shape the TCP stack takes. Equal port sets are one object."""
        return MappingProxyType(self._served)

    def __iter__(self) -> Iterator[tuple[Address, Endpoint]]:
        for key, found in self._at.items():
            for endpoint in found if isinstance(found, tuple) else (found,):
                yield ip_address(key), endpoint

    def __len__(self) -> int:
        return self._count

    def __eq__(self, other: object) -> bool:
        return self._at == other._at if isinstance(other, Directory) else NotImplemented

    __hash__ = None  # type: ignore[assignment]  # compared by content, never a key

    def __repr__(self) -> str:
        return f"<Directory of {self._count} endpoints at {len(self._at)} addresses>"


def _ports(at: Mapping[bytes, Endpoint | tuple[Endpoint, ...]]) -> dict[bytes, frozenset[int]]:
    shared: dict[frozenset[int], frozenset[int]] = {}
    single: dict[int, frozenset[int]] = {}
    served: dict[bytes, frozenset[int]] = {}
    for key, found in at.items():
        if isinstance(found, tuple):
            ports = frozenset(endpoint.port for endpoint in found)
            served[key] = shared.setdefault(ports, ports)
        else:
            one = single.get(found.port)
            if one is None:
                one = frozenset((found.port,))
                one = single[found.port] = shared.setdefault(one, one)
            served[key] = one
    return served


def _packed(address: str) -> bytes:
    # For every connection, and for every live flow when something changes: ip_address() takes four times as long.
    parts = address.split(".")
    if len(parts) == 4:
        try:
            return bytes(map(int, parts))
        except ValueError:
            pass
    return ip_address(address).packed
