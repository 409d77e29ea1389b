"""The lab's own codec against bytes that were captured from real peers or made by the protobuf runtime."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngrokd.lab.header import (
    BadHeader,
    BindingAnswer,
    BindingRequest,
    RequestReader,
    decode_request,
    encode_answer,
)

REQUESTS = [
    ("14 00 0a 10 6d 79 2d 61 70 69 2e 6e 67 72 6f 6b 2e 61 70 70 10 50", "my-api.ngrok.app", 80, (1, 2)),
    ("15 00 0a 10 6d 79 2d 61 70 69 2e 6e 67 72 6f 6b 2e 61 70 70 10 bb 03", "my-api.ngrok.app", 443, (1, 2)),
    ("0c 00 0a 07 64 62 2e 70 72 6f 64 10 b8 2a", "db.prod", 5432, (1, 2)),
    ("0d 00 0a 07 64 62 2e 70 72 6f 64 10 ff ff 03", "db.prod", 65535, (1, 2)),
    ("16 00 0a 10 6d 79 2d 61 70 69 2e 6e 67 72 6f 6b 2e 61 70 70 10 50 1a 00", "my-api.ngrok.app", 80, (1, 2, 3)),
]
ANSWERS = [
    (BindingAnswer("ep_2abc", "http"), "0f 00 0a 07 65 70 5f 32 61 62 63 12 04 68 74 74 70"),
    (BindingAnswer("ep_2abc", "tcp", notices=("hi",)),
     "14 00 0a 07 65 70 5f 32 61 62 63 12 03 74 63 70 2a 04 0a 02 68 69"),
    (
        BindingAnswer(error_code="ERR_NGROK_706", error_message="no such endpoint"),
        "21 00 1a 0d 45 52 52 5f 4e 47 52 4f 4b 5f 37 30 36 22 10 6e 6f 20 73 75 63 68 20 65 6e 64 70 6f 69 6e 74",
    ),
    (BindingAnswer(), "00 00"),
]  # fmt: skip


@pytest.mark.parametrize(("vector", "host", "port", "fields"), REQUESTS)
def test_known_requests_are_read(vector: str, host: str, port: int, fields: tuple[int, ...]) -> None:
    """The bytes of the Go daemon and of the Kubernetes operator."""
    reader = RequestReader()

    assert reader.feed(bytes.fromhex(vector)) == BindingRequest(host, port, fields)
    assert reader.surplus == b""


@pytest.mark.parametrize(("answer", "vector"), ANSWERS)
def test_known_answers_are_written(answer: BindingAnswer, vector: str) -> None:
    """The bytes that the real ingress sends."""
    assert encode_answer(answer) == bytes.fromhex(vector)


def test_any_chunking_reads_the_same() -> None:
    """Go writes length and body as two TLS records, and TCP cuts where it likes."""
    data = bytes.fromhex(REQUESTS[2][0])
    for cut in range(len(data)):
        reader = RequestReader()

        first, second = reader.feed(data[:cut]), reader.feed(data[cut:])

        assert first is None
        assert second == BindingRequest("db.prod", 5432, (1, 2))


def test_what_follows_the_frame_is_kept() -> None:
    """Bytes of the client's own protocol that came too early belong to the back end."""
    reader = RequestReader()

    reader.feed(bytes.fromhex(REQUESTS[2][0]) + b"early")

    assert reader.surplus == b"early"


def test_unknown_fields_are_skipped() -> None:
    """All four wire types that proto3 has."""
    body = b"\x78\x07" + b"\x79" + bytes(8) + b"\x7d" + bytes(4) + b"\x7a\x02xy" + b"\x0a\x01h\x10\x01"

    assert decode_request(body) == BindingRequest("h", 1, (15, 15, 15, 15, 1, 2))


@given(st.binary(max_size=200))
def test_garbage_is_refused_in_one_way(body: bytes) -> None:
    """Whatever a client sends, the reader says BadHeader or reads it."""
    with contextlib.suppress(BadHeader):
        decode_request(body)
