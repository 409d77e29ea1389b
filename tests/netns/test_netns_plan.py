"""`ngrokd plan` says what `ngrokd run` does, and `ngrokd cleanup` takes away what a killed one left."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ngrokd.host import linux
from ngrokd.host.plan import KERNEL, Plan, Step
from tests.netns.stage import Stage
from tests.netns.support import Namespace

pytestmark = pytest.mark.netns

NetNS = Callable[[], Namespace]
FOREIGN_LINES = "192.0.2.1\tforeign.example # kept\r\n\n# no newline at the end"


@pytest.fixture
def stage(netns: NetNS) -> Iterator[Callable[..., Stage]]:
    made: list[Stage] = []

    def make(*options: str) -> Stage:
        made.append(Stage(netns(), "--demo", *options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def ngrokd(play: Stage, *arguments: str, **options: Any) -> Any:
    """Run a command with the daemon's own configuration."""
    return play.ngrokd("--config", play.lab.config, *arguments, **options)


def document(play: Stage, *arguments: str, **options: Any) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(ngrokd(play, *arguments, "--json", **options).stdout)["data"]
    return data


def steps_of(data: list[dict[str, Any]]) -> Plan:
    return Plan(tuple(Step(one["kind"], tuple(one["args"].items()), "", ()) for one in data))


def network(ns: Namespace) -> dict[str, object]:
    """What the kernel has, as far as it does not depend on who opened the device."""
    shown = {}
    for what in ("addr", "-4 route show table all", "-6 route show table all", "rule"):
        shown[what] = json.loads(ns.run(["ip", "-j", *what.split()]).stdout or "[]")
    links = [link for link in shown["addr"] if link["ifname"] != "lo"]
    routes = [
        (
            route.get("type", "unicast"),
            route["dst"],
            route.get("dev", ""),
            route.get("metric", 0),
            route.get("table", ""),
        )
        for family in ("-4", "-6")
        for route in shown[f"{family} route show table all"]
    ]
    return {
        "links": [
            (
                *(link["ifname"], link["mtu"], link["txqlen"], "UP" in link["flags"]),
                *((one["local"], one["prefixlen"]) for one in link["addr_info"]),
            )
            for link in links
        ],
        "routes": sorted(routes),
        "rules": shown["rule"],
    }


def test_the_plan_is_what_run_does(stage: Callable[..., Stage], netns: NetNS) -> None:
    """Its steps are what the kernel then has; typed elsewhere as a script, it makes the same; undone, nothing stays."""
    play = stage("--set", 'net.subnet6="fd00:107::/64"')
    elsewhere = netns()
    empty = network(elsewhere)
    planned = document(play, "plan")
    script = ngrokd(play, "plan").stdout
    backwards = ngrokd(play, "plan", "--undo").stdout
    play.start()

    kernel = steps_of(planned["steps"]).only(*KERNEL)
    elsewhere.run(["sh", "-e", "-c", script.replace(str(play.directory), "/run")])

    assert planned["conflicts"] == []
    assert len(kernel) == 8
    assert play.ns.call(linux.in_force, kernel) == kernel
    assert network(play.ns) == network(elsewhere)
    assert {("state", True), ("control", True), ("http", True), ("hosts", True)} == {
        (step["kind"], is_done(play, step)) for step in planned["steps"] if step["kind"] not in KERNEL
    }
    elsewhere.run(["sh", "-e", "-c", backwards.replace(str(play.directory), "/run")])
    assert network(elsewhere) == empty


def is_done(play: Stage, step: dict[str, Any]) -> bool:
    """Whether a step that is not the kernel's has been done."""
    match step["kind"]:
        case "state":
            return (Path(step["args"]["directory"]) / "lock").exists()
        case "control":
            return Path(step["args"]["path"]).is_socket()
        case "http":
            return play.ns.run(["curl", "-sS", f"http://{step['args']['listen']}/health"]).stdout == "healthy\n"
        case _:
            return "BEGIN ngrokd managed section" in play.ns.read_file(step["args"]["path"])


def test_a_plan_for_a_machine_where_it_runs_already(stage: Callable[..., Stage]) -> None:
    """What the daemon has is not in its own way."""
    play = stage()
    daemon = play.start()

    planned = document(play, "plan")

    assert planned["conflicts"] == []
    assert planned["running"].startswith(f"process {daemon.pid} ")


def routes(play: Stage) -> str:
    """IPv4 only: the kernel goes on adding routes of IPv6 to a new link for a while."""
    return str(play.ns.run(["ip", "-4", "route", "show", "table", "all"]).stdout)


def test_a_plan_needs_no_rights_and_names_who_is_in_the_way(stage: Callable[..., Stage]) -> None:
    """Before anybody types sudo: a foreign route, with a subnet that is free, and a port that is taken."""
    play = stage()
    play.ns.run(["ip", "link", "add", "br-1234", "type", "bridge"])
    play.ns.run(["ip", "link", "set", "br-1234", "addrgenmode", "none"])  # or one comes by itself, later
    play.ns.run(["ip", "addr", "add", "10.107.3.1/24", "dev", "br-1234"])
    play.ns.run(["ip", "link", "set", "br-1234", "addrgenmode", "none", "up"])
    squat = "import socket, time; s = socket.create_server(('127.0.0.1', 8081)); print('on'); time.sleep(60)"
    squatter = play.ns.start([sys.executable, "-u", "-c", squat])
    squatter.expect("on")
    before = routes(play)

    refused = ngrokd(play, "plan", check=False)
    data = document(play, "plan", check=False)

    assert refused.returncode == 1
    said = " ".join(line.lstrip("# ") for line in refused.stdout.splitlines())
    assert "CONFLICT: 10.107.0.0/16 is taken: address 10.107.3.1/24 of br-1234 (a bridge, of Docker)" in said
    assert "10.108.0.0/16" in said
    assert [one["about"] for one in data["conflicts"]] == ["routes", "routes", "http"]
    assert "process" in data["conflicts"][-1]["what"]
    assert routes(play) == before
    bare = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--", sys.executable, "-m", "ngrokd"]
    unprivileged = play.ns.run([*bare, "--config", play.lab.config, "plan", "--json"], check=False)
    assert unprivileged.returncode == 1
    assert json.loads(unprivileged.stdout)["data"]["conflicts"][:2] == data["conflicts"][:2]


def test_what_is_left_to_the_operator_is_enough(stage: Callable[..., Stage]) -> None:
    """net.configure = false: the daemon makes the device and no more; typed by hand, the rest of the plan serves."""
    play = stage("--set", "net.configure=false")
    play.start()
    planned = document(play, "plan")
    assert play.ns.call(linux.in_force, steps_of(planned["left_to_you"])) == Plan(())
    assert [step["kind"] for step in planned["steps"]] == ["state", "device", "control", "http", "hosts"]

    for step in planned["left_to_you"]:
        for line in step["do"]:
            play.ns.run(["sh", "-c", line])

    assert play.ns.run(["curl", "-sS", "--max-time", "10", "http://hello.demo/"]).stdout
    assert play.stop() == 0
    guards = [line for line in play.network().splitlines() if line.startswith("unreachable 10.107.0.0/16")]
    assert len(guards) == 1, "it is the operator's"


def test_cleanup_after_sigkill_leaves_the_machine_as_it_was(stage: Callable[..., Stage]) -> None:
    """Foreign lines and routes to the byte; refused while the daemon lives; shown first; done twice without harm."""
    play = stage("--set", 'net.subnet6="fd00:107::/64"')
    play.ns.write_file("/etc/hosts", play.hosts() + FOREIGN_LINES)
    play.ns.run(["ip", "link", "add", "foreign0", "type", "bridge"])
    play.ns.run(["ip", "link", "set", "foreign0", "addrgenmode", "none"])
    play.ns.run(["ip", "addr", "add", "192.0.2.9/24", "dev", "foreign0"])
    play.ns.run(["ip", "route", "add", "unreachable", "198.51.100.0/24", "metric", "4278198272"])
    hosts, before = play.hosts(), play.network()
    files_before = {path.name for path in play.directory.iterdir()}
    daemon = play.start()

    alive = ngrokd(play, "cleanup", check=False)
    still_there = play.hosts()
    daemon.kill()
    daemon.wait(timeout=5)
    shown = document(play, "cleanup", "--dry-run")
    after_showing = play.network(), play.hosts()
    removed = document(play, "cleanup")

    assert alive.returncode == 73
    assert f"process {daemon.pid}" in alive.stderr
    assert "hello.demo" in still_there
    assert [one["kind"] for one in shown["found"]] == ["hosts", "guard", "guard", "socket", "lock", "lock"]
    assert shown["removed"] == []
    assert after_showing[0] != before
    assert after_showing[1] == still_there
    assert removed["removed"] == shown["found"]
    assert play.hosts() == hosts
    assert play.network() == before
    assert {path.name for path in play.directory.iterdir()} == files_before
    assert not (play.directory / "state" / "lock").exists()
    assert (play.directory / "state" / "operator_id").exists()
    again = ngrokd(play, "cleanup")
    assert again.stdout == "nothing was left behind\n"
    assert "198.51.100.0/24" in again.stderr, "somebody else's guard is only told of"
    play.start()
    assert play.stop() == 0


def test_cleanup_without_rights_says_which(stage: Callable[..., Stage]) -> None:
    """And removes what it may."""
    play = stage()
    daemon = play.start()
    daemon.kill()
    daemon.wait(timeout=5)

    bare = ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", "--", sys.executable, "-m", "ngrokd"]
    refused = play.ns.run([*bare, "--config", play.lab.config, "cleanup"], check=False)

    assert refused.returncode == 77
    assert "CAP_NET_ADMIN" in refused.stderr
    assert "10.107." not in play.hosts()
    assert "unreachable 10.107.0.0/16" in play.network()


def test_cleanup_leaves_another_instance_alone(stage: Callable[..., Stage]) -> None:
    """It lives beside, with an interface, a subnet and a section of its own."""
    play = stage("--set", 'net.interface="ngrokd1"', "--set", 'net.subnet="10.109.0.0/16"')
    play.start()
    before, hosts = play.network(), play.hosts()
    play.ns.write_file("/run/other.toml", '[state]\ndirectory = "/run/none"\n[control]\nsocket = "/run/none.sock"\n')

    run = play.ns.run([sys.executable, "-m", "ngrokd", "cleanup", "--config", "/run/other.toml"])

    assert run.stdout == "nothing was left behind\n"
    assert (play.network(), play.hosts()) == (before, hosts)
    assert play.ns.run(["curl", "-sS", "--max-time", "10", "http://hello.demo/"]).stdout
    assert re.search(r"\(ngrokd1\)", play.hosts())
