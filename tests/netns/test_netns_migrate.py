"""A recorded installation of the Go daemon is taken over, serves on, and is given back."""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.netns.stage import LabProcess, Stage
from tests.netns.support import ROOT, Namespace

pytestmark = pytest.mark.netns

GO_UNIT = """[Unit]
Description=ngrokd - ngrok forward proxy daemon
After=network.target

[Service]
Type=simple
ExecStart={python} {root}/tests/netns/go_daemon.py --config=/etc/ngrokd/config.yml
Restart=always
RestartSec=10

[Install]
WantedBy=multi-user.target
"""
# As its installer writes it, with what administrators change.
GO_CONFIG = """# ngrokd configuration
api:
  url: {api}
  key: "{key}"
ingressEndpoint: "{ingress}"
server:
  log_level: debug   # ignored by that daemon
  socket_path: /var/run/ngrokd.sock
  client_cert: /etc/ngrokd/tls.crt
  client_key: /etc/ngrokd/tls.key
bound_endpoints:
  poll_interval: 2
  selectors: ['true']
net:
  interface_name: ngrokd0
  subnet: 10.107.0.0/16
  listen_interface: virtual
dns:
  enabled: true
"""
# What neither says: the certificates of the lab.
OURS = """[api]
ca_file = "{directory}/lab-ca.pem"
[ingress]
ca_file = "{directory}/lab-ca.pem"
"""


@dataclass
class Machine:
    """A machine on which the Go daemon runs as a service."""

    ns: Namespace
    lab: LabProcess
    directory: Path
    operator_id: str

    def ngrokd(self, *arguments: str, check: bool = True) -> Any:
        return self.ns.run(
            [sys.executable, "-m", "ngrokd", *arguments], check=check, env={"PATH": f"/run/bin:{PATH}"}, timeout=60
        )

    def systemctl(self, *arguments: str) -> str:
        return self.ns.run(["/run/bin/systemctl", *arguments]).stdout

    def etc(self) -> dict[str, str]:
        """What is in /etc/ngrokd and of the units, by name; the private key's text is not told."""
        listing = self.ns.run(
            ["sh", "-c", "cd /; sha256sum etc/ngrokd/* etc/systemd/system/ngrokd* 2>/dev/null"], check=False
        )
        return {name: digest for digest, name in (line.split() for line in listing.stdout.splitlines())}

    def hosts(self) -> dict[str, str]:
        lines = re.findall(r"^(10\.107\.\S+)\t(\S+)$", self.ns.read_file("/etc/hosts"), re.MULTILINE)
        return {name: address for address, name in lines}

    def wait_for(self, what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 20
        while not what():
            assert time.monotonic() < deadline, self.ns.run(
                ["sh", "-c", "cat /run/systemctl/*.log"], check=False
            ).stdout
            time.sleep(0.1)


PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@pytest.fixture
def machine(netns: Callable[[], Namespace]) -> Iterator[Machine]:
    ns = netns()
    play = Stage(ns, "--demo", "--set", 'state.directory="/etc/ngrokd"')
    # The operator and the certificate are real ones: made by a daemon, in the files that both daemons use.
    ns.run(["mkdir", "-m", "755", "/etc/ngrokd"])
    play.start()
    assert play.stop() == 0
    operator_id = ns.read_file("/etc/ngrokd/operator_id")
    ns.run(
        ["sh", "-c", "cd /etc/ngrokd; mkdir conf.d; rm -f addresses.json endpoints.json ingress-ca.pem subnet6 lock"]
    )
    addresses = json.loads(ns.read_file("/etc/ngrokd/ip_mappings.json"))
    addresses["echo.demo"] = addresses["hello.demo"]  # as that daemon lets names share one
    ns.write_file("/etc/ngrokd/ip_mappings.json", json.dumps(addresses, indent=2))
    facts = play.lab.facts
    config = GO_CONFIG.format(api=facts["api_url"], key=facts["api_key"], ingress=facts["ingress_address"])
    ns.write_file("/etc/ngrokd/config.yml", config)
    ns.write_file("/etc/ngrokd/conf.d/lab.toml", OURS.format(directory=play.directory))
    ns.run(["mkdir", "-p", "/etc/systemd/system", "/run/bin", "/run/systemd/system"])
    ns.run(["sh", "-c", "rm -f /etc/systemd/system/ngrokd*"])
    ns.write_file("/etc/systemd/system/ngrokd.service", GO_UNIT.format(python=sys.executable, root=ROOT))
    ns.write_file("/run/bin/systemctl", f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/netns/systemctl.py "$@"\n')
    ns.run(["chmod", "755", "/run/bin/systemctl"])
    machine = Machine(ns, play.lab, play.directory, operator_id)
    for verb in ("daemon-reload", "enable ngrokd.service", "start ngrokd.service"):
        machine.systemctl(*verb.split())
    machine.wait_for(lambda: '"registered": true' in machine.ngrokd("status", "--json", check=False).stdout)
    yield machine
    machine.systemctl("stop", "ngrokd.service")
    play.close()
    shutil.rmtree(play.directory, ignore_errors=True)


def test_what_would_be_done_is_shown_and_a_loose_daemon_is_left_alone(machine: Machine) -> None:
    """Everything that was found, each step as a person would type it, what is left out and why."""
    before = machine.etc()

    planned = machine.ngrokd("plan", check=False)
    shown = machine.ngrokd("migrate", "--dry-run")
    data = json.loads(machine.ngrokd("migrate", "--dry-run", "--json").stdout)["data"]

    assert planned.returncode == 1
    assert "CONFLICT: the control socket /var/run/ngrokd.sock belongs to process" in planned.stdout
    assert machine.operator_id in shown.stdout
    assert "7 names, 1 of them shared" in shown.stdout
    assert "systemctl disable ngrokd" in shown.stdout
    assert "nothing was changed" in shown.stdout
    assert "dns.enabled: names stand in the hosts file" in shown.stderr
    kinds = ["save", "stop", "disable", "unit", "socket", "config", "service", "start"]
    assert [step["kind"] for step in data["steps"]] == kinds
    assert data["settings"]["api.poll_interval"] == "2s"
    assert "lab-api-key" not in shown.stdout + json.dumps(data)
    assert machine.etc() == before
    assert "ActiveState=active" in machine.systemctl("show", "ngrokd.service")

    # One that nobody manages is named, and whoever started it ends it.
    machine.systemctl("stop", "ngrokd.service")
    machine.ns.run(["rm", "/etc/systemd/system/ngrokd.service"])
    machine.systemctl("daemon-reload")
    loose = machine.ns.start([sys.executable, f"{ROOT}/tests/netns/go_daemon.py"])
    machine.wait_for(lambda: '"registered": true' in machine.ngrokd("status", "--json", check=False).stdout)
    refused = machine.ngrokd("migrate", check=False)
    assert refused.returncode == 73
    assert f"process {loose.pid}" in refused.stderr
    assert f"kill {loose.pid}" in refused.stderr
    loose.terminate()


def test_it_is_taken_over_and_given_back(machine: Machine) -> None:
    """Same operator and certificate, same addresses but for those that were shared; and back again to the byte."""
    before, hosts = machine.etc(), machine.hosts()
    assert hosts["echo.demo"] == hosts["hello.demo"]
    operators = machine.lab.do("state")["operators"]

    # First the new service does not start: everything is as it was, and the old one runs.
    systemctl = machine.ns.read_file("/run/bin/systemctl")
    refuses = 'if [ "$1" = start ] && grep -q Type=notify /etc/systemd/system/ngrokd.service; then exit 1; fi'
    machine.ns.write_file("/run/bin/systemctl", systemctl.replace("\n", f"\n{refuses}\n", 1))
    failed = machine.ngrokd("migrate", "--trust-writable", check=False)
    assert failed.returncode == 69, failed.stderr
    assert "systemctl start ngrokd.service failed" in failed.stderr
    assert machine.etc() == before
    machine.wait_for(lambda: '"registered": true' in machine.ngrokd("status", "--json", check=False).stdout)
    assert machine.ngrokd("migrate", "--undo", check=False).returncode == 73, "there is nothing to go back from"
    machine.ns.write_file("/run/bin/systemctl", systemctl)

    machine.ngrokd("migrate", "--trust-writable")
    machine.wait_for(lambda: '"state": "ready"' in machine.ngrokd("status", "--json", check=False).stdout)

    status = json.loads(machine.ngrokd("status", "--json").stdout)["data"]
    now = machine.hosts()
    assert status["operator_id"] == machine.operator_id
    assert machine.lab.do("state")["operators"] == operators
    assert machine.etc()["etc/ngrokd/tls.crt"] == before["etc/ngrokd/tls.crt"]
    assert {name for name in hosts if now[name] != hosts[name]} in ({"echo.demo"}, {"hello.demo"})
    assert len(set(now.values())) == len(now)
    assert machine.ns.run(["curl", "-sS", "--max-time", "10", "http://hello.demo/"]).stdout
    assert "notify" in machine.ns.read_file("/etc/systemd/system/ngrokd.service")
    assert machine.ns.run(["stat", "-c", "%a", "/etc/ngrokd/config.toml"]).stdout == "600\n"
    again = machine.ngrokd("migrate", "--trust-writable", check=False)
    assert again.returncode == 73
    assert "--undo" in again.stderr

    back = machine.ngrokd("migrate", "--undo")
    machine.wait_for(lambda: '"registered": true' in machine.ngrokd("status", "--json", check=False).stdout)

    assert "has its place again" in back.stdout
    after = machine.etc()
    kept = {name: digest for name, digest in before.items() if "ip_mappings" not in name}
    assert {name: after.get(name) for name in kept} == kept
    assert "etc/ngrokd/config.toml" not in after
    assert "enabled" in machine.systemctl("show", "ngrokd.service")
    assert "version" not in json.loads(machine.ngrokd("status", "--json").stdout)["data"]
    assert {name: address for name, address in machine.hosts().items() if name != "echo.demo"}.items() <= now.items()
    assert machine.ns.run(["ls", "/etc/ngrokd"]).stdout.split().count("before-migration") == 0
