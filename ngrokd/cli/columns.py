"""Tables of many columns on terminals of any width, and numbers as people read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from ngrokd.cli.output import clean, truncate

GAP: Final = 2


@dataclass(frozen=True, slots=True)
class Column:
    """One column.

    Attributes:
        title: its head.
        right: aligned to the right, as numbers are.
        least: characters it may be cut to; 0: it is never cut.
        worth: columns of little worth go first where the terminal is narrow; 0: it never goes.
    """

    title: str
    right: bool = False
    least: int = 0
    worth: int = 0


def fit(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int | None) -> list[str]:
    """Aligned lines, the head first. What does not fit is cut, then left out, the least worthy column first.

    A column in which nothing stands is left out too, if it may go.

    Args:
        columns: as many as each row has cells.
        rows: any text; control characters are escaped.
        width: characters in a line; None: as many as it takes.
    """
    cells = [[clean(cell) for cell in row] for row in rows]
    chosen = [
        at for at, column in enumerate(columns) if not (column.worth and cells and not any(row[at] for row in cells))
    ]
    while True:
        widths = {at: max([len(columns[at].title), *(len(row[at]) for row in cells)]) for at in chosen}
        _squeeze(columns, widths, width)
        fits = width is None or _total(widths) <= width
        unworthy = [at for at in chosen if columns[at].worth]
        if fits or not unworthy:
            break
        chosen.remove(min(unworthy, key=lambda at: columns[at].worth))
    lines = [[column.title for column in columns], *cells]
    placed = (
        (" " * GAP).join(_place(line[at], size, right=columns[at].right) for at, size in widths.items()).rstrip()
        for line in lines
    )
    return [line if width is None else truncate(line, width) for line in placed]


def _squeeze(columns: Sequence[Column], widths: dict[int, int], width: int | None) -> None:
    """Cut the widest of those that may be cut, as far as they may."""
    while width is not None and _total(widths) > width:
        softer = [at for at, size in widths.items() if 0 < columns[at].least < size]
        if not softer:
            return
        widths[max(softer, key=lambda at: widths[at])] -= 1


def _total(widths: dict[int, int]) -> int:
    return sum(widths.values()) + GAP * (len(widths) - 1)


def _place(text: str, size: int, *, right: bool) -> str:
    text = truncate(text, size)
    return text.rjust(size) if right else text.ljust(size)


def size_text(count: object) -> str:
    """Bytes with three digits and a unit of 1000: "0 B", "512 B", "1.5 kB", "23 MB"; "" for what is no number."""
    if isinstance(count, bool) or not isinstance(count, (int, float)):
        return ""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(value) < 999.5 or unit == "TB":
            digits = 1 if unit != "B" and abs(value) < 9.95 else 0
            return f"{value:.{digits}f} {unit}"
        value /= 1000
    raise AssertionError("the last unit takes all")


def rate_text(count: object) -> str:
    """Bytes a second; "" for none."""
    return f"{size_text(count)}/s" if isinstance(count, (int, float)) and count >= 0.5 else ""


def time_text(seconds: object) -> str:
    """How long, in four characters or so: "0.2s", "59s", "5m", "3h", "2d"."""
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        return ""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= 2 * size:
            return f"{int(seconds // size)}{unit}"
    return f"{seconds:.1f}s" if seconds < 9.95 else f"{int(seconds)}s"


def milliseconds_text(value: object) -> str:
    """ "0.21 ms", "12 ms"; "" for what is no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return ""
    return f"{value:.2f} ms" if value < 9.95 else f"{value:.0f} ms"


def table_of(data: object) -> dict[str, Any]:  # Any: another program's JSON; each use looks first
    """The object, or an empty one for what is none."""
    return data if isinstance(data, dict) else {}


def rows_of(data: object) -> list[dict[str, Any]]:  # Any: as above
    """The objects of a list, or none."""
    return [each for each in data if isinstance(each, dict)] if isinstance(data, list) else []
