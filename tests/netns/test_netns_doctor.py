"""`ngrokd doctor` beside a real kernel: a daemon that is well, and what only a kernel can do to it."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.netns.stage import Stage
from tests.netns.support import Namespace

pytestmark = pytest.mark.netns


@pytest.fixture
def stage(netns: Callable[[], Namespace]) -> Iterator[Callable[..., Stage]]:
    made: list[Stage] = []

    def make(*options: str) -> Stage:
        made.append(Stage(netns(), "--demo", *options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def examine(play: Stage, before: str = "", expect: int | None = None) -> dict[str, dict[str, Any]]:
    """The worst finding of each check."""
    command = f'{before} exec {sys.executable} -m ngrokd --config "{play.lab.config}" doctor --json'
    run = play.ns.run(["sh", "-c", command], check=False)
    findings: list[dict[str, Any]] = json.loads(run.stdout)["data"]["findings"]
    assert run.returncode == int(any(one["level"] == "fail" for one in findings))
    if expect is not None:
        assert run.returncode == expect, findings
    order = ("ok", "warn", "fail")
    return {one["check"]: one for one in sorted(findings, key=lambda one: order.index(one["level"]))}


def failures(found: dict[str, dict[str, Any]]) -> set[str]:
    return {check for check, one in found.items() if one["level"] == "fail"}


def test_a_daemon_that_is_well(stage: Callable[..., Stage]) -> None:
    """Everything is tried, over the real way, and nothing is wrong."""
    play = stage()
    daemon = play.start()

    found = examine(play, expect=0)

    assert failures(found) == set()
    assert found["daemon"]["summary"].endswith(f"runs as process {daemon.pid}, ready")
    assert found["firewall"]["summary"] == "packets to 10.107.0.0/16 reach the daemon"
    assert found["resolver"]["summary"].endswith("(7 names tried)")
    assert f"held by process {daemon.pid}" in found["instance"]["summary"]
    assert found["ingress"]["facts"].keys() == {"dns_ms", "tcp_ms", "tls_ms", "header_ms"}
    assert {one["level"] for one in found.values()} <= {"ok", "warn"}


def test_a_route_that_is_in_the_way(stage: Callable[..., Stage]) -> None:
    """By the name of its owner, with a subnet that is free."""
    play = stage()
    play.ns.run(["ip", "link", "add", "wg0", "type", "bridge"])
    play.ns.run(["ip", "link", "set", "wg0", "up"])
    play.ns.run(["ip", "route", "add", "10.107.4.0/24", "dev", "wg0"])

    found = examine(play, expect=1)

    assert "route 10.107.4.0/24 of wg0" in found["routes"]["summary"]
    assert '"10.108.0.0/16"' in found["routes"]["remedy"]


def test_a_hosts_file_that_cannot_be_written(stage: Callable[..., Stage]) -> None:
    """Read-only, and merely mounted by itself: the one fails, the other is told."""
    play = stage()
    play.ns.run(["mount", "--bind", "/etc/hosts", "/etc/hosts"])
    mounted = examine(play)
    play.ns.run(["mount", "-o", "remount,bind,ro", "/etc/hosts"])

    read_only = examine(play, expect=1)

    assert mounted["hosts"]["level"] == "warn"
    assert "in place" in mounted["hosts"]["summary"]
    assert read_only["hosts"]["level"] == "fail"
    assert "read-only" in read_only["hosts"]["summary"]
    assert "hosts.enabled = false" in read_only["hosts"]["remedy"]


def test_a_machine_without_tun(stage: Callable[..., Stage]) -> None:
    """The driver is not loaded, or the container did not get the device."""
    play = stage()
    play.ns.run(["mount", "-t", "tmpfs", "none", "/dev/net"])

    found = examine(play, expect=1)

    assert "/dev/net/tun" in found["tun"]["summary"]
    assert "modprobe tun" in found["tun"]["remedy"]
    assert "--device /dev/net/tun" in found["tun"]["remedy"]


def test_few_files_may_be_opened(stage: Callable[..., Stage]) -> None:
    """In the shell that asks; of a daemon that runs, its own limit counts."""
    play = stage()

    asked = examine(play, "ulimit -n 128;", expect=1)
    play.start()
    running = examine(play, "ulimit -n 128;", expect=0)

    assert "128, allows 64 connections" in asked["file-limit"]["summary"]
    assert "LimitNOFILE=" in asked["file-limit"]["remedy"]
    assert running["file-limit"]["summary"].startswith("the daemon's")


def test_programs_get_other_answers_than_are_served(stage: Callable[..., Stage]) -> None:
    """Names that nobody looks up where they are written; and one that is written twice."""
    unread = stage("--set", 'hosts.path="/run/hosts"')
    twice = stage("--set", 'api.poll_interval="1h"')
    unread.ns.write_file("/run/hosts", "")
    unread.start()
    twice.start()
    twice.ns.write_file("/etc/hosts", "192.0.2.66\thello.demo\n" + twice.hosts())

    nothing = examine(unread, expect=1)
    other = examine(twice, expect=1)

    assert "hello.demo is not found" in nothing["resolver"]["summary"]
    assert "nsswitch.conf" in nothing["resolver"]["remedy"]
    assert "hello.demo is 192.0.2.66 instead of 10.107.0." in other["resolver"]["summary"]
    assert "/etc/hosts:1" in other["names"]["summary"]


def test_a_firewall_that_drops(stage: Callable[..., Stage]) -> None:
    """Suspected by its rules before a start; while a daemon runs, packets show it, and the rule is named."""
    if shutil.which("nft") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("nft is missing (apt-get install nftables)")
        pytest.skip("nft is missing")
    play = stage()
    closed = (
        "add table inet filter; add chain inet filter output { type filter hook output priority 0; policy drop; };"
        " add rule inet filter output oif lo accept"
    )

    play.ns.run(["nft", closed])
    suspected = examine(play, expect=0)["firewall"]
    play.ns.run(["nft", 'add rule inet filter output oifname "ngrokd0" accept'])
    allowed = examine(play, expect=0)["firewall"]
    play.ns.run(["nft", "flush chain inet filter output; add rule inet filter output oif lo accept"])
    play.start()
    dropped = examine(play, expect=1)["firewall"]

    assert (suspected["level"], allowed["level"], dropped["level"]) == ("warn", "ok", "fail")
    assert "chain inet filter output: policy drop" in suspected["summary"]
    assert "do not reach the daemon (no answer within 1.5 s): nftables chain inet filter output" in dropped["summary"]
    assert 'oifname "ngrokd0" accept' in dropped["remedy"]


def test_what_a_killed_daemon_left(stage: Callable[..., Stage]) -> None:
    """It is no failure: the next start takes it over."""
    play = stage()
    daemon = play.start()
    daemon.kill()
    daemon.wait(timeout=5)

    found = examine(play, expect=0)

    assert "guard" in found["leftovers"]["summary"]
    assert "ngrokd cleanup" in found["leftovers"]["remedy"]


def test_a_second_daemon_for_the_same_account(stage: Callable[..., Stage]) -> None:
    """Another configuration that wants the same interface is told who has it."""
    play = stage()
    daemon = play.start()
    other = f"cp {play.lab.config} /run/other.toml; sed -i s/ngrokd.sock/other.sock/ /run/other.toml;"
    command = f"{other} exec {sys.executable} -m ngrokd --config /run/other.toml doctor --json"

    run = play.ns.run(["sh", "-c", command], check=False)

    assert run.returncode == 1
    taken = [one for one in json.loads(run.stdout)["data"]["findings"] if one["check"] == "instance"]
    assert {one["facts"]["about"] for one in taken} == {"interface", "state", "http"}
    assert all(f"process {daemon.pid}" in one["summary"] for one in taken)


def test_a_user_who_may_not_ask_and_an_archive_of_a_daemon_that_runs(stage: Callable[..., Stage]) -> None:
    """What cannot be seen is no fault; and the archive has what the daemon says of itself, its key nowhere."""
    play = stage()
    daemon = play.start()
    socket = {"NGROKD_SOCKET": f"{play.directory}/ngrokd.sock"}
    nobody = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
    archive = play.directory / "report.tar.gz"

    asked = play.ns.run([*nobody, sys.executable, "-m", "ngrokd", "doctor", "--json"], env=socket, check=False)
    play.ngrokd("--config", play.lab.config, "doctor", "--bundle", str(archive))

    findings = {one["check"]: one for one in json.loads(asked.stdout)["data"]["findings"]}
    assert findings["daemon"]["level"] == "warn"
    assert "may not ask" in findings["daemon"]["summary"]
    assert findings["instance"]["level"] == "ok"
    assert f"process {daemon.pid}" in findings["instance"]["summary"]
    with tarfile.open(archive) as opened:
        held = {member.name.rpartition("/")[2]: opened.extractfile(member) for member in opened}
        texts = {name: file.read().decode() for name, file in held.items() if file is not None}
    assert json.loads(texts["status.json"])["pid"] == daemon.pid
    assert "endpoints" in texts["log.jsonl"]
    assert json.loads(texts["list.json"])[0]["hostname"].endswith(".demo")
    assert "ngrokd0" in texts["links.txt"]
    key = (play.directory / "state/tls.key").read_text().splitlines()[1]
    assert not any(secret in text for text in texts.values() for secret in (play.lab.facts["api_key"], key))
