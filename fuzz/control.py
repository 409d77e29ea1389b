"""Requests of the control socket: where one ends, what it says, and the answer's form.

* `JsonScanner` finds the same object, or refuses, however the bytes are cut;
* where it finds one that is JSON at all, it is the first object of the text, and nothing less or more;
* `parse_request` gives a command and texts, or `BadRequest` with a printable message;
* an answer is one line of ASCII that reads back as what was answered.
"""

# ruff: noqa: PT017 - what an error says is one of the invariants

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Final

from ngrokd.endpoints import printable
from ngrokd.errors import Exit
from ngrokd.ops.control import BadRequest, JsonScanner, encode_answer, failure, parse_request, success

CORPUS: Final = "control"
MAX_LEN: Final = 400
LIMIT: Final = 300
TOKENS: Final = (
    b'{"command":"', b'"args":[', b"\\u0000", b"\\ud800", b"\\", b'"', b"{", b"}", b"[", b"]", b"NaN", b"1e999",
    b"null", b"[[[[[[[[[[[[[[[[", b"]]]]]]]]]]]]]]]]", b",", b":", b"true", b"-0", b"\xed\xa0\x80", b"\xff",
    b"9" * 50, b"status", b'"command"',
)  # fmt: skip


def run_one(data: bytes) -> None:
    """One conversation."""
    step = data[0] % 17 + 1 if data else 1
    text = data[1:]
    whole = scan(text, len(text) or 1)
    for size in {1, 2, step}:
        pieces = scan(text, size)
        assert pieces == whole, f"cut by {size} it is something else: {pieces!r} instead of {whole!r}"
    if whole is not None:
        check_object(text, whole)
        answer(whole)
    answer(text)


def scan(text: bytes, size: int) -> bytes | None:
    """The object that is found; None where there is none."""
    scanner = JsonScanner(LIMIT)
    for at in range(0, len(text), size):
        try:
            if scanner.feed(text[at : at + size]):
                assert len(scanner.data) <= LIMIT
                return scanner.data
        except BadRequest as error:
            assert str(error).isprintable()
            return None
        assert len(scanner.data) <= LIMIT
    return None


def check_object(text: bytes, found: bytes) -> None:
    stripped = text.lstrip(b" \t\r\n")
    assert stripped.startswith(found)
    assert found[:1] == b"{"
    assert found[-1:] in (b"}", b"]")
    try:
        decoded = stripped.decode("latin-1")
        _, end = json.JSONDecoder().raw_decode(decoded)
    except (ValueError, RecursionError):
        return
    assert end == len(found), "another object than the first"


def encode(said: Mapping[str, object]) -> bytes:
    return b"".join(encode_answer(said))


def answer(text: bytes) -> None:
    try:
        command, arguments = parse_request(text)
    except BadRequest as error:
        message = str(error)
        assert len(message) <= 200
        line = encode(failure(f"failed to decode command: {error}", Exit.USAGE, "hint"))
        assert json.loads(line)["error"] == f"failed to decode command: {error}"
    else:
        value = json.loads(text)
        assert isinstance(value, dict)
        assert value.get("command", "") == command
        assert (value.get("args") or []) == arguments
        assert all(isinstance(argument, str) for argument in arguments)
        line = encode(success({"command": command, "arguments": arguments}))
        back = json.loads(line)
        assert back["data"] == {"command": command, "arguments": arguments}
        assert back["success"] is True
        assert json.loads(encode(failure(f"unknown command: {printable(command)}", Exit.USAGE)))["code"] == 2
    assert line.isascii()
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")


if __name__ == "__main__":
    from fuzz.driver import main

    main(__file__)
