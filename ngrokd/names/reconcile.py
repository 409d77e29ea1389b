"""What should be, given what the API says: pure decisions, applied by others.

`plan` turns a listing (raw JSON values, hostile) into the state wanted and the difference from the state before.
Three rules shape it:

- One bad endpoint is skipped with its reason, the others live.
- A service is a host name and a port. Several endpoints with the same URL (ngrok pools them) are one service, which
  goes when the last of them goes. Two URLs that differ only in scheme want the same door; one gets it, always the
  same one for the same listing, and the other is reported.
- An API that suddenly lists nothing is more often wrong than right. When at least three endpoints vanish at once, the
  plan asks for a second look and changes nothing.

The same listing gives the same plan in any order, and a plan made twice changes nothing.

What there may be 65,000 of (`Service`, `Skipped`) is kept from the garbage collector, as `Endpoint` is: these values
cannot be part of a cycle. The work is plain Python in small steps, so that it can be done in a thread beside the
packets: no single call into C that holds the interpreter for long.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address
from operator import is_
from types import MappingProxyType
from typing import Final, TypeAlias

import msgspec

from ngrokd.endpoints import ALWAYS_DENIED, BadEndpoint, Endpoint, parse_endpoint, printable, shown_url
from ngrokd.names.addresses import AddressPool
from ngrokd.names.directory import Directory
from ngrokd.names.hosts import DEFAULT_INSTANCE, Survey
from ngrokd.names.twins import Twins

CONFIRM_FROM: Final = 3
"""From this many endpoints on, an empty listing must be seen twice before anything is removed."""

_Door: TypeAlias = tuple[str, int]  # host name and port: what is asked for, whoever answers

_INGRESS: Final = re.compile(r"[A-Za-z0-9._:\[\]-]{1,270}")

SHADOWS_PUBLIC: Final = "shadows-public"
"""Flag of a host name that resolves publicly as well: this machine now reaches ngrok under it."""


class Service(msgspec.Struct, frozen=True, gc=False):
    """A host name and port that is served.

    Attributes:
        endpoint: the one that stands for the pool, the smallest id.
        address: where it answers on this machine.
        others: the other endpoints with the same URL, by id.
    """

    endpoint: Endpoint
    address: IPv4Address
    others: tuple[Endpoint, ...] = ()

    @property
    def pool_size(self) -> int:
        """How many endpoints share the URL, at least 1."""
        return 1 + len(self.others)


class Skipped(msgspec.Struct, frozen=True, gc=False):
    """An endpoint that is not served, and why. All printable; `id` and `url` are "" where there was none."""

    id: str
    url: str
    reason: str


@dataclass(frozen=True, slots=True)
class Desired:
    """Everything that should be true on this machine. The default is: nothing is served.

    Attributes:
        services: sorted by host and port.
        skipped: in the order of ids.
        without_address: host names for which the subnet had no address left, sorted.
        directory: what the data plane is told.
        flags: words about host names that are found out later, such as `SHADOWS_PUBLIC`.
    """

    services: tuple[Service, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    without_address: tuple[str, ...] = ()
    directory: Directory = field(default_factory=Directory, repr=False)
    flags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def endpoint_count(self) -> int:
        """How many endpoints are served, each member of a pool counted."""
        return sum(service.pool_size for service in self.services)

    def hosts_entries(self) -> list[tuple[IPv4Address, str]]:
        """What the hosts section says: one line for each name, sorted by address."""
        addresses = {service.endpoint.host: service.address for service in self.services}
        return sorted(((address, host) for host, address in addresses.items()), key=lambda entry: int(entry[0]))

    def names(self) -> set[str]:
        """The host names that are served."""
        return {service.endpoint.host for service in self.services}

    def with_flags(self, flags: Mapping[str, Collection[str]]) -> Desired:
        """The same state with these flags instead, for names that are served."""
        if not flags and not self.flags:
            return self
        names = self.names()
        kept = {host: tuple(sorted(words)) for host, words in sorted(flags.items()) if host in names and words}
        return replace(self, flags=MappingProxyType(kept))


NOTHING: Final = Desired()
"""The state before the first plan."""


@dataclass(frozen=True, slots=True)
class Denied:
    """Names that are never served here, besides those that `endpoints.check_hostname` refuses anywhere.

    Make it with `denied`.
    """

    reasons: Mapping[str, str] = field(default_factory=dict)
    foreign: AbstractSet[str] = frozenset()
    own: Mapping[str, str] = field(default_factory=dict)
    elsewhere: Mapping[str, str] = field(default_factory=dict)
    instance: str = DEFAULT_INSTANCE

    def reason(self, host: str) -> str:
        """Why this name is not served, or ""."""
        if host in self.foreign:
            return f"{host} stands in the hosts file already, outside our section"
        owner = self.elsewhere.get(host)
        # Two that wrote the name at the same moment must not both keep it, nor both let go: the smaller name keeps it.
        if owner is not None and (host not in self.own or owner < self.instance):
            return f"{host} is served by the instance on {printable(owner, 64)}"
        return self.reasons.get(host, "")


def denied(
    *,
    machine: Iterable[str] = (),
    servers: Iterable[str] = (),
    hosts: Survey | None = None,
    instance: str | None = None,
) -> Denied:
    """Gather the names that must not be taken over.

    Args:
        machine: what this machine calls itself: host name and fully qualified name.
        servers: hosts of the configured API and ingress; ngrok's own are always included.
        hosts: the hosts file as it is now, None when it is not used.
        instance: our interface name; None is the same as ngrokd0.
    """
    reasons = dict.fromkeys(map(_folded, machine), "it is this machine's own name")
    reasons.update(dict.fromkeys(map(_folded, servers), "the daemon itself must reach that server under this name"))
    reasons.update(dict.fromkeys(ALWAYS_DENIED, "the daemon itself must reach that server under this name"))
    if hosts is None:
        return Denied(reasons, instance=instance or DEFAULT_INSTANCE)
    return Denied(reasons, hosts.foreign, hosts.own, hosts.elsewhere, instance or DEFAULT_INSTANCE)


@dataclass(frozen=True, slots=True)
class Plan:
    """The state wanted, and how it differs from the state before.

    Attributes:
        desired: what should be. The state before, unchanged, when `confirm` is set.
        added: services that were not there.
        removed: services that are no more.
        changed: services at the same name and port whose URL, address or protocol differs: (before, after).
        skipped: endpoints that are newly skipped, or for another reason than before; in the order of ids.
        confirm: everything vanished at once; ask the API again soon and plan with `confirmed`.
    """

    desired: Desired
    added: tuple[Service, ...] = ()
    removed: tuple[Service, ...] = ()
    changed: tuple[tuple[Service, Service], ...] = ()
    skipped: tuple[Skipped, ...] = ()
    confirm: bool = False

    def __bool__(self) -> bool:
        """Whether a service comes, goes or changes."""
        return bool(self.added or self.removed or self.changed)

    def transition(self) -> Directory:
        """What to serve while names come and go: all that either state serves; where both do, what will be.

        It is `desired.directory` itself when nothing goes.
        """
        directory = self.desired.directory
        leaving = [
            service
            for service in (*self.removed, *(before for before, _ in self.changed))
            if directory.lookup((service.address.packed, service.endpoint.port)) is None
        ]
        if not leaving:
            return directory
        return Directory((one.address, one.endpoint) for one in (*self.desired.services, *leaving))

    def summary(self, limit: int = 5) -> str:
        """The difference in one printable line: `2 added (http://a.prod, tcp://b.prod:5432), 1 removed (...)`."""
        parts = []
        for services, verb in (
            (self.added, "added"),
            (self.removed, "removed"),
            ([after for _, after in self.changed], "changed"),
        ):
            if services:
                urls = ", ".join(service.endpoint.url for service in services[:limit])
                more = ", ..." if len(services) > limit else ""
                parts.append(f"{len(services)} {verb} ({urls}{more})")
        return ", ".join(parts) or "no change"


def plan(
    previous: Desired,
    listing: Sequence[object],
    pool: AddressPool,
    refused: Denied,
    now: float,
    *,
    confirmed: bool = False,
    limit: int = 65533,
) -> Plan:
    """Decide what should be.

    Args:
        previous: the state that stands, `NOTHING` at the start.
        listing: the API's objects as decoded, all pages.
        pool: gives the names their addresses; it is the only thing changed here, and what it learns stays true
            whether or not the plan is carried out.
        refused: names that must not be served.
        now: wall clock, seconds since 1970.
        confirmed: an empty listing has been seen twice, or the user asked for it.
        limit: how many services at most; those that stand go first, then the order of names.
    """
    endpoints, skipped = _read(listing, previous)
    doors, others = _merge(endpoints, refused, skipped)
    if not doors and not confirmed and previous.endpoint_count >= CONFIRM_FROM:
        return Plan(previous, confirm=True)

    before = {(service.endpoint.host, service.endpoint.port): service for service in previous.services}
    if len(doors) > limit:
        ranked = sorted(doors, key=lambda door: (door not in before, door))
        for door in ranked[limit:]:
            for member in (doors.pop(door), *others.get(door, ())):
                skipped.append(_skip(member, f"more than {limit} endpoints (limits.endpoints)"))
    addresses = pool.assign({host for host, _ in doors}, now)
    services: list[Service] = []
    for door in _in_order(doors, before):
        first, rest = doors[door], others.get(door, ())
        address = addresses.get(door[0])
        if address is None:
            for member in (first, *rest):
                skipped.append(_skip(member, f"no address is left in {pool.subnet}"))
            continue
        service = Service(first, address, rest)
        standing = before.get(door)
        # Keep the object that stands: at 65,000 endpoints the old and the new state would weigh twice.
        services.append(standing if standing == service else service)

    same = len(services) == len(previous.services) and all(map(is_, services, previous.services))
    desired = Desired(
        services=previous.services if same else tuple(services),
        skipped=tuple(sorted(skipped, key=lambda one: (one.id, one.url, one.reason))),
        without_address=pool.without_address,
        directory=previous.directory if same else Directory((one.address, one.endpoint) for one in services),
    ).with_flags(previous.flags)
    return _difference(previous, desired)


def rows(desired: Desired, twins: Twins | None = None) -> Iterator[dict[str, object]]:
    """What `list` answers: the Go daemon's fields, then ours, one row for each service, sorted by host and port.

    They are made one by one: all of 65,000 would take a fifth of a second.

    Args:
        desired: what is served.
        twins: the names' IPv6 addresses, None while they have none.
    """
    for service in desired.services:
        yield {
            "id": service.endpoint.id,
            "hostname": service.endpoint.host,
            "ip": str(service.address),
            "port": service.endpoint.port,
            "url": service.endpoint.url,
            "local_listener": True,
            "network_port": 0,
            "listen_interface": "virtual",
            "ip6": str(twins.of(service.address)) if twins is not None else "",
            "proto": service.endpoint.proto,
            "name": service.endpoint.name,
            "pool_size": service.pool_size,
            "flags": list(desired.flags.get(service.endpoint.host, ())),
        }


# The last known state, for a start while the API is down


def dump_endpoints(desired: Desired, now: float, ingress_endpoint: str = "") -> bytes:
    """`endpoints.json`: the endpoints served, as objects that `plan` takes for a listing, and where the ingress is.

    Sorted; equal states differ only in `saved_at` (wall clock, whole seconds since 1970)."""
    members = [endpoint for service in desired.services for endpoint in (service.endpoint, *service.others)]
    listing = [
        {
            "id": endpoint.id,
            "url": endpoint.url,
            "proto": endpoint.proto,
            **({"name": endpoint.name} if endpoint.name else {}),
            **({"description": endpoint.description} if endpoint.description else {}),
        }
        for endpoint in members
    ]
    head = json.dumps({"version": 1, "saved_at": int(now), "ingress_endpoint": ingress_endpoint})[:-1]
    lines = ",\n".join(map(json.dumps, listing))
    return f'{head}, "endpoints": [\n{lines}\n]}}\n'.encode("ascii")


@dataclass(frozen=True, slots=True)
class LastKnown:
    """What `endpoints.json` held.

    Attributes:
        listing: raw objects, to be judged by `plan` like any listing.
        saved_at: wall clock, seconds since 1970; 0 when unknown.
        ingress_endpoint: HOST:PORT as the API had named it, "" when unknown.
        problem: why nothing could be read, printable, or "".
    """

    listing: tuple[object, ...] = ()
    saved_at: float = 0.0
    ingress_endpoint: str = ""
    problem: str = ""


def load_endpoints(data: bytes | None) -> LastKnown:
    """Read `endpoints.json`; None stands for a file that does not exist. Never fails: see `LastKnown.problem`."""
    if data is None:
        return LastKnown()
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        return LastKnown(problem=f"endpoints.json is damaged ({printable(str(error), 100)}); it is started anew")
    listing = value.get("endpoints") if isinstance(value, dict) else None
    if not isinstance(listing, list):
        return LastKnown(problem="endpoints.json holds no list of endpoints; it is started anew")
    saved_at = value.get("saved_at")
    known = isinstance(saved_at, int) and not isinstance(saved_at, bool) and 0 < saved_at < 253_402_300_800
    ingress = value.get("ingress_endpoint")
    # What is dialled is verified, so a damaged name does no harm; but it is shown, and must not be a terminal's ruin.
    found = ingress if isinstance(ingress, str) and _INGRESS.fullmatch(ingress) is not None else ""
    return LastKnown(tuple(listing), float(saved_at) if known else 0.0, found)


# Helpers, in the order of `plan`


def _folded(name: str) -> str:
    return name.lower().removesuffix(".")


def _read(listing: Iterable[object], previous: Desired) -> tuple[list[Endpoint], list[Skipped]]:
    known = {endpoint.id: endpoint for service in previous.services for endpoint in (service.endpoint, *service.others)}
    endpoints: list[Endpoint] = []
    skipped: list[Skipped] = []
    for obj in listing:
        id_ = obj.get("id") if isinstance(obj, dict) else None
        same = known.get(id_) if isinstance(id_, str) else None
        if same is not None and isinstance(obj, dict) and _says(obj, same):
            endpoints.append(same)
            continue
        try:
            endpoints.append(parse_endpoint(obj))
        except BadEndpoint as error:
            skipped.append(_skip_raw(obj, str(error)))
    return endpoints, skipped


def _says(obj: dict[object, object], endpoint: Endpoint) -> bool:
    """Whether parsing this object is sure to give this endpoint; spares most of the work of most polls."""
    proto, name, description = obj.get("proto"), obj.get("name"), obj.get("description")
    return (
        obj.get("url") == endpoint.url
        and (proto == endpoint.proto or (proto is None and endpoint.proto == endpoint.scheme))
        and (name == endpoint.name or (name is None and not endpoint.name))
        and (description == endpoint.description or (description is None and not endpoint.description))
    )


def _merge(
    endpoints: Iterable[Endpoint], refused: Denied, skipped: list[Skipped]
) -> tuple[dict[_Door, Endpoint], dict[_Door, tuple[Endpoint, ...]]]:
    """Group by name and port. Returns who stands for each, and the others where there are any."""
    doors: dict[_Door, Endpoint] = {}
    several: dict[_Door, list[Endpoint]] = {}
    verdicts: dict[str, str] = {}
    for endpoint in endpoints:
        host = endpoint.host
        reason = verdicts.get(host)
        if reason is None:
            reason = verdicts[host] = refused.reason(host)
        if reason:
            skipped.append(_skip(endpoint, reason))
            continue
        door = (host, endpoint.port)
        first = doors.setdefault(door, endpoint)
        if first is not endpoint:
            several.setdefault(door, [first]).append(endpoint)
    others: dict[_Door, tuple[Endpoint, ...]] = {}
    for door, members in several.items():
        doors[door], *rest = _one_scheme(members, skipped)
        others[door] = tuple(rest)
    return doors, others


def _in_order(doors: Mapping[_Door, Endpoint], before: Mapping[_Door, Service]) -> list[_Door]:
    """The doors, sorted. Those that stood before are so already, and merging two sorted runs is one quick pass."""
    standing = [door for door in before if door in doors]
    fresh = sorted(door for door in doors if door not in before)
    return sorted(standing + fresh) if standing and fresh else standing or fresh


def _one_scheme(members: list[Endpoint], skipped: list[Skipped]) -> list[Endpoint]:
    # Sorted by everything, so that the outcome does not depend on the order of the listing. An endpoint may come twice
    # when the list moves between two pages.
    ordered = sorted(set(members), key=lambda e: (e.scheme, e.id, e.url, e.proto, e.name, e.description))
    first = ordered[0]
    winners: dict[str, Endpoint] = {}
    for endpoint in ordered:
        if endpoint.scheme == first.scheme:
            winners.setdefault(endpoint.id, endpoint)
        else:
            skipped.append(_skip(endpoint, f"{first.url} ({first.id}) has the same host and port and is served"))
    return list(winners.values())


def _skip(endpoint: Endpoint, reason: str) -> Skipped:
    return Skipped(endpoint.id, printable(endpoint.url), reason)


def _skip_raw(obj: object, reason: str) -> Skipped:
    fields = obj if isinstance(obj, dict) else {}
    id_, url = fields.get("id"), fields.get("url") or fields.get("public_url")
    return Skipped(
        printable(id_, 128) if isinstance(id_, str) else "",
        printable(shown_url(url)) if isinstance(url, str) else "",
        reason,
    )


def _difference(previous: Desired, desired: Desired) -> Plan:
    before = {(service.endpoint.host, service.endpoint.port): service for service in previous.services}
    known = set(previous.skipped)
    added: list[Service] = []
    changed: list[tuple[Service, Service]] = []
    for service in desired.services:
        former = before.pop((service.endpoint.host, service.endpoint.port), None)
        if former is None:
            added.append(service)
        elif former is not service and _face(former) != _face(service):
            changed.append((former, service))
    skipped = tuple(one for one in desired.skipped if one not in known)
    return Plan(desired, tuple(added), tuple(before.values()), tuple(changed), skipped)


def _face(service: Service) -> tuple[str, str, IPv4Address]:
    # Who of a pool stands for it, and how many they are, is nobody's news.
    return service.endpoint.scheme, service.endpoint.proto, service.address
