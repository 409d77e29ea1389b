"""On which line of a TOML text each key is written.

The TOML parser keeps no positions of values, and a mistake without its line is half a message. So the text is walked
a second time, after it has been parsed: the walk knows that it is valid and checks nothing. Keys in dotted or quoted
form, inline tables, lists, arrays of tables and multi-line strings are followed as the TOML specification says.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from typing import Final

import tomli

KeyPath = tuple[str | int, ...]

_SPACE: Final = re.compile(r"(?:[ \t\r\n]+|#[^\n]*)*")
_KEY_PART: Final = r"""(?:[A-Za-z0-9_-]+|"(?:\\.|[^"\\\n])*"|'[^'\n]*')"""
_DOTTED_KEY: Final = re.compile(rf"{_KEY_PART}(?:[ \t]*\.[ \t]*{_KEY_PART})*")
_STRING: Final = re.compile(
    r'''"""(?:\\.|[^\\])*?"""(?:"{0,2})|\'\'\'.*?\'\'\'(?:'{0,2})|"(?:\\.|[^"\\\n])*"|'[^'\n]*\'''', re.DOTALL
)
_SCALAR: Final = re.compile(r"[^,\]}#\r\n]+")


def index_lines(text: str) -> dict[KeyPath, int]:
    """Every table, key and list item of a TOML text -> the line (from 1) on which it is written.

    The text must have been parsed successfully before.

    Raises:
        RecursionError: values are nested hundreds of levels deep.
    """
    return _Index(text).walk()


class _Index:
    """The walk over one text. `_lists` counts the tables of each array of tables."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._starts = [0, *(found.end() for found in re.finditer("\n", text))]
        self._lines: dict[KeyPath, int] = {}
        self._lists: dict[KeyPath, int] = {}
        self._position = 0

    def walk(self) -> dict[KeyPath, int]:
        table: KeyPath = ()
        self._skip(_SPACE)
        while self._position < len(self._text):
            if self._text[self._position] == "[":
                table = self._header()
            else:
                self._pair(table)
            self._skip(_SPACE)
        return self._lines

    def _header(self) -> KeyPath:
        line = self._line()
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
        return path

    def _into(self, path: KeyPath) -> KeyPath:
        """A name that is an array of tables means its last table."""
        return (*path, self._lists[path] - 1) if path in self._lists else path

    def _pair(self, table: KeyPath) -> None:
        line = self._line()
        path = table
        for part in self._key():
            path = (*path, part)
            self._lines.setdefault(path, line)
        self._skip(_SPACE)
        self._position += 1  # "="
        self._skip(_SPACE)
        self._value(path)

    def _value(self, path: KeyPath) -> None:
        opening = self._text[self._position]
        if opening in "\"'":
            self._skip(_STRING)
        elif opening in "[{":
            self._container(path, "]" if opening == "[" else "}")
        else:
            self._skip(_SCALAR)

    def _container(self, path: KeyPath, closing: str) -> None:
        self._position += 1
        count = 0
        while True:
            self._skip(_SPACE)
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
                self._pair(path)

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

    def _skip(self, pattern: re.Pattern[str]) -> None:
        found = pattern.match(self._text, self._position)
        assert found is not None, "the text has been parsed before"
        self._position = found.end()

    def _line(self) -> int:
        return bisect_right(self._starts, self._position)
