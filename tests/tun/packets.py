"""Packets for tests, built and judged without the code under test (RFC 791, RFC 9293, RFC 1071 by the book)."""

from __future__ import annotations

import struct
from dataclasses import dataclass

FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16


def rfc1071(data: bytes) -> int:
    """The one's complement sum, word by word."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def ipv4_header(payload_bytes: int, protocol: int, source: str, destination: str) -> bytes:
    fields = (0x45, 0, 20 + payload_bytes, 7, 0x4000, 64, protocol, 0, address(source), address(destination))
    header = struct.pack("!BBHHHBBH4s4s", *fields)
    return header[:10] + struct.pack("!H", ~rfc1071(header) & 0xFFFF) + header[12:]


def address(text: str) -> bytes:
    return bytes(map(int, text.split(".")))


def pseudo_header(packet: bytes) -> bytes:
    return packet[12:20] + struct.pack("!BBH", 0, packet[9], struct.unpack_from("!H", packet, 2)[0] - 20)


def segment_header(
    payload_bytes: int = 0,
    *,
    source: tuple[str, int] = ("10.107.0.2", 443),
    destination: tuple[str, int] = ("10.107.0.1", 40000),
    sequence: int = 1000,
    acknowledgment: int = 0,
    flags: int = ACK,
    window: int = 65535,
    options: bytes = b"",
) -> bytearray:
    """IP and TCP header as the stack hands them to a device: the sum of the pseudo header in the checksum field."""
    offset = (20 + len(options)) // 4
    tcp = struct.pack(
        "!HHIIBBHHH", source[1], destination[1], sequence, acknowledgment, offset << 4, flags, window, 0, 0
    )
    ip = ipv4_header(len(tcp) + len(options) + payload_bytes, 6, source[0], destination[0])
    header = bytearray(ip + tcp + options)
    struct.pack_into("!H", header, 36, rfc1071(pseudo_header(ip)))
    return header


def segment(payload: bytes = b"", *, good: bool = True, **fields: object) -> bytes:
    """A complete TCP packet; its checksum is right if it is `good`."""
    packet = segment_header(len(payload), **fields) + payload  # type: ignore[arg-type]  # the fields of segment_header
    checksum = ~rfc1071(bytes(packet[20:])) & 0xFFFF
    struct.pack_into("!H", packet, 36, checksum if good else checksum ^ 0x0101)
    return bytes(packet)


def tcp_checksum_is_right(packet: bytes) -> bool:
    return rfc1071(pseudo_header(packet) + packet[20:]) == 0xFFFF


def udp(payload: bytes, source: tuple[str, int], destination: tuple[str, int]) -> bytes:
    """A complete UDP packet over IPv4, without a checksum (RFC 768 allows that)."""
    datagram = struct.pack("!HHHH", source[1], destination[1], 8 + len(payload), 0) + payload
    return ipv4_header(len(datagram), 17, source[0], destination[0]) + datagram


@dataclass(frozen=True, slots=True)
class Seen:
    """A TCP packet, taken apart."""

    source: tuple[str, int]
    destination: tuple[str, int]
    sequence: int
    acknowledgment: int
    flags: int
    window: int
    payload: bytes


def parse(packet: bytes) -> Seen:
    source_port, destination_port, sequence, acknowledgment, offset, flags, window = struct.unpack_from(
        "!HHIIBBH", packet, 20
    )
    return Seen(
        (".".join(map(str, packet[12:16])), source_port),
        (".".join(map(str, packet[16:20])), destination_port),
        sequence,
        acknowledgment,
        flags,
        window,
        packet[20 + (offset >> 4) * 4 :],
    )
