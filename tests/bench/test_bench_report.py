"""The benchmark's own arithmetic: a wrong ratio would convince of something false."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from bench import report
from bench.cases import CASES, Results, cost, ratio
from bench.chart import Bar, Group, chart
from bench.report import markdown, record, replace_part, table
from bench.stage import read_hosts, to_toml

RUN = {
    "commit": "0123456789ab",
    "command": "bench/bench_path.py",
    "load_before": 0.1,
    "rounds": 3,
    "seconds": 2.0,
    "machine": "a machine",
    "kernel": "Linux",
    "software": "CPython",
}


def rounds(figure: str, *values: float, **more: Any) -> list[dict[str, Any]]:
    return [{figure: value, "failures": 0, "cpu_s": 1.0, **more} for value in values]


def test_a_ratio_above_one_means_that_the_daemon_is_ahead() -> None:
    """Whether more or less is better; a table of both must be readable at a glance."""
    assert ratio(CASES["up"], rounds("gbit_s", 20.0), rounds("gbit_s", 10.0)) == 2.0
    assert ratio(CASES["connect"], rounds("p50_us", 500.0), rounds("p50_us", 1000.0)) == 2.0


def test_a_ratio_is_the_median_of_the_rounds_ratios() -> None:
    """When the machine is slow in one round, it is slow for both, and that round's ratio still counts."""
    ours, theirs = rounds("gbit_s", 10.0, 2.0, 12.0), rounds("gbit_s", 10.0, 1.0, 10.0)
    assert ratio(CASES["up"], ours, theirs) == 1.2


def test_a_round_in_which_nothing_came_through_has_no_ratio() -> None:
    """It is told as failures; a ratio of zero or infinity would hide the other rounds."""
    assert ratio(CASES["up"], rounds("gbit_s", 0.0, 3.0, 3.0), rounds("gbit_s", 1.0, 1.0, 1.0)) == 3.0
    assert ratio(CASES["up"], rounds("gbit_s", 0.0), rounds("gbit_s", 1.0)) == 0.0


def test_cpu_is_told_per_gigabyte_or_per_thousand_requests() -> None:
    """All rounds together: their quantum of 10 ms is coarse."""
    assert cost(rounds("gbit_s", 1.0, 1.0, bytes=4_000_000_000)) == (0.25, "s/GB")
    assert cost(rounds("rate", 1.0, 1.0, total=4_000)) == (0.25, "s/1000")


def test_a_part_of_the_results_is_replaced_and_others_stay() -> None:
    """Several programs write into one file."""
    text = replace_part("# Results\n", "one", "first")
    text = replace_part(text, "two", "second")
    text = replace_part(text, "one", "new")
    assert text == (
        "# Results\n\n<!-- begin one -->\nnew\n<!-- end one -->\n\n<!-- begin two -->\nsecond\n<!-- end two -->\n"
    )


def test_failures_stand_in_every_table() -> None:
    """A fast daemon that drops connections is not fast."""
    broken = [{"rate": 5.0, "failures": 3, "failure": "connection reset", "cpu_s": 1.0, "total": 10}]
    results: Results = {"burst": {"ngrokd": broken, "forwarder": rounds("rate", 5.0, total=10)}}
    assert any("connection reset" in line for line in table(results))
    shown = markdown({"new": {"run": RUN, "results": results}})
    assert "| 32 at once, rate: failures |  | 3 | 0 |" in shown
    assert "Nothing failed" not in shown


def test_a_run_replaces_only_the_families_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long benchmark can be repeated in parts."""
    for name, path in {"RESULTS": "RESULTS.md", "NUMBERS": "results.json", "CHARTS": "charts"}.items():
        monkeypatch.setattr(report, name, tmp_path / path)
    bulk: Results = {"up": {"ngrokd": rounds("gbit_s", 4.0, bytes=1), "forwarder": rounds("gbit_s", 2.0, bytes=1)}}
    record(RUN, bulk, {"memory_mib": {"ngrokd": [30.0]}})
    slower: Results = {"up": {"ngrokd": rounds("gbit_s", 1.0, bytes=1), "forwarder": rounds("gbit_s", 2.0, bytes=1)}}
    record(RUN, slower, None)
    text = (tmp_path / "RESULTS.md").read_text()
    assert "**0.50**" in text
    assert "**2.00**" not in text
    assert "| memory, without connections | MiB | 30 |" in text
    assert {path.name for path in (tmp_path / "charts").iterdir()} == {"bulk.svg", "rest.svg"}


def test_a_chart_is_readable_on_light_and_dark_pages() -> None:
    """Its background is the page's, so text needs a color for each; numbers are written out, not only drawn."""
    drawn = chart([Group("up & down", "more is better", [Bar("ngrokd", 2.0, "2 Gbit/s", 0), Bar("x", 0.0, "0", 2)])])
    root = ET.fromstring(drawn)
    texts = ["".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts == ["up & downmore is better", "ngrokd", "2 Gbit/s", "x", "0"]
    assert "prefers-color-scheme:dark" in drawn


def test_every_case_belongs_to_a_told_family() -> None:
    """Else its numbers would be measured and not written down."""
    assert {case.family for case in CASES.values()} | {"rest"} == set(report.FAMILIES)
    assert all(dataclasses.asdict(case)["title"] for case in CASES.values())


def test_a_daemons_configuration_is_valid_toml() -> None:
    """Keys of one section stand together, whatever order they were given in."""
    text = to_toml({"api.url": '"https://x"', "net.mtu": "1500", "api.timeout": '"3s"'})
    assert text == '[api]\nurl = "https://x"\ntimeout = "3s"\n[net]\nmtu = 1500\n'


def test_names_are_read_from_a_hosts_file(tmp_path: Path) -> None:
    """That is where a daemon under test says what the addresses of its endpoints are."""
    path = tmp_path / "hosts"
    path.write_text("# comment\n127.0.0.1 localhost\n\n10.107.0.2\techo.bench other\n")
    assert read_hosts(path) == {"localhost": "127.0.0.1", "echo.bench": "10.107.0.2", "other": "10.107.0.2"}
