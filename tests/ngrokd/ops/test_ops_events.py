"""Events: numbered, kept, promised in the docs."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from ngrokd.log import Log
from ngrokd.ops.events import KINDS, Event, Events, markdown

ROOT = Path(__file__).parents[3]


def make_events(**keywords: int) -> Events:
    return Events(lambda: 1_763_632_800.5, **keywords)


def test_events_are_numbered_from_one() -> None:
    events = make_events()
    events.emit("daemon.resumed")
    events.emit("api.failed", "no answer", reason="no answer")

    assert events.last == 2
    assert [(event.number, event.name) for event in events.after(0)] == [(1, "daemon.resumed"), (2, "api.failed")]
    assert events.after(2) == []
    assert events.after(99) == []


def test_who_reads_too_slowly_sees_a_gap() -> None:
    """The oldest go first, and the numbers tell."""
    events = make_events(kept=3)
    for _ in range(10):
        events.emit("daemon.resumed")

    assert [event.number for event in events.after(2)] == [8, 9, 10]
    assert [event.number for event in events.after(8, 1)] == [9]


def test_an_event_is_one_line_of_json() -> None:
    event = Event(7, 1_763_632_800.25, "flow.refused", "no\nway", {"flow": 3, "endpoint": "a.b:80"})

    line = event.to_json()

    assert line.count(b"\n") == 1
    assert json.loads(line) == {
        "seq": 7,
        "time": "2025-11-20T10:00:00.250Z",
        "event": "flow.refused",
        "level": "warning",
        "message": "no\\nway",
        "flow": 3,
        "endpoint": "a.b:80",
    }


def test_a_name_or_field_that_was_not_promised_is_a_bug() -> None:
    events = make_events()

    with pytest.raises(KeyError):
        events.emit("flow.exploded")
    with pytest.raises(AssertionError, match="reason"):
        events.emit("api.failed", "no answer")


def test_each_event_is_a_line_of_the_log_at_its_level(tmp_path: Path) -> None:
    """With its name and fields, for machines; what is below the level is kept all the same."""
    events = make_events()
    with (tmp_path / "log").open("wb") as file, Log("info", "json", descriptor=file.fileno(), environ={}):
        events.emit("flow.gave_up", "gone", flow=1, endpoint="a:1", source="b:2", reason="gave_up", dial_ms=1.5)
        events.emit("flow.notice", "hello", flow=2, endpoint="a:1", source="b:2")

    [line] = (tmp_path / "log").read_text().splitlines()
    record = json.loads(line)
    assert (record["event"], record["flow"], record["message"], record["level"]) == ("flow.notice", 2, "hello", "info")
    assert events.last == 2


def test_every_kind_can_be_logged() -> None:
    """No field has a name that the log keeps for itself."""
    events = make_events()
    logging.getLogger("ngrokd").setLevel(logging.DEBUG)
    try:
        for name, kind in KINDS.items():
            events.emit(name, "x", **dict.fromkeys(kind.fields, 1))
            fields = set(json.loads(events.after(events.last - 1)[0].to_json()))
            assert fields == {"seq", "time", "event", "level", "message", *kind.fields}
    finally:
        logging.getLogger("ngrokd").setLevel(logging.NOTSET)


def test_the_docs_have_the_table() -> None:
    """docs/events.md is the promise. To write it anew: python -m ngrokd.ops.events"""
    text = (ROOT / "docs/events.md").read_text()

    assert "\n".join(markdown()) in text
