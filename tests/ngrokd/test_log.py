"""The log: one event is one line, whatever is in it, and a blocked reader costs lines and no time."""

from __future__ import annotations

import json
import logging
import os
import pty
import re
import select
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngrokd import log as logs
from ngrokd.log import JsonFormatter, LineWriter, Log, RateLimit, TextFormatter, fold_traceback, one_line

HOSTILE = "a\nb\r\x1b[2J\x00\x9b\u2028\u202e\ud800"


@dataclass
class Pipe:
    """What a reader of stderr gets."""

    reading: int
    writing: int

    def text(self) -> str:
        """What is there now."""
        data = b""
        while select.select([self.reading], [], [], 0)[0]:
            piece = os.read(self.reading, 1 << 20)
            if not piece:
                break
            data += piece
        return data.decode()

    def stop_reading(self) -> None:
        os.close(self.reading)
        self.reading = -1


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    reading, writing = os.pipe()
    pipe = Pipe(reading, writing)
    yield pipe
    with suppress(OSError):
        os.close(pipe.reading)
    # A writer that was blocked gets an error now and ends. Before that its descriptor's number must not be free: the
    # next test would have it, and read what was meant for this one.
    for thread in threading.enumerate():
        if thread.name == "ngrokd-log":
            thread.join(5)
    with suppress(OSError):
        os.close(writing)


@contextmanager
def installed(
    pipe: Pipe, level: str = "info", form: str = "text", **environ: str
) -> Iterator[tuple[logging.Logger, Log]]:
    with Log(level, form, descriptor=pipe.writing, environ=environ) as log:
        yield logging.getLogger("ngrokd.test"), log


class Unprintable:
    """Its text cannot be had."""

    def __str__(self) -> str:
        raise ValueError("no text")


def record(message: str, *arguments: object, **extra: object) -> logging.LogRecord:
    made = logging.getLogger("ngrokd.x").makeRecord(
        "ngrokd.x", logging.WARNING, "/src/x.py", 7, message, arguments, None, extra=extra
    )
    made.created = 1_763_632_800.25
    return made


# Form


def test_a_line_on_a_pipe_has_the_time_in_utc_and_the_level(pipe: Pipe) -> None:
    """Files and container logs have no other clock."""
    with installed(pipe) as (log, _):
        log.info("hello %s", "world", extra={"endpoint": "http://a.prod", "count": 3, "note": 'two "words"'})

    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z info: "
        r'hello world endpoint=http://a.prod count=3 note="two \\"words\\""\n',
        pipe.text(),
    )


def test_a_terminal_gets_the_local_time_and_colour_only_where_something_is_wrong() -> None:
    """Calm when all is well."""
    formatter = TextFormatter("terminal", colour=True)
    info = record("fine")
    info.levelno, info.levelname = logging.INFO, "INFO"

    assert re.fullmatch(r"\d\d:\d\d:\d\d fine", formatter.format(info))
    assert re.fullmatch(r"\d\d:\d\d:\d\d \x1b\[33mwarning:\x1b\[0m careful", formatter.format(record("careful")))
    assert "\x1b" not in TextFormatter("terminal").format(record("careful"))


@pytest.mark.parametrize(("environ", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
def test_colour_is_for_terminals_that_want_it(environ: Mapping[str, str], coloured: bool) -> None:
    """https://no-color.org."""
    leader, follower = pty.openpty()
    try:
        line = logs.make_formatter("auto", follower, environ).format(record("careful"))
    finally:
        os.close(leader)
        os.close(follower)

    assert ("\x1b[33m" in line) is coloured


def test_where_nobody_reads_along_each_line_is_json(pipe: Pipe) -> None:
    """A pipe or a file is read by machines, unless text is asked for; events have their name there."""
    with installed(pipe, form="auto") as (log, _):
        log.info("connected", extra={"event": "flow.opened", "flow": 7})

    line = json.loads(pipe.text())
    assert (line["message"], line["event"], line["flow"], line["level"]) == ("connected", "flow.opened", 7, "info")


def test_people_do_not_read_the_names_of_events(pipe: Pipe) -> None:
    """The message says it in words."""
    with installed(pipe) as (log, _):
        log.info("connected", extra={"event": "flow.opened", "flow": 7})

    assert pipe.text().endswith(" info: connected flow=7\n")


def test_under_the_journal_a_line_has_its_priority_and_no_time(pipe: Pipe) -> None:
    """systemd passes the stream's device and inode; a stderr that was redirected since does not match."""
    status = os.fstat(pipe.writing)

    with installed(pipe, JOURNAL_STREAM=f"{status.st_dev}:{status.st_ino}", level="debug") as (log, _):
        log.debug("d")
        log.info("i")
        log.warning("w")
        log.error("e")
    with installed(pipe, JOURNAL_STREAM=f"{status.st_dev}:1") as (log, _):
        log.info("elsewhere")

    lines = pipe.text().splitlines()
    assert lines[:4] == ["<7>d", "<6>i", "<4>w", "<3>e"]
    assert lines[4].endswith("Z info: elsewhere")


def test_json_is_one_object_in_a_line(pipe: Pipe) -> None:
    """Numbers stay numbers; a field cannot replace one of ours."""
    with installed(pipe, form="json") as (log, _):
        log.warning("refused %s", "x", extra={"endpoint": "http://a.prod", "flows": 3, "ok": None, "level": "fake"})

    event = json.loads(pipe.text())
    assert event.pop("time").endswith("Z")
    assert event == {
        "level": "warning",
        "logger": "ngrokd.test",
        "message": "refused x",
        "endpoint": "http://a.prod",
        "flows": 3,
        "ok": None,
    }


def test_context_adds_its_fields_to_what_is_said_inside(pipe: Pipe) -> None:
    """And takes them away again."""
    with installed(pipe) as (log, _):
        with logs.context(flow=7), logs.context(endpoint="a"):
            log.info("in")
        log.info("out")

    inside, outside = pipe.text().splitlines()
    assert inside.endswith("info: in flow=7 endpoint=a")
    assert outside.endswith("info: out")


# One event, one line


@pytest.mark.parametrize("form", ["text", "json"])
def test_foreign_text_makes_no_line_and_moves_no_cursor(pipe: Pipe, form: str) -> None:
    """In the message, in a field, in an exception."""
    with installed(pipe, form=form) as (log, _):
        log.info("got %s", HOSTILE, extra={"name_": HOSTILE})
        try:
            raise ValueError(HOSTILE)
        except ValueError:
            log.exception("failed")

    text = pipe.text()
    assert text.count("\n") == 2
    assert text.replace("\n", "").isprintable()


@given(st.text(), st.integers(3, 50))
def test_a_line_is_printable_and_bounded(text: str, limit: int) -> None:
    """For any text."""
    shown = one_line(text, limit)

    assert len(shown) <= limit
    assert shown.isprintable()


@pytest.mark.parametrize("formatter", [TextFormatter("plain"), JsonFormatter()])
def test_a_line_has_an_end(formatter: logging.Formatter) -> None:
    """A megabyte in a message, or in a hundred fields, is some KiB in the log."""
    fields: dict[str, object] = {f"field{number}": "y" * 10_000 for number in range(100)}

    assert len(formatter.format(record("x" * 1_000_000))) < 8 << 10
    assert len(formatter.format(record("m", **fields))) < 64 << 10


def test_a_traceback_is_folded_into_the_line_without_values(pipe: Pipe) -> None:
    """Where, not what: a variable may hold a key."""

    def inner(key: str) -> None:
        raise ExceptionGroup("two", [ValueError("one\n"), OSError(5, "gone")])

    with installed(pipe) as (log, _):
        try:
            inner("CANARY")
        except ExceptionGroup:
            log.exception("broke")

    [line] = pipe.text().splitlines()
    assert re.search(
        r"error: broke \| ExceptionGroup: two \(2 sub-exceptions\) "
        r"\[test_log\.py:\d+ test_a_traceback\w+ > test_log\.py:\d+ inner\] "
        r"\{ValueError: one\\n; OSError: \[Errno 5\] gone\}$",
        line,
    )
    assert "CANARY" not in line


def test_the_cause_of_an_error_is_told() -> None:
    """What was raised from what."""
    try:
        try:
            raise KeyError("k")
        except KeyError as error:
            raise ValueError("v") from error
    except ValueError as error:
        text = fold_traceback(error)

    assert re.fullmatch(r"ValueError: v \[.*\] <- KeyError: 'k' \[.*\]", text)


@pytest.mark.parametrize(("message", "argument"), [("%d flows", "x"), ("100% of %s %s", "x"), ("%s", Unprintable())])
def test_a_wrong_placeholder_costs_the_line_its_arguments_and_nothing_more(
    pipe: Pipe, message: str, argument: object
) -> None:
    """The rarest lines are the least tried ones, and the daemon must outlive them."""
    with installed(pipe) as (log, _):
        log.warning(message, argument)

    assert pipe.text().endswith(f"warning: {message} (its arguments do not fit)\n")


# A reader that does not read


def test_a_blocked_stderr_costs_lines_and_no_time(pipe: Pipe) -> None:
    """The pipe is full and nobody reads: 20,000 lines are said in no time, most are counted as lost."""
    with installed(pipe) as (log, control):
        start = time.monotonic()
        for number in range(20_000):
            log.info("x" * 500, extra={"rate_key": number})
        took = time.monotonic() - start
        assert took < 10.0, "the writer is not waited for"
        assert control.dropped > 5_000
        while not control._writer.flush(0.05):  # the reader comes back
            pipe.text()
        log.info("after")
        control.flush()
        rest = pipe.text()

    assert "log lines were lost here: stderr was not read" in rest or control.dropped > 0
    assert rest.splitlines()[-1].endswith("after")


def test_what_was_lost_is_said_when_there_is_room_again(pipe: Pipe) -> None:
    """A gap in the log must be visible in the log."""
    writer = LineWriter(pipe.writing, lines=3)
    big = b"x" * 60_000 + b"\n"
    for _ in range(20):
        writer.put(big)
    dropped = writer.dropped

    data = ""
    while not writer.flush(0.05):
        data += pipe.text()
    writer.put(b"after\n")
    writer.flush(1)
    data += pipe.text()
    writer.close()

    assert dropped > 0
    assert sum(int(found) for found in re.findall(r"\((\d+) log lines were lost here", data)) == dropped


def test_a_reader_that_has_gone_ends_nothing(pipe: Pipe) -> None:
    """EPIPE: there is nobody to tell."""
    with installed(pipe) as (log, control):
        pipe.stop_reading()
        log.info("into the void")
        control.flush()

        assert control.dropped == 1


def test_a_non_blocking_stderr_is_waited_for_in_the_thread(pipe: Pipe) -> None:
    """A terminal shared with a program that made it so loses nothing."""
    os.set_blocking(pipe.writing, False)
    writer = LineWriter(pipe.writing)
    for _ in range(50):
        writer.put(b"x" * 9_999 + b"\n")

    data = ""
    while not writer.flush(0.02):
        data += pipe.text()
    data += pipe.text()
    writer.close()

    assert len(data) == 500_000
    assert writer.dropped == 0


def test_closing_does_not_wait_for_a_reader_that_never_reads(pipe: Pipe) -> None:
    """SIGTERM must end the process."""
    writer = LineWriter(pipe.writing)
    for _ in range(50):
        writer.put(b"x" * 9_999 + b"\n")

    start = time.monotonic()
    writer.close(0.1)

    assert time.monotonic() - start < 5.0


# Repetition


def test_a_place_that_repeats_is_limited_and_says_by_how_much() -> None:
    """Ten in a second pass; the first of a later second carries the number of the others."""
    now = 100.0
    limit = RateLimit(lambda: now)

    passed = sum(bool(limit.filter(record("again"))) for _ in range(1000))
    now = 101.5
    later = record("again")

    assert passed == 10
    assert limit.filter(later)
    assert TextFormatter("journal").format(later) == "<4>again (990 more like this suppressed)"
    assert limit.suppressed == 990


def test_other_places_and_keys_have_limits_of_their_own() -> None:
    """One noisy endpoint does not silence the next."""
    limit = RateLimit(lambda: 0.0)
    for number in range(100):
        limit.filter(record("x", rate_key=f"k{number % 2}"))

    other = record("x")
    other.lineno = 8

    assert limit.filter(other)
    assert limit.suppressed == 80


def test_the_places_remembered_are_bounded() -> None:
    """A key made of foreign text must not grow without end."""
    limit = RateLimit(lambda: 0.0)

    for number in range(5000):
        assert limit.filter(record("x", rate_key=number))

    assert len(limit._places) == logs.RATE_PLACES


# The rest


def test_level_and_form_change_at_run_time(pipe: Pipe) -> None:
    """SIGHUP takes both over."""
    with installed(pipe, level="warning") as (log, control):
        log.info("unheard")
        control.set_level("debug")
        control.set_format("json")
        log.debug("heard")

    assert json.loads(pipe.text())["message"] == "heard"


def test_the_last_lines_are_kept(pipe: Pipe) -> None:
    """For whoever asks the daemon later: time, level, and the line as it was."""
    with installed(pipe) as (log, control):
        for number in range(logs.RING_LINES + 5):
            log.info("line %d", number, extra={"rate_key": number})
        log.warning("trouble", extra={"endpoint": "a"})

        kept = control.ring.after(0)

    assert len(kept) == logs.RING_LINES
    assert (kept[-1].level, kept[-1].text) == (logging.WARNING, "trouble endpoint=a")
    assert control.ring.after(0, logging.WARNING) == kept[-1:]
    assert control.ring.after(kept[-3].number) == kept[-2:]
    assert control.ring.last == kept[-1].number == logs.RING_LINES + 6


def test_leaving_takes_the_handlers_away(pipe: Pipe) -> None:
    """Two daemons in one test process do not speak through each other."""
    with installed(pipe):
        pass

    assert logging.getLogger("ngrokd").handlers == []
    logging.getLogger("ngrokd.test").warning("unheard")
    assert pipe.text() == ""
