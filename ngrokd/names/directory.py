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

    def changes_since(self, before: Directory) -> tuple[list[tuple[bytes, Endpoint]], list[tuple[bytes, int]]]:
        """What `before.changed` needs to become this one: endpoints at packed addresses, and places now empty."""
        put: list[tuple[bytes, Endpoint]] = []
        drop: list[tuple[bytes, int]] = []
        for key, found in self._at.items():
            old = before._at.get(key)
            if old is not found and old != found:
                known = {endpoint.port: endpoint for endpoint in _several(old)}
                put += [(key, endpoint) for endpoint in _several(found) if known.pop(endpoint.port, None) != endpoint]
                drop += [(key, port) for port in known]
        for key, gone in before._at.items():
            if key not in self._at:
                drop += [(key, endpoint.port) for endpoint in _several(gone)]
        return put, drop

    def changed(self, put: Iterable[tuple[bytes, Endpoint]], drop: Iterable[tuple[bytes, int]] = ()) -> Directory:
        """Another directory in which this has changed. Takes a copy of two dicts, a millisecond for 65,000 addresses.

        Args:
            put: endpoints at packed addresses; one at the same address and port is replaced.
            drop: packed addresses and ports where nothing is any more.
        """
        places: dict[bytes, dict[int, Endpoint]] = {}

        def ports_at(key: bytes) -> dict[int, Endpoint]:
            ports = places.get(key)
            if ports is None:
                ports = places[key] = {endpoint.port: endpoint for endpoint in _several(self._at.get(key))}
            return ports

        for key, port in drop:
            ports_at(key).pop(port, None)
        for key, endpoint in put:
            ports_at(key)[endpoint.port] = endpoint
        at, served, count = dict(self._at), dict(self._served), self._count
        touched: dict[bytes, Endpoint | tuple[Endpoint, ...]] = {}
        for key, ports in places.items():
            count += len(ports) - len(_several(at.get(key)))
            if ports:
                at[key] = touched[key] = next(iter(ports.values())) if len(ports) == 1 else tuple(ports.values())
            else:
                at.pop(key, None)
                served.pop(key, None)
        served.update(_ports(touched))
        made = Directory()
        made._at, made._served, made._count = at, served, count
        return made

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


def _several(found: Endpoint | tuple[Endpoint, ...] | None) -> tuple[Endpoint, ...]:
    if found is None:
        return ()
    return found if isinstance(found, tuple) else (found,)


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
