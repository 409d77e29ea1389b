"""The log: what the daemon says on stderr.

Theory of operation
-------------------
Everything goes through the standard `logging`. One handler formats the record where it is made (arguments may change
later) and puts the finished line into a bounded queue; one thread writes the queue to stderr. So a reader that stops
reading, or a disk that is full, costs lines and never time: what does not fit is counted, and the count is said when
there is room again.

One event is one line, of at most some KiB, whatever was in its arguments: control characters, line separators and
bidirectional marks are shown as escapes, and a traceback is folded into the line, without the values of variables.
Lines that repeat are limited per place in the code, and the next one that passes says how many did not.

Forms: `text` is for people (on a terminal with the local time, under systemd's journal with its `<N>` priority and no
time, elsewhere with UTC), `json` one JSON object per line. `auto` is text on a terminal and under the journal, and JSON
elsewhere.

Fields: `log.info("flow refused", extra={"endpoint": url})` shows as ` endpoint=...` in text and as a key in JSON;
`with context(flow=7):` adds fields to every line said inside, by this task and the tasks it starts. `event` is the name
of an event (`ngrokd.ops.events`), which people need not read; with `said` the message says all fields, and text has no
more than that.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Literal, Self

MAX_MESSAGE_CHARS: Final = 4096
MAX_FIELD_CHARS: Final = 1024
MAX_FIELDS: Final = 32
QUEUE_LINES: Final = 10_000
QUEUE_BYTES: Final = 4 << 20
RATE_PER_S: Final = 10  # lines of one place in the code in one second
RATE_PLACES: Final = 1024  # places remembered
RING_LINES: Final = 2000
MAX_TRACEBACK_FRAMES: Final = 20

_STANDARD_ATTRIBUTES: Final = frozenset(vars(logging.makeLogRecord({}))) | {
    "message",
    "asctime",
    "suppressed",
    "rate_key",
    "said",
}
_PRIORITIES: Final = ((logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))  # sd-daemon(3); debug is 7
_COLOURS: Final = {"warning": "\x1b[33m", "error": "\x1b[31m", "critical": "\x1b[31m", "debug": "\x1b[2m"}

Form = Literal["terminal", "journal", "plain", "json"]

_context: ContextVar[Mapping[str, object]] = ContextVar("ngrokd_log_context")


@contextlib.contextmanager
def context(**fields: object) -> Iterator[None]:
    """Add these fields to every record made inside."""
    token = _context.set({**_context.get({}), **fields})
    try:
        yield
    finally:
        _context.reset(token)


def one_line(text: str, limit: int = MAX_MESSAGE_CHARS) -> str:
    """The text without anything that could move a cursor, hide a character or start a line, at most `limit` long.

    Unlike `endpoints.printable` it leaves backslashes alone: messages are ours, and only what was put into them may
    be foreign.
    """
    head = text[: limit + 1]
    if not head.isprintable():
        head = "".join(character if character.isprintable() else _escape(character) for character in head)
    return head if len(head) <= limit and len(text) <= limit else head[: limit - 3] + "..."


def _escape(character: str) -> str:
    code = ord(character)
    return {9: "\\t", 10: "\\n", 13: "\\r"}.get(code) or (
        f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
    )


def fold_traceback(error: BaseException) -> str:
    """The error and where it was raised, innermost call last, on one line and without values of variables."""
    frames = []
    step = error.__traceback__
    while step is not None:
        code = step.tb_frame.f_code
        frames.append(f"{os.path.basename(code.co_filename)}:{step.tb_lineno} {code.co_name}")
        step = step.tb_next
    if len(frames) > MAX_TRACEBACK_FRAMES:
        frames[:-MAX_TRACEBACK_FRAMES] = ["..."]
    text = f"{type(error).__name__}: {error}" + (f" [{' > '.join(frames)}]" if frames else "")
    if isinstance(error, BaseExceptionGroup):
        text += " {" + "; ".join(fold_traceback(inner) for inner in error.exceptions) + "}"
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return text + (f" <- {fold_traceback(cause)}" if cause is not None else "")


def _fields(record: logging.LogRecord) -> dict[str, object]:
    """What the caller and the context added to a record."""
    extra = {name: value for name, value in vars(record).items() if name not in _STANDARD_ATTRIBUTES}
    return dict(list({**_context.get({}), **extra}.items())[:MAX_FIELDS])


def _message(record: logging.LogRecord) -> str:
    try:
        text = record.getMessage()
    except (TypeError, ValueError):  # a placeholder and its argument disagree: a bug that must not end the daemon
        text = f"{record.msg} (its arguments do not fit)"
    suppressed = getattr(record, "suppressed", 0)
    return text + (f" ({suppressed} more like this suppressed)" if suppressed else "")


class TextFormatter(logging.Formatter):
    """For people: `[time] [level] message key=value`."""

    def __init__(self, form: Form, *, colour: bool = False) -> None:
        super().__init__()
        self._form = form
        self._colour = colour

    def format(self, record: logging.LogRecord) -> str:
        """One line without its end."""
        parts = [_message(record)]
        if not getattr(record, "said", False):
            parts += [f"{name}={_quoted(value)}" for name, value in _fields(record).items() if name != "event"]
        if record.exc_info and record.exc_info[1] is not None:
            parts.append("| " + fold_traceback(record.exc_info[1]))
        return self._head(record) + one_line(" ".join(parts))

    def _head(self, record: logging.LogRecord) -> str:
        level = record.levelname.lower()
        if self._form == "journal":
            return f"<{next((number for least, number in _PRIORITIES if record.levelno >= least), 7)}>"
        if self._form == "terminal":
            clock = time.strftime("%H:%M:%S", time.localtime(record.created))
            if record.levelno == logging.INFO:
                return f"{clock} "
            colour = _COLOURS.get(level, "") if self._colour else ""
            return f"{clock} {colour}{level}:{chr(27) + '[0m' if colour else ''} "
        return f"{_utc(record.created)} {level}: "


class JsonFormatter(logging.Formatter):
    """For machines: one JSON object with time, level, logger, message, the fields, and error where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """One line without its end."""
        event: dict[str, object] = {
            "time": _utc(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": one_line(_message(record)),
        }
        for name, value in _fields(record).items():
            plain = value is None or isinstance(value, (bool, int, float))
            event.setdefault(name, value if plain else one_line(str(value), MAX_FIELD_CHARS))
        if record.exc_info and record.exc_info[1] is not None:
            event["error"] = one_line(fold_traceback(record.exc_info[1]))
        return json.dumps(event, ensure_ascii=True, separators=(",", ":"))


def _quoted(value: object) -> str:
    text = one_line(str(value), MAX_FIELD_CHARS)
    return text if text and not set(text) & {" ", '"', "="} else '"' + text.replace('"', '\\"') + '"'


def _utc(created: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(created)) + f".{int(created % 1 * 1000):03d}Z"


class RateLimit(logging.Filter):
    """Lets `RATE_PER_S` records of one place (or `extra={"rate_key": ...}`) pass in each second.

    The first one after a pause carries the number of those that did not pass.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._places: OrderedDict[object, tuple[float, int]] = OrderedDict()  # place -> (start of its second, count)
        self.suppressed = 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record passes."""
        place = getattr(record, "rate_key", None) or (record.pathname, record.lineno)
        now = self._clock()
        start, count = self._places.get(place, (now, 0))
        if now - start >= 1.0:
            if count > RATE_PER_S:
                record.suppressed = count - RATE_PER_S
            start, count = now, 0
        self._places[place] = (start, count + 1)
        self._places.move_to_end(place)
        if len(self._places) > RATE_PLACES:
            self._places.popitem(last=False)
        if count >= RATE_PER_S:
            self.suppressed += 1
            return False
        return True


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the log: its number since the start, wall clock (Unix seconds), level, text without time and level."""

    number: int
    wall: float
    level: int
    text: str


class Ring(logging.Handler):
    """The last lines, for whoever asks the daemon. Any thread may log, and any may ask."""

    def __init__(self, lines: int = RING_LINES) -> None:
        super().__init__()
        self._lines: deque[Line] = deque(maxlen=lines)
        self._formatter = TextFormatter("journal")
        self.last = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the record's line. `handle` holds the lock meanwhile."""
        line = self._formatter.format(record).partition(">")[2]
        self.last += 1
        self._lines.append(Line(self.last, record.created, record.levelno, line))

    def after(self, number: int, level: int = logging.NOTSET) -> list[Line]:
        """The lines kept behind this number, oldest first, of this level and above."""
        assert self.lock is not None, "logging makes one for each handler"
        with self.lock:
            return [line for line in self._lines if line.number > number and line.level >= level]


class LineWriter:
    """A bounded queue and the thread that writes it to a descriptor. `put` never waits and never fails.

    The descriptor stays the caller's. Lines that could not be written (full queue, closed pipe) are `dropped`.
    """

    def __init__(self, descriptor: int, *, lines: int = QUEUE_LINES, size: int = QUEUE_BYTES) -> None:
        self._descriptor = descriptor
        self._most_lines = lines
        self._most_bytes = size
        self._queue: deque[bytes] = deque()
        self._bytes = 0
        self._changed = threading.Condition()
        self._closing = False
        self._writing = False
        self.dropped = 0
        self._said = 0
        # A daemon thread: a reader that never reads again must not keep the process alive.
        self._thread = threading.Thread(target=self._run, name="ngrokd-log", daemon=True)
        self._thread.start()

    def put(self, line: bytes) -> None:
        """Queue one line, with its end."""
        with self._changed:
            if self._closing or len(self._queue) >= self._most_lines or self._bytes + len(line) > self._most_bytes:
                self.dropped += 1
                return
            self._queue.append(line)
            self._bytes += len(line)
            self._changed.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything queued is written; whether it was in time."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue and not self._writing, timeout_s)

    def close(self, timeout_s: float = 1.0) -> None:
        """Write what can be written in that time, and stop."""
        self.flush(timeout_s)
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_s if not self._queue else 0.0)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._writing = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._queue or self._closing)
                if not self._queue:
                    return
                batch = self._take_batch()
                self._writing = True
            self._write(b"".join(batch), len(batch))

    def _take_batch(self) -> list[bytes]:
        batch: list[bytes] = []
        size = 0
        while self._queue and size < 65536:
            line = self._queue.popleft()
            batch.append(line)
            size += len(line)
        self._bytes -= size
        missed = self.dropped - self._said
        if missed:
            self._said = self.dropped
            batch.append(f"({missed} log lines were lost here: stderr was not read)\n".encode())
        return batch

    def _write(self, data: bytes, lines: int) -> None:
        while data:
            try:
                data = data[os.write(self._descriptor, data) :]
            except BlockingIOError:  # somebody who shares the terminal made it non-blocking
                poll = select.poll()
                poll.register(self._descriptor, select.POLLOUT)
                poll.poll(1000)
            except OSError:  # a closed pipe, a full disk: there is nobody to tell
                with self._changed:
                    self.dropped += lines
                    self._said += lines
                return


class _QueueHandler(logging.Handler):
    """Formats where the record is made, and queues."""

    def __init__(self, writer: LineWriter) -> None:
        super().__init__()
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        self._writer.put(line.encode("utf-8", "backslashreplace") + b"\n")


class Log:
    """The installed log. A context manager: leaving it flushes and takes the handlers away again.

    Attributes:
        ring: the last lines.
        level: what is logged now.
    """

    def __init__(
        self, level: str = "info", form: str = "auto", *, descriptor: int = 2, environ: Mapping[str, str] | None = None
    ) -> None:
        self._descriptor = descriptor
        self._environ = os.environ if environ is None else environ
        self.ring = Ring()
        self._limit = RateLimit()
        self._writer = LineWriter(descriptor)
        self._handler = _QueueHandler(self._writer)
        # One filter for both: a record counts once, so the filter must not sit on each handler.
        self._root = logging.getLogger("ngrokd")
        self._tun = logging.getLogger("tun")
        self.level = level
        self.set_format(form)
        self.set_level(level)
        self._fan = _Fan(self._limit, (self._handler, self.ring))
        self._loggers = (self._root, self._tun, logging.getLogger("py.warnings"), logging.getLogger("pyroute2"))
        for logger in self._loggers:
            logger.addHandler(self._fan)
            logger.propagate = False

    def set_level(self, level: str) -> None:
        """debug, info, warning or error, from now on."""
        self.level = level
        self._root.setLevel(level.upper())
        self._tun.setLevel(level.upper())

    def set_format(self, form: str) -> None:
        """auto, text or json, from now on."""
        self._handler.setFormatter(make_formatter(form, self._descriptor, self._environ))

    @property
    def dropped(self) -> int:
        """Lines that nobody read in time."""
        return self._writer.dropped

    @property
    def suppressed(self) -> int:
        """Lines that repeated too fast."""
        return self._limit.suppressed

    def flush(self, timeout_s: float = 1.0) -> None:
        """Wait until everything said is written, or the time is over."""
        self._writer.flush(timeout_s)

    def close(self) -> None:
        """Flush and uninstall."""
        for logger in self._loggers:
            logger.removeHandler(self._fan)
            logger.propagate = True
        self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _Fan(logging.Handler):
    """Passes each record that the limit lets through to several handlers."""

    def __init__(self, limit: RateLimit, handlers: tuple[logging.Handler, ...]) -> None:
        super().__init__()
        self.addFilter(limit)
        self._handlers = handlers

    def emit(self, record: logging.LogRecord) -> None:
        for handler in self._handlers:
            handler.handle(record)


def make_formatter(form: str, descriptor: int, environ: Mapping[str, str]) -> logging.Formatter:
    """The formatter for `log.format` and for what the descriptor is."""
    if form == "json":
        return JsonFormatter()
    if is_journal(descriptor, environ):
        return TextFormatter("journal")
    if os.isatty(descriptor):
        return TextFormatter("terminal", colour=not environ.get("NO_COLOR") and environ.get("TERM") != "dumb")
    return TextFormatter("plain") if form == "text" else JsonFormatter()


def is_journal(descriptor: int, environ: Mapping[str, str]) -> bool:
    """Whether the descriptor is the journal's stream (systemd.exec(5), JOURNAL_STREAM: device and inode)."""
    try:
        status = os.fstat(descriptor)
    except OSError:
        return False
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def stderr_descriptor() -> int:
    """The descriptor behind sys.stderr, or 2."""
    try:
        return sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        return 2
