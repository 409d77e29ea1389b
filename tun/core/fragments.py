"""Reassembly, for echo requests only (RFC 791 3.2, RFC 8200 4.5, RFC 815, RFC 5722).

The local kernel never fragments TCP (it sets DF), so what is put together here is `ping -s 20000`. That is a courtesy,
and its price is bounded: 64 datagrams of at most 128 parts, 1 MiB and 30 s, the oldest going first. Fragments that
overlap kill their datagram: nobody honest sends them, and every reassembler that tried to be clever was attacked
through it.
"""

from __future__ import annotations

from typing import Final

MAX_DATAGRAMS: Final = 64
MAX_BYTES: Final = 1 << 20
MAX_PARTS: Final = 128  # 64 KiB over a link of 576 bytes; finding a part's place costs as many steps
TIMEOUT_S: Final = 30.0  # RFC 1122 3.3.2 says 60..120 s for a network; ours is one queue long
MAX_PAYLOAD: Final = 65515  # 65535 less the header
MAX_PAYLOAD_V6: Final = 65535
# What a stored fragment costs besides its bytes (FragmentSmack CVE-2018-5391: tiny ones must not be cheap).
_OVERHEAD: Final = 256


class Datagram:
    """The parts of one datagram that have come."""

    __slots__ = ("charge", "expires_at", "first", "parts", "total")

    def __init__(self, expires_at: float) -> None:
        self.expires_at: float = expires_at
        self.parts: list[tuple[int, bytes]] = []  # sorted, disjoint
        self.total: int = -1  # the payload's length, once the last fragment has come
        self.charge: int = 0
        self.first: bytes = b""  # IP header and 8 bytes of fragment 0, for the ICMP error at the end


class Reassembler:
    """Fragments in, whole payloads out.

    Attributes:
        dropped: fragments thrown away, by limit, overlap, nonsense or age.
        joined: fragments of the datagram that was completed last.
    """

    __slots__ = ("bytes_held", "datagrams", "dropped", "joined")

    def __init__(self) -> None:
        self.datagrams: dict[bytes, Datagram] = {}  # in the order of their age
        self.bytes_held: int = 0
        self.dropped: int = 0
        self.joined: int = 0

    def add(
        self, key: bytes, offset: int, more: bool, payload: bytes, first: bytes, now: float, most: int = MAX_PAYLOAD
    ) -> bytes | None:
        """Take one fragment.

        Args:
            key: source, destination, identification.
            offset: of `payload` in the datagram's payload, bytes.
            more: is this not the last one?
            first: IP header and the first 8 bytes behind it, if `offset` is 0.
            most: bytes that a whole payload may have, MAX_PAYLOAD or MAX_PAYLOAD_V6.

        Returns: the whole payload when this completed it.
        """
        datagram = self.datagrams.get(key)
        if datagram is None:
            if len(self.datagrams) >= MAX_DATAGRAMS:
                self._drop(next(iter(self.datagrams)))
            datagram = self.datagrams[key] = Datagram(now + TIMEOUT_S)
        end = offset + len(payload)
        if (
            (more and len(payload) % 8)
            or not payload
            or end > most
            or len(datagram.parts) >= MAX_PARTS
            or (datagram.total >= 0 and (end > datagram.total or not more))
        ):
            self._refuse(key)
            return None
        index = 0
        for start, part in datagram.parts:
            if start >= end:
                break
            if start + len(part) > offset:
                self._refuse(key)
                return None
            index += 1
        if not more:
            if index != len(datagram.parts):
                self._refuse(key)
                return None
            datagram.total = end
        datagram.parts.insert(index, (offset, payload))
        charge = len(payload) + _OVERHEAD
        datagram.charge += charge
        self.bytes_held += charge
        if offset == 0:
            datagram.first = first
        if datagram.total >= 0 and sum(len(part) for _, part in datagram.parts) == datagram.total:
            self._forget(key)
            self.joined = len(datagram.parts)
            return b"".join([part for _, part in datagram.parts])
        while self.bytes_held > MAX_BYTES:
            self._drop(next(iter(self.datagrams)))
        return None

    def expire(self, now: float) -> list[bytes]:
        """Throw away what is too old.

        Returns: the beginnings of those datagrams whose first fragment had come; their senders get "time exceeded".
        """
        firsts: list[bytes] = []
        while self.datagrams:
            key = next(iter(self.datagrams))
            datagram = self.datagrams[key]
            if datagram.expires_at > now:
                break
            if datagram.first:
                firsts.append(datagram.first)
            self._drop(key)
        return firsts

    def next_deadline(self) -> float:
        """When `expire` has something to do; infinite when nothing is held."""
        if not self.datagrams:
            return float("inf")
        return self.datagrams[next(iter(self.datagrams))].expires_at

    def _refuse(self, key: bytes) -> None:
        """Throw a fragment away, and its datagram with it."""
        self.dropped += 1
        self._drop(key)

    def _drop(self, key: bytes) -> None:
        self.dropped += len(self.datagrams[key].parts)
        self._forget(key)

    def _forget(self, key: bytes) -> None:
        self.bytes_held -= self.datagrams.pop(key).charge
