"""JSON made in pieces: the bytes are those of one go, and no piece is long."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngrokd.ops.answers import PIECE_BYTES, Members, json_pieces

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


def joined(value: object) -> bytes:
    return b"".join(json_pieces(value))


@given(values)
def test_the_bytes_are_those_of_one_go(value: Any) -> None:
    """Whoever reads an answer need not know how it was made."""
    assert joined(value) == json.dumps(value, separators=(",", ":")).encode("ascii")


@given(st.lists(values, max_size=5), st.dictionaries(st.text(), values, max_size=5))
def test_what_is_made_later_looks_the_same(elements: list[Any], members: dict[str, Any]) -> None:
    """An iterator is an array, `Members` is an object, empty ones included."""
    lazy = {"success": True, "data": {"rows": iter(elements), "endpoints": Members(members.items())}, "code": 0}
    eager = {"success": True, "data": {"rows": elements, "endpoints": members}, "code": 0}

    assert joined(lazy) == json.dumps(eager, separators=(",", ":")).encode("ascii")


def test_a_long_answer_is_made_while_it_is_sent() -> None:
    """What is not wanted yet is not made: that leaves the packets their turn."""
    made = 0

    def rows() -> Iterator[dict[str, object]]:
        nonlocal made
        for number in range(10_000):
            made += 1
            yield {"id": f"ep_{number}", "url": "http://my-api.prod"}

    pieces = json_pieces({"data": rows()})
    first = next(pieces)

    assert PIECE_BYTES <= len(first) < PIECE_BYTES + 100
    assert made < 2_000
    assert len(json.loads(first + b"".join(pieces))["data"]) == 10_000


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), object(), b"bytes"])
def test_what_json_has_no_form_for_is_an_error(wrong: object) -> None:
    """It would be a bug of ours."""
    with pytest.raises((ValueError, TypeError)):
        joined({"data": iter([wrong])})
