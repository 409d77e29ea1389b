"""A TOML text with errors of syntax, read as far as it can be: one error shall not hide the others.

The parser stops at the first. So the line it names is taken out, as if it were empty, and the rest is parsed again.
That must not make up errors: a broken header is mended where its name can be seen, and where that, or the place of the
error, is in doubt, nothing more is said than what is certain.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import tomli

from ngrokd.config.lines import KeyPath, index_lines
from ngrokd.endpoints import printable

MAX_ERRORS: Final = 20
MAX_KEY_CHARS: Final = 100  # a longer one is not repeated

_HEADER: Final = re.compile(r"\s*\[+\s*([A-Za-z0-9_.-]+)")
_PAIR: Final = re.compile(r"""\s*(["']?)(?P<key>[A-Za-z0-9_.-]+)\1\s*=[ \t]*(?P<value>.*?)\s*""", re.DOTALL)
_MISSING_EQUALS: Final = re.compile(r"\s*(?P<key>[A-Za-z0-9_-]+)(?:\s*:\s*|\s+)\S.*", re.DOTALL)
_BARE_TEXT: Final = re.compile(r"[^\"'\[\]{}#\s][^\"'\[\]{}#]*")


@dataclass(frozen=True, slots=True)
class SyntaxMistake:
    """One error: where it is (from 1), at which key ("" unknown), what the parser says, what would be right."""

    line: int
    column: int
    key: str
    message: str
    hint: str


@dataclass(frozen=True, slots=True)
class Salvaged:
    """What could be read, on which line each key stands, and what was wrong."""

    document: Mapping[str, Any]
    lines: Mapping[KeyPath, int]
    mistakes: tuple[SyntaxMistake, ...]


def salvage(text: str, secrets: Collection[str] = ()) -> Salvaged:
    """Read what can be read.

    Args:
        text: the file.
        secrets: names of keys whose values no hint may repeat.

    Raises:
        RecursionError: values are nested hundreds of levels deep.
        ValueError: a number has thousands of digits. (A `TOMLDecodeError` is one too, and is never raised.)
    """
    rows = text.split("\n")
    mistakes: list[SyntaxMistake] = []
    while True:
        try:
            document = tomli.loads("\n".join(rows))
        except tomli.TOMLDecodeError as error:
            row = error.lineno - 1
            if mistakes and error.lineno <= mistakes[-1].line:  # one that taking out a line has made
                return Salvaged({}, {}, tuple(mistakes))
            hint = _hint(rows[row], error, secrets)
            message = printable(error.msg)
            mistakes.append(SyntaxMistake(error.lineno, error.colno, _key(rows, row), message, hint))
            mended = _mended(rows[row])
            if mended == rows[row] or len(mistakes) >= MAX_ERRORS:
                return Salvaged({}, {}, tuple(mistakes))
            rows[row] = mended
        else:
            return Salvaged(document, index_lines("\n".join(rows)), tuple(mistakes))


def _key(rows: Sequence[str], row: int) -> str:
    """The dotted key of a row, with the section above it; "" for what is none."""
    pair = _PAIR.fullmatch(rows[row]) or _MISSING_EQUALS.fullmatch(rows[row])
    if pair is None or _HEADER.match(rows[row]):
        return ""
    headers = (found[1] for above in reversed(rows[:row]) if (found := _HEADER.match(above)))
    section = next(headers, "")
    key = f"{section}.{pair['key']}" if section else pair["key"]
    return key if len(key) <= MAX_KEY_CHARS else ""


def _mended(row: str) -> str:
    header = _HEADER.match(row)
    return f"[{header[1].strip('.')}]" if header else ""


def _hint(row: str, error: tomli.TOMLDecodeError, secrets: Collection[str]) -> str:
    if error.msg.startswith("Cannot overwrite"):
        return "it is written above already"
    if error.msg.startswith("Cannot declare"):
        return "this section stands above already; its keys belong there"
    pair = _PAIR.fullmatch(row)
    if len(row) > MAX_KEY_CHARS * 3:
        return ""
    if pair is None:
        missing = _MISSING_EQUALS.fullmatch(row)
        return f"a key is set like this: {missing['key']} = ..." if missing and not _HEADER.match(row) else ""
    key, written = pair["key"], re.sub(r"(?:^|\s+)#.*$", "", pair["value"])
    if not written:
        return "the value is missing"
    if written in ("True", "False"):
        return f"did you mean {key} = {written.lower()}?"
    if not _BARE_TEXT.fullmatch(written) or len(written) > 100:
        return ""
    if key.rpartition(".")[2] in secrets:
        return "texts stand in quotes"
    return f'texts stand in quotes: {key} = "{printable(written)}"'
