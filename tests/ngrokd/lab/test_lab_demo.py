"""`ngrokd demo`: what it decides, and the whole of it, once, in a corner of this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from io import BytesIO
from ipaddress import IPv4Network
from pathlib import Path

import pytest
import tomli

from ngrokd.cli import demo
from tests.netns.support import ROOT, require_namespaces


def test_the_first_subnet_that_no_route_touches_is_taken() -> None:
    """A default route touches everything and says nothing."""
    routes = [IPv4Network(text) for text in ("0.0.0.0/0", "10.107.3.0/24", "10.108.0.0/14")]

    assert demo.free_subnet([IPv4Network("0.0.0.0/0")]) == "10.107.0.0/16"
    assert demo.free_subnet(routes) == "10.112.0.0/16"
    assert demo.free_subnet([IPv4Network("10.0.0.0/8")]) == "10.107.0.0/16"  # the daemon will say whose it is


def test_the_daemons_environment_is_its_own() -> None:
    """A key or a socket of the real daemon on this machine must not reach the demo's."""
    environment = {
        "PATH": "/bin",
        "NGROKD_SOCKET": "/run/real.sock",
        "NGROK_API_KEY": "secret",
        "CREDENTIALS_DIRECTORY": "/run/credentials",
        "NOTIFY_SOCKET": "/run/systemd/notify",
    }

    assert demo._clean_environment(environment) == {"PATH": "/bin"}


def test_the_ready_line_is_found_among_others() -> None:
    """And an end without it is no line."""
    assert demo._read_ready_line(BytesIO(b"hello\n[ready] ngrokd 1 tun=t\nmore\n")) == "[ready] ngrokd 1 tun=t"
    assert demo._read_ready_line(BytesIO(b"hello\n")) == ""


def run_demo(*arguments: str, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [*prefix, sys.executable, "-m", "ngrokd", "demo", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)


@pytest.mark.netns
def test_the_demo_passes_and_leaves_nothing() -> None:
    """The main job, from end to end, as `make demo` does it."""
    require_namespaces()
    hosts = Path("/etc/hosts").read_bytes()

    result = run_demo("--isolated", "--once", "--json")

    assert result.returncode == 0, result.stdout + result.stderr
    document = json.loads(result.stdout)
    assert document["schema"] == "ngrokd.demo/1"
    assert document["data"]["ok"]
    assert [step["title"] for step in document["data"]["steps"] if not step["ok"]] == []
    assert {"the daemon", "TCP echo", "everything undone"} <= {step["title"] for step in document["data"]["steps"]}
    assert Path("/etc/hosts").read_bytes() == hosts


@pytest.mark.netns
def test_without_rights_the_demo_says_so() -> None:
    """Exit 77, the reason and the remedy."""
    require_namespaces()

    result = run_demo("--isolated", "--once", prefix=("setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"))

    assert result.returncode == 77
    assert "CAP_SYS_ADMIN is missing" in result.stdout
    assert "sudo ngrokd demo --isolated" in result.stdout


@pytest.mark.netns
def test_the_demo_runs_until_it_is_interrupted(tmp_path: Path) -> None:
    """It says what to try, and that can be tried; ^C undoes everything."""
    require_namespaces()
    command = [sys.executable, "-m", "ngrokd", "demo", "--isolated"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(tmp_path)}
    ) as process:
        assert process.stdout is not None
        printed = []
        for line in process.stdout:
            printed.append(line)
            if "undoes everything" in line:
                break
        tried = next(line for line in printed if "curl http://hello.demo/" in line).split()
        curl = subprocess.run(tried[1:], capture_output=True, text=True, timeout=30, check=False)  # without sudo
        config = next(tmp_path.glob("ngrokd-demo-*/config.toml"))
        interface = tomli.loads(config.read_text())["net"]["interface"]
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()

    assert curl.stdout == "Hello from the lab.\n", curl.stderr
    assert interface == demo.INTERFACE
    assert "ok      everything undone" in rest
    assert process.returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_its_commands_can_be_typed_as_they_are_shown(tmp_path: Path) -> None:
    """By name where a shell finds them by name, else by path: from a checkout the program is on nobody's PATH."""
    program = tmp_path / "ngrokd"
    program.write_text("")
    program.chmod(0o755)

    assert demo._as_typed(str(program), {"PATH": str(tmp_path)}) == "ngrokd"
    assert demo._as_typed(str(program), {"PATH": "/nowhere"}) == str(program)
    assert demo._as_typed("/x/ngrokd/__main__.py", {}) == f"{sys.executable} -m ngrokd"
