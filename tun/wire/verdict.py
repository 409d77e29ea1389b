"""What a hot parser says about a packet: a small integer, never an exception.

0 is good; everything else is the reason why the packet is dropped, and `NAMES` gives the word it is counted under.
"""

from __future__ import annotations

from typing import Final

OK: Final = 0
SHORT: Final = 1
VERSION: Final = 2
HEADER_LENGTH: Final = 3
TOTAL_LENGTH: Final = 4
HEADER_CHECKSUM: Final = 5
IP_OPTIONS: Final = 6
SOURCE_ROUTE: Final = 7
TCP_OFFSET: Final = 8
TCP_CHECKSUM: Final = 9
ICMP_CHECKSUM: Final = 10
UDP_LENGTH: Final = 11
UDP_CHECKSUM: Final = 12
EXTENSIONS: Final = 13
NO_NEXT_HEADER: Final = 14
PARAMETER: Final = 15

NAMES: Final = (
    "ok",
    "short",
    "version",
    "header_length",
    "total_length",
    "header_checksum",
    "ip_options",
    "source_route",
    "tcp_offset",
    "tcp_checksum",
    "icmp_checksum",
    "udp_length",
    "udp_checksum",
    "extensions",
    "no_next_header",
    "parameter",
)
