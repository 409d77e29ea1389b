"""The commands that look at a running daemon: what a person reads, what a program reads, and how they end."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngrokd.cli import flows as flows_module
from ngrokd.cli import ping as ping_module
from ngrokd.cli.capture import Blocks, CaptureError
from ngrokd.cli.columns import Column, fit, rate_text, size_text, time_text
from ngrokd.cli.ping import Echo, echo_request
from ngrokd.cli.top import SORTS, View, keys_of, press, screen, sorted_flows
from ngrokd.errors import Exit, StateError
from tests.ngrokd.cli.conftest import FakeDaemon, Lines, Outcome
from tun.pcap import interface_description, packet_block, read_capture, section_header

Cli = Callable[..., Outcome]
Daemon = Callable[..., FakeDaemon]

FLOW: Final[dict[str, Any]] = {
    "id": 7,
    "endpoint": "my-api.prod:80",
    "source": "10.107.0.1:40001",
    "destination": "10.107.0.2:80",
    "state": "ESTABLISHED",
    "process": "curl",
    "pid": 4242,
    "uid": 0,
    "bytes_from_app": 1500,
    "bytes_to_app": 23_000_000,
    "rtt_ms": 0.214,
    "age_s": 65.2,
    "dial_ms": 12.5,
}
ENDED: Final[dict[str, Any]] = {
    "id": 6,
    "endpoint": "my-api.prod:80",
    "source": "10.107.0.1:40000",
    "ended_at": "2025-11-20T10:00:00Z",
    "outcome": "refused",
    "reason": "ingress_unreachable",
    "message": "cannot reach the ingress \x1b[31m",
    "bytes_from_app": 0,
    "bytes_to_app": 0,
    "age_s": 10.0,
}
EVENT: Final[dict[str, Any]] = {
    "seq": 9,
    "time": "2025-11-20T10:00:00.250Z",
    "event": "flow.refused",
    "level": "warning",
    "message": "connection refused",
    "flow": 3,
    "endpoint": "my-api.prod:80",
}


def terminal(*arguments: str, columns: int, environ: dict[str, str] | None = None) -> list[str]:
    """What a person sees on a terminal of this width."""
    leader, follower = pty.openpty()
    os.set_blocking(leader, False)
    variables = {**os.environ, "COLUMNS": str(columns), "TERM": "xterm", "NO_COLOR": "1", **(environ or {})}
    command = [sys.executable, "-m", "ngrokd", *arguments]
    with subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, env=variables) as process:
        process.wait(20)
    seen = os.read(leader, 1 << 20).decode().replace("\r\n", "\n")
    os.close(leader)
    os.close(follower)
    return seen.splitlines()


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates take no time here."""
    monkeypatch.setattr(flows_module, "RATE_S", 0.0)


# Flows


def test_flows_name_program_user_and_endpoint(cli: Cli, daemon: Daemon) -> None:
    """A pipe gets all columns, whole."""
    fake = daemon(flows={"total": 1, "flows": [FLOW]})

    outcome = cli("flows")

    heading, line = outcome.out.splitlines()
    assert heading.split() == ["ID", "PROGRAM", "USER", "ENDPOINT", "STATE", "SENT", "RECEIVED", "RTT", "AGE", "FROM"]
    assert line.split()[:6] == ["7", "curl/4242", "root", "my-api.prod:80", "open", "1.5"]
    assert line.split()[6:] == ["kB", "23", "MB", "0.21", "ms", "65s", "10.107.0.1:40001"]
    assert fake.asked == [("flows", []), ("flows", [])], "a rate takes two looks"


@pytest.mark.parametrize("columns", [40, 60, 80, 200])
def test_no_line_is_wider_than_the_terminal(daemon: Daemon, columns: int) -> None:
    """What matters least goes first; program and endpoint stay."""
    long = {**FLOW, "endpoint": f"{'long-name.' * 8}prod:80", "process": "a-rather-long-na"}
    daemon(flows={"total": 2, "flows": [FLOW, long]})

    lines = terminal("flows", columns=columns)

    assert max(map(len, lines)) <= columns
    assert "curl/" in lines[1]
    assert "my-api" in lines[1]
    assert ("10.107.0.1:40001" in lines[1]) is (columns == 200)


def test_flows_as_json_and_filtered(cli: Cli, daemon: Daemon) -> None:
    other = {**FLOW, "id": 8, "endpoint": "db.prod:5432", "process": "psql"}
    daemon(flows={"total": 2, "flows": [FLOW, other]})

    every = cli("flows", "--json").document()
    by_endpoint = cli("flows", "--endpoint", "DB.prod", "--json").document()
    by_process = cli("flows", "--process", "curl", "--json").document()
    nobody = cli("flows", "--process", "ssh")

    assert (every["schema"], [flow["id"] for flow in every["data"]]) == ("ngrokd.flows/1", [7, 8])
    assert every["data"][0] == {**FLOW, "rate_from_app": 0, "rate_to_app": 0}
    assert [flow["id"] for flow in by_endpoint["data"]] == [8]
    assert [flow["id"] for flow in by_process["data"]] == [7]
    assert (nobody.out, nobody.err, nobody.code) == ("", "no connections like this\n", 0)


def test_ended_flows_say_why(cli: Cli, daemon: Daemon) -> None:
    """With what was said then, and no control character of it."""
    fake = daemon(
        flows={"total": 0, "flows": [], "ended": [ENDED, {**ENDED, "outcome": "closed", "reason": "app_gone"}]}
    )

    text = cli("flows", "--ended")
    document = cli("flows", "--ended", "--json").document()

    lines = text.out.splitlines()
    assert "refused: ingress unreachable" in lines[1]
    assert "cannot reach the ingress \\x1b[31m" in lines[1]
    assert "app gone" in lines[2]
    assert document["data"][0]["reason"] == "ingress_unreachable"
    assert fake.asked[0] == ("flows", ["ended=1"])


def test_flows_are_closed_by_number(cli: Cli, daemon: Daemon) -> None:
    fake = daemon(close_flow="closed 2 flows")

    outcome = cli("flows", "close", "7", "8")

    assert (outcome.code, outcome.out) == (0, "closed 2 flows\n")
    assert fake.asked == [("close-flow", ["7", "8"])]
    assert cli("flows", "close", "7", "--json").document()["schema"] == "ngrokd.flows.close/1"


@pytest.mark.parametrize("arguments", [["flows", "close"], ["flows", "close", "all"], ["flows", "clsoe", "7"]])
def test_what_cannot_be_closed_is_a_usage_error(cli: Cli, daemon: Daemon, arguments: list[str]) -> None:
    daemon(close_flow="closed")

    outcome = cli(*arguments)

    assert outcome.code == Exit.USAGE
    assert outcome.err.startswith("error: ")
    assert outcome.out == ""


# Top

FRAME: Final[dict[str, Any]] = {
    "time": "2025-11-20T10:00:00Z",
    "interval_s": 2.0,
    "state": "degraded",
    "problems": ["the API is away", "and more"],
    "endpoints": 3,
    "total": 2,
    "pool_ready": 2,
    "bytes_from_app_s": 1000.0,
    "bytes_to_app_s": 2_000_000.0,
    "opened_s": 1.5,
    "refused_s": 0.0,
    "dials_s": 12.0,
    "dial_p95_ms": 31.0,
    "drops_s": 0.0,
    "flows": [
        {**FLOW, "rate_from_app": 10, "rate_to_app": 5},
        {
            **FLOW,
            "id": 8,
            "process": "psql",
            "endpoint": "db.prod:5432",
            "rate_from_app": 500,
            "rate_to_app": 0,
            "age_s": 1,
        },
    ],
}


def test_the_screen_fits_and_names_its_keys() -> None:
    """80x24 is what a person has at the worst moment."""
    many = {**FRAME, "flows": [{**FRAME["flows"][0], "id": number} for number in range(100)]}

    for width, height in ((80, 24), (200, 50), (40, 10), (20, 4), (10, 1)):
        lines = screen(View(frame=many), width, height)
        assert len(lines) == height
        assert max(map(len, lines)) <= width
    lines = screen(View(frame=many), 80, 24)
    assert lines[0].startswith("ngrokd is degraded")
    assert lines[2] == "problem: the API is away (and 1 more)"
    assert "q quit" in lines[-1]
    assert sum("my-api.prod" in line for line in lines) == 24 - 6


def test_the_order_is_what_was_asked_for() -> None:
    """The most first; names from a to z; r turns it round."""
    first = {sort: sorted_flows(View(frame=FRAME, sort=sort))[0]["id"] for sort in SORTS}

    assert first == {"rate": 8, "sent": 7, "received": 7, "age": 7, "rtt": 7, "program": 7, "endpoint": 8, "id": 8}
    assert sorted_flows(View(frame=FRAME, sort="rate", reverse=True))[0]["id"] == 7
    assert [flow["id"] for flow in sorted_flows(View(frame=FRAME, wanted="PSQL"))] == [8]


def typed(view: View, keys: str) -> View:
    for key in keys_of(keys):
        view = press(view, key)
    return view


def test_keys_do_what_the_last_line_says() -> None:
    view = View(frame=FRAME)

    assert typed(view, "q").quit
    assert typed(view, "\x03").quit
    assert [typed(view, keys).sort for keys in ("s", "ss", "S")] == ["sent", "received", "id"]
    assert typed(view, "r").reverse
    assert typed(view, "p").paused
    assert not typed(view, "pp").paused
    assert typed(view, "\x1b[B\x1b[B\x1b[B").offset == 1, "there are two rows"
    assert typed(view, "jk").offset == 0
    assert typed(view, "\x1b[5~\x1bOP\x1b[1;5Dz") == view, "keys that mean nothing"


def test_a_filter_is_typed_and_taken_back() -> None:
    view = View(frame=FRAME)

    writing = typed(view, "/psx\x7fql")
    kept = typed(writing, "\r")

    assert (writing.wanted, writing.typing) == ("psql", True)
    assert screen(writing, 80, 24)[-1].startswith("filter: psql_")
    assert (kept.wanted, kept.typing) == ("psql", False)
    assert screen(kept, 80, 24)[-1].startswith("only psql   q quit")
    assert typed(kept, "\x1b").wanted == ""
    assert typed(view, "/abc\x1b").wanted == ""


@given(st.text(max_size=30))
def test_whatever_is_typed_is_survived(text: str) -> None:
    view = typed(View(frame=FRAME), text)

    assert len(screen(view, 80, 24)) == 24


@given(
    st.dictionaries(
        st.sampled_from(sorted(FRAME)),
        st.none()
        | st.booleans()
        | st.floats()
        | st.text(max_size=5)
        | st.lists(st.dictionaries(st.text(max_size=3), st.integers())),
    )
)
def test_a_daemon_of_another_version_breaks_nothing(frame: dict[str, Any]) -> None:
    """Members may be missing, or be something else."""
    assert len(screen(View(frame=frame), 80, 24)) == 24


def test_top_once_prints_the_first_frame_with_rates(cli: Cli, daemon: Daemon) -> None:
    fake = daemon(top=Lines([{**FRAME, "interval_s": 0.0}, FRAME, {**FRAME, "total": 99}]))

    text = cli("top", "--once", "--sort", "endpoint")
    document = json.loads(cli("top", "--once", "--json").out)
    every = [json.loads(line) for line in cli("top", "--json").out.splitlines()]

    lines = text.out.splitlines()
    assert lines[0].startswith("ngrokd is degraded")
    assert [line.split()[0] for line in lines[4:]] == ["ID", "8", "7"]
    assert (document["schema"], document["total"]) == ("ngrokd.top/1", 2)
    assert [frame["total"] for frame in every] == [2, 99]
    assert fake.asked[0] == ("top", ["interval=0.5"])


@pytest.mark.parametrize("ending", ["q", "SIGINT", "SIGTERM", "SIGHUP"])
def test_the_terminal_is_put_back(daemon: Daemon, ending: str) -> None:
    """Echo, lines, the cursor and what was on the screen before; however it ends."""
    import termios

    fake = daemon(top=Lines([{**FRAME, "number": number} for number in range(3)]))
    leader, follower = pty.openpty()
    before = termios.tcgetattr(follower)
    variables = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24", "NGROKD_SOCKET": fake.socket}
    command = [
        sys.executable,
        "-c",
        KEEP_OPEN + "import sys\nfrom ngrokd.cli import main\nsys.argv[1:] = ['top']\nmain()",
    ]
    with subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, env=variables) as process:
        seen = b""
        while b"q quit" not in seen:
            seen += os.read(leader, 65536)
        if ending == "q":
            os.write(leader, b"q")
        else:
            process.send_signal(signal.Signals[ending])
        code = process.wait(10)
        seen += os.read(leader, 65536)
    after = termios.tcgetattr(follower)
    os.close(leader)
    os.close(follower)

    assert code == 0
    assert after == before
    assert seen.count(b"\x1b[?1049h") == seen.count(b"\x1b[?1049l") == 1
    assert seen.rstrip().endswith(b"\x1b[?25h\x1b[?1049l")


# The fake daemon ends its answer after three frames; a client that goes on watching is what this is about.
KEEP_OPEN: Final = """
import ngrokd.ask, select
class Patient(ngrokd.ask.Subscription):
    def ready(self):
        try:
            yield from super().ready()
        except ngrokd.ask.NoAnswerError:
            import time; time.sleep(0.05)
ngrokd.ask.Subscription = Patient
"""


# Events and log


def test_events_are_lines(cli: Cli, daemon: Daemon) -> None:
    """For people and for programs; both may ask for some of them."""
    fake = daemon(events=Lines([EVENT, {**EVENT, "seq": 10, "event": "api.recovered", "level": "info"}]))

    text = cli("events")
    lines = [json.loads(line) for line in cli("events", "--json", "--since", "8").out.splitlines()]
    some = cli("events", "--json", "--name", "api", "--no-follow")

    assert text.out.splitlines()[0].endswith("flow.refused       connection refused flow=3 endpoint=my-api.prod:80")
    assert lines[0] == {"schema": "ngrokd.events/1", **EVENT}
    assert [json.loads(line)["seq"] for line in some.out.splitlines()] == [10]
    assert [arguments for _, arguments in fake.asked] == [
        ["follow=1"],
        ["follow=1", "since=8"],
        ["follow=0", "since=0"],
    ]


def test_the_log_is_printed_with_its_levels(cli: Cli, daemon: Daemon) -> None:
    entry = {"seq": 1, "time": "2025-11-20T10:00:00.000Z", "level": "warning", "message": "careful\x1b[2J"}
    fake = daemon(logs=Lines([entry, {**entry, "level": "info", "message": "fine"}], data={"level": "info"}))

    text = cli("logs", "-n", "5", "--level", "info")
    document = json.loads(cli("logs", "-f", "--json").out.splitlines()[0])

    assert text.out.splitlines()[0].endswith("warning: careful\\x1b[2J")
    assert text.out.splitlines()[1].endswith(":00 fine")
    assert document == {"schema": "ngrokd.logs/1", **entry}
    assert [arguments for _, arguments in fake.asked] == [
        ["lines=5", "level=info", "follow=0"],
        ["lines=100", "level=debug", "follow=1"],
    ]


def test_an_answer_that_ends_badly_is_an_error(cli: Cli, daemon: Daemon) -> None:
    daemon(events=Lines([EVENT], error=StateError("the disk is full", remedy="free some space")))

    outcome = cli("events")

    assert outcome.code == Exit.CANNOT_CREATE
    assert outcome.err == "error: the disk is full\n  hint: free some space\n"


def test_the_level_of_the_log_is_changed_for_a_while(cli: Cli, daemon: Daemon) -> None:
    fake = daemon(log_level={"level": "info", "for_s": None}, set_log_level={"level": "debug", "for_s": 600.0})

    shown = cli("log-level")
    changed = cli("log-level", "debug", "--for", "10m")
    document = cli("log-level", "debug", "--json").document()

    assert shown.out == "info\n"
    assert changed.out == "debug, for 600 s more\n"
    assert document == {"schema": "ngrokd.log-level/1", "data": {"level": "debug", "for_s": 600.0}}
    assert fake.asked[1] == ("set-log-level", ["level=debug", "for=600.0"])


@pytest.mark.parametrize(
    "arguments", [["loud"], ["debug", "--for", "10"], ["debug", "--for", "soon"], ["--for", "10m"]]
)
def test_a_level_or_time_that_is_none_is_a_usage_error(cli: Cli, daemon: Daemon, arguments: list[str]) -> None:
    daemon(log_level={})

    assert cli("log-level", *arguments).code == Exit.USAGE


# Capture


def make_capture(sizes: list[int]) -> bytes:
    packets = [packet_block(0, number, bytes([0x45] * size), inbound=True) for number, size in enumerate(sizes)]
    return section_header("ngrokd") + interface_description("ngrokd0") + b"".join(packets)


def in_pieces(data: bytes, size: int) -> Lines:
    """As the daemon sends it: cut anywhere, and counted at the end."""
    lines: list[object] = [{"pcapng": b64encode(data[at : at + size]).decode()} for at in range(0, len(data), size)]
    return Lines([*lines, {"end": "packets", "recorded": 3, "dropped": 2}])


def packets_of(path: Path) -> list[int]:
    with path.open("rb") as file:
        return [len(packet.packet) for packet in read_capture(file)]


def test_a_capture_is_the_file_that_the_daemon_sends(cli: Cli, daemon: Daemon, folder: Path) -> None:
    """For nobody else to read; how much it was is said on stderr."""
    data = make_capture([60, 1500, 40])
    fake = daemon(capture=in_pieces(data, 100))
    path = folder / "app.pcapng"

    outcome = cli(
        "capture", "-w", str(path), "--endpoint", "my-api.prod", "--port", "80", "--duration", "1m", "-s", "96"
    )
    document = cli("capture", "-w", str(path), "--json").document()

    assert outcome.code == 0
    assert outcome.out == ""
    assert outcome.err == f"3 packets, {size_text(len(data))}, 2 lost: too fast for whoever writes\n"
    assert path.read_bytes() == data
    assert path.stat().st_mode & 0o777 == 0o600
    assert fake.asked[0] == ("capture", ["endpoint=my-api.prod", "port=80", "snaplen=96", "duration=60.0"])
    assert document["data"] == {"file": str(path), "packets": 3, "bytes": len(data), "dropped": 2}


def test_files_are_rotated_and_each_is_whole(cli: Cli, daemon: Daemon, folder: Path) -> None:
    """-C begins another when one is full, -W comes back to the first."""
    daemon(capture=in_pieces(make_capture([60_000] * 40), 100_000))

    assert cli("capture", "-w", str(folder / "all"), "-C", "1").code == 0
    assert cli("capture", "-w", str(folder / "ring"), "-C", "1", "-W", "2").code == 0

    assert [len(packets_of(folder / name)) for name in ("all", "all1", "all2")] == [16, 16, 8]
    assert not (folder / "all3").exists()
    assert [len(packets_of(folder / name)) for name in ("ring0", "ring1")] == [8, 16]
    assert not (folder / "ring2").exists()


def test_a_link_that_somebody_left_is_not_followed(cli: Cli, daemon: Daemon, folder: Path) -> None:
    """Root captures into /tmp."""
    (folder / "victim").write_text("precious")
    (folder / "link").symlink_to(folder / "victim")
    daemon(capture=in_pieces(make_capture([60]), 1000))

    outcome = cli("capture", "-w", str(folder / "link"))

    assert outcome.code == Exit.CANNOT_CREATE
    assert (folder / "victim").read_text() == "precious"


def test_a_pipe_gets_the_capture_and_may_close(daemon: Daemon) -> None:
    """`ngrokd capture | head -c 100`: what is read is whole, and nobody complains."""
    data = make_capture([1000] * 3000)
    fake = daemon(capture=in_pieces(data, 50_000))
    command = [sys.executable, "-m", "ngrokd", "capture"]
    environ = {**os.environ, "NGROKD_SOCKET": fake.socket}

    whole = subprocess.run([*command, "-w", "-"], capture_output=True, env=environ, check=True)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        head = process.stdout.read(100)
        process.stdout.close()
        complaint = process.stderr.read()
        code = process.wait(10)

    assert whole.stdout == data
    assert list(read_capture(io.BytesIO(whole.stdout)))[-1].size == 1000
    assert head == data[:100]
    assert code == 0
    assert b"Traceback" not in complaint


@pytest.mark.parametrize(
    "arguments",
    [["-w", "x", "-W", "2"], ["-w", "-", "-C", "1"], ["-w", "x", "--port", "0"], ["-w", "x", "--count", "0"]],
)
def test_options_of_capture_that_make_no_sense_together(cli: Cli, daemon: Daemon, arguments: list[str]) -> None:
    daemon(capture=in_pieces(make_capture([60]), 1000))

    assert cli("capture", *arguments).code == Exit.USAGE


def test_a_terminal_gets_no_capture(daemon: Daemon) -> None:
    """It would be garbage, and might be commands to the terminal."""
    daemon(capture=in_pieces(make_capture([60]), 1000))

    assert "where to?" in terminal("capture", columns=80)[0]
    assert "a terminal cannot show" in terminal("capture", "-w", "-", columns=80)[0]


@given(st.lists(st.integers(0, 80), min_size=1, max_size=20), st.integers(1, 50))
def test_blocks_are_put_together_whatever_the_pieces(sizes: list[int], piece: int) -> None:
    data = make_capture(sizes)
    blocks = Blocks()

    found = [block for at in range(0, len(data), piece) for _, block in blocks.feed(data[at : at + piece])]

    assert b"".join(found) == data
    assert len(found) == len(sizes) + 2


def test_what_is_no_capture_is_an_error() -> None:
    with pytest.raises(CaptureError):
        list(Blocks().feed(b"HTTP/1.1 400 Bad Request\r\n\r\n"))


# Ping

PROBE: Final[dict[str, Any]] = {
    "endpoint": "my-api.prod:80",
    "address": "10.107.0.2",
    "ok": True,
    "phases": [{"name": "connect", "ms": 12.5}, {"name": "tls", "ms": 25.1}, {"name": "header", "ms": 9.0}],
    "ingress": "203.0.113.7",
    "tls": "TLSv1.3",
    "endpoint_id": "ep_1",
    "proto": "http",
    "reason": "",
    "problem": "",
    "remedy": "",
}


def test_ping_shows_each_part_of_the_way(cli: Cli, daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ping_module, "send_echo", lambda _address: Echo(0.21))
    fake = daemon(probe=PROBE)

    text = cli("ping", "my-api.prod")
    twice = cli("ping", "my-api.prod", "--count", "2", "-i", "0.2", "--json").document()

    assert text.out.splitlines() == [
        "my-api.prod:80 (10.107.0.2): reached in 47 ms",
        "  icmp     0.21 ms  10.107.0.2, answered on this machine",
        "  connect    12 ms  203.0.113.7",
        "  tls        25 ms  TLSv1.3",
        "  header   9.00 ms  ep_1, http",
    ]
    assert fake.asked[0] == ("probe", ["endpoint=my-api.prod"])
    assert [each["icmp_ms"] for each in twice["data"]] == [0.21, 0.21]


def test_ping_says_which_part_failed(cli: Cli, daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ping_module, "send_echo", lambda _address: Echo(None, "not tried", tried=False))
    daemon(
        probe={**PROBE, "ok": False, "phases": PROBE["phases"][:1], "problem": "not trusted", "remedy": "set ca_file"}
    )

    outcome = cli("ping", "my-api.prod")

    assert outcome.code == Exit.NO
    assert outcome.out.splitlines() == [
        "my-api.prod:80 (10.107.0.2): not reached",
        "  icmp         -  not tried",
        "  connect  12 ms  203.0.113.7",
        "  not trusted",
        "  hint: set ca_file",
    ]


def test_an_echo_request_has_the_right_checksum() -> None:
    """The sum of all words, it included, is all ones (RFC 792)."""
    packet = echo_request(0x1234, 1, b"0123456789abcdef")

    total = sum(int.from_bytes(packet[at : at + 2], "big") for at in range(0, len(packet), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)

    assert total == 0xFFFF
    assert packet[:2] == b"\x08\x00"


def test_an_echo_that_may_not_be_sent_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(socket, "socket", refuse)

    assert ping_module.send_echo("127.0.0.1") == Echo(
        None, "not tried: takes root, or a group in net.ipv4.ping_group_range", tried=False
    )


# Health, wait, pause, metrics

HEALTH: Final[dict[str, Any]] = {
    "healthy": True,
    "ready": False,
    "uptime": "5s",
    "endpoints": {},
    "conditions": {"tun": {"ok": True, "message": ""}, "ingress": {"ok": False, "message": "not trusted"}},
}


def test_health_names_each_condition(cli: Cli, daemon: Daemon) -> None:
    daemon(health=HEALTH)

    outcome = cli("health")

    assert outcome.code == 0
    assert outcome.out.splitlines()[1:4] == ["Ready      no", "  tun      yes", "  ingress  no: not trusted"]
    assert cli("health", "--ready").code == Exit.NO


def test_wait_comes_back_when_it_is_so(cli: Cli, daemon: Daemon) -> None:
    fake = daemon(
        health=HEALTH, list=[{"hostname": "my-api.prod", "port": 80, "url": "http://my-api.prod", "id": "ep_1"}]
    )

    late = cli("wait", "--timeout", "300ms")
    fake.answers["health"] = {**HEALTH, "ready": True}
    ready = cli("wait")
    served = [
        cli("wait", "--for", "endpoint", name).code for name in ("my-api.prod", "MY-API.prod:80", "http://my-api.prod")
    ]
    missing = cli("wait", "--for", "endpoint", "db.prod", "--timeout", "100ms", "--json")

    assert (late.code, late.err) == (Exit.NO, "not ready after 300ms: ingress: not trusted\n")
    assert (ready.code, ready.out) == (0, "ngrokd is ready\n")
    assert served == [0, 0, 0]
    assert missing.code == Exit.NO
    assert missing.document()["data"]["missing"] == "no endpoint db.prod is served"


def test_wait_waits_for_a_daemon_that_is_not_there_yet(cli: Cli) -> None:
    begun = time.monotonic()

    outcome = cli("wait", "--timeout", "500ms")

    assert outcome.code == Exit.NO
    assert "not running" in outcome.err
    assert time.monotonic() - begun >= 0.5


@pytest.mark.parametrize("arguments", [["--for", "endpoint"], ["my-api.prod"], ["--for", "luck"], ["--timeout", "x"]])
def test_what_cannot_be_waited_for(cli: Cli, daemon: Daemon, arguments: list[str]) -> None:
    daemon(health=HEALTH)

    assert cli("wait", *arguments).code == Exit.USAGE


def test_pause_and_resume_say_what_they_did(cli: Cli, daemon: Daemon) -> None:
    daemon(pause="paused: new connections are refused, 3 live on; names stay", resume="resumed")

    assert cli("pause").out == "paused: new connections are refused, 3 live on; names stay\n"
    assert cli("resume", "--json").document() == {"schema": "ngrokd.resume/1", "data": "resumed"}


def test_metrics_are_printed_or_written_as_a_whole(cli: Cli, daemon: Daemon, folder: Path) -> None:
    daemon(metrics={"page": "ngrokd_up 1\n"})
    path = folder / "ngrokd.prom"
    path.write_text("old")

    assert cli("metrics").out == "ngrokd_up 1\n"
    assert cli("metrics", "write", str(path)).code == 0
    assert path.read_text() == "ngrokd_up 1\n"
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_daemon_that_is_away_is_a_metric_too(cli: Cli, folder: Path) -> None:
    """Otherwise the last figures would go on being collected."""
    path = folder / "ngrokd.prom"

    outcome = cli("metrics", "write", str(path))

    assert outcome.code == Exit.NOT_RUNNING
    assert path.read_text().endswith("\nngrokd_up 0\n")
    assert cli("metrics", "write", str(folder / "no" / "where.prom")).code == Exit.CANNOT_CREATE


# All of them

ASKING: Final = [
    ["flows"],
    ["flows", "close", "1"],
    ["top", "--once"],
    ["events"],
    ["logs"],
    ["log-level"],
    ["capture", "-w", "/dev/null"],
    ["ping", "x"],
    ["metrics"],
    ["pause"],
    ["resume"],
]


@pytest.mark.parametrize("arguments", ASKING, ids=" ".join)
def test_without_a_daemon_each_says_so_and_exits_3(cli: Cli, arguments: list[str]) -> None:
    outcome = cli(*arguments)
    document = cli(*arguments, "--json").document()

    assert (outcome.code, outcome.out) == (Exit.NOT_RUNNING, "")
    assert "ngrokd is not running" in outcome.err
    assert "Traceback" not in outcome.err
    assert document["error"]["code"] == Exit.NOT_RUNNING


def test_none_of_them_loads_an_event_loop() -> None:
    """Nor what else costs more than asking."""
    code = (
        "import sys, click\nfrom ngrokd.cli.app import group\n"
        "for name in 'flows top events logs log-level capture ping metrics wait pause list'.split():\n"
        "    group.get_command(click.Context(group), name)\n"
        "print(*sys.modules)"
    )

    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert not {"trio", "pyroute2", "cryptography", "h11", "ssl", "msgspec", "rich"} & set(loaded.split())


# Columns


def test_columns_are_cut_and_then_left_out() -> None:
    columns = (Column("A", least=3), Column("NUMBER", right=True, worth=1), Column("B"))
    rows = [["abcdefgh", "12", "xy"]]

    assert fit(columns, rows, None) == ["A         NUMBER  B", "abcdefgh      12  xy"]
    assert fit(columns, rows, 16) == ["A     NUMBER  B", "abc…      12  xy"]
    assert fit(columns, rows, 9) == ["A      B", "abcd…  xy"]
    assert fit(columns, [["a\x1b", "", "b"]], None) == ["A      B", "a\\x1b  b"], "an empty column may go"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (1500, "1.5 kB"),
        (23_456_789, "23 MB"),
        (10**18, "1000000 TB"),
        ("x", ""),
    ],
)
def test_sizes_have_few_digits(count: object, text: str) -> None:
    assert size_text(count) == text


def test_rates_and_times_are_short() -> None:
    assert [rate_text(value) for value in (0, 0.4, 1000, None)] == ["", "", "1.0 kB/s", ""]
    assert [time_text(value) for value in (0.04, 9.9, 59, 119, 121, 7300, 200_000, None)] == [
        "0.0s",
        "9.9s",
        "59s",
        "119s",
        "2m",
        "2h",
        "2d",
        "",
    ]
