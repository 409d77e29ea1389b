"""The page at /metrics, and that dashboard and alerts ask for nothing that is not on it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from ngrokd.daemon.figures import ProcessFigures, Situation, families
from ngrokd.metrics import Distribution, Family, Histogram, render

CONF: Final = Path(__file__).parents[3] / "conf"
DASHBOARD: Final = CONF / "grafana-dashboard.json"
ALERTS: Final = CONF / "alerts.yml"
LABELS_OF_TARGETS: Final = {"instance", "job", "le", "severity"}


def make_situation(**changes: Any) -> Situation:
    """A daemon that has seen everything once, so that every label is there."""
    dials = Histogram()
    dials.observe(0.02)
    counters = {
        **dials.flat("pool.dial_seconds"),
        "relay.requests": 9,
        "relay.accepted": 5,
        "relay.reason.binding_refused": 2,
        "relay.bytes_from_app": 10**12,
        "drops.checksum": 1,
        "device.full": 2,
        "pool.dials": 3,
        "pool.failed_ingress_untrusted": 1,
    }
    values: dict[str, Any] = {
        "version": "0.1.0",
        "python": "3.11.7",
        "started_at": 1_763_632_800.5,
        "conditions": {"tun": True, "ingress": False},
        "paused": False,
        "endpoints": {"online": 1, "degraded": 0, "unknown": 2},
        "skipped": 1,
        "without_address": 0,
        "counters": counters,
        "pool_target": 2,
        "by_endpoint": {'we"ird\\:80': (3, 1), "other": (1, 0)},
        "polls": {"ok": 7, "failed": 1, "refused": 0},
        "polled_at": 1_763_632_900.0,
        "certificate_expires_at": 1_766_632_900.0,
        "loop_delay": Distribution((0.001, 1.0), (4, 1, 0), 0.01),
        "restarts": {"device": 1},
        "control": {"requests": 4, "refused": 1},
        "web": {"requests": 2, "misdirected": 1},
        "log_lost": 1,
        "log_suppressed": 2,
        "process": ProcessFigures(1.5, 60 << 20, 30, 1024),
    }
    return Situation(**(values | changes))


def page(**changes: Any) -> list[Family]:
    return list(families(make_situation(**changes)))


def test_names_and_units_follow_the_conventions() -> None:
    """https://prometheus.io/docs/practices/naming/: a prefix, base units, _total for what only grows."""
    for family in page():
        assert re.fullmatch(r"(ngrokd|process)_[a-z_]+", family.name), family.name
        assert (family.kind == "counter") is family.name.endswith("_total"), family.name
        assert not re.search(r"_(ms|milliseconds|us|kb|mb|percent)(_|$)", family.name), family.name
        assert family.help.endswith("."), family.name
        assert (family.kind == "histogram") is any(isinstance(value, Distribution) for _, value in family.samples)


def test_each_family_is_there_once_and_from_the_start() -> None:
    """A dashboard must not depend on what has happened."""
    names = [family.name for family in page()]
    at_start = [family.name for family in page(counters={}, by_endpoint={}, control={}, web={})]

    assert len(set(names)) == len(names)
    assert at_start == names


def test_numbers_are_where_they_belong() -> None:
    text = render(page())

    for line in (
        'ngrokd_condition{condition="ingress"} 0',
        "ngrokd_ready 0",
        'ngrokd_flow_bytes_total{direction="from_app"} 1000000000000',
        'ngrokd_flow_failures_total{reason="binding_refused"} 2',
        'ngrokd_dials_total{result="ok"} 3',
        'ngrokd_dials_total{result="ingress_untrusted"} 1',
        'ngrokd_packets_dropped_total{reason="checksum"} 1',
        'ngrokd_endpoint_flows_opened_total{endpoint="we\\"ird\\\\:80"} 3',
        "ngrokd_dial_duration_seconds_count 1",
        'ngrokd_dial_duration_seconds_bucket{le="0.025"} 1',
        'ngrokd_api_polls_total{result="ok"} 7',
        'ngrokd_control_rejections_total{reason="refused"} 1',
    ):
        assert line in text.splitlines(), line
    assert "ngrokd_ready 1" in render(page(conditions={"tun": True}))
    assert "process_open_fds" not in render(page(process=ProcessFigures()))
    assert "ngrokd_certificate_expiry_timestamp_seconds 0.0" in render(page(certificate_expires_at=float("inf")))


def known() -> dict[str, set[str]]:
    """Each name that a query may ask for, and its labels."""
    found: dict[str, set[str]] = {}
    for family in page():
        labels = {label for labels, _ in family.samples for label in labels}
        names = [f"{family.name}_{part}" for part in ("bucket", "sum", "count")]
        found |= dict.fromkeys(names if family.kind == "histogram" else [family.name], labels)
    return found


def queries() -> Iterator[tuple[str, str]]:
    """Where it stands, and the query."""
    dashboard = json.loads(DASHBOARD.read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            yield f"dashboard: {panel['title']}", target["expr"]
    text = ALERTS.read_text()
    rules = re.findall(r"- alert: (\w+)\n +expr: (?:\|\n((?: {10}.*\n)+)|(.*)\n)", text)
    assert len(rules) == text.count("- alert:")
    for name, block, line in rules:
        yield f"alert: {name}", block or line


def test_dashboard_and_alerts_ask_only_for_what_there_is() -> None:
    """Names, and the labels they are selected by."""
    names = known()
    wrong = []
    asked: set[str] = set()
    for where, query in queries():
        for name, selector in re.findall(r"\b((?:ngrokd|process)_[a-z_]+)(\{[^}]*\})?", query):
            asked.add(name)
            if name not in names:
                wrong.append((where, name))
                continue
            labels = set(re.findall(r'(\w+)\s*(?:=~|!~|!=|=)\s*"', selector))
            wrong += [(where, f"{name}{{{label}}}") for label in labels - names[name] - LABELS_OF_TARGETS]

    assert wrong == []
    assert len(asked) > 25


def test_what_alerts_and_legends_quote_are_labels() -> None:
    every = set().union(*known().values()) | LABELS_OF_TARGETS
    quoted = set(re.findall(r"\$labels\.(\w+)", ALERTS.read_text()))
    quoted |= set(re.findall(r"\{\{(\w+)\}\}", DASHBOARD.read_text()))

    assert quoted <= every


def test_the_dashboard_is_one() -> None:
    """Every panel has its place, its unit and a data source that can be chosen."""
    dashboard = json.loads(DASHBOARD.read_text())
    panels = dashboard["panels"]

    assert dashboard["uid"] == "ngrokd"
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [(x, y) for panel in panels for x, y in cells_of(panel["gridPos"])]
    assert len(set(cells)) == len(cells), "two panels overlap"
    for panel in panels:
        assert panel["title"]
        assert panel["type"] == "row" or panel["datasource"]["uid"] == "${datasource}"


def cells_of(place: dict[str, int]) -> Iterator[tuple[int, int]]:
    assert place["x"] + place["w"] <= 24
    for x in range(place["x"], place["x"] + place["w"]):
        for y in range(place["y"], place["y"] + place["h"]):
            yield x, y


@pytest.fixture
def promtool() -> str:
    """Prometheus' own judge; CI has it."""
    found = shutil.which("promtool")
    if found is None:
        assert os.environ.get("CI") != "true", ".ci/run fetches promtool"
        pytest.skip("promtool is not here (Debian: in the package prometheus)")
    return found


@pytest.mark.parametrize("changes", [{}, {"counters": {}, "by_endpoint": {}}], ids=["busy", "fresh"])
def test_prometheus_accepts_the_page(promtool: str, changes: dict[str, Any]) -> None:
    """Without a word of criticism."""
    done = subprocess.run(
        [promtool, "check", "metrics"], input=render(page(**changes)), text=True, capture_output=True, check=False
    )

    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_prometheus_accepts_the_alerts(promtool: str) -> None:
    done = subprocess.run([promtool, "check", "rules", ALERTS], text=True, capture_output=True, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
