"""The tests' own ground: a namespace must keep what happens in it inside, and leave nothing."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from tests.netns import support
from tests.netns.support import HOLDER, ROOT, Failed, Namespace

WELL_BEHAVED = """
import os, signal, sys

def bye(*_):
    print("bye", flush=True)
    sys.exit(7)

signal.signal(signal.SIGTERM, bye)
print("[ready]", os.getpid(), flush=True)
print(input("name? "), flush=True)
signal.pause()
"""

TEST_RUN = """
import signal
from tests.netns.support import open_namespace

with open_namespace() as ns:
    program = ns.start(["sleep", "300"])
    print(ns.pid, program.pid, flush=True)
    signal.pause()
"""

CONVERSATION = """
import trio

async def main():
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, lambda stream: stream.send_all(b"hello"), listeners)
        async with await trio.open_tcp_stream("my-api.prod", listeners[0].socket.getsockname()[1]) as stream:
            print((await stream.receive_some()).decode())
        nursery.cancel_scope.cancel()

trio.run(main)
"""


def test_a_fresh_namespace_has_only_lo_and_it_is_up(netns: Callable[[], Namespace]) -> None:
    """Everything else a test sees there, it made itself."""
    ns = netns()

    assert ns.run(["ls", "/sys/class/net"]).stdout.split() == ["lo"]
    assert "state UNKNOWN" in ns.run(["ip", "link", "show", "up"]).stdout


def test_namespaces_do_not_see_each_other(netns: Callable[[], Namespace]) -> None:
    one, other = netns(), netns()

    one.run(["ip", "link", "add", "only0", "type", "veth", "peer", "name", "only1"])

    assert "only0" in one.run(["ip", "link"]).stdout
    assert "only0" not in other.run(["ip", "link"]).stdout
    assert "only0" not in subprocess.run(["ip", "link"], capture_output=True, text=True, check=True).stdout


def test_two_namespaces_can_be_cabled(netns: Callable[[], Namespace]) -> None:
    """That is how a test makes a neighbour on the LAN."""
    here, there = netns(), netns()
    here.run(["ip", "link", "add", "v0", "type", "veth", "peer", "name", "v1", "netns", str(there.pid)])
    here.run(["ip", "addr", "add", "192.0.2.1/24", "dev", "v0"])
    there.run(["ip", "addr", "add", "192.0.2.2/24", "dev", "v1"])
    here.run(["ip", "link", "set", "v0", "up"])
    there.run(["ip", "link", "set", "v1", "up"])

    with here.call(socket.create_server, ("192.0.2.1", 80)), there.call(socket.create_connection, ("192.0.2.1", 80), 5):
        pass


def test_files_of_etc_and_run_are_private(netns: Callable[[], Namespace]) -> None:
    """The hosts file is renamed over, as the daemon does, and the machine's own does not change."""
    before = Path("/etc/hosts").read_bytes()
    ns = netns()

    ns.run(["sh", "-c", "echo 10.107.0.2 my-api.prod >/etc/hosts.new && mv /etc/hosts.new /etc/hosts"])
    ns.run(["sh", "-c", "mkdir /etc/ngrokd && echo x >/var/run/ngrokd.sock"])

    assert ns.read_file("/etc/hosts") == "10.107.0.2 my-api.prod\n"
    assert ns.run(["getent", "hosts", "my-api.prod"]).stdout.startswith("10.107.0.2 ")
    assert Path("/etc/hosts").read_bytes() == before
    assert not Path("/etc/hosts.new").exists()


def test_another_directory_can_be_made_private(netns: Callable[[], Namespace], tmp_path: Path) -> None:
    (tmp_path / "there").write_text("before")
    ns = netns()

    ns.private(tmp_path)
    ns.write_file(tmp_path / "there", "inside")

    assert ns.read_file(tmp_path / "there") == "inside"
    assert (tmp_path / "there").read_text() == "before"


def test_names_fail_at_once(netns: Callable[[], Namespace]) -> None:
    """A test must not wait for a DNS server that cannot be reached."""
    ns = netns()

    began = time.monotonic()
    result = ns.run(["getent", "hosts", "my-api.example"], check=False)

    assert result.returncode == 2
    assert time.monotonic() - began < 5


def test_a_program_runs_in_the_repository(netns: Callable[[], Namespace]) -> None:
    ns = netns()

    assert ns.python("import os, tun; print(os.getcwd())").stdout.strip() == str(ROOT)


def test_a_failing_program_fails_the_test_and_shows_what_it_said(netns: Callable[[], Namespace]) -> None:
    ns = netns()

    with pytest.raises(Failed, match="no such luck"):
        ns.run(["sh", "-c", "echo no such luck >&2; exit 3"])
    assert ns.run(["sh", "-c", "exit 3"], check=False).returncode == 3


def test_a_program_that_hangs_is_killed(netns: Callable[[], Namespace]) -> None:
    ns = netns()

    with pytest.raises(Failed, match=r"still ran after 0\.3 s"):
        ns.run(["sh", "-c", "sleep 60; true"], timeout=0.3)


def test_a_started_program_is_watched_and_signalled(netns: Callable[[], Namespace]) -> None:
    """SIGTERM reaches the program itself, not a wrapper."""
    ns = netns()
    program = ns.start([sys.executable, "-c", WELL_BEHAVED])

    assert int(program.expect(r"^\[ready\] (\d+)$")[1]) == program.pid
    program.expect(r"name\? \Z")
    program.write("hello\n")
    program.expect("hello$")
    program.send_signal(signal.SIGTERM)

    assert program.wait(timeout=10) == 7
    assert program.stdout.endswith("bye\n")


def test_waiting_for_words_of_a_dead_program_fails_at_once(netns: Callable[[], Namespace]) -> None:
    ns = netns()
    program = ns.start(["sh", "-c", "echo what I had to say >&2"])

    with pytest.raises(Failed, match="what I had to say"):
        program.expect("ready", timeout=60)


def test_a_function_runs_inside_and_its_sockets_stay_there(netns: Callable[[], Namespace]) -> None:
    """A test's own event loop can serve a socket that only kernel clients inside can reach."""
    ns = netns()
    namespace = os.readlink("/proc/self/ns/net")

    with ns.call(socket.create_server, ("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        client = ns.start(["curl", "-s", "-m", "10", f"http://127.0.0.1:{port}/"])
        server.settimeout(10)
        connection, _ = server.accept()
        with connection:
            connection.recv(1000)
            connection.sendall(b"HTTP/1.0 200 OK\r\n\r\nhello\n")

    client.expect("^hello$", timeout=10)
    assert ns.call(os.readlink, "/proc/thread-self/ns/net") != namespace
    assert os.readlink("/proc/thread-self/ns/net") == namespace


def test_what_a_function_raises_comes_back(netns: Callable[[], Namespace]) -> None:
    ns = netns()

    with pytest.raises(FileNotFoundError):
        ns.call(os.readlink, "/nowhere")


async def test_the_loop_goes_on_while_a_program_runs(netns: Callable[[], Namespace]) -> None:
    ns = netns()
    with ns.call(socket.create_server, ("127.0.0.1", 0)) as server:
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(server))

        async def hello(stream: trio.SocketStream) -> None:
            await stream.receive_some()
            await stream.send_all(b"HTTP/1.0 200 OK\r\n\r\nhello")
            await stream.aclose()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, hello, [listener])
            result = await ns.run_async(["curl", "-s", "-m", "10", f"http://127.0.0.1:{server.getsockname()[1]}/"])
            nursery.cancel_scope.cancel()

    assert result.stdout == "hello"


def test_an_event_loop_of_its_own_needs_a_process_of_its_own(netns: Callable[[], Namespace]) -> None:
    """Trio's worker threads serve the whole process: one made outside would look names up outside."""
    ns = netns()
    ns.write_file("/etc/hosts", "127.0.0.1 my-api.prod\n")

    with pytest.raises(ValueError, match="python"):
        ns.call(trio.run, trio.sleep, 0)

    assert ns.python(CONVERSATION).stdout == "hello\n"


@pytest.mark.parametrize(("ci", "outcome"), [("true", "Failed"), ("", "Skipped")])
def test_where_no_namespace_can_be_made_only_ci_fails(monkeypatch: pytest.MonkeyPatch, ci: str, outcome: str) -> None:
    """On a person's machine it is a reason to skip, told in words."""
    monkeypatch.setenv("CI", ci)
    monkeypatch.setattr(support, "missing_for_namespaces", lambda: "run as root")

    with pytest.raises(BaseException, match="run as root") as caught:
        support.require_namespaces()

    assert type(caught.value).__name__ == outcome


def test_daemons_that_left_their_session_end_with_the_namespace(netns: Callable[[], Namespace]) -> None:
    """Nothing that was started inside survives."""
    ns = netns()
    pid = int(ns.run(["sh", "-c", "setsid sleep 300 >/dev/null 2>&1 & echo $!"]).stdout)
    assert Path(f"/proc/{pid}").exists()

    ns.close()

    assert not _runs(pid)


def test_everything_ends_when_the_test_run_is_killed(netns: Callable[[], Namespace]) -> None:
    """The holder watches its standard input, which the kernel closes for a run that died."""
    netns()
    run = subprocess.Popen([sys.executable, "-c", TEST_RUN], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    with run:
        assert run.stdout is not None
        pids = [int(word) for word in run.stdout.readline().split()]

        run.kill()

    deadline = time.monotonic() + 10
    while any(_runs(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(_runs(pid) for pid in pids)


def test_the_holder_refuses_to_work_outside(netns: Callable[[], Namespace]) -> None:
    """Run by hand it would lay its files over the machine's own."""
    result = subprocess.run([sys.executable, "-I", "-S", HOLDER], capture_output=True, text=True, check=False)

    assert result.returncode == 1
    assert "namespace of its own" in result.stderr


def test_secrets_and_proxies_of_the_person_stay_outside(
    netns: Callable[[], Namespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NGROK_API_KEY", "secret")
    monkeypatch.setenv("https_proxy", "http://192.0.2.1:1")
    ns = netns()

    names = ns.run(["env"], env={"MARK": "1"}).stdout

    assert "MARK=1" in names
    assert "secret" not in names
    assert "192.0.2.1" not in names


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
