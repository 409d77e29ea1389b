"""`ngrokd top`: the connections that carry most, live.

The daemon sends a frame every few seconds. What is shown is a pure function of the frame, what was typed and the size
of the terminal; around it is a loop that waits for either, and a terminal that is put back whatever happens.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Self

import click

from ngrokd.ask import Subscription
from ngrokd.cli.columns import Column, fit, milliseconds_text, rate_text, rows_of, size_text, table_of, time_text
from ngrokd.cli.context import Context, command
from ngrokd.cli.flows import STATES, user_name
from ngrokd.cli.offers import endpoint_names
from ngrokd.cli.output import clean, paint, print_lines, terminal_width, truncate, wall_time
from ngrokd.cli.programs import Programs

LOOK_S: Final = 0.5  # how soon another size of the terminal is noticed
FIRST_S: Final = 0.5  # so that the first rates do not take a whole interval
SORTS: Final[Mapping[str, tuple[str, ...]]] = {
    "rate": ("rate_from_app", "rate_to_app"),
    "sent": ("bytes_from_app",),
    "received": ("bytes_to_app",),
    "age": ("age_s",),
    "rtt": ("rtt_ms",),
    "program": ("process",),
    "endpoint": ("endpoint",),
    "id": ("id",),
}
_TEXTS: Final = frozenset({"program", "endpoint"})
_ESCAPE: Final = "\x1b"
_SCROLLS: Final = {"\x1b[A": -1, "k": -1, "\x1b[B": 1, "j": 1, "\x1b[5~": -10, "\x1b[6~": 10}

COLUMNS: Final = (
    Column("ID", right=True, worth=6),
    Column("PROGRAM", least=8),
    Column("USER", least=6, worth=2),
    Column("ENDPOINT", least=16),
    Column("STATE", worth=5),
    Column("SENT/S", right=True),
    Column("RECEIVED/S", right=True),
    Column("SENT", right=True, worth=4),
    Column("RECEIVED", right=True, worth=4),
    Column("RTT", right=True, worth=3),
    Column("AGE", right=True, worth=7),
    Column("FROM", worth=1),
)


@dataclass(frozen=True, slots=True)
class View:
    """What is looked at, and how.

    Attributes:
        frame: the last one that is to be shown.
        sort, reverse: the order of the rows.
        wanted: only rows that contain this.
        typing: `wanted` is being typed.
        paused: frames that come are not shown.
        offset: rows that are scrolled over.
        quit: enough was seen.
    """

    frame: Mapping[str, Any] = field(default_factory=dict)
    sort: str = "rate"
    reverse: bool = False
    wanted: str = ""
    typing: bool = False
    paused: bool = False
    offset: int = 0
    quit: bool = False


@command("top")
@click.option("--interval", metavar="S", type=click.FloatRange(0.2, 3600), default=2.0, show_default=True)
@click.option("--sort", type=click.Choice(list(SORTS)), default="rate", show_default=True, help="What comes first.")
@click.option(
    "--filter",
    "wanted",
    metavar="TEXT",
    default="",
    shell_complete=endpoint_names,
    help="Only endpoints and programs that contain TEXT.",
)
@click.option("--once", is_flag=True, help="Print one table and stop, as when stdout is no terminal.")
def top(context: Context, interval: float, sort: str, wanted: str, once: bool) -> None:
    """Watch the connections that carry most: who, where to, how fast, each way.

    Keys: q quit, s and S sort by the next or previous column, r reverse, / filter, p pause, arrows scroll.
    With --json each line is one frame.
    """
    view = View(sort=sort, wanted=wanted)
    live = not once and not context.as_json and sys.stdout.isatty()
    shorter = interval if live or not once else min(interval, FIRST_S)
    with Subscription(context.socket_path(), "top", (f"interval={shorter}",)) as subscription:
        if live:
            _watch(subscription, view)
        else:
            _print_frames(context, subscription, view, once=once or not context.as_json)


def _print_frames(context: Context, subscription: Subscription, view: View, *, once: bool) -> None:
    programs = Programs()
    for line in subscription:
        frame = table_of(line)
        if not frame.get("interval_s"):  # nobody had looked before, so it has no rates
            continue
        programs.name(rows_of(frame.get("flows")))
        if context.as_json:
            sys.stdout.write(json.dumps({"schema": "ngrokd.top/1", **frame}) + "\n")
            sys.stdout.flush()
        else:
            width = terminal_width()
            shown = replace(view, frame=frame)
            print_lines([*head_lines(shown, width), "", *_rows(shown, width)])
        if once:
            return


# What is shown


def screen(view: View, width: int, height: int) -> list[str]:
    """All lines of the terminal: head, rows, keys. Never more than `height`, nor wider than `width`."""
    head = head_lines(view, width)
    heading, *rows = _rows(view, width)  # plain text: colours come after cutting
    room = max(0, height - len(head) - 3)
    offset = max(0, min(view.offset, len(rows) - room))
    rows = rows[offset : offset + room]
    rows += [""] * (room - len(rows))
    lines = [*head, "", paint(heading, "bold"), *rows, _foot(view, width)]
    return lines[:height]


def head_lines(view: View, width: int | None) -> list[str]:
    """What is said of the daemon as a whole: two lines, and one more for what is wrong."""
    frame = view.frame
    if not frame:
        return ["ngrokd: waiting for the daemon", ""]
    state = clean(frame.get("state", ""))
    colour = "green" if state == "ready" else "yellow"
    total = frame.get("total", 0)
    facts = [
        _clock(frame.get("time")),
        f"{frame.get('endpoints', 0)} endpoints",
        f"{total} connection{'' if total == 1 else 's'}",
        f"{frame.get('pool_ready', 0)} kept ready",
    ]
    first = _within(f"ngrokd is {state}", width) + "".join(f"   {fact}" for fact in facts)
    rates = [
        f"sent {rate_text(frame.get('bytes_from_app_s')) or '0'}",
        f"received {rate_text(frame.get('bytes_to_app_s')) or '0'}",
        f"opened {_per_second(frame.get('opened_s'))}",
        f"refused {_per_second(frame.get('refused_s'))}",
        f"dials {_per_second(frame.get('dials_s'))}",
        f"p95 {milliseconds_text(frame.get('dial_p95_ms') or None) or '-'}",
        f"drops {_per_second(frame.get('drops_s'))}",
    ]
    lines = [_within(first, width).replace(state, paint(state, colour), 1), _within("   ".join(rates), width)]
    problems = frame.get("problems")
    if isinstance(problems, list) and problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        lines.append(paint(_within(f"problem: {clean(problems[0])}{more}", width), "yellow"))
    return lines


def _rows(view: View, width: int | None) -> list[str]:
    flows = sorted_flows(view)
    return fit(COLUMNS, [_cells(flow) for flow in flows], width)


def sorted_flows(view: View) -> list[dict[str, Any]]:
    """The flows that are wanted, in order. What has no value comes last."""
    wanted = view.wanted.lower()
    flows = [
        flow
        for flow in rows_of(view.frame.get("flows"))
        if wanted in f"{flow.get('endpoint', '')} {flow.get('process', '')}".lower()
    ]
    names = SORTS[view.sort]
    if view.sort in _TEXTS:
        return sorted(flows, key=lambda flow: str(flow.get(names[0], "")), reverse=view.reverse)

    def value(flow: Mapping[str, Any]) -> float:
        return sum(each for name in names if isinstance(each := flow.get(name), (int, float)))

    return sorted(flows, key=value, reverse=not view.reverse)


def _cells(flow: Mapping[str, Any]) -> tuple[str, ...]:
    state = str(flow.get("state", ""))
    return (
        str(flow.get("id", "")),
        str(flow.get("process") or "?"),
        user_name(flow.get("uid")),
        str(flow.get("endpoint", "")),
        STATES.get(state, state),
        rate_text(flow.get("rate_from_app")),
        rate_text(flow.get("rate_to_app")),
        size_text(flow.get("bytes_from_app")),
        size_text(flow.get("bytes_to_app")),
        milliseconds_text(flow.get("rtt_ms")),
        time_text(flow.get("age_s")),
        str(flow.get("source", "")),
    )


def _foot(view: View, width: int) -> str:
    if view.typing:
        return _within(f"filter: {clean(view.wanted)}_   (enter: keep, escape: none)", width)
    order = f"{view.sort}{', reversed' if view.reverse else ''}"
    only = f"only {clean(view.wanted)}   " if view.wanted else ""
    paused = "PAUSED   " if view.paused else ""
    keys = f"{paused}{only}q quit  s sort ({order})  r reverse  / filter  p pause  arrows scroll"
    return paint(_within(keys, width), "dim")


def _within(text: str, width: int | None) -> str:
    return text if width is None else truncate(text, width)


def _per_second(value: object) -> str:
    return f"{value:.{1 if value < 10 else 0}f}/s" if isinstance(value, (int, float)) and value else "0"


def _clock(stamp: object) -> str:
    moment = wall_time(stamp)
    return "" if moment is None else time.strftime("%H:%M:%S", time.localtime(moment))


# What is typed


def press(view: View, key: str) -> View:
    """What a key does. `key` is one character, or the sequence that a terminal sends for one key."""
    if view.typing:
        return _type(view, key)
    if key in _SCROLLS:
        most = max(0, len(sorted_flows(view)) - 1)
        return replace(view, offset=max(0, min(view.offset + _SCROLLS[key], most)))
    names = list(SORTS)
    match key:
        case "q" | "\x03" | "\x04":
            return replace(view, quit=True)
        case "s" | "S":
            step = 1 if key == "s" else -1
            return replace(view, sort=names[(names.index(view.sort) + step) % len(names)], offset=0)
        case "r":
            return replace(view, reverse=not view.reverse)
        case "p" | " ":
            return replace(view, paused=not view.paused)
        case "/":
            return replace(view, typing=True)
        case "\x1b":
            return replace(view, wanted="", offset=0)
    return view


def _type(view: View, key: str) -> View:
    match key:
        case "\r" | "\n":
            return replace(view, typing=False)
        case "\x1b" | "\x03":
            return replace(view, typing=False, wanted="")
        case "\x7f" | "\x08":
            return replace(view, wanted=view.wanted[:-1], offset=0)
    return replace(view, wanted=view.wanted + key, offset=0) if key.isprintable() and len(key) == 1 else view


def keys_of(text: str) -> Iterator[str]:
    """What was read from a terminal, key by key."""
    at = 0
    while at < len(text):
        end = at + 1
        if text[at] == _ESCAPE and text[end : end + 1] in ("[", "O"):
            end += 1
            while end < len(text) and not ("@" <= text[end] <= "~"):
                end += 1
            end += 1
        yield text[at:end]
        at = end


# The terminal


def _watch(subscription: Subscription, view: View) -> None:
    """Show frames until somebody has seen enough."""
    programs = Programs()
    with _Terminal() as terminal, contextlib.suppress(KeyboardInterrupt):
        shown: tuple[object, ...] = ()
        while not view.quit:
            width, height = shutil.get_terminal_size()
            if shown != (view, width, height, terminal.entered):
                shown = (view, width, height, terminal.entered)
                terminal.draw(screen(view, width, height))
            for line in _wait(subscription, terminal):
                if isinstance(line, str):
                    view = press(view, line)
                    continue
                frame = table_of(line)
                programs.name(rows_of(frame.get("flows")))
                view = _take(view, frame)


def _take(view: View, frame: Mapping[str, Any]) -> View:
    return view if view.paused else replace(view, frame=frame)


def _wait(subscription: Subscription, terminal: _Terminal) -> Iterator[Any]:
    """The keys and frames that have come, or nothing after LOOK_S."""
    if subscription.has_line:
        yield from subscription.ready()
        return
    sources: list[Any] = [subscription, *([terminal.keyboard] if terminal.keyboard is not None else [])]
    found, _, _ = select.select(sources, [], [], LOOK_S)
    if terminal.keyboard in found and terminal.keyboard is not None:
        try:
            typed = os.read(terminal.keyboard, 256)
        except OSError:  # the terminal itself is gone
            typed = b"q"
        if not typed:
            terminal.keyboard = None
        yield from keys_of(typed.decode("utf-8", "replace"))
    if subscription in found:
        yield from subscription.ready()


class _Terminal:
    """The other screen, no cursor, keys as they are pressed. A context manager; leaving it puts all of it back.

    Attributes:
        keyboard: what keys are read from; None: there is none.
        entered: how often the screen was taken; it must be drawn anew after each.
    """

    def __init__(self) -> None:
        self.keyboard: int | None = 0 if sys.stdin.isatty() else None
        self.entered = 0
        self._before: list[Any] = []
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGTSTP):
            self._handlers[number] = signal.getsignal(number)
        signal.signal(signal.SIGTERM, _interrupt)
        signal.signal(signal.SIGHUP, _interrupt)
        signal.signal(signal.SIGTSTP, self._suspend)
        self._take()
        return self

    def __exit__(self, *_: object) -> None:
        self._give_back()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def draw(self, lines: list[str]) -> None:
        """Show these lines from the top, and nothing else."""
        text = "\x1b[H" + "\r\n".join(f"{line}\x1b[K" for line in lines) + "\x1b[J"
        sys.stdout.write(text)
        sys.stdout.flush()

    def _take(self) -> None:
        self.entered += 1
        if self.keyboard is not None:
            import termios
            import tty

            self._before = termios.tcgetattr(self.keyboard)
            tty.setcbreak(self.keyboard)
        sys.stdout.write("\x1b[?1049h\x1b[?25l")
        sys.stdout.flush()

    def _give_back(self) -> None:
        if self._before and self.keyboard is not None:
            import termios

            with contextlib.suppress(termios.error):  # the terminal itself is gone
                termios.tcsetattr(self.keyboard, termios.TCSANOW, self._before)
        with contextlib.suppress(OSError):
            sys.stdout.write("\x1b[?25h\x1b[?1049l")
            sys.stdout.flush()

    def _suspend(self, _number: int, _frame: object) -> None:
        """^Z: put the terminal back, stop, and take it again afterwards."""
        self._give_back()
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, self._suspend)
        self._take()


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt
