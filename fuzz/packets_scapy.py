"""The packets of `packets`, read by scapy as well: a slow second opinion on everything that is accepted.

Fields of IPv4, TCP, UDP and ICMP headers are the same, options are the same where scapy understands them, and a
checksum that we believe is the one that scapy computes for the packet.
"""

from __future__ import annotations

from typing import Any, Final

from scapy.layers.inet import ICMP, IP, TCP, UDP, in4_chksum  # noqa: TID251 - this is the oracle

from fuzz.packets import aim, prepare
from tun.wire import icmp, verdict
from tun.wire.ipv4 import Ipv4Header, parse_ipv4
from tun.wire.tcp import Segment, parse_tcp, verify_tcp
from tun.wire.udp import Datagram, parse_udp, verify_udp

CORPUS: Final = "packets"
MAX_LEN: Final = 256

_HEADER: Final = Ipv4Header()
_SEGMENT: Final = Segment()
_DATAGRAM: Final = Datagram()


def run_one(data: bytes) -> None:
    """One packet, dressed as in `packets`."""
    if len(data) < 3:
        return
    dress = data[0]
    flow = prepare(data[1] % 6)[1] if dress & 12 == 12 else None
    packet = aim(data[3:], dress, flow)
    if parse_ipv4(packet, 0, _HEADER) != verdict.OK:
        return
    packet = packet[: _HEADER.total_length]
    seen: Any = IP(packet)  # scapy's fields are attributes made at run time
    assert seen.ihl * 4 == _HEADER.header_length
    assert seen.len == _HEADER.total_length
    assert seen.id == _HEADER.identification
    assert seen.frag * 8 == _HEADER.fragment
    assert bool(seen.flags.MF) == _HEADER.more_fragments
    assert (seen.ttl, seen.proto) == (_HEADER.ttl, _HEADER.protocol)
    assert seen.src == ".".join(map(str, _HEADER.source))
    assert seen.dst == ".".join(map(str, _HEADER.destination))
    assert same_checksum(IP(packet[: _HEADER.header_length]), packet[10:12])
    if _HEADER.fragment or _HEADER.more_fragments:
        return
    at, end = _HEADER.header_length, _HEADER.total_length
    if seen.haslayer(TCP) and _HEADER.protocol == 6:
        check_tcp(packet, at, end, seen)
    elif seen.haslayer(UDP) and _HEADER.protocol == 17:
        check_udp(packet, at, end, seen)
    elif seen.haslayer(ICMP) and _HEADER.protocol == 1 and end - at >= 8:
        assert icmp.verify_icmp(packet, at, end) == same_checksum(ICMP(packet[at:end]), packet[at + 2 : at + 4])


def same_checksum(layer: Any, field: bytes) -> bool:
    """Does scapy compute this field? One's complement has two zeros."""
    del layer.chksum
    built = bytes(layer)
    at = {IP: 10, TCP: 16, UDP: 6, ICMP: 2}[type(layer)]
    computed = built[at : at + 2]
    return computed == field or {computed, field} == {b"\0\0", b"\xff\xff"}


def check_tcp(packet: bytes, at: int, end: int, seen: Any) -> None:
    if parse_tcp(packet, at, end, _SEGMENT) != verdict.OK:
        assert end - at < 20 or seen[TCP].dataofs < 5 or seen[TCP].dataofs * 4 > end - at
        return
    tcp = seen[TCP]
    assert (tcp.sport, tcp.dport, tcp.seq, tcp.ack) == (
        _SEGMENT.source_port, _SEGMENT.destination_port, _SEGMENT.seq, _SEGMENT.ack,
    )  # fmt: skip
    assert int(tcp.flags) & 0x3F == _SEGMENT.flags
    assert tcp.window == _SEGMENT.window
    assert at + tcp.dataofs * 4 == _SEGMENT.data_start
    good = verify_tcp(packet, at, end, packet[12:16], packet[16:20])
    assert good == checks_out(packet, at, end, 6, at + 16)
    options = tcp.options
    names = [name for name, *_ in options]
    if not all(name in ("MSS", "WScale", "SAckOK", "Timestamp", "NOP", "EOL", "SAck") for name in names):
        return
    if names.count("Timestamp") == 1 and "EOL" not in names[: names.index("Timestamp")]:
        value = dict(options)["Timestamp"]
        if isinstance(value, tuple) and len(value) == 2 and _SEGMENT.has_timestamp:
            assert value == (_SEGMENT.ts_value, _SEGMENT.ts_echo)
    if _SEGMENT.mss >= 0 and names.count("MSS") == 1:
        assert dict(options)["MSS"] == _SEGMENT.mss
    if _SEGMENT.window_scale >= 0 and names.count("WScale") == 1:
        assert dict(options)["WScale"] == _SEGMENT.window_scale
    if _SEGMENT.sack_count and names.count("SAck") == 1:
        assert list(dict(options)["SAck"]) == _SEGMENT.sacks[: 2 * _SEGMENT.sack_count]


def check_udp(packet: bytes, at: int, end: int, seen: Any) -> None:
    if parse_udp(packet, at, end, _DATAGRAM) != verdict.OK:
        assert end - at < 8 or seen[UDP].len < 8 or seen[UDP].len > end - at
        return
    udp = seen[UDP]
    assert (udp.sport, udp.dport) == (_DATAGRAM.source_port, _DATAGRAM.destination_port)
    assert udp.len == _DATAGRAM.data_end - at
    good = verify_udp(packet, at, _DATAGRAM.data_end, packet[12:16], packet[16:20])
    assert good == (udp.chksum == 0 or checks_out(packet, at, _DATAGRAM.data_end, 17, at + 6))


def checks_out(packet: bytes, at: int, end: int, protocol: int, field: int) -> bool:
    """Does scapy's own sum over the pseudo header and the segment, checksum included, come out as nothing?"""
    cleared = packet[at:field] + b"\0\0" + packet[field + 2 : end]
    computed = in4_chksum(protocol, IP(packet[:20]), cleared)
    found = packet[field] << 8 | packet[field + 1]
    return computed == found or {computed, found} == {0, 0xFFFF}


if __name__ == "__main__":
    from fuzz.driver import main

    main(__file__)
