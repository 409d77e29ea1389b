"""The binding header: one frame each way at the start of a stream, then raw bytes.

A frame is its length (two bytes, little endian) and that many bytes of protobuf (proto3). We send ConnRequest with
`host` and `port`, in this order, and nothing else; the ingress answers with ConnResponse, perhaps in pieces, perhaps
with the first application bytes right behind it, which belong to the application.

What arrives is not trusted: BadBindingHeader is the only error, the length is bounded before anything is kept, and
fields that we do not know are skipped whatever their wire type, so that the other side may learn new ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ngrokd.errors import RelayError

MAX_BODY: Final = 16 * 1024  # bytes; the frame could say 65535, real answers have a few hundred
_LENGTH: Final = 2
_MAX_GROUPS: Final = 16  # nested groups (a wire type nobody uses any more) followed while skipping

# Wire types (protobuf encoding, "message structure").
_VARINT: Final = 0
_FIXED64: Final = 1
_BYTES: Final = 2
_GROUP: Final = 3
_GROUP_END: Final = 4
_FIXED32: Final = 5


class BadBindingHeader(RelayError):  # noqa: N818 - a verdict on what was received
    """The answer of the ingress is not a binding header. The only error of the decoder."""

    reason = "binding_malformed"


@dataclass(frozen=True, slots=True)
class BindingResponse:
    """What the ingress answered. Text is as it came: make it printable before showing it.

    Attributes:
        endpoint_id, proto: set on success, and even then possibly empty.
        error_code, error_message: either of them not empty is a refusal.
        notices: messages meant for the user, on success too.
    """

    endpoint_id: str = ""
    proto: str = ""
    error_code: str = ""
    error_message: str = ""
    notices: tuple[str, ...] = ()

    @property
    def refused(self) -> bool:
        """The ingress said no."""
        return bool(self.error_code or self.error_message)


def encode_request(host: str, port: int) -> bytes:
    """Make the frame that asks for an endpoint: its host name without port, and its public port."""
    assert host  # endpoints are checked where they are parsed
    assert 0 < port < 65536
    name = host.encode()
    body = b"\x0a" + _varint(len(name)) + name + b"\x10" + _varint(port)
    assert len(body) <= MAX_BODY
    return len(body).to_bytes(_LENGTH, "little") + body


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


class ResponseDecoder:
    """Collects the answer from whatever pieces it arrives in."""

    __slots__ = ("_buffer", "_done")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._done = False

    @property
    def received(self) -> int:
        """Bytes of an unfinished frame; after it, the bytes of the surplus."""
        return len(self._buffer)

    @property
    def surplus(self) -> bytes:
        """What came behind the frame; it belongs to the application. Empty until the frame is complete."""
        return bytes(self._buffer) if self._done else b""

    def feed(self, data: bytes | memoryview) -> BindingResponse | None:
        """Add received bytes.

        Returns: the answer when it is complete, once; None before. Not to be called after that.
        Raises: BadBindingHeader.
        """
        assert not self._done
        buffer = self._buffer
        buffer += data
        if len(buffer) < _LENGTH:
            return None
        size = buffer[0] | buffer[1] << 8
        if size > MAX_BODY:
            raise BadBindingHeader(
                f"the binding header of the ingress claims {size} bytes, more than the {MAX_BODY} that are allowed"
            )
        if len(buffer) < _LENGTH + size:
            return None
        body = bytes(buffer[_LENGTH : _LENGTH + size])
        del buffer[: _LENGTH + size]
        self._done = True
        return decode_response(body)


def decode_response(body: bytes) -> BindingResponse:
    """Decode a ConnResponse without its length. Raises BadBindingHeader, and nothing else."""
    text = {1: "", 2: "", 3: "", 4: ""}
    notices: list[str] = []
    for number, value in _fields(body, {1, 2, 3, 4, 5}):
        if number == 5:
            messages = _fields(value, {1})
            notices.append(_text(messages[-1][1]) if messages else "")
        else:
            text[number] = _text(value)  # of repeated values the last one counts, here and above (proto3)
    return BindingResponse(text[1], text[2], text[3], text[4], tuple(notices))


def _text(value: bytes) -> str:
    return value.decode("utf-8", "replace")


def _fields(body: bytes, wanted: set[int]) -> list[tuple[int, bytes]]:
    """Find the wanted fields, all of them length-delimited, in the order in which they come; skip the others."""
    found: list[tuple[int, bytes]] = []
    position = 0
    while position < len(body):
        number, wire_type, position = _read_tag(body, position)
        if number in wanted:
            if wire_type != _BYTES:
                raise BadBindingHeader(f"field {number} of the binding header has wire type {wire_type}, not {_BYTES}")
            size, start = _read_varint(body, position)
            position = _advance(body, start, size)
            found.append((number, body[start:position]))
        else:
            position = _skip(body, position, number, wire_type)
    return found


def _read_tag(body: bytes, position: int) -> tuple[int, int, int]:
    tag, position = _read_varint(body, position)
    number = tag >> 3
    if not 0 < number < 1 << 29:
        raise BadBindingHeader(f"the binding header has a field of the impossible number {number}")
    return number, tag & 7, position


def _read_varint(body: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(body):
        byte = body[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >> 64:
                break
            return value, position
        shift += 7
        if shift > 63:
            break
    else:
        raise BadBindingHeader("the binding header ends within a number")
    raise BadBindingHeader("the binding header holds a number of more than 64 bits")


def _advance(body: bytes, position: int, size: int) -> int:
    if size > len(body) - position:
        raise BadBindingHeader("the binding header ends within a field")
    return position + size


def _skip(body: bytes, position: int, number: int, wire_type: int) -> int:
    """Pass over the value of an unknown field."""
    open_groups: list[int] = []
    while True:
        if wire_type == _VARINT:
            _, position = _read_varint(body, position)
        elif wire_type == _FIXED64:
            position = _advance(body, position, 8)
        elif wire_type == _BYTES:
            size, position = _read_varint(body, position)
            position = _advance(body, position, size)
        elif wire_type == _FIXED32:
            position = _advance(body, position, 4)
        elif wire_type == _GROUP and len(open_groups) < _MAX_GROUPS:
            open_groups.append(number)
        elif wire_type == _GROUP_END and open_groups and open_groups[-1] == number:
            open_groups.pop()
        else:
            raise BadBindingHeader(f"field {number} of the binding header has the wrong wire type {wire_type}")
        if not open_groups:
            return position
        if position >= len(body):
            raise BadBindingHeader("the binding header ends within a group")
        number, wire_type, position = _read_tag(body, position)


__all__ = ["BadBindingHeader", "BindingResponse", "ResponseDecoder", "decode_response", "encode_request"]
