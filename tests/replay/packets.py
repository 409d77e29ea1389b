"""Packets of a capture, read without the code under test, and told in tcpdump's words."""

from __future__ import annotations

import socket
import struct
import zlib
from dataclasses import dataclass

FIN, SYN, RST, PSH, ACK, URG = 1, 2, 4, 8, 16, 32
TCP, UDP, ICMP, ICMPV6 = 6, 17, 1, 58

MASK = 0xFFFFFFFF
_LETTERS = (("S", SYN), ("F", FIN), ("R", RST), ("P", PSH), (".", ACK), ("U", URG))

Address = tuple[bytes, int]


@dataclass(frozen=True, slots=True)
class Key:
    """Which connection: the app's address and port, and those of the endpoint."""

    app: Address
    endpoint: Address


@dataclass(frozen=True, slots=True)
class Tcp:
    """A TCP packet. Offsets are into the packet."""

    source: Address
    destination: Address
    start: int
    data_start: int
    seq: int
    ack: int
    flags: int
    window: int
    payload: bytes
    mss: int | None
    window_scale: int | None
    sack_permitted: bool
    stamp: tuple[int, int] | None
    stamp_at: int
    sacks: tuple[tuple[int, int], ...]
    sacks_at: int
    good: bool

    def key(self, inbound: bool) -> Key:
        """The connection, given who sent this."""
        return Key(self.source, self.destination) if inbound else Key(self.destination, self.source)

    @property
    def length(self) -> int:
        """How many numbers it takes."""
        return len(self.payload) + (self.flags & SYN != 0) + (self.flags & FIN != 0)


def ones_complement_sum(data: bytes) -> int:
    """RFC 1071, word by word as far as C does it."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total


@dataclass(frozen=True, slots=True)
class Ip:
    """An IP header: where the rest begins, and what it is."""

    source: bytes
    destination: bytes
    protocol: int
    start: int
    pseudo: bytes


def parse_ip(packet: bytes) -> Ip | None:
    """None where this is not a whole, unfragmented IP packet."""
    version = packet[0] >> 4 if packet else 0
    if version == 4 and len(packet) >= 20:
        start = (packet[0] & 15) * 4
        if struct.unpack_from("!H", packet, 2)[0] != len(packet) or not 20 <= start <= len(packet):
            return None
        if struct.unpack_from("!H", packet, 6)[0] & 0x3FFF:
            return None
        pseudo = packet[12:20] + struct.pack("!HH", packet[9], len(packet) - start)
        return Ip(packet[12:16], packet[16:20], packet[9], start, pseudo)
    if version == 6 and len(packet) >= 40:
        if struct.unpack_from("!H", packet, 4)[0] + 40 != len(packet):
            return None
        pseudo = packet[8:40] + struct.pack("!II", len(packet) - 40, packet[6])
        return Ip(packet[8:24], packet[24:40], packet[6], 40, pseudo)
    return None


def parse_tcp(packet: bytes) -> Tcp | None:
    """None where this is not a TCP packet that can be understood."""
    ip = parse_ip(packet)
    if ip is None or ip.protocol != TCP or len(packet) < ip.start + 20:
        return None
    at = ip.start
    source, destination, seq, ack, words, flags, window = struct.unpack_from("!HHIIBBH", packet, at)
    data_start = at + (words >> 4) * 4
    if not at + 20 <= data_start <= len(packet):
        return None
    mss, scale, permitted, stamp, stamp_at = None, None, False, None, 0
    sacks: list[tuple[int, int]] = []
    sacks_at = 0
    option = at + 20
    while option < data_start and packet[option] != 0:
        if packet[option] == 1:
            option += 1
            continue
        size = packet[option + 1] if option + 1 < data_start else 0
        if size < 2 or option + size > data_start:
            break
        kind, body = packet[option], option + 2
        if kind == 2 and size == 4:
            mss = struct.unpack_from("!H", packet, body)[0]
        elif kind == 3 and size == 3:
            scale = packet[body]
        elif kind == 4:
            permitted = True
        elif kind == 5:
            sacks = [struct.unpack_from("!II", packet, body + 8 * n) for n in range((size - 2) // 8)]
            sacks_at = body
        elif kind == 8 and size == 10:
            stamp = struct.unpack_from("!II", packet, body)
            stamp_at = body
        option += size
    return Tcp(
        (ip.source, source),
        (ip.destination, destination),
        at,
        data_start,
        seq,
        ack,
        flags & 0x3F,
        window,
        packet[data_start:],
        mss,
        scale,
        permitted,
        stamp,
        stamp_at,
        tuple(sacks),
        sacks_at,
        ones_complement_sum(ip.pseudo + packet[at:]) == 0xFFFF,
    )


def with_tcp_checksum(packet: bytearray, *, good: bool) -> bytes:
    """The packet with its TCP checksum made anew, or made wrong."""
    ip = parse_ip(bytes(packet))
    assert ip is not None
    packet[ip.start + 16 : ip.start + 18] = bytes(2)
    checksum = ~ones_complement_sum(ip.pseudo + bytes(packet[ip.start :])) & 0xFFFF
    packet[ip.start + 16 : ip.start + 18] = struct.pack("!H", checksum if good else checksum ^ 0x5555)
    return bytes(packet)


def address_text(address: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET if len(address) == 4 else socket.AF_INET6, address)


@dataclass(slots=True)
class Origin:
    """Where numbers and timestamps of one side of a connection begin. Told from there, they do not vary."""

    seq: int
    stamp: int | None = None


class Narrator:
    """Tells packets, one line each, with numbers relative to the beginning of their connection."""

    def __init__(self) -> None:
        self._app: dict[Key, Origin] = {}
        self._us: dict[Key, Origin] = {}

    def tell(self, packet: bytes, inbound: bool, gso_size: int = 0) -> str:
        """The packet in one line, as tcpdump would have it."""
        tcp = parse_tcp(packet)
        if tcp is not None:
            return self._tell_tcp(tcp, inbound, gso_size)
        ip = parse_ip(packet)
        if ip is None:
            return _tell_part(packet)
        who = f"{address_text(ip.source)} > {address_text(ip.destination)}:"
        rest = packet[ip.start :]
        if ip.protocol == UDP and len(rest) >= 8:
            ports = struct.unpack_from("!HH", rest)
            return f"{who} udp {ports[0]} > {ports[1]} ({len(rest) - 8})"
        if ip.protocol in (ICMP, ICMPV6) and len(rest) >= 8:
            covered = ip.pseudo + rest if ip.protocol == ICMPV6 else rest
            state = "" if ones_complement_sum(covered) == 0xFFFF else " (bad checksum)"
            name = "icmp6" if ip.protocol == ICMPV6 else "icmp"
            return f"{who} {name} {rest[0]}/{rest[1]} ({len(rest) - 8}) {zlib.crc32(rest[8:]):08x}{state}"
        return f"{who} protocol {ip.protocol} ({len(rest)})"

    def _tell_tcp(self, tcp: Tcp, inbound: bool, gso_size: int) -> str:
        key = tcp.key(inbound)
        mine, other = (self._app, self._us) if inbound else (self._us, self._app)
        if tcp.flags & SYN and tcp.good:
            known = mine.get(key)
            if known is None or known.seq != tcp.seq:
                mine[key] = Origin(tcp.seq, tcp.stamp[0] if tcp.stamp else None)
                if inbound:
                    self._us.pop(key, None)
        own, peer = mine.get(key), other.get(key)
        # A RST without a connection has the number 0, or the one that it was told.
        bare = tcp.flags & RST and not (tcp.flags & ACK and tcp.seq)
        first = tcp.seq if own is None or (bare and tcp.flags & ACK) else _signed(tcp.seq - own.seq)
        letters = "".join(letter for letter, flag in _LETTERS if tcp.flags & flag) or "none"
        parts = [f"{letters} {first}:{first + len(tcp.payload)}({len(tcp.payload)})"]
        if tcp.flags & ACK:
            parts.append(f"ack {tcp.ack if peer is None else _signed(tcp.ack - peer.seq)}")
        parts.append(f"win {tcp.window}")
        if tcp.mss is not None:
            parts.append(f"mss {tcp.mss}")
        if tcp.window_scale is not None:
            parts.append(f"wscale {tcp.window_scale}")
        if tcp.sack_permitted:
            parts.append("sackOK")
        if tcp.stamp is not None:
            value = tcp.stamp[0] if own is None or own.stamp is None else _signed(tcp.stamp[0] - own.stamp)
            echo = tcp.stamp[1]
            if peer is not None and peer.stamp is not None:
                echo = _signed(echo - peer.stamp)
            parts.append(f"ts {value} ecr {echo}")
        if tcp.sacks:
            base = 0 if peer is None else peer.seq
            parts.append("sack " + " ".join(f"{_signed(a - base)}:{_signed(b - base)}" for a, b in tcp.sacks))
        if gso_size:
            parts.append(f"gso {gso_size}")
        if tcp.payload and not inbound:
            parts.append(f"#{zlib.crc32(tcp.payload):08x}")
        if not tcp.good:
            parts.append("(bad checksum)")
        who = ".".join((address_text(tcp.source[0]), str(tcp.source[1])))
        whom = ".".join((address_text(tcp.destination[0]), str(tcp.destination[1])))
        return f"{who} > {whom}: {' '.join(parts)}"


def _tell_part(packet: bytes) -> str:
    """A part of an IPv4 packet, with its place in the whole, or whatever else it is."""
    if len(packet) >= 20 and packet[0] >> 4 == 4 and struct.unpack_from("!H", packet, 2)[0] == len(packet):
        part = struct.unpack_from("!H", packet, 6)[0]
        more = "+" if part & 0x2000 else ""
        who = f"{address_text(packet[12:16])} > {address_text(packet[16:20])}:"
        return f"{who} part {len(packet) - 20}@{(part & 0x1FFF) * 8}{more} of protocol {packet[9]}"
    return f"{len(packet)} bytes: {packet[:40].hex()}"


def _signed(value: int) -> int:
    value &= MASK
    return value - 0x100000000 if value >= 0x80000000 else value
