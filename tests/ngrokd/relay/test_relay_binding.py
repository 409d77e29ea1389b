"""The binding header, byte for byte, in whatever pieces it comes."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngrokd.relay.binding import (
    MAX_BODY,
    BadBindingHeader,
    BindingResponse,
    ResponseDecoder,
    decode_response,
    encode_request,
)


@pytest.mark.parametrize(
    ("host", "port", "frame"),
    [
        ("my-api.ngrok.app", 80, "14 00 0a 10 6d 79 2d 61 70 69 2e 6e 67 72 6f 6b 2e 61 70 70 10 50"),
        ("my-api.ngrok.app", 443, "15 00 0a 10 6d 79 2d 61 70 69 2e 6e 67 72 6f 6b 2e 61 70 70 10 bb 03"),
        ("db.prod", 5432, "0c 00 0a 07 64 62 2e 70 72 6f 64 10 b8 2a"),
        ("db.prod", 65535, "0d 00 0a 07 64 62 2e 70 72 6f 64 10 ff ff 03"),
    ],
)
def test_a_request_is_what_the_reference_client_sends(host: str, port: int, frame: str) -> None:
    """Captured from Go's protobuf runtime: host, then port, and nothing else."""
    assert encode_request(host, port) == bytes.fromhex(frame)


RESPONSES = [
    ("0f 00 0a 07 65 70 5f 32 61 62 63 12 04 68 74 74 70", BindingResponse("ep_2abc", "http")),
    (
        "14 00 0a 07 65 70 5f 32 61 62 63 12 03 74 63 70 2a 04 0a 02 68 69",
        BindingResponse("ep_2abc", "tcp", notices=("hi",)),
    ),
    (
        "21 00 1a 0d 45 52 52 5f 4e 47 52 4f 4b 5f 37 30 36 22 10 6e 6f 20 73 75 63 68 20 65 6e 64 70 6f 69 6e 74",
        BindingResponse(error_code="ERR_NGROK_706", error_message="no such endpoint"),
    ),
    ("00 00", BindingResponse()),
]


@pytest.mark.parametrize(("frame", "response"), RESPONSES)
def test_a_response_is_read(frame: str, response: BindingResponse) -> None:
    """Byte-compared with Google's protobuf runtime; the empty message is a success."""
    decoder = ResponseDecoder()

    assert decoder.feed(bytes.fromhex(frame)) == response

    assert decoder.surplus == b""
    assert response.refused == bool(response.error_code)


@pytest.mark.parametrize(("frame", "response"), RESPONSES)
@pytest.mark.parametrize("surplus", [b"", b"220 ready\r\n"])
def test_every_split_gives_the_same(frame: str, response: BindingResponse, surplus: bytes) -> None:
    """The ingress writes length and body apart; TLS and TCP cut where they like; servers may speak first."""
    data = bytes.fromhex(frame)
    for cut in range(len(data)):
        decoder = ResponseDecoder()

        assert decoder.feed(data[:cut]) is None
        assert decoder.surplus == b""
        assert decoder.received == cut
        assert decoder.feed(data[cut:] + surplus) == response
        assert decoder.surplus == surplus


def test_single_bytes_are_enough() -> None:
    decoder = ResponseDecoder()
    *first, last = bytes.fromhex(RESPONSES[2][0])

    for byte in first:
        assert decoder.feed(bytes([byte])) is None

    assert decoder.feed(bytes([last])) == RESPONSES[2][1]


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(number: int, wire_type: int, value: bytes) -> bytes:
    return varint(number << 3 | wire_type) + value


def text(number: int, value: str) -> bytes:
    return field(number, 2, varint(len(value.encode())) + value.encode())


UNKNOWN = [
    field(6, 0, varint(2**64 - 1)),
    field(7, 1, bytes(8)),
    field(8, 2, varint(300) + bytes(300)),
    field(9, 5, bytes(4)),
    field(10, 3, field(11, 0, b"\x01") + field(12, 3, b"") + field(12, 4, b"") + text(1, "no")) + field(10, 4, b""),
    field(2**29 - 1, 0, b"\x00"),
]


@pytest.mark.parametrize("unknown", UNKNOWN)
def test_unknown_fields_are_skipped(unknown: bytes) -> None:
    """Whatever their wire type: the other side may learn new fields before we do."""
    body = unknown + text(1, "ep") + unknown + text(5, "") + text(2, "tcp") + unknown

    assert decode_response(body) == BindingResponse("ep", "tcp", notices=("",))


def test_the_last_of_repeated_fields_counts() -> None:
    """As proto3 has it."""
    assert decode_response(text(1, "a") + text(1, "b")).endpoint_id == "b"


def test_text_that_is_not_utf8_is_repaired() -> None:
    """It is for people; an ingress with a typo in it is still an ingress."""
    assert decode_response(field(4, 2, b"\x02\xffx")).error_message == "\ufffdx"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"\x0a", "ends within a number"),
        (b"\x0a\x05ep", "ends within a field"),
        (b"\x31\x00", "ends within a field"),
        (b"\x35\x00", "ends within a field"),
        (b"\x30", "ends within a number"),
        (b"\x30\x80", "ends within a number"),
        (b"\x30" + b"\x80" * 9 + b"\x02", "more than 64 bits"),
        (b"\x30" + b"\x80" * 10, "more than 64 bits"),
        (b"\x08\x01", "wire type 0"),
        (b"\x2d\x00\x00\x00\x00", "wire type 5"),
        (b"\x36", "wrong wire type 6"),
        (b"\x37", "wrong wire type 7"),
        (b"\x34", "wrong wire type 4"),
        (b"\x33", "ends within a group"),
        (b"\x33\x3c", "wrong wire type 4"),
        (b"\x33" * 17 + b"\x34" * 17, "wrong wire type 3"),
        (b"\x02\x00", "impossible number 0"),
        (b"\x80\x80\x80\x80\x10\x00", "impossible number"),
        (text(5, "\x0a"), "ends within a number"),
    ],
)
def test_what_is_not_a_response_has_one_error(body: bytes, says: str) -> None:
    with pytest.raises(BadBindingHeader, match=says):
        decode_response(body)


def test_the_length_is_judged_before_anything_is_kept() -> None:
    """A frame may claim 65535 bytes; nobody waits for them."""
    with pytest.raises(BadBindingHeader, match="65535 bytes"):
        ResponseDecoder().feed(b"\xff\xff")
    body = field(15, 2, varint(MAX_BODY - 3) + bytes(MAX_BODY - 3))
    assert len(body) == MAX_BODY
    assert ResponseDecoder().feed(MAX_BODY.to_bytes(2, "little") + body) == BindingResponse()


@given(st.binary(max_size=300))
def test_any_bytes_are_a_response_or_the_one_error(body: bytes) -> None:
    with contextlib.suppress(BadBindingHeader):
        decode_response(body)


@given(
    st.tuples(st.text(), st.text(), st.text(), st.text(), st.lists(st.text(), max_size=3)),
    st.lists(st.sampled_from(UNKNOWN), max_size=3),
    st.binary(max_size=20),
    st.data(),
)
def test_what_was_written_is_read_in_any_pieces(
    fields: tuple[str, str, str, str, list[str]], unknown: list[bytes], surplus: bytes, data: st.DataObject
) -> None:
    """Incremental equals one-shot for every way to cut, with unknown fields anywhere."""
    pieces = [text(number, value) for number, value in enumerate(fields[:4], 1) if value]
    notices = [field(5, 2, varint(len(text(1, each))) + text(1, each)) for each in fields[4]]
    body = b"".join(data.draw(st.permutations([*pieces, *unknown, b"".join(notices)])))
    frame = len(body).to_bytes(2, "little") + body + surplus
    expected = BindingResponse(*fields[:4], tuple(fields[4]))

    decoder = ResponseDecoder()
    response = None
    position = 0
    while response is None:
        size = data.draw(st.integers(1, max(1, len(frame) - position)))
        response = decoder.feed(frame[position : position + size])
        position += size

    assert response == expected == decode_response(body)
    assert decoder.surplus + frame[position:] == surplus
