"""The whole daemon on a real kernel, watched: a running transfer has the right program, rate and packets."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.netns.stage import Stage
from tests.netns.support import Namespace
from tun.pcap import read_capture

pytestmark = pytest.mark.netns

RATE: Final = 2_000_000
DOWNLOAD: Final = ("curl", "-sS", "-o", "/dev/null", "-w", "%{size_download}")
CLIENT: Final = (
    "import socket, sys, time\n"
    "s = socket.create_connection(('sink.demo', 9))\n"
    "print('connected', s.getsockname()[1], flush=True)\n"
    "piece = b'x' * 100_000\n"
    "begun, sent = time.monotonic(), 0\n"
    "while True:\n"
    "    s.sendall(piece); sent += len(piece)\n"
    f"    time.sleep(max(0, begun + sent / {RATE} - time.monotonic()))\n"
)


@pytest.fixture
def stage(netns: Callable[[], Namespace]) -> Iterator[Stage]:
    """A daemon that is ready, with the endpoints of the demo."""
    stage = Stage(netns(), "--demo", "--set", 'net.subnet6="off"')
    stage.start()
    yield stage
    stage.close()


def documents(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_transfer_is_seen_by_name_and_rate_and_can_be_ended(stage: Stage) -> None:
    """As `flows`, `top` and `list` show it, then as its end is remembered and told."""
    client = stage.ns.start([sys.executable, "-c", CLIENT])
    port = int(client.expect(r"^connected (\d+)$")[1])
    name = Path(f"/proc/{client.pid}/comm").read_text().strip()
    time.sleep(1.5)  # TCP's first burst is over

    [flow] = json.loads(stage.ngrokd("flows", "--json").stdout)["data"]
    frame = documents(stage.ngrokd("top", "--once", "--json", "--interval", "2").stdout)[0]
    [row] = [each for each in json.loads(stage.ngrokd("list", "--json").stdout)["data"] if each["port"] == 9]
    refused = stage.ngrokd("flows", "close", "4711", check=False)
    stage.ngrokd("flows", "close", str(flow["id"]))
    code = client.wait(timeout=5)
    [ended] = json.loads(stage.ngrokd("flows", "--ended", "--json").stdout)["data"]
    events = documents(stage.ngrokd("events", "--no-follow", "--json", "--name", "flow").stdout)

    assert flow["process"] == name
    assert (flow["pid"], flow["uid"]) == (client.pid, os.getuid())
    assert (flow["endpoint"], flow["state"]) == ("sink.demo:9", "ESTABLISHED")
    assert flow["source"] == f"10.107.0.1:{port}"
    assert 0 <= flow["rtt_ms"] < 1000
    assert frame["flows"][0]["id"] == flow["id"]
    assert RATE / 2 < frame["flows"][0]["rate_from_app"] < RATE * 2
    assert (row["state"], row["flows"], row["consecutive_failures"]) == ("online", 1, 0)
    assert refused.returncode == 1
    assert code == 1, "the program sees a reset"
    assert "ConnectionResetError" in client.stderr
    assert (ended["id"], ended["reason"]) == (flow["id"], "closed_by_operator")
    assert ended["bytes_from_app"] > flow["bytes_from_app"]
    assert [event["event"] for event in events] == ["flow.opened", "flow.closed"]


def test_a_capture_of_a_transfer_opens_without_a_warning(stage: Stage) -> None:
    """From its first packet to its last, read live through a pipe by the tool that people use."""
    path = stage.directory / "hello.pcapng"
    ngrokd = [sys.executable, "-m", "ngrokd", "--socket", f"{stage.directory}/ngrokd.sock"]
    capture = stage.ns.start([*ngrokd, "capture", "-w", str(path), "--endpoint", "http://hello.demo"])
    stage.ngrokd("wait", "--for", "ready")
    while not path.exists() or not path.stat().st_size:
        time.sleep(0.05)
    size = stage.ns.run([*DOWNLOAD, "http://hello.demo/bytes/3000000"]).stdout
    stage.ns.run(["ping", "-c", "1", stage_address(stage, "echo.demo")])
    time.sleep(0.5)
    capture.terminate()
    assert capture.wait(timeout=5) == 0

    with path.open("rb") as file:
        packets = list(read_capture(file))
    address = bytes(map(int, stage_address(stage, "hello.demo").split(".")))
    assert size == "3000000"
    assert all(address in (packet.packet[12:16], packet.packet[16:20]) for packet in packets)
    assert sum(packet.size for packet in packets) > 3_000_000
    assert re.search(r"^\d+ packets, 3\.\d MB", capture.stderr)
    judge_capture(path)


def judge_capture(path: Path) -> None:
    """tshark's word on it, where tshark is."""
    tshark = shutil.which("tshark")
    if tshark is None:
        return
    done = subprocess.run(
        [
            tshark,
            "-r",
            path,
            "-q",
            "-z",
            "expert,warn",
            "-o",
            "tcp.check_checksum:TRUE",
            "-o",
            "ip.check_checksum:TRUE",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Warns" not in done.stdout, done.stdout
    assert "Errors" not in done.stdout, done.stdout


def stage_address(stage: Stage, name: str) -> str:
    """The address of a name, from the hosts file inside."""
    [address] = re.findall(rf"^(10\.107\.\d+\.\d+)\t{re.escape(name)}$", stage.hosts(), re.MULTILINE)
    return str(address)


def test_what_operators_ask_is_answered(stage: Stage) -> None:
    """Each command once, against the real thing: its text, its exit code, its JSON."""
    ng = stage.ngrokd
    waited = json.loads(ng("wait", "--json").stdout)
    pinged = json.loads(ng("ping", "echo.demo", "--json").stdout)["data"]
    health = ng("health", "--ready")
    page = ng("metrics").stdout
    ng("metrics", "write", str(stage.directory / "ngrokd.prom"))
    paused = ng("pause")
    refused = stage.ns.run(["curl", "-sS", "http://hello.demo/"], check=False)
    state = stage.status()["state"]
    unready = ng("health", "--ready", check=False)
    ng("resume")
    served = stage.ns.run(["curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}", "http://hello.demo/"])
    level = ng("log-level", "debug", "--for", "10m").stdout
    logs = ng("logs", "-n", "50").stdout
    unknown = ng("ping", "nobody.demo", check=False)

    assert waited["data"]["ok"] is True
    assert pinged["ok"] is True
    assert pinged["icmp_ms"] is not None
    assert [phase["name"] for phase in pinged["phases"]] == ["connect", "tls", "header"]
    assert "ingress    yes" in health.stdout
    assert "\nngrokd_ready 1\n" in page
    assert (stage.directory / "ngrokd.prom").read_text().startswith("# HELP ngrokd_up ")
    assert paused.stdout.startswith("paused: new connections are refused")
    assert refused.returncode == 7, "curl could not connect"
    assert (state, unready.returncode) == ("paused", 1)
    assert "accepting  no: paused" in unready.stdout
    assert served.stdout == "200"
    assert level.startswith("debug, for ")
    assert "paused by process" in logs
    assert (unknown.returncode, unknown.stdout) == (1, "")
    assert "no endpoint nobody.demo is served here" in unknown.stderr


def test_a_client_that_stands_still_holds_nobody_up(stage: Stage) -> None:
    """A capture whose reader was stopped, while bytes pass: the daemon drops for it, then drops it."""
    stopped = stage.ns.start(
        [sys.executable, "-m", "ngrokd", "--socket", f"{stage.directory}/ngrokd.sock", "capture", "-w", "/dev/null"]
    )
    events = documents(stage.ngrokd("events", "--no-follow", "--json").stdout)
    while not any(event["event"] == "capture.started" for event in events):
        events = documents(stage.ngrokd("events", "--no-follow", "--json").stdout)
    os.kill(stopped.pid, signal.SIGSTOP)
    begun = time.monotonic()

    size = stage.ns.run([*DOWNLOAD, "http://hello.demo/bytes/50000000"]).stdout
    took = time.monotonic() - begun
    while not any(event["event"] == "capture.ended" for event in events):
        assert time.monotonic() < begun + 20
        time.sleep(0.3)
        events = documents(stage.ngrokd("events", "--no-follow", "--json").stdout)

    os.kill(stopped.pid, signal.SIGCONT)
    [end] = [event for event in events if event["event"] == "capture.ended"]
    assert size == "50000000"
    assert took < 10
    assert end["dropped"] > 0
