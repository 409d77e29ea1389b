"""JSON of any length, made while it is sent.

`list` and `/status` of a daemon that serves 65,000 endpoints are 20 MB. Made in one go they hold up every packet for a
third of a second; so what may be long is given as an iterator (an array) or as `Members` (an object), each element is
made when its turn has come, and between two pieces the caller lets others run.

The bytes are the same as in one go: ASCII, without blanks. Invariant: between two pieces lies the work of about
PIECE_BYTES, unless a value that is no iterator is longer by itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

PIECE_BYTES: Final = 1 << 16  # some hundred rows, a millisecond of work


class Members:
    """A JSON object, given as its members. Names must differ; it can be gone through once."""

    __slots__ = ("_pairs",)

    def __init__(self, pairs: Iterable[tuple[str, object]]) -> None:
        self._pairs = pairs

    def items(self) -> Iterator[tuple[str, object]]:
        """The names and values."""
        return iter(self._pairs)


def json_pieces(value: object) -> Iterator[bytes]:
    """The JSON of `value` in pieces of about PIECE_BYTES, at least one.

    Args:
        value: what `json` can encode, with text for keys; besides, iterators (arrays) and `Members` (objects) on the
            upper levels.

    Raises:
        ValueError, TypeError: it holds what JSON has no form for, NaN among it.
    """
    gathered: list[str] = []
    size = 0
    for text in _texts(value, _UPPER_LEVELS):
        gathered.append(text)
        size += len(text)
        if size >= PIECE_BYTES:
            yield "".join(gathered).encode("ascii")
            gathered.clear()
            size = 0
    if gathered:
        yield "".join(gathered).encode("ascii")


def _texts(value: object, levels: int) -> Iterator[str]:
    if isinstance(value, Members) or (levels and isinstance(value, Mapping)):
        before = "{"
        for name, inner in value.items():
            yield f"{before}{_encode(name)}:"
            yield from _texts(inner, levels - 1)
            before = ","
        yield "{}" if before == "{" else "}"
    elif isinstance(value, Iterator):
        before = "["
        for inner in value:
            yield before + _encode(inner)
            before = ","
        yield "[]" if before == "[" else "]"
    else:
        yield _encode(value)


_UPPER_LEVELS: Final = 2  # of objects that may hold iterators: the answer and its data
_encode: Final = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
