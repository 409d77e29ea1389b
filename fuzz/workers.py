"""What the daemon and its workers say to each other: bytes of either, cut anywhere.

* `Frames` gives the same messages, or the same error, however the bytes are cut;
* the only error is `BadMessage`, with a message fit for a terminal;
* what was read is written again and read as the same, in either direction that knows it;
* what waits for its rest is never more than a frame may have.
"""

from __future__ import annotations

import re
from typing import Any, Final

from ngrokd.workers.messages import FROM_WORKER, TO_WORKER, BadMessage, Begin, Frames, encode, settings_of

CORPUS: Final = "workers"
MAX_LEN: Final = 2048
LIMIT: Final = 4096
TOKENS: Final = (
    *(f"{chr(0xA0 + len(kind.__name__))}{kind.__name__}".encode("latin-1") for kind in (*TO_WORKER, *FROM_WORKER)),
    b"\x00\x00\x00\x10", b"\x00\x00\x10\x00", b"\xff\xff\xff\xff", b"\x93", b"\x80", b"\xc0", b"\xc4\x04", b"\xcb",
    b"\xcf\xff\xff\xff\xff\xff\xff\xff\xff", b"\xdc\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xca\x7f\xc0\x00\x00",
)  # fmt: skip

Outcome = tuple[list[tuple[int, Any]], str]


def run_one(data: bytes) -> None:
    """One conversation, heard by either side, in several pieces."""
    step = data[0] % 61 + 1 if data else 1
    said = data[1:]
    for kinds in (TO_WORKER, FROM_WORKER):
        whole = read(said, len(said) or 1, kinds)
        for size in {1, 7, step}:
            pieces = read(said, size, kinds)
            assert same(pieces, whole), f"cut by {size} it is something else"
        for number, message in whole[0]:
            write_again(number, message, kinds)


def same(one: object, other: object) -> bool:
    """Equal, or equal as texts: in those, what is not a number equals itself, and objects have no identity."""
    return one == other or shown(one) == shown(other)


def shown(value: object) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def read(data: bytes, step: int, kinds: tuple[type, ...]) -> Outcome:
    """The messages, and what was wrong after them."""
    frames = Frames(kinds, LIMIT)
    found: list[tuple[int, Any]] = []
    try:
        for at in range(0, len(data), step):
            found.extend(frames.feed(data[at : at + step]))
            assert len(frames._buffer) - frames._start <= LIMIT + 4
    except BadMessage as error:
        text = str(error)
        assert text.isprintable()
        assert len(text) < 300
        return found, text
    return found, ""


def write_again(number: int, message: Any, kinds: tuple[type, ...]) -> None:
    if isinstance(message, Begin):
        settings_of(message)  # IPv6 networks of any length are numbers
    try:
        frame = encode(message, number)
    except OverflowError:
        raise AssertionError(f"{message!r} was read and cannot be written") from None
    [again] = Frames(kinds, len(frame)).feed(frame)
    assert same(again, (number, message))


if __name__ == "__main__":
    from fuzz.driver import main

    main(__file__)
