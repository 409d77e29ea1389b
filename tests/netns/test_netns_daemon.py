"""The main job on a real kernel: real clients, the real daemon, real TLS."""

from __future__ import annotations

import json
import re
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.netns.stage import Stage
from tests.netns.support import Namespace

pytestmark = pytest.mark.netns

# A client of its own process: what it prints is the outcome.
HALF_CLOSE_CLIENT = """
import hashlib, socket, sys
host, port, size, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
data = bytes(range(256)) * (size // 256)
wanted = hashlib.sha256(data).hexdigest().encode()
for _ in range(rounds):
    with socket.create_connection((host, port), 10) as s:
        s.settimeout(10)
        s.sendall(data)
        s.shutdown(socket.SHUT_WR)
        answer = b""
        while part := s.recv(65536):
            answer += part
        assert wanted in answer and str(len(data)).encode() in answer, answer[:200]
print("ok", rounds)
"""
SERVER_CLOSES_CLIENT = """
import socket, sys
host, port, size, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
data = b"x" * size
for _ in range(rounds):
    with socket.create_connection((host, port), 10) as s:
        s.settimeout(10)
        greeting = b""
        while part := s.recv(65536):
            greeting += part
        assert greeting.endswith(b"\\n"), greeting
        s.sendall(data)
        s.shutdown(socket.SHUT_WR)
        assert s.recv(1) == b""
print("ok", rounds)
"""
CONNECT_CLIENT = """
import errno, socket, sys, time
started = time.monotonic()
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), 15).close()
    print("connected", end=" ")
except OSError as error:
    print(errno.errorcode.get(error.errno, error), end=" ")
print(round((time.monotonic() - started) * 1000))
"""
ECHO_LINES_CLIENT = """
import socket, sys
s = socket.create_connection(("echo.demo", 7), 10)
for line in sys.stdin:
    s.sendall(line.encode())
    print("echo", s.recv(100).decode(), end="")
"""
HUNDRED_FLOWS_CLIENT = """
import socket, time
held = [socket.create_connection(("echo.demo", 7), 10) for _ in range(100)]
for s in held:
    s.sendall(b"x")
for s in held:
    s.recv(1)
print("open")
time.sleep(60)
"""
READ_ALL_CLIENT = """
import errno, socket, sys
received = 0
try:  # a reset may be there before connect() has come back
    with socket.create_connection((sys.argv[1], int(sys.argv[2])), 10) as s:
        s.settimeout(10)
        while part := s.recv(65536):
            received += len(part)
        print("eof", received)
except OSError as error:
    print(errno.errorcode.get(error.errno, error), received)
"""


@pytest.fixture
def stage(netns: Callable[[], Namespace]) -> Iterator[Callable[..., Stage]]:
    """Makes stages; the last act of the test is to take them away."""
    made: list[Stage] = []

    def make(*options: str) -> Stage:
        made.append(Stage(netns(), *(options or ("--demo",))))
        return made[-1]

    yield make
    for one in made:
        one.close()


def connect(stage: Stage, host: str, port: int) -> tuple[str, int]:
    """What a client's connect() says, and after how many milliseconds."""
    word, ms = stage.ns.python(CONNECT_CLIENT, host, str(port)).stdout.split()
    return word, int(ms)


def test_curl_by_name_carries_100_mb_each_way_exactly(stage: Callable[..., Stage], tmp_path: Path) -> None:
    """The main job: a program knows a name, and the bytes are the endpoint's."""
    play = stage()
    play.start()

    greeting = play.ns.run(["curl", "-sS", "--max-time", "10", "http://hello.demo/"])
    down = play.ns.run(
        ["sh", "-c", "curl -sS -D /run/headers http://hello.demo/bytes/100000000 | sha256sum; cat /run/headers"]
    )
    play.ns.run(["sh", "-c", "head -c 100000000 /dev/urandom > /run/body"])
    up = play.ns.run(
        ["sh", "-c", "sha256sum < /run/body; curl -sS -H Expect: --data-binary @/run/body http://hello.demo/hash"]
    )

    assert greeting.stdout
    received = down.stdout.split()[0]
    assert received in re.findall(r"[0-9a-f]{64}", down.stdout.split("\n", 1)[1])
    sent, answered = re.findall(r"[0-9a-f]{64}", up.stdout)[:2]
    assert sent == answered


def test_twenty_curls_at_once(stage: Callable[..., Stage]) -> None:
    """Flows do not get into each other's way."""
    play = stage()
    play.start()

    run = play.ns.run(
        [
            "sh",
            "-c",
            "for i in $(seq 20); do curl -sS --max-time 20 http://hello.demo/bytes/1000000 | wc -c & done; wait",
        ]
    )

    assert run.stdout.split() == ["1000000"] * 20


def test_a_server_that_speaks_first_is_heard(stage: Callable[..., Stage]) -> None:
    """Nothing waits for the app to say something: raw bytes for every protocol."""
    play = stage()
    play.start()

    run = play.ns.python(
        "import socket; s = socket.create_connection(('banner.demo', 25), 5); s.settimeout(5); print(s.recv(100))"
    )

    assert len(run.stdout) > 5


@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_half_close_loses_no_byte(stage: Callable[..., Stage], version: str) -> None:
    """FIN becomes close_notify and the other way round, and the other direction lives on."""
    play = stage()
    play.lab.do(f"tls {version}")
    play.start()

    answered = play.ns.python(HALF_CLOSE_CLIENT, "answer.demo", "9000", "102400", "200", timeout=60)
    sent = play.ns.python(SERVER_CLOSES_CLIENT, "closes.demo", "9001", "50000", "200", timeout=60)

    assert answered.stdout == sent.stdout == "ok 200\n"
    deadline = time.monotonic() + 10  # the back end counts a connection when it is over, not when the client is done
    while True:
        counted = re.findall(r"\b50000\b", json.dumps(play.lab.do("tallies closes.demo:9001")))
        if len(counted) >= 200:
            break
        assert time.monotonic() < deadline, len(counted)
        time.sleep(0.05)


def test_connect_is_honest(stage: Callable[..., Stage]) -> None:
    """Whoever cannot be served gets a refusal at once, not a connection that dies."""
    play = stage()
    play.start()
    address = play.ns.run(["getent", "ahostsv4", "hello.demo"]).stdout.split()[0]

    assert connect(play, "hello.demo", 80)[0] == "connected"
    word, ms = connect(play, address, 81)
    assert (word, ms < 100) == ("ECONNREFUSED", True), (word, ms)
    assert connect(play, "10.107.99.99", 80)[0] == "EHOSTUNREACH"
    play.lab.do("toxic hello.demo:80 error_code=ERR_NGROK_3200 error_message=offline")
    word, ms = connect(play, "hello.demo", 80)
    assert (word, ms < 500) == ("ECONNREFUSED", True), (word, ms)
    play.lab.do("toxic hello.demo:80 off")
    play.lab.do("ingress down")
    play.lab.do("drop")  # and the connections that were kept ready go with it
    word, ms = connect(play, "hello.demo", 80)
    assert (word, ms < 500) == ("ECONNREFUSED", True), (word, ms)
    play.lab.do("ingress up")
    assert connect(play, "hello.demo", 80)[0] == "connected"


@pytest.mark.parametrize("end", ["reset", "cut", "alert"])
def test_a_stream_that_is_cut_is_a_reset_for_the_app(stage: Callable[..., Stage], end: str) -> None:
    """A torn answer must never look like a whole one."""
    play = stage()
    play.start()
    play.lab.do(f"toxic source.demo:19 after_bytes=300000 then={end}")

    outcome, received = play.ns.python(READ_ALL_CLIENT, "source.demo", "19").stdout.split()

    assert outcome == "ECONNRESET"
    assert int(received) <= 300000


@pytest.mark.parametrize("wrong", ["foreign", "expired", "wrong-name"])
def test_an_ingress_that_cannot_prove_itself_gets_nothing(stage: Callable[..., Stage], wrong: str) -> None:
    """Refused, and not one byte was sent after the handshake."""
    play = stage()
    play.lab.do(f"certificate {wrong}")
    play.start()

    assert connect(play, "hello.demo", 80)[0] == "ECONNREFUSED"

    seen = play.lab.do("connections 20")["connections"]
    assert seen
    assert all(one["after_handshake"] == 0 for one in seen), seen
    assert "not trusted" in play.status()["ingress"]["problem"]


def test_a_ca_known_by_its_fingerprint_is_found_and_kept(stage: Callable[..., Stage]) -> None:
    """The default trust: ngrok's private CA is not in any store, and we carry no copy of it."""
    play = stage("--demo", "--trust", "fingerprint")
    play.start()

    assert connect(play, "hello.demo", 80)[0] == "connected"
    assert connect(play, "hello.demo", 80)[0] == "connected"

    assert "BEGIN CERTIFICATE" in (play.directory / "state" / "ingress-ca.pem").read_text()


def test_sigterm_leaves_nothing_within_five_seconds_of_100_open_flows(stage: Callable[..., Stage]) -> None:
    """Link, routes, hosts lines, socket and temporary files go; foreign hosts lines stay byte for byte."""
    play = stage()
    foreign = play.hosts() + "192.0.2.1\tforeign.example # kept\r\n\n# no newline at the end"
    play.ns.write_file("/etc/hosts", foreign)
    before = play.network()
    play.start()
    assert "hello.demo" in play.hosts()
    clients = play.ns.start([sys.executable, "-u", "-c", HUNDRED_FLOWS_CLIENT])
    clients.expect("open", timeout=30)

    started = time.monotonic()
    code = play.stop()
    took = time.monotonic() - started

    assert code == 0
    assert took < 5
    assert play.hosts() == foreign
    assert play.network() == before
    left = {path.name for path in play.directory.rglob("*")}
    assert not any("sock" in name or "lock" in name or "ngrokd-" in name or name.endswith(".new") for name in left), (
        left
    )


def test_names_keep_their_addresses_through_everything(stage: Callable[..., Stage]) -> None:
    """Restart, SIGKILL, outage, outage and restart: same names, same addresses."""
    play = stage()
    play.start()
    wanted = re.findall(r"^10\.107\..*$", play.hosts(), re.MULTILINE)
    assert len(wanted) == 7

    assert play.stop() == 0
    assert "10.107." not in play.hosts()
    daemon = play.start()
    assert re.findall(r"^10\.107\..*$", play.hosts(), re.MULTILINE) == wanted

    daemon.kill()
    daemon.wait(timeout=5)
    word, ms = connect(play, "hello.demo", 80)
    assert (word, ms < 100) == ("EHOSTUNREACH", True), "the guard route must answer at once"
    play.lab.do("outage on")
    play.start()
    assert re.findall(r"^10\.107\..*$", play.hosts(), re.MULTILINE) == wanted
    assert connect(play, "hello.demo", 80)[0] == "connected"
    assert play.status()["api"]["problem"]

    play.lab.do("outage off")
    play.lab.do("add http://zoo.demo http")
    deadline = time.monotonic() + 12
    while "zoo.demo" not in play.hosts():
        assert time.monotonic() < deadline, play.daemon
        time.sleep(0.1)
    assert set(re.findall(r"^10\.107\..*$", play.hosts(), re.MULTILINE)) > set(wanted)
    assert play.stop() == 0


def test_a_second_signal_ends_the_drain(stage: Callable[..., Stage]) -> None:
    """Whoever presses ^C twice does not want to wait."""
    play = stage("--demo", "--set", 'net.drain="60s"')
    daemon = play.start()
    client = play.ns.start(
        [sys.executable, "-c", "import socket; s = socket.create_connection(('echo.demo', 7)); print('on'); s.recv(1)"],
        env={"PYTHONUNBUFFERED": "1"},
    )
    client.expect("on")

    daemon.send_signal(signal.SIGINT)
    daemon.expect("draining|stopping", stream="stderr")
    assert connect(play, "10.107.0.2", 80)[0] == "ECONNREFUSED"
    started = time.monotonic()
    daemon.send_signal(signal.SIGINT)

    assert daemon.wait(timeout=5) == 0
    assert time.monotonic() - started < 2


def test_the_control_socket_speaks_the_go_daemons_language(stage: Callable[..., Stage]) -> None:
    """The exact requests of its ngrokctl, sent as it sends them: no newline, no half-close."""
    play = stage()
    play.start()
    ask = (
        "import json, socket, sys\n"
        "for request in sys.argv[2:]:\n"
        "    s = socket.socket(socket.AF_UNIX); s.settimeout(5); s.connect(sys.argv[1]); s.sendall(request.encode())\n"
        "    data = b''\n"
        "    while part := s.recv(65536): data += part\n"
        "    assert data.endswith(b'\\n') and data.count(b'\\n') == 1\n"
        "    print(data.decode(), end='')\n"
    )

    run = play.ns.python(
        ask,
        f"{play.directory}/ngrokd.sock",
        '{"command":"status"}',
        '{"command":"list"}',
        '{"command":"set-api-key","args":[]}',
        '{"command":"x"}',
        "junk",
        '{"command":"refresh-cert","args":["--force"]}',
    )

    status, listed, key, unknown, junk, renewed = map(json.loads, run.stdout.splitlines())
    assert status["success"] is True
    assert status["data"]["registered"] is True
    assert status["data"]["operator_id"].startswith("k8sop_")
    assert status["data"]["endpoint_count"] == 7
    assert status["data"]["ingress_endpoint"]
    assert {"id", "hostname", "ip", "port", "url", "local_listener", "network_port", "listen_interface"} <= set(
        listed["data"][0]
    )
    assert key == {**key, "success": False, "error": "API key required"}
    assert unknown == {**unknown, "success": False, "error": "unknown command: x"}
    assert junk["error"].startswith("failed to decode command: ")
    assert renewed["data"] == "Certificate renewal forced (check daemon logs)"
    mode = (play.directory / "ngrokd.sock").stat().st_mode
    assert stat.S_IMODE(mode) == 0o660


def test_a_renewed_certificate_is_for_new_flows_and_live_ones_go_on(stage: Callable[..., Stage]) -> None:
    """Renewal changes nothing for whoever is connected."""
    play = stage()
    play.start()
    client = play.ns.start([sys.executable, "-u", "-c", ECHO_LINES_CLIENT])
    client.write("one\n")
    client.expect("echo one")
    before = play.lab.do("connections 1")["connections"][0]["client_serial"]

    play.ngrokd("refresh-cert", "--force")
    client.write("two\n")
    client.expect("echo two")
    assert connect(play, "hello.demo", 80)[0] == "connected"

    after = play.lab.do("connections 1")["connections"][0]["client_serial"]
    assert before != after


def test_two_daemons_side_by_side_and_a_third_that_collides(stage: Callable[..., Stage]) -> None:
    """Each with its own interface, subnet, state, socket and port; what is taken is named, with exit code 73."""
    play = stage("--demo", "--set", 'net.interface="ngrokd1"')
    play.start()
    first = Path(play.lab.config).read_text()
    second = (
        first.replace("ngrokd1", "ngrokd2")
        .replace(f"{play.directory}/state", f"{play.directory}/state2")
        .replace("ngrokd.sock", "ngrokd2.sock")
        + '\n[http]\nlisten = "127.0.0.1:8082"\n'
    ).replace("[net]\n", '[net]\nsubnet = "10.108.0.0/16"\n')
    (play.directory / "second.toml").write_text(second)

    other = play.ns.start(
        [sys.executable, "-m", "ngrokd", "run", "--config", str(play.directory / "second.toml")], cwd=Path.cwd()
    )
    line = other.expect(r"^\[ready\].*")[0]

    assert "tun=ngrokd2 subnet=10.108.0.0/16" in line
    third = play.ns.run(
        [sys.executable, "-m", "ngrokd", "run", "--config", play.lab.config], check=False, cwd=Path.cwd(), timeout=10
    )
    assert third.returncode == 73
    assert "ngrokd" in third.stderr


def test_the_interface_comes_back_and_flows_survive_when_somebody_deletes_it(stage: Callable[..., Stage]) -> None:
    """A link is not a connection: TCP bridges the gap."""
    play = stage()
    play.start()
    client = play.ns.start([sys.executable, "-u", "-c", ECHO_LINES_CLIENT])
    client.write("one\n")
    client.expect("echo one")

    play.ns.run(["ip", "link", "del", "ngrokd0"])
    deadline = time.monotonic() + 5
    while "ngrokd0" not in play.ns.run(["ip", "route"]).stdout:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    client.write("two\n")
    client.expect("echo two", timeout=10)
