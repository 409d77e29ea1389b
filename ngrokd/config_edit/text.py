"""One value of a TOML text changed, and not one byte besides.

Theory of operation
-------------------
The text is never written anew from a tree, as a library would do it that keeps comments and spacing as well as it can.
It is parsed, to know that it is valid; walked (`ngrokd.config.lines`), to know where everything stands; and then a few
characters are replaced. So what is not touched cannot change, whatever it is: comments, order, spacing, quotes, line
ends, a byte order mark.

The result is parsed again, and must say what the old text said, but for that one value. Where it does not, the text is
refused and nothing has happened: the walk is ours and may be wrong, and this is what keeps a mistake of it from a file.

A comment is never lost. One that stood inside a value that is replaced, or behind a key that is removed, gets a line of
its own in front. A key that stands commented out in its section (`#mtu = 0`) shows where it belongs: it is set in the
next line, beneath its explanation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, TypeAlias

import tomli

from ngrokd.config.lines import Pair, Table, lay_out
from ngrokd.endpoints import printable
from ngrokd.errors import ConfigError

KeyPath: TypeAlias = tuple[str, ...]

_BOM: Final = "\ufeff"
_BARE: Final = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)
_INDENT: Final = "    "
_MAX_COMMENTED_LINES: Final = 200
_ESCAPES: Final = {"\b": "\\b", "\t": "\\t", "\n": "\\n", "\f": "\\f", "\r": "\\r", '"': '\\"', "\\": "\\\\"}


class EditError(ConfigError):
    """The text cannot be edited so; nothing was changed."""


def set_value(text: str, path: KeyPath, value: object) -> str:
    """The text with this key at this value: replaced where it stands, else added where it belongs.

    Args:
        text: a TOML document.
        path: tables and key.
        value: a truth value, integer, text, list or table of such.

    Raises:
        EditError: the text is not TOML, or holds something else in the key's place.
    """
    return _edited(text, lambda edit: edit.set(path, value), path, value)


def unset_value(text: str, path: KeyPath) -> str:
    """The text without this key; the same text where it has none. Raises EditError as `set_value`."""
    return _edited(text, lambda edit: edit.unset(path), path, _NOTHING) if has_value(text, path) else text


def has_value(text: str, path: KeyPath) -> bool:
    """Whether something of this path is written there. Raises EditError for what is not TOML."""
    body = text.removeprefix(_BOM)
    _parse(body)
    return path in lay_out(body).lines


def format_key(path: Iterable[str]) -> str:
    """Tables and key as they are written, with dots between, quoted where needed."""
    return ".".join(part if _BARE.fullmatch(part) else _quoted(part) for part in path)


def parse_key(text: str) -> KeyPath:
    """What `format_key` writes, read again. Raises ValueError."""
    path: list[str] = []
    table: object
    try:
        table = tomli.loads(f"{text}=0")
    except (tomli.TOMLDecodeError, RecursionError):
        raise ValueError(f"not a key: {printable(text)}") from None
    while isinstance(table, dict) and len(table) == 1:
        [(part, table)] = table.items()
        path.append(part)
    if table != 0 or not path:
        raise ValueError(f"not a key: {printable(text)}")
    return tuple(path)


def format_value(value: object, like: str = "") -> str:
    """A value as TOML; `like` is the one that it replaces, whose quotes and line breaks it keeps where it can."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        literal = like.startswith("'") and not like.startswith("'''") and value.isprintable() and "'" not in value
        return f"'{value}'" if literal else _quoted(value)
    if isinstance(value, (list, tuple)):
        items = [format_value(item, _first_item(like)) for item in value]
        if "\n" in like and items:
            return _spread(items, like)
        return "[" + ", ".join(items) + "]"
    if isinstance(value, dict):
        pairs = [f"{format_key((key,))} = {format_value(item)}" for key, item in value.items()]
        return "{ " + ", ".join(pairs) + " }" if pairs else "{}"
    raise TypeError(f"no TOML for {type(value).__name__}")


def _quoted(text: str) -> str:
    return '"' + "".join(_escaped(character) for character in text) + '"'


def _escaped(character: str) -> str:
    if character in _ESCAPES:
        return _ESCAPES[character]
    # TOML asks for the control characters; others that cannot be seen are better escaped for the reader's sake.
    if character.isprintable():
        return character
    return f"\\u{ord(character):04X}" if ord(character) < 0x10000 else f"\\U{ord(character):08X}"


def _first_item(like: str) -> str:
    found = re.match(r"\[\s*", like)
    return like[found.end() :] if found and like.startswith("'", found.end()) else ""


def _spread(items: Sequence[str], like: str) -> str:
    """A list with a line for each item, indented as the one before."""
    newline = "\r\n" if "\r\n" in like else "\n"
    found = re.search(r"\n([ \t]*)[^\s#\]]", like)
    indent = found[1] if found else _INDENT
    closing = re.search(r"\n([ \t]*)\]$", like)
    return f"[{newline}" + "".join(f"{indent}{item},{newline}" for item in items) + f"{closing[1] if closing else ''}]"


# The frame of every edit


class _Nothing:
    """Stands for the value of a key that is removed."""


_NOTHING: Final = _Nothing()


def _edited(text: str, change: Callable[[_Edit], str], path: KeyPath, value: object) -> str:
    """Carry out one edit, and hold the result to what was asked for."""
    body = text.removeprefix(_BOM)
    before = _parse(body)
    edited = change(_Edit(body))
    wanted = _changed(before, path, value)
    try:
        after = tomli.loads(edited)
    except (tomli.TOMLDecodeError, RecursionError):
        after = None
    if after is None or _pruned(after) != _pruned(wanted):
        raise EditError(f"{printable(format_key(path))} cannot be changed here by a program; edit the file by hand")
    return (_BOM if text.startswith(_BOM) else "") + edited


def _parse(body: str) -> dict[str, Any]:
    try:
        return tomli.loads(body)
    except (tomli.TOMLDecodeError, RecursionError, ValueError) as error:
        raise EditError(f"not TOML: {printable(str(error))}") from None


def _changed(document: dict[str, Any], path: KeyPath, value: object) -> dict[str, Any]:
    """A copy of the document, with this change."""
    copy = dict(document)
    key, rest = path[0], path[1:]
    if rest:
        inner = copy.get(key, {})
        if not isinstance(inner, dict):
            raise EditError(f"{printable(format_key(path[:1]))} is no table")
        copy[key] = _changed(inner, rest, value)
    elif isinstance(value, _Nothing):
        copy.pop(key, None)
    else:
        copy[key] = list(value) if isinstance(value, tuple) else value
    return copy


def _pruned(value: object) -> object:
    """Without tables that hold nothing: whether one is left behind when its last key goes is a matter of form."""
    if not isinstance(value, dict):
        return value
    kept = {key: _pruned(inner) for key, inner in value.items()}
    return {key: inner for key, inner in kept.items() if inner != {}}


class _Edit:
    """One edit of one valid text; every method returns the whole new text. Offsets are those of the old one."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._layout = lay_out(text)
        self._newline = "\r\n" if "\r\n" in text else "\n"

    # Setting

    def set(self, path: KeyPath, value: object) -> str:
        layout, parent = self._layout, path[:-1]
        if path in layout.pairs:
            return self._replace(layout.pairs[path], value)
        if path in layout.lines:
            raise EditError(f"{printable(format_key(path))} is a table in this file")
        for depth in range(len(parent), 0, -1):
            if path[:depth] in layout.pairs:
                return self._add_inline(layout.pairs[path[:depth]], path[depth:], value)
        header = next((table for table in layout.tables if table.path == parent and not table.is_list), None)
        if header is not None:
            return self._add_under(header, path[-1], value)
        # A table that is made by dotted keys must not be opened by a header as well.
        inner = [pair for found, pair in layout.pairs.items() if found[: len(parent)] == parent and pair.inside < 0]
        dotted = [pair for pair in inner if len(pair.table) < len(parent)]
        if dotted:
            last = dotted[-1]
            return self._add_line(last.end, self._indent(last.start) + _line(path[len(last.table) :], value))
        return self._add_section(parent, _line(path[-1:], value))

    def _replace(self, pair: Pair, value: object) -> str:
        written = format_value(value, self._text[pair.value : pair.end])
        return self._spliced(pair.value, pair.end, written, pair)

    def _spliced(self, start: int, end: int, written: str, pair: Pair) -> str:
        """Put something between two places within a statement; comments that stood there go above it."""
        statement = self._statement(pair)
        top = self._line_start(statement.start)
        indent = self._text[top : statement.start]
        raised = "".join(f"{indent}{comment}{self._newline}" for comment in self._comments(start, end))
        return self._text[:top] + raised + self._text[top:start] + written + self._text[end:]

    def _comments(self, start: int, end: int) -> list[str]:
        spans = [span for span in self._layout.comments if start <= span[0] < end]
        return [self._text[first:last].rstrip() for first, last in spans]

    def _statement(self, pair: Pair) -> Pair:
        """The pair that has lines of its own and holds this one, perhaps itself."""
        while pair.inside >= 0:
            inside = pair.inside
            around = [each for each in self._layout.pairs.values() if each.value <= inside < each.end]
            pair = max(around, key=lambda each: each.value)
        return pair

    def _add_inline(self, container: Pair, rest: KeyPath, value: object) -> str:
        if self._text[container.value] != "{":
            raise EditError("it would be in something that is no table in this file")
        inner = [pair for pair in self._layout.pairs.values() if pair.inside == container.value]
        if inner:
            return self._inserted(inner[-1].end, f", {_line(rest, value)}")
        return self._inserted(container.value + 1, f" {_line(rest, value)} ")

    def _add_under(self, header: Table, key: str, value: object) -> str:
        """Into the part of the file that a header begins: beneath its commented self, else behind the last key."""
        text, layout, line = self._text, self._layout, _line((key,), value)
        end = min((table.start for table in layout.tables if table.start > header.start), default=len(text))
        commented = re.compile(rf"#[ \t]*{re.escape(format_key((key,)))}[ \t]*=")
        for first, last in layout.comments:
            alone = not self._indent(first).strip()
            if header.end <= first < end and alone and commented.match(text, first, last):
                return self._add_line(self._commented_end(first, last), self._indent(first) + line)
        under = [pair for pair in layout.pairs.values() if pair.inside < 0 and header.end <= pair.start < end]
        if under:
            return self._add_line(under[-1].end, self._indent(under[-1].start) + line)
        return self._add_line(header.end, line) if header.path else f"{line}{self._newline}{text}"

    def _commented_end(self, first: int, last: int) -> int:
        """Behind a commented key, whose value may go on in the comments of the next lines."""
        text, end = self._text[first + 1 : last], last
        for start, stop in [span for span in self._layout.comments if span[0] > last][:_MAX_COMMENTED_LINES]:
            if _is_toml(text) or self._text[end:start].strip(" \t\r") != "\n":
                break
            text += "\n" + self._text[start + 1 : stop]
            end = stop
        return end if _is_toml(text) else last

    def _add_section(self, path: KeyPath, line: str) -> str:
        text = self._text
        if text and not text.endswith("\n"):
            text += self._newline
        if text.strip() and not text.endswith(("\n\n", "\n\r\n")):
            text += self._newline
        return f"{text}[{format_key(path)}]{self._newline}{line}{self._newline}"

    def _add_line(self, position: int, line: str) -> str:
        """Below the line in which `position` is."""
        end = self._text.find("\n", position)
        if end < 0:
            return f"{self._text}{self._newline}{line}"
        return self._inserted(end + 1, line + self._newline)

    def _inserted(self, position: int, written: str) -> str:
        return self._text[:position] + written + self._text[position:]

    # Removing

    def unset(self, path: KeyPath) -> str:
        pair = self._layout.pairs.get(path)
        if pair is None:
            raise EditError(f"{printable(format_key(path))} is a table in this file; remove its keys")
        if pair.inside >= 0:
            return self._remove_inline(pair)
        start, end = self._line_start(pair.start), self._text.find("\n", pair.end) + 1 or len(self._text)
        indent = self._indent(pair.start)
        kept = "".join(f"{indent}{comment}{self._newline}" for comment in self._comments(pair.value, end))
        return self._text[:start] + kept + self._text[end:]

    def _remove_inline(self, pair: Pair) -> str:
        siblings = [each for each in self._layout.pairs.values() if each.inside == pair.inside]
        index = siblings.index(pair)
        if index + 1 < len(siblings):
            return self._spliced(pair.start, siblings[index + 1].start, "", pair)
        if index:
            return self._spliced(siblings[index - 1].end, pair.end, "", pair)
        comma = re.compile(r"[ \t]*,?").match(self._text, pair.end)
        assert comma is not None, "it matches nothing as well"
        return self._spliced(pair.start, comma.end(), "", pair)

    # Places

    def _line_start(self, position: int) -> int:
        return self._text.rfind("\n", 0, position) + 1

    def _indent(self, position: int) -> str:
        """The white space before what begins a line at `position`."""
        return self._text[self._line_start(position) : position]


def _line(path: KeyPath, value: object) -> str:
    return f"{format_key(path)} = {format_value(value)}"


def _is_toml(text: str) -> bool:
    try:
        tomli.loads(text)
    except (tomli.TOMLDecodeError, RecursionError, ValueError):
        return False
    return True
