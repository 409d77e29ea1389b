"""The binding header: what the ingress answers, in any pieces, and what both codecs make of each other.

* `ResponseDecoder` gives the same answer, the same surplus or the same error however the bytes are cut;
* the only error is `BadBindingHeader`, with a message fit for a terminal;
* where the body is ordinary protobuf (no groups), a second reading of the encoding finds the same fields;
* what the lab's own codec writes is read back, and what we ask is understood by it.
"""

from __future__ import annotations

from typing import Final

from fuzz.reading import Source
from ngrokd.lab import header
from ngrokd.relay.binding import MAX_BODY, BadBindingHeader, BindingResponse, ResponseDecoder, encode_request

CORPUS: Final = "binding"
MAX_LEN: Final = 512
TOKENS: Final = (
    b"\x0a", b"\x12", b"\x1a", b"\x22", b"\x2a", b"\x0b", b"\x0c", b"\x0d", b"\x09", b"\x08",
    b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", b"\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x00",
    b"\x2a\x02\x0a\x00", b"ERR_NGROK_3200", b"\xf8\xff\xff\xff\x0f",
)  # fmt: skip

Outcome = tuple[BindingResponse | None, bytes, str]


def run_one(data: bytes) -> None:
    """One answer, cut in several ways; then one conversation out of the same bytes."""
    cuts = data[:1]
    frame = data[1:]
    whole = decode(frame, len(frame) or 1)
    for step in (1, 2, 3, (cuts[0] % 61 + 1) if cuts else 7):
        assert decode(frame, step) == whole, f"cut by {step} it is something else"
    compare(frame, whole)
    converse(Source(data))


def decode(frame: bytes, step: int) -> Outcome:
    """Feed pieces of this size; the answer or the error, and what was behind it."""
    decoder = ResponseDecoder()
    for at in range(0, len(frame), step):
        piece = frame[at : at + step]
        try:
            answer = decoder.feed(memoryview(piece) if step & 1 else piece)
        except BadBindingHeader as error:
            text = str(error)
            assert text.isprintable()
            return None, b"", text
        assert decoder.received <= MAX_BODY + 2 or answer is not None or step > 3
        if answer is not None:
            return answer, decoder.surplus + frame[at + step :], ""
        assert decoder.surplus == b""
    return None, b"", ""


def compare(frame: bytes, outcome: Outcome) -> None:
    """A second reading, of frames that are whole and hold no groups."""
    answer, surplus, error = outcome
    if len(frame) < 2:
        assert answer is None
        assert not error
        return
    size = int.from_bytes(frame[:2], "little")
    if size > MAX_BODY:
        assert error
        return
    if len(frame) - 2 < size:
        assert answer is None
        assert not error
        return
    try:
        fields = read_fields(frame[2 : 2 + size])
    except Groups:
        return
    if fields is None:
        assert error
        return
    assert (answer is None) == bool(error)
    if any(number in (1, 2, 3, 4, 5) and not isinstance(value, bytes) for number, value in fields):
        assert error
        return
    try:
        notices = [read_fields(value) for number, value in fields if number == 5 and isinstance(value, bytes)]
    except Groups:
        return
    if None in notices:
        assert error
        return
    inner = [[value for number, value in notice or () if number == 1] for notice in notices]
    if any(not isinstance(value, bytes) for values in inner for value in values):
        assert error
        return
    assert answer is not None, error
    last = {number: value for number, value in fields if isinstance(value, bytes)}
    texts = [last.get(number, b"").decode("utf-8", "replace") for number in (1, 2, 3, 4)]
    assert [answer.endpoint_id, answer.proto, answer.error_code, answer.error_message] == texts
    assert answer.notices == tuple(str(values[-1], "utf-8", "replace") if values else "" for values in inner)  # type: ignore[arg-type]
    assert surplus == frame[2 + size :]
    assert answer.refused == bool(texts[2] or texts[3])


class Groups(Exception):  # noqa: N818 - it says what was met
    """The body holds a group, which this second reading does not know."""


def read_fields(body: bytes) -> list[tuple[int, int | bytes]] | None:
    """Protobuf's encoding once more; None where it is broken. Raises Groups."""
    fields: list[tuple[int, int | bytes]] = []
    while body:
        tag, body = read_number(body)
        if tag < 0 or not 0 < tag >> 3 < 1 << 29:
            return None
        kind = tag & 7
        if kind in (3, 4):
            raise Groups
        if kind == 0:
            value, body = read_number(body)
            if value < 0:
                return None
            fields.append((tag >> 3, value))
            continue
        if kind == 2:
            size, body = read_number(body)
        else:
            size = {1: 8, 5: 4}.get(kind, -1)
        if not 0 <= size <= len(body):
            return None
        fields.append((tag >> 3, body[:size] if kind == 2 else 0))
        body = body[size:]
    return fields


def read_number(body: bytes) -> tuple[int, bytes]:
    for index, byte in enumerate(body[:10]):
        if byte < 0x80:
            value = sum((each & 0x7F) << 7 * place for place, each in enumerate(body[: index + 1]))
            return (value if value < 1 << 64 else -1), body[index + 1 :]
    return -1, b""


def converse(source: Source) -> None:
    """What the two codecs say to each other arrives."""
    source.byte()
    one, two, three, four = (source.take(source.byte() & 63).decode("utf-8", "ignore") for _ in range(4))
    notices = tuple(source.take(source.byte() & 31).decode("utf-8", "ignore") for _ in range(source.byte() & 3))
    spoken = header.encode_answer(header.BindingAnswer(one, two, three, four, notices))
    answer, surplus, error = decode(spoken + b"220 ready", 5)
    assert not error
    assert answer == BindingResponse(one, two, three, four, notices)
    assert surplus == b"220 ready"

    host = "".join(map(chr, source.take(40))).encode("ascii", "ignore").decode() or "a"
    port = source.short() or 1
    asked = encode_request(host, port)
    reader = header.RequestReader()
    for index in range(len(asked) - 1):
        assert reader.feed(asked[index : index + 1]) is None
    assert reader.feed(asked[-1:]) == header.BindingRequest(host, port, (1, 2))
    assert reader.surplus == b""


if __name__ == "__main__":
    from fuzz.driver import main

    main(__file__)
