"""The binding header, written a second time.

The relay has its own codec; this one is the other end of the wire and shares no code with it, so that a mistake in
one cannot be repaired by the same mistake in the other. It is a server's: it reads requests and writes responses.

    frame    = u16 little-endian length, protobuf body (proto3)
    request  = 1 host: string, 2 port: int64 varint, 3 pod identity: message (the Kubernetes operator sends it)
    response = 1 endpoint id, 2 proto, 3 error code, 4 error message: strings, 5 notices: repeated { 1 message }

Empty and zero fields are left out, unknown fields are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

MAX_BODY: Final = 0xFFFF  # what the length field can say

_VARINT: Final = 0
_FIXED64: Final = 1
_BYTES: Final = 2
_FIXED32: Final = 5


class BadHeader(Exception):  # noqa: N818 - it names what was received
    """Not a binding header; the only thing the decoders raise."""


@dataclass(frozen=True, slots=True)
class BindingRequest:
    """What a client asks for. `fields` holds the field numbers seen, in order, for tests of who sends what."""

    host: str
    port: int
    fields: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class BindingAnswer:
    """What the ingress says: an endpoint and its protocol, or an error; notices are for the log."""

    endpoint_id: str = ""
    proto: str = ""
    error_code: str = ""
    error_message: str = ""
    notices: tuple[str, ...] = ()


class RequestReader:
    """Collects a request out of any chunks.

    `surplus` holds what came after the frame once it is complete: the client's first bytes of its own protocol,
    which a client has no right to send yet and a server must not lose.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self.surplus = b""

    def feed(self, data: bytes | memoryview) -> BindingRequest | None:
        """Take bytes; return the request when it is complete, else None.

        Raises:
            BadHeader: the body is no request.
        """
        self._buffer += data
        if len(self._buffer) < 2:
            return None
        end = 2 + int.from_bytes(self._buffer[:2], "little")
        if len(self._buffer) < end:
            return None
        self.surplus = bytes(self._buffer[end:])
        return decode_request(bytes(self._buffer[2:end]))


def decode_request(body: bytes) -> BindingRequest:
    """Decode the body of a request frame. Raises BadHeader."""
    host, port, seen = "", 0, []
    for number, value in _fields(body):
        seen.append(number)
        if number == 1:
            host = _text(value)
        elif number == 2:
            if not isinstance(value, int):
                raise BadHeader("port is not a number")
            port = value
    return BindingRequest(host, port, tuple(seen))


def encode_answer(answer: BindingAnswer) -> bytes:
    """The complete frame of a response."""
    body = bytearray()
    texts = (answer.endpoint_id, answer.proto, answer.error_code, answer.error_message)
    for number, text in enumerate(texts, start=1):
        if text:
            body += _length_delimited(number, text.encode())
    for notice in answer.notices:
        body += _length_delimited(5, _length_delimited(1, notice.encode()))
    return frame(bytes(body))


def frame(body: bytes) -> bytes:
    """Put the length in front of a body."""
    assert len(body) <= MAX_BODY
    return len(body).to_bytes(2, "little") + body


def _length_delimited(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | _BYTES) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _fields(body: bytes) -> Iterator[tuple[int, int | bytes]]:
    at = 0
    while at < len(body):
        tag, at = _read_varint(body, at)
        number, wire_type = tag >> 3, tag & 7
        if number == 0:
            raise BadHeader("field number 0")
        if wire_type == _VARINT:
            value, at = _read_varint(body, at)
            yield number, value
            continue
        if wire_type == _BYTES:
            size, at = _read_varint(body, at)
        elif wire_type == _FIXED64:
            size = 8
        elif wire_type == _FIXED32:
            size = 4
        else:
            raise BadHeader(f"wire type {wire_type}")
        if at + size > len(body):
            raise BadHeader("a field ends after the body")
        yield number, body[at : at + size]
        at += size


def _read_varint(body: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(body):
            raise BadHeader("a number ends after the body")
        byte = body[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, at
    raise BadHeader("a number of more than ten bytes")


def _text(value: int | bytes) -> str:
    if not isinstance(value, bytes):
        raise BadHeader("a text field holds a number")
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise BadHeader("a text field is not UTF-8") from None
