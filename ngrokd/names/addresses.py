"""One address per host name, for ever.

Programs remember addresses longer than names live: in DNS caches, connection pools, firewall rules. So a name keeps
its address through restarts, outages and its own absence, and an address that once meant one name does not soon mean
another:

- a new name gets the lowest address that was never handed out; new names are served in sorted order, so that the same
  names give the same addresses on every machine;
- a name that vanished keeps its address reserved. Only when no fresh address is left does the name that has been gone
  the longest lose its address to a new one, and never within a day of going;
- when nothing is left either, the name has no address; the pool says which names these are, and the others live on.

What is written down is the Go daemon's `ip_mappings.json`, a flat object from name to address, so that both daemons
read each other's file; what it cannot hold (when a name went, addresses in a subnet configured earlier) stands in
`addresses.json`. Both are judged on the way in: the Go daemon let names share addresses, used the broadcast address
and wrote whatever name the API gave. Each entry that cannot stay has a line in `problems`; all others stay.

Invariant: no two names hold one address, and every held address is a usable one of the subnet.
Pure: no I/O, no clock.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from ipaddress import IPv4Address, IPv4Network
from typing import Final

from ngrokd.endpoints import BadEndpoint, check_hostname, printable

QUARANTINE_S: Final = 24 * 3600.0
"""How long a released address is kept from other names: longer than any sane cache holds an answer."""

REMEMBERED_SUBNETS: Final = 4
"""How many earlier subnets `addresses.json` remembers; enough to undo a mistake, too few to grow."""

_YEAR_10000: Final = 253_402_300_800  # seconds; keeps out infinity and what int() would choke on
_WILDCARD_KEY: Final = "wildcard:"  # the Go daemon's key for the one address of all *.suffix endpoints


class AddressPool:
    """The addresses of one subnet and the names that hold them.

    Never given out: the network address, the gateway (the first host address, ours on the link), the broadcast
    address. Usable are the second host address and up; a /31 or /32 has none.

    Args:
        subnet: any size.
        mappings: `ip_mappings.json` as decoded, any JSON value; None when there is no such file.
        state: `addresses.json` as decoded, any JSON value; None when there is no such file.
        quarantine_s: see `QUARANTINE_S`.

    Attributes:
        problems: one printable line for each entry that could not stay as it was, and for each unreadable file.
        without_address: the names for which the last `assign` found none, sorted.
        generation: grows whenever what `dump` or `dump_state` return has changed.
    """

    def __init__(
        self,
        subnet: IPv4Network | str,
        mappings: object = None,
        state: object = None,
        *,
        quarantine_s: float = QUARANTINE_S,
    ) -> None:
        self.subnet: Final = IPv4Network(subnet)
        self.problems: list[str] = []
        self.without_address: tuple[str, ...] = ()
        self.generation = 0
        self._quarantine_s = quarantine_s
        self._first = int(self.subnet.network_address) + 2
        self._last = int(self.subnet.broadcast_address) - 1
        self._next = self._first  # nothing below is free
        self._held: dict[str, IPv4Address] = {}  # the one object that all who show or serve the address share
        self._holder: dict[int, str] = {}
        self._released: dict[str, float] = {}
        self._aliases: dict[str, str] = {}  # the Go daemon's spelling (upper case) -> the name
        self._remembered: dict[str, dict[str, str]] = {}
        state = self._read_state(state)
        self._take_over(mappings, _subnet_of(state))
        self._recall()
        self._take_release_times(state.get("released"))

    @classmethod
    def load(
        cls,
        subnet: IPv4Network | str,
        mappings: bytes | None,
        state: bytes | None = None,
        *,
        quarantine_s: float = QUARANTINE_S,
    ) -> AddressPool:
        """Read the two files as they are on disk; None stands for a file that does not exist.

        Never fails: what cannot be read is reported in `problems`, and of a damaged `ip_mappings.json` every entry
        that is still whole is kept.
        """
        problems: list[str] = []
        mapped = None if mappings is None else _decode("ip_mappings.json", mappings, problems, salvage=True)
        known = None if state is None else _decode("addresses.json", state, problems)
        pool = cls(subnet, mapped, known, quarantine_s=quarantine_s)
        pool.problems[:0] = problems
        return pool

    @property
    def gateway(self) -> IPv4Address:
        """Our own address on the link, `.1`."""
        return IPv4Address(min(int(self.subnet.network_address) + 1, int(self.subnet.broadcast_address)))

    @property
    def capacity(self) -> int:
        """How many names can have an address."""
        return max(0, self._last - self._first + 1)

    @property
    def held(self) -> int:
        """How many addresses are held, reserved ones included."""
        return len(self._held)

    @property
    def full(self) -> bool:
        """Whether the last `assign` left names without an address."""
        return bool(self.without_address)

    def get(self, host: str) -> IPv4Address | None:
        """The address this name holds or has reserved."""
        return self._held.get(host)

    def assign(self, hosts: Iterable[str], now: float) -> dict[str, IPv4Address]:
        """Give every name its address.

        Args:
            hosts: ALL names to be served from now on, lower case; every other name counts as released.
            now: wall clock, seconds since 1970.

        Returns:
            The addresses by name, in no particular order. Names for which there was none are missing here and listed
            in `without_address`.
        """
        wanted = set(hosts)
        self._mark_released(wanted, now)
        without: list[str] = []
        reusable: list[int] | None = None
        for host in sorted(host for host in wanted if host not in self._held):
            free = self._fresh()
            if not free:
                if reusable is None:
                    reusable = self._past_quarantine(now)
                if not reusable:
                    without.append(host)
                    continue
                free = reusable.pop()
            self._hold(host, free)
        self.without_address = tuple(without)
        given: dict[str, IPv4Address] = {}
        for host in wanted:
            address = self._held.get(host)
            if address is not None:
                given[host] = address
        return given

    def shortage(self) -> str:
        """What to tell the user when `full`, else ""."""
        if not self.without_address:
            return ""
        count, first = len(self.without_address), ", ".join(self.without_address[:3])
        more = f" and {count - 3} more" if count > 3 else ""
        return (
            f"the subnet {self.subnet} is full: all {self.capacity} addresses are in use or were until less than "
            f"{self._quarantine_s / 3600:g} h ago, so there is none for {first}{more}; configure a larger net.subnet"
        )

    def dump(self) -> dict[str, str]:
        """`ip_mappings.json`: every held and reserved address by name, sorted by name."""
        mapping = {host: str(address) for host, address in self._held.items()}
        mapping.update((spelling, mapping[host]) for spelling, host in self._aliases.items())
        return dict(sorted(mapping.items()))

    def dump_json(self) -> bytes:
        """`ip_mappings.json` byte for byte as the Go daemon writes it: sorted, two blanks, no final newline."""
        # By hand: json.dumps with an indent takes the slow path, and no name needs an escape.
        lines = ",\n".join(f'  "{host}": "{address}"' for host, address in self.dump().items())
        return f"{{\n{lines}\n}}".encode("ascii") if lines else b"{}"

    def dump_state(self) -> dict[str, object]:
        """`addresses.json`: the subnet, the release times (seconds since 1970), and earlier subnets' addresses."""
        return {
            "version": 1,
            "subnet": str(self.subnet),
            "released": {host: int(self._released[host]) for host in sorted(self._released)},
            "remembered": self._remembered,
        }

    def dump_state_json(self) -> bytes:
        """`addresses.json` as bytes."""
        return json.dumps(self.dump_state(), indent=1).encode("ascii") + b"\n"

    # Handing out

    def _mark_released(self, wanted: set[str], now: float) -> None:
        released = self._released
        back = wanted.intersection(released)
        gone = [host for host in self._held if host not in wanted and host not in released]
        for host in back:
            del released[host]
        for host in gone:
            released[host] = now
        if back or gone:
            self.generation += 1

    def _fresh(self) -> int:
        while self._next <= self._last and self._next in self._holder:
            self._next += 1
        return self._next if self._next <= self._last else 0

    def _past_quarantine(self, now: float) -> list[int]:
        """Addresses whose names have been gone long enough, the longest gone last."""
        # A release time in the future (the clock was set back) is simply not ripe yet: waiting is the safe mistake.
        ripe = [(t, int(self._held[host])) for host, t in self._released.items() if now - t >= self._quarantine_s]
        return [address for _, address in sorted(ripe, reverse=True)]

    def _hold(self, host: str, address: int) -> None:
        former = self._holder.get(address)
        if former is not None:
            del self._held[former]
            self._released.pop(former, None)
            self._aliases = {spelling: name for spelling, name in self._aliases.items() if name != former}
        self._take(host, address)
        self.generation += 1

    def _take(self, host: str, address: int) -> None:
        self._held[host] = IPv4Address(address)
        self._holder[address] = host

    # Taking over

    def _take_over(self, mappings: object, former: IPv4Network | None) -> None:
        if mappings is None:
            return
        if not isinstance(mappings, Mapping):
            self.problems.append("ip_mappings.json does not hold an object; every name gets a new address")
            return
        moved: dict[str, str] = {}
        # Exact names first, so that a name in another spelling never displaces the name itself.
        for key, host in sorted(((key, _name_of(key)) for key in mappings), key=_exact_names_first):
            shown, value = printable(str(key), 80), mappings[key]
            if not host:
                self.problems.append(f"ip_mappings.json: {shown} is not a host name we may serve; its entry is dropped")
                continue
            address = _parse(value)
            if address is None:
                what = printable(value, 40) if isinstance(value, str) else type(value).__name__
                self.problems.append(
                    f"ip_mappings.json: {shown} has {what}, which is not an address; it gets a new one"
                )
            elif host in self._held:
                if int(self._held[host]) == address:
                    self._aliases[key] = host
                else:
                    self.problems.append(
                        f"ip_mappings.json: {shown} is {host}, which has {self.get(host)}; {value} is dropped"
                    )
            elif (
                former is not None
                and former != self.subnet
                and IPv4Address(address) in former
                and not self._usable(address)
            ):
                moved[host] = _dotted(address)
            elif not self._usable(address):
                self.problems.append(
                    f"ip_mappings.json: {shown} has {value}, {self._why_not(address)}; it gets a new one"
                )
            elif address in self._holder:
                self.problems.append(
                    f"ip_mappings.json: {shown} shares {value} with {self._holder[address]}; it gets its own"
                )
            else:
                self._take(host, address)
                if host != key:
                    self._aliases[key] = host
        if moved and former is not None:
            self.problems.append(f"net.subnet changed from {former} to {self.subnet}: {len(moved)} names move")
            self._remembered.pop(str(former), None)
            self._remembered[str(former)] = dict(sorted(moved.items()))
            while len(self._remembered) > REMEMBERED_SUBNETS:
                del self._remembered[next(iter(self._remembered))]

    def _recall(self) -> None:
        """When the subnet was used before, give names without an address the one they had in it."""
        for host, text in self._remembered.pop(str(self.subnet), {}).items():
            address = _parse(text)
            if address is not None and self._usable(address) and host not in self._held and address not in self._holder:
                self._take(host, address)

    def _read_state(self, state: object) -> Mapping[str, object]:
        if state is None:
            return {}
        if not isinstance(state, Mapping):
            self.problems.append("addresses.json does not hold an object; release times are forgotten")
            return {}
        remembered = state.get("remembered")
        if isinstance(remembered, Mapping):
            for subnet, entries in list(remembered.items())[-REMEMBERED_SUBNETS:]:
                if isinstance(subnet, str) and isinstance(entries, Mapping):
                    self._remembered[subnet] = {
                        host: text
                        for host, text in entries.items()
                        if _name_of(host) == host and _parse(text) is not None
                    }
        return state

    def _take_release_times(self, released: object) -> None:
        if not isinstance(released, Mapping):
            return
        for host, since in released.items():
            if host in self._held and isinstance(since, int | float) and 0 <= since < _YEAR_10000:
                self._released[host] = float(since)

    def _usable(self, address: int) -> bool:
        return self._first <= address <= self._last

    def _why_not(self, address: int) -> str:
        if address == int(self.subnet.network_address):
            return f"the network address of {self.subnet}"
        if address == int(self.subnet.broadcast_address):
            return f"the broadcast address of {self.subnet}"
        if address == int(self.subnet.network_address) + 1:
            return f"our own address in {self.subnet}"
        return f"outside the subnet {self.subnet}"


def _decode(name: str, data: bytes, problems: list[str], *, salvage: bool = False) -> object:
    try:
        value: object = json.loads(data)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        # A write cut off by a power failure leaves a prefix; its whole entries still name addresses in use.
        saved = {k.decode(): v.decode() for k, v in _WHOLE_ENTRY.findall(data)} if salvage else {}
        what = f"{len(saved)} entries could be read, other names get new addresses" if salvage else "it is started anew"
        problems.append(f"{name} is damaged ({printable(str(error), 100)}); {what}")
        return saved
    if value is None:
        problems.append(f"{name} holds null; it is started anew")
    return value


_WHOLE_ENTRY: Final = re.compile(rb'"([!#-\[\]-~]{1,300})"\s*:\s*"([0-9.]{7,15})"')


def _subnet_of(state: Mapping[str, object]) -> IPv4Network | None:
    text = state.get("subnet")
    try:
        return IPv4Network(text) if isinstance(text, str) else None
    except ValueError:
        return None


def _name_of(key: object) -> str:
    """The name an entry is for, "" when we cannot serve or keep it."""
    if not isinstance(key, str):
        return ""
    try:
        if key.startswith(_WILDCARD_KEY):  # kept as it is, so that going back to the Go daemon keeps this one as well
            check_hostname(key.removeprefix(_WILDCARD_KEY))
            return key
        return check_hostname(key)
    except BadEndpoint:
        return ""


def _exact_names_first(entry: tuple[object, str]) -> tuple[bool, str]:
    key, host = entry
    return key != host, str(key)


def _parse(value: object) -> int | None:
    if not isinstance(value, str):
        return None
    try:
        return int(IPv4Address(value))
    except ValueError:
        return None


def _dotted(address: int) -> str:
    return f"{address >> 24}.{address >> 16 & 255}.{address >> 8 & 255}.{address & 255}"
