"""The daemon within the walls of its systemd unit, as far as they can be built without systemd.

The capabilities, the read-only file system, /proc without other processes and without settings, no new privileges. The
filter of system calls is systemd's to compile; what the daemon calls was compared with it by hand.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator

import pytest

from ngrokd.host.units import Service, systemd_unit
from tests.netns.stage import Stage
from tests.netns.support import ROOT, Namespace, Running

pytestmark = pytest.mark.netns

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@pytest.fixture
def stage(netns: Callable[[], Namespace]) -> Iterator[Stage]:
    play = Stage(netns(), "--demo")
    yield play
    play.close()


def walled(play: Stage, *arguments: str, workers: int = 1) -> list[str]:
    """A command line of ngrokd as the unit would run it."""
    unit = systemd_unit(Service(workers=workers))
    [capabilities] = [line.partition("=")[2] for line in unit.splitlines() if line.startswith("CapabilityBoundingSet")]
    bounding = "".join(f",+{name.removeprefix('CAP_').lower()}" for name in capabilities.split())
    rights = f"setpriv --bounding-set=-all{bounding} --inh-caps=-all --no-new-privs"
    ours = shlex.quote(str(play.directory))
    walls = [
        f"mount --bind {ours} {ours}",
        "mount -o remount,bind,ro /",  # /etc and /run are mounts of the namespace, and stay as they are
        "mount -t proc -o nosuid,nodev,noexec,hidepid=invisible,subset=pid proc /proc",
        "umask 077",
        f"exec {rights} {sys.executable} -m ngrokd --config {shlex.quote(play.lab.config)} {' '.join(arguments)}",
    ]
    return ["unshare", "--mount", "sh", "-e", "-c", "; ".join(walls)]


def start(play: Stage, *, workers: int = 1) -> Running:
    command = walled(play, "run", "--set", f"net.workers={workers}", workers=workers)
    play.daemon = play.ns.start(command, env={"NGROKD_SOCKET": "/run/ngrokd/ngrokd.sock"})
    play.daemon.expect(r"^\[ready\] .*\n", timeout=15)
    return play.daemon


@pytest.mark.parametrize("workers", [1, 2])
def test_everything_works_within_the_walls(stage: Stage, workers: int) -> None:
    """Device, routes, names, connections; the commands find the service's socket by themselves; all is undone."""
    stage.ns.run(["mkdir", "-m", "755", "/run/ngrokd"])
    stage.ns.run(["sh", "-c", "grep -q '^127' /etc/hosts"])
    before, hosts = stage.network(), stage.hosts()
    start(stage, workers=workers)

    greeting = stage.ns.run(["curl", "-sS", "--max-time", "10", "http://hello.demo/"]).stdout
    connect = "import socket; s = socket.create_connection(('echo.demo', 7)); s.sendall(b'x'); print('on')"
    client = f"{connect}; s.recv(9); s.recv(9)"
    stage.ns.start([sys.executable, "-u", "-c", client]).expect("on")
    [flow] = json.loads(stage.ns.run([sys.executable, "-m", "ngrokd", "flows", "--json"]).stdout)["data"]
    status = json.loads(stage.ns.run([sys.executable, "-m", "ngrokd", "status", "--json"]).stdout)["data"]
    written = stage.ns.run(walled(stage, "status"), env={"NGROKD_SOCKET": "/run/ngrokd/ngrokd.sock"}).stdout

    assert "lab" in greeting
    assert (flow["uid"], "python" in flow["process"]) == (0, True), "who asks sees what the daemon may not"
    assert status["state"] == "ready"
    assert status["hosts"]["problem"] == ""
    assert "is running" in written
    assert stage.stop() == 0
    assert (stage.network(), stage.hosts()) == (before, hosts)


@pytest.mark.parametrize("workers", [1, 2])
def test_what_a_killed_service_left_is_removed_within_the_walls(stage: Stage, workers: int) -> None:
    """ExecStopPost has no more rights than the daemon had; workers end by themselves."""
    stage.ns.run(["mkdir", "-m", "755", "/run/ngrokd"])
    before, hosts = stage.network(), stage.hosts()
    daemon = start(stage, workers=workers)
    daemon.kill()
    daemon.wait(timeout=5)
    assert "10.107." in stage.hosts()

    said = stage.ns.run(walled(stage, "cleanup"), env={"NGROKD_SOCKET": "/run/ngrokd/ngrokd.sock"}).stdout

    assert "removed guard" in said
    assert (stage.network(), stage.hosts()) == (before, hosts)
    assert stage.ns.run(["ls", "/run/ngrokd"]).stdout == ""


def test_a_service_is_not_made_of_what_others_can_change(stage: Stage) -> None:
    """This very checkout, when it is somebody's; and root is told how to do better."""
    stage.ns.private("/usr/local")
    stage.ns.run(["mkdir", "-p", "/usr/local/copy", "/etc/systemd/system"])
    stage.ns.run(["cp", "-r", "ngrokd", "tun", "/usr/local/copy/"])
    stage.ns.run(["chown", "-R", "65534", "/usr/local/copy/tun"])
    command = [sys.executable, "-m", "ngrokd", "service", "install"]

    refused = stage.ns.run(command, cwd="/usr/local/copy", check=False)

    assert refused.returncode == 77
    assert "/usr/local/copy/tun" in refused.stderr
    assert "belongs to uid 65534" in refused.stderr
    assert "sudo make install" in refused.stderr
    assert "ngrokd.service" not in stage.ns.run(["ls", "/etc/systemd/system"]).stdout


def test_the_life_of_a_service(stage: Stage) -> None:
    """Installed and started, found by every command, restarted when it has changed, stopped, removed."""
    ns = stage.ns
    ns.run(["mkdir", "-p", "/etc/systemd/system", "/run/bin", "/run/systemd/system"])
    ns.write_file("/run/bin/systemctl", f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/netns/systemctl.py "$@"\n')
    ns.run(["chmod", "755", "/run/bin/systemctl"])
    ns.write_file("/etc/ngrokd.toml", ns.read_file(stage.lab.config))
    env = {"PATH": f"/run/bin:{PATH}", "NGROKD_CONFIG": "/etc/ngrokd.toml"}

    def service(*words: str, check: bool = True) -> tuple[int, str]:
        command = [sys.executable, "-m", "ngrokd", "service", *words]
        done = ns.run(command, env=env, check=check, timeout=60)
        return done.returncode, done.stdout + done.stderr

    by_hand = stage.start()
    refused = service("install", "--now", "--trust-writable", check=False)
    assert refused[0] == 73
    assert f"process {by_hand.pid}" in refused[1]
    assert stage.stop() == 0

    assert service("install", "--now", "--trust-writable")[0] == 0
    ask = [sys.executable, "-m", "ngrokd", "--socket", "/run/ngrokd/ngrokd.sock"]
    ns.run([*ask, "wait", "--timeout", "20s"], timeout=30)
    first = json.loads(ns.run([*ask, "status", "--json"]).stdout)["data"]["pid"]
    code, said = service("status")
    assert (code, f"Process  {first}" in said) == (0, True), said
    assert "unchanged" in service("install", "--now", "--trust-writable")[1]
    assert json.loads(ns.run([*ask, "status", "--json"]).stdout)["data"]["pid"] == first
    ns.write_file("/etc/ngrokd.toml", ns.read_file("/etc/ngrokd.toml") + '\n[net]\ndrain = "60s"\n')
    assert "TimeoutStopSec=70" in service("print")[1]
    service("restart")
    ns.run([*ask, "wait", "--timeout", "20s"], timeout=30)
    assert json.loads(ns.run([*ask, "status", "--json"]).stdout)["data"]["pid"] != first
    assert service("stop")[0] == 0
    assert service("status", check=False)[0] == 3
    assert service("uninstall")[0] == 0
    assert "there was no service" in service("uninstall")[1]
    assert "ngrokd.service" not in ns.run(["ls", "/etc/systemd/system"]).stdout
    assert "10.107." not in stage.hosts()
