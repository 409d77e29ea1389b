"""What a person sees: aligned columns, no boxes, colour only where it helps and is wanted.

Data goes to stdout, everything else to stderr. Text from outside (names, reasons, messages of another daemon) is shown
with its control characters escaped, so that no endpoint can move the cursor of whoever lists it.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Final, TextIO

MIN_COLUMN: Final = 8  # characters that truncation leaves of a column
MAX_TEXT: Final = 4096  # characters of one cell or message
_CODES: Final = {"green": "32", "yellow": "33", "red": "31", "dim": "2", "bold": "1"}


def clean(text: object) -> str:
    """Any text, fit for a terminal: on one line, control and bidirectional characters as escapes, not endless."""
    shown = truncate(str(text), MAX_TEXT)
    if shown.isprintable():
        return shown
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in shown
    )


def wants_colour(stream: TextIO) -> bool:
    """https://no-color.org: any non-empty NO_COLOR means no; so does a pipe, and a terminal that cannot."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb" and stream.isatty()


def paint(text: str, colour: str, stream: TextIO | None = None) -> str:
    """The text in a colour, where the stream (stdout unless given) wants colours."""
    return f"\x1b[{_CODES[colour]}m{text}\x1b[0m" if wants_colour(stream or sys.stdout) else text


def terminal_width() -> int | None:
    """Characters in a line of stdout; None where it is no terminal and nothing is to be cut."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def truncate(text: str, width: int) -> str:
    """At most `width` characters, the last one "…" where something is missing."""
    return text if len(text) <= width else text[: width - 1] + "…"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], width: int | None) -> list[str]:
    """Aligned lines under a header, two spaces between the columns.

    What is wider than `width` is made narrower at its widest columns first, never below `MIN_COLUMN`.
    """
    lines = [list(header), *([clean(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    while width is not None and sum(widths) + 2 * (len(widths) - 1) > width and max(widths) > MIN_COLUMN:
        widths[widths.index(max(widths))] -= 1
    return [
        "  ".join(truncate(cell, size).ljust(size) for cell, size in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]


def fields(pairs: Iterable[tuple[str, str]], width: int | None, indent: str = "  ") -> list[str]:
    """Names and values in two columns; pairs without a value are left out."""
    shown = [(name, clean(value)) for name, value in pairs if value]
    size = max((len(name) for name, _ in shown), default=0)
    room = None if width is None else max(width - size - len(indent) - 2, MIN_COLUMN)
    return [f"{indent}{name.ljust(size)}  {value if room is None else truncate(value, room)}" for name, value in shown]


def ago(seconds: float) -> str:
    """How long, roughly: "12 s", "5 min", "3 h", "2 days"."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{int(seconds // size)} {unit}"
    return f"{max(0, int(seconds))} s"


def wall_time(value: object) -> float | None:
    """Seconds since 1970, or RFC 3339 -> seconds since 1970; None for what is neither, for 0 and for Go's zero time."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value) if 0 < value < 253_402_300_800 else None  # the year 10000, which no calendar here knows
    if not isinstance(value, str):
        return None
    from datetime import datetime

    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        return None
    return moment.timestamp() if moment.year > 1 and moment.tzinfo is not None else None


def since(value: object, now: float | None = None) -> str:
    """ "12 s ago" of what `wall_time` reads; "" for what is none."""
    moment = wall_time(value)
    return "" if moment is None else f"{ago((time.time() if now is None else now) - moment)} ago"


def print_lines(lines: Iterable[str]) -> None:
    """To stdout, in one write."""
    sys.stdout.write("".join(line + "\n" for line in lines))
    sys.stdout.flush()


def warn(text: str) -> None:
    """One line on stderr that is not an error."""
    print(f"{paint('warning:', 'yellow', sys.stderr)} {clean(text)}", file=sys.stderr)


def print_error(message: str, remedy: str = "") -> None:
    """Say on stderr what is wrong, each line by itself, and what to do next."""
    for line in message.split("\n"):
        print(f"{paint('error:', 'red', sys.stderr)} {clean(line)}", file=sys.stderr)
    if remedy:
        print(f"  hint: {clean(remedy)}", file=sys.stderr)
