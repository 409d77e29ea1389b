"""What was measured, as a table for a terminal, and as the generated part of RESULTS.md with a chart per family.

`results.json` holds the numbers of every round; a run replaces the families that it measured. Other programs have
parts of their own in RESULTS.md: each stands between two markers and is replaced as a whole (`replace_part`).
"""

from __future__ import annotations

import json
import os
import platform
import ssl
import statistics
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bench.cases import CASES, ROUND_TRIP_MS, Case, Results, cost, failures, median, ratio, ratios
from bench.chart import Bar, Group, chart
from bench.rest import FIGURES, Figures
from bench.stage import DAEMON, haproxy_version
from bench.toolchain import give_to_owner, go_version

BENCH = Path(__file__).resolve().parent
RESULTS = BENCH / "RESULTS.md"
NUMBERS = BENCH / "results.json"
CHARTS = BENCH / "charts"
PART = "path"
REFERENCE = "forwarder"
LIMIT = "direct"
PEERS = (REFERENCE, "resuming", "haproxy", LIMIT)

HONEST_CONNECT = """connect(), one byte there and back, close. The forwarder and haproxy accept at once, whether or not
the endpoint can be reached; the daemon accepts when the ingress has."""

LONG_LINE = """As above, behind a line that delays every packet in both directions. Without a proxy, connect() takes one
round trip and the byte another."""

FAMILIES: dict[str, tuple[str, str]] = {
    "bulk": ("Bulk", "Bytes in one direction, as fast as they go; `up` counts what arrived at the far end."),
    "ask": ("Requests and answers on open connections", "64 bytes there and back, one at a time on each connection."),
    "new": ("New connections", HONEST_CONNECT),
    "far": (f"New connections, with a round trip of {ROUND_TRIP_MS:g} ms to the ingress", LONG_LINE),
    "rest": ("At rest", "Fresh processes; memory is theirs (Pss), without what the kernel holds for sockets."),
}

INTRODUCTION = """## The path, beside its peers

- **forwarder**: the reference, about 100 lines of Go (`bench/go/forward.go`): kernel listener, one TLS dial with a
  client certificate per connection, binding header, two copies.
- **haproxy**: TCP in, TLS with a client certificate out, sessions resumed, as configured by default. It knows no
  binding header, so it has a port of the ingress that expects none, and saves that round trip.
- **direct**: no proxy and no TLS: what the kernel itself does between the same two programs.

All of them and the load ran side by side on the same cores, in rounds that alternate. Numbers are medians of the
rounds; a ratio is the median of the rounds' ratios, in parentheses the lowest and the highest, and above 1 when ngrokd
is ahead. CPU is the proxy's own, user and system.
"""


# -- for a terminal ----------------------------------------------------------------------------------------------------


def table(results: Results) -> Iterator[str]:
    """One line for each case and way."""
    yield f"{'case':<42}{'way':<12}{'median':>10} {'unit':<7}{'ratio':>6}{'p99 ms':>9}{'connect':>9}{'failed':>7}  cpu"
    for name, ways in results.items():
        case = CASES[name]
        label = ("50 ms away: " if case.far else "") + case.title
        first = next(iter(ways.values()))
        for way, values in ways.items():
            figure = median(values, case.figure) / case.scale
            share = "" if values is first else f"{ratio(case, first, values):.2f}"
            p99, connect = (_or_blank(median(values, key) / 1e3) for key in ("p99_us", "connect_us"))
            spent, unit = cost(values)
            cpu = "" if way == LIMIT else f"{spent:.3g} {unit}"
            shown = f"{figure:>10.2f} {case.unit:<7}{share:>6}{p99:>9}{connect:>9}{failures(values):>7}  {cpu}"
            yield f"{label:<42}{way:<12}{shown}"
            label = ""
            yield from (f"{'':<42}{value.get('failure', '')}" for value in values if value["failures"])


def _or_blank(value: float) -> str:
    return f"{value:.2f}" if value else ""


def rest_table(figures: Figures) -> Iterator[str]:
    for figure, ways in figures.items():
        title, unit = FIGURES[figure]
        shown = ", ".join(f"{way} {statistics.median(values):.1f}" for way, values in ways.items())
        yield f"{title:<60}{shown} {unit}"


# -- what is kept ------------------------------------------------------------------------------------------------------


def describe_run(command: str, commit: str, load_before: float, rounds: int, seconds: float) -> dict[str, Any]:
    """Under which circumstances numbers came about."""
    openssl = " ".join(ssl.OPENSSL_VERSION.split()[:2])
    software = [f"CPython {platform.python_version()}", openssl, go_version(), haproxy_version()]
    return {
        "commit": commit[:12] or "not committed",
        "command": command,
        "load_before": round(load_before, 1),
        "rounds": rounds,
        "seconds": seconds,
        "machine": f"{_processor()}, {os.cpu_count()} cores, {_memory_gib()} GiB",
        "kernel": f"{platform.system()} {platform.release()}",
        "software": ", ".join(filter(None, software)),
    }


def full_commit(revision: str) -> str:
    """The commit that a revision names; "" for ""."""
    if not revision:
        return ""
    command = ["git", "-c", f"safe.directory={BENCH.parent}", "rev-parse", "--verify", f"{revision}^{{commit}}"]
    return subprocess.run(command, cwd=BENCH, capture_output=True, text=True, check=True).stdout.strip()


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _memory_gib() -> int:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)


def record(run: Mapping[str, Any], results: Results, figures: Figures | None) -> None:
    """Keep the numbers of a run and write RESULTS.md and the charts anew from all that are kept."""
    kept: dict[str, Any] = json.loads(NUMBERS.read_text())["families"] if NUMBERS.exists() else {}
    for family in FAMILIES:
        found = {name: ways for name, ways in results.items() if CASES[name].family == family}
        if found:
            kept[family] = {"run": run, "results": found}
    if figures:
        kept["rest"] = {"run": run, "results": figures}
    kept = {family: kept[family] for family in FAMILIES if family in kept}
    _write(NUMBERS, _one_result_per_line({"schema": "ngrokd.bench/2", "families": kept}))
    CHARTS.mkdir(exist_ok=True)
    give_to_owner(CHARTS)
    for family, of in kept.items():
        groups = rest_groups(of["results"]) if family == "rest" else list(case_groups(of["results"]))
        _write(CHARTS / f"{family}.svg", chart(groups))
    text = RESULTS.read_text() if RESULTS.exists() else "# Results\n"
    _write(RESULTS, replace_part(text, PART, markdown(kept)))


def _write(path: Path, text: str) -> None:
    path.write_text(text)
    give_to_owner(path)


def _one_result_per_line(value: Any, depth: int = 0) -> str:
    """JSON that a diff can show: what holds only plain values is one line."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if not any(isinstance(item, (dict, list)) for item in items):
        return json.dumps(_rounded(value))
    indent, end = " " * (depth + 1), " " * depth
    if isinstance(value, dict):
        inner = [f"{indent}{json.dumps(key)}: {_one_result_per_line(item, depth + 1)}" for key, item in value.items()]
        return "{\n" + ",\n".join(inner) + f"\n{end}}}" + ("\n" if not depth else "")
    return "[\n" + ",\n".join(indent + _one_result_per_line(item, depth + 1) for item in value) + f"\n{end}]"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def replace_part(text: str, name: str, part: str) -> str:
    """Put `part` between the markers called `name`, or at the end, with markers, where there are none."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    block = f"{begin}\n{part.strip()}\n{end}"
    if begin in text and end in text:
        return text.partition(begin)[0] + block + text.partition(end)[2]
    return f"{text.rstrip()}\n\n{block}\n"


# -- RESULTS.md --------------------------------------------------------------------------------------------------------


def markdown(kept: Mapping[str, Any]) -> str:
    """Our part of RESULTS.md."""
    lines = [INTRODUCTION]
    described = ""
    for family, of in kept.items():
        title, explained = FAMILIES[family]
        lines += [f"### {title}", ""]
        if (told := _tell_run(of["run"])) != described:
            lines += [told, ""]
            described = told
        lines += [explained, "", f"![{title}](charts/{family}.svg)", ""]
        lines += rest_markdown(of["results"]) if family == "rest" else case_markdown(of["results"])
        lines.append("")
    return "\n".join(lines)


def _tell_run(run: Mapping[str, Any]) -> str:
    return (
        f"{run['machine']}; {run['kernel']}; {run['software']}. Commit {run['commit']}, {run['rounds']} rounds of "
        f"{run['seconds']:g} s, load average before: {run['load_before']}. Command: `{run['command']}`"
    )


def _in_order(ways: Iterable[str]) -> list[str]:
    """Each once: the daemon, its variants, its peers."""
    return sorted(
        dict.fromkeys(ways), key=lambda way: -1 if way == DAEMON else PEERS.index(way) + 1 if way in PEERS else 0
    )


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def case_markdown(results: Results) -> list[str]:
    ways = _in_order(way for of in results.values() for way in of)
    ours = [way for way in ways if way not in PEERS]
    lines = [_row(["case", "unit", *ways, *(f"{way} : {REFERENCE}" for way in ours), "goal"])]
    lines.append("|---|---" + "|--:" * (len(ways) + len(ours) + 1) + "|")
    for name, of in results.items():
        case = CASES[name]
        cells = [_number(median(of[way], case.figure) / case.scale) if way in of else "" for way in ways]
        cells += [_told_ratio(case, of, way) for way in ours]
        lines.append(_row([case.title, case.unit, *cells, f"{case.goal:g}" if case.goal else ""]))
    proxies = [way for way in ways if way != LIMIT]
    lines += ["", _row(["and", "unit", *ways]), "|---|---" + "|--:" * len(ways) + "|"]
    for name, of in results.items():
        case = CASES[name]
        if case.figure == "gbit_s":
            details = []
        else:
            details = [("p99", "p99_us"), ("connect()", "connect_us")]
        for told, key in details:
            if key != case.figure and any(median(values, key) for values in of.values()):
                cells = [_number(median(of[way], key) / 1e3) if way in of else "" for way in ways]
                lines.append(_row([f"{case.title.partition(',')[0]}: {told}", "ms", *cells]))
        unit = next(unit for way in proxies if way in of and (unit := cost(of[way])[1]))
        cells = [_number(cost(of[way])[0]) if way in of and way in proxies else "" for way in ways]
        lines.append(_row([f"{case.title}: CPU", unit, *cells]))
        if any(failures(values) for values in of.values()):
            lines.append(
                _row([f"{case.title}: failures", "", *[str(failures(of[way])) if way in of else "" for way in ways]])
            )
    if not any(failures(values) for of in results.values() for values in of.values()):
        lines += ["", "Nothing failed."]
    return lines


def _told_ratio(case: Case, of: Mapping[str, list[dict[str, Any]]], way: str) -> str:
    if way not in of or REFERENCE not in of:
        return ""
    found = ratios(case, of[way], of[REFERENCE])
    return f"**{statistics.median(found):.2f}** ({min(found):.2f}-{max(found):.2f})" if found else ""


def rest_markdown(figures: Figures) -> list[str]:
    ways = _in_order(way for of in figures.values() for way in of)
    lines = [_row(["", "unit", *ways]), "|---|---" + "|--:" * len(ways) + "|"]
    for figure, of in figures.items():
        title, unit = FIGURES[figure]
        lines.append(_row([title, unit, *[_number(statistics.median(of[way])) if way in of else "" for way in ways]]))
    return lines


# -- charts ------------------------------------------------------------------------------------------------------------


def case_groups(results: Results) -> Iterator[Group]:
    for name, ways in results.items():
        case = CASES[name]
        values = {way: median(of, case.figure) / case.scale for way, of in ways.items()}
        bars = _bars({way: value for way, value in values.items() if way != LIMIT}, case.unit)
        limit = f"; without a proxy {_number(values[LIMIT])} {case.unit}" if LIMIT in values else ""
        yield Group(case.title, f"{'more' if case.more else 'less'} is better{limit}", bars)


def rest_groups(figures: Figures) -> list[Group]:
    shown = ("start_ms", "memory_mib", "flow_kib")
    return [
        Group(
            FIGURES[figure][0],
            "less is better",
            _bars({way: statistics.median(values) for way, values in figures[figure].items()}, FIGURES[figure][1]),
        )
        for figure in shown
        if figures.get(figure)
    ]


def _bars(values: Mapping[str, float], unit: str) -> list[Bar]:
    colors = {DAEMON: 0, REFERENCE: 2, "resuming": 4, "haproxy": 3}
    return [Bar(way, value, f"{_number(value)} {unit}", colors.get(way, 1)) for way, value in values.items()]
