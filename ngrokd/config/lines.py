"""Where in a TOML text each key, value, table and comment is written.

The TOML parser keeps no positions of values, and a mistake without its line is half a message; an edit needs to know
even the first and the last character of a value. So the text is walked a second time, after it has been parsed: the
walk knows that it is valid and checks nothing. Keys in dotted or quoted form, inline tables, lists, arrays of tables
and multi-line strings are followed as the TOML specification says.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Final

import tomli

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Pair:
    """One `key = value`, by offsets into the text.

    Attributes:
        table: the header under which it stands; () above the first.
        start: where its key begins.
        value: where its value begins.
        end: behind its value.
        inside: where the inline table begins in which it stands, -1 for one that has lines of its own.
    """

    table: KeyPath
    start: int
    value: int
    end: int
    inside: int


@dataclass(frozen=True, slots=True)
class Table:
    """One `[header]`, by offsets into the text; `is_list` for `[[header]]`. The text begins with one of path ()."""

    path: KeyPath
    start: int
    end: int
    is_list: bool


@dataclass(slots=True)
class Layout:
    """What stands where: `lines` counts from 1, all else are offsets. In the order of the text."""

    lines: dict[KeyPath, int] = field(default_factory=dict)
    pairs: dict[KeyPath, Pair] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=lambda: [Table((), 0, 0, False)])
    comments: list[tuple[int, int]] = field(default_factory=list)


_SPACE: Final = re.compile(r"(?:[ \t\r\n]+|#[^\n]*)*")
_KEY_PART: Final = r"""(?:[A-Za-z0-9_-]+|"(?:\\.|[^"\\\n])*"|'[^'\n]*')"""
_DOTTED_KEY: Final = re.compile(rf"{_KEY_PART}(?:[ \t]*\.[ \t]*{_KEY_PART})*")
_STRING: Final = re.compile(
    r'''"""(?:\\.|[^\\])*?"""(?:"{0,2})|\'\'\'.*?\'\'\'(?:'{0,2})|"(?:\\.|[^"\\\n])*"|'[^'\n]*\'''', re.DOTALL
)
_SCALAR: Final = re.compile(r"[^,\]}#\r\n]+")
_COMMENT: Final = re.compile(r"#[^\n]*")


def index_lines(text: str) -> dict[KeyPath, int]:
    """Every table, key and list item of a TOML text -> the line (from 1) on which it is written.

    The text must have been parsed successfully before.

    Raises:
        RecursionError: values are nested hundreds of levels deep.
    """
    return lay_out(text).lines


def lay_out(text: str) -> Layout:
    """Where everything stands in a TOML text that has been parsed successfully before. Raises as `index_lines`."""
    return _Index(text).walk()


class _Index:
    """The walk over one text. `_lists` counts the tables of each array of tables."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._starts = [0, *(found.end() for found in re.finditer("\n", text))]
        self._layout = Layout()
        self._lines = self._layout.lines
        self._table: KeyPath = ()
        self._lists: dict[KeyPath, int] = {}
        self._position = 0

    def walk(self) -> Layout:
        self._space()
        while self._position < len(self._text):
            if self._text[self._position] == "[":
                self._table = self._header()
            else:
                self._pair(self._table)
            self._space()
        return self._layout

    def _header(self) -> KeyPath:
        line, start = self._line(), self._position
        is_list = self._text.startswith("[[", self._position)
        self._position += 2 if is_list else 1
        self._skip(_SPACE)
        parts = self._key()
        self._skip(_SPACE)
        self._position += 2 if is_list else 1
        path: KeyPath = ()
        for part in parts[:-1]:
            path = self._into((*path, part))
        path = (*path, parts[-1])
        self._lines.setdefault(path, line)
        if is_list:
            self._lists[path] = self._lists.get(path, 0) + 1
            path = (*path, self._lists[path] - 1)
            self._lines[path] = line
        self._layout.tables.append(Table(path, start, self._position, is_list))
        return path

    def _into(self, path: KeyPath) -> KeyPath:
        """A name that is an array of tables means its last table."""
        return (*path, self._lists[path] - 1) if path in self._lists else path

    def _pair(self, table: KeyPath, inside: int = -1) -> None:
        line, start = self._line(), self._position
        path = table
        for part in self._key():
            path = (*path, part)
            self._lines.setdefault(path, line)
        self._skip(_SPACE)
        self._position += 1  # "="
        self._skip(_SPACE)
        value = self._position
        self._layout.pairs[path] = Pair(self._table, start, value, value, inside)  # in the order of the text
        self._value(path)
        self._layout.pairs[path] = Pair(self._table, start, value, self._position, inside)

    def _value(self, path: KeyPath) -> None:
        opening = self._text[self._position]
        if opening in "\"'":
            self._skip(_STRING)
        elif opening in "[{":
            self._container(path, "]" if opening == "[" else "}")
        else:
            start = self._position
            self._skip(_SCALAR)
            self._position = start + len(self._text[start : self._position].rstrip(" \t"))

    def _container(self, path: KeyPath, closing: str) -> None:
        opening = self._position
        self._position += 1
        count = 0
        while True:
            self._space()
            if self._text[self._position] == closing:
                self._position += 1
                return
            if self._text[self._position] == ",":
                self._position += 1
            elif closing == "]":
                self._lines[(*path, count)] = self._line()
                self._value((*path, count))
                count += 1
            else:
                self._pair(path, opening)

    def _key(self) -> list[str]:
        found = _DOTTED_KEY.match(self._text, self._position)
        assert found is not None, "the text has been parsed before"
        self._position = found.end()
        if found[0].isascii() and found[0].replace("_", "").replace("-", "").isalnum():
            return [found[0]]
        parts: list[str] = []
        table: object = tomli.loads(f"{found[0]}=0")  # quotes and escapes are the parser's business
        while isinstance(table, dict):
            [(part, table)] = table.items()
            parts.append(part)
        return parts

    def _space(self) -> None:
        """Go on to what is no white space and no comment, noting the comments."""
        start = self._position
        self._skip(_SPACE)
        if "#" in self._text[start : self._position]:
            found = _COMMENT.finditer(self._text, start, self._position)
            self._layout.comments += [comment.span() for comment in found]

    def _skip(self, pattern: re.Pattern[str]) -> None:
        found = pattern.match(self._text, self._position)
        assert found is not None, "the text has been parsed before"
        self._position = found.end()

    def _line(self) -> int:
        return bisect_right(self._starts, self._position)
