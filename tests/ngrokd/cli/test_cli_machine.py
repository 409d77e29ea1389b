"""plan, cleanup, doctor, service and migrate on the command line: arguments, exit codes, documents. What they do is
tested with their rooms, and beside a kernel.
"""

from __future__ import annotations

import json
import os
import plistlib
import socket
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from ngrokd.cli.context import Context
from ngrokd.host.units import Service, systemd_unit

Cli = Callable[..., Any]


@pytest.fixture
def config(folder: Path) -> str:
    """A configuration whose interface, socket, state and hosts file are nobody's."""
    (folder / "hosts").write_text("127.0.0.1 localhost\n")
    text = f"""
        [net]
        interface = "ngrokd-cli"
        subnet = "10.233.0.0/16"
        subnet6 = "off"
        [state]
        directory = "{folder}/state"
        [hosts]
        path = "{folder}/hosts"
        [http]
        listen = ""
        [api]
        url = "https://127.0.0.1:9"
    """
    path = folder / "machine.toml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("platform", ["linux", "macos"])
def test_a_plan_is_a_document_with_its_schema(cli: Cli, config: str, platform: str) -> None:
    """For both systems on any; the fields that scripts read."""
    outcome = cli("plan", "--platform", platform, "--config", config, "--json")

    document = outcome.document()
    assert outcome.code == 0
    assert document["schema"] == "ngrokd.plan/1"
    assert set(document["data"]) == {
        *("platform", "steps", "left_to_you", "conflicts", "warnings", "notes", "running"),
    }
    assert document["data"]["platform"] == platform
    assert {frozenset(step) for step in document["data"]["steps"]} == {frozenset(("kind", "args", "why", "do", "undo"))}


def test_a_plan_is_a_script_that_ends_in_nothing_but_comments(cli: Cli, config: str, folder: Path) -> None:
    """Whoever pipes it into a shell does what it says and no more; no line is lost at the edge of a terminal."""
    lines = cli("plan", "--config", config, "--platform", "linux").out.splitlines()

    commands = [line for line in lines if line and not line.startswith("#")]
    assert commands[0] == f"mkdir -p -m 700 {folder}/state"
    assert all(line.startswith(("ip ", "mkdir ")) for line in commands)
    assert max(map(len, lines)) <= 100


def test_what_another_has_makes_a_plan_fail(cli: Cli, config: str, folder: Path) -> None:
    """Exit 1: a check answered no. The socket is somebody's who is not ngrokd."""
    path = str(folder / "taken.sock")
    with closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(path)
        listener.listen()

        outcome = cli("plan", "--config", config, "--socket", path, "--json")
        text = cli("plan", "--config", config, "--socket", path).out

    [conflict] = outcome.document()["data"]["conflicts"]
    assert outcome.code == 1
    assert conflict["about"] == "control"
    assert f"process {os.getpid()}" in conflict["what"]
    assert "# CONFLICT: the control socket" in text


def test_nothing_to_clean_up_is_fine(cli: Cli, config: str) -> None:
    """And said, in both forms."""
    assert cli("cleanup", "--config", config).out == "nothing was left behind\n"
    document = cli("cleanup", "--dry-run", "--config", config, "--json").document()
    assert document == {
        "schema": "ngrokd.cleanup/1",
        "data": {"dry_run": True, "found": [], "removed": [], "problems": [], "notes": []},
    }


def test_a_dead_socket_and_a_section_are_cleaned_up(cli: Cli, config: str, folder: Path) -> None:
    """Without any right but to these files."""
    foreign = (folder / "hosts").read_text()
    section = (
        "# BEGIN ngrokd managed section (ngrokd-cli)\n10.233.0.2\ta.b\n# END ngrokd managed section (ngrokd-cli)\n"
    )
    (folder / "hosts").write_text(foreign + section)
    path = str(folder / "dead.sock")
    with closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(path)

    outcome = cli("cleanup", "--config", config, "--socket", path)

    assert outcome.code == 0
    assert outcome.out.splitlines() == [
        f"removed hosts: 3 lines of {folder}/hosts, the section of ngrokd",
        f"removed socket: {path}",
    ]
    assert (folder / "hosts").read_text() == foreign
    assert not os.path.exists(path)


def test_what_is_no_socket_is_left_alone(cli: Cli, config: str, folder: Path) -> None:
    """A wrong path in the configuration must not cost a file."""
    (folder / "file").write_text("mine")

    outcome = cli("cleanup", "--config", config, "--socket", str(folder / "file"))

    assert outcome.code == 0
    assert "is no socket" in outcome.err
    assert (folder / "file").read_text() == "mine"


@pytest.mark.parametrize("command", ["plan", "cleanup", "doctor", "migrate", "service install", "service print"])
def test_a_broken_configuration_is_one_message_and_78(cli: Cli, folder: Path, command: str) -> None:
    """Each mistake with its line, before anything is looked at; the doctor says it as a finding."""
    path = folder / "broken.toml"
    path.write_text("[net]\nmtu = 10\nsubnett = 1\n")

    outcome = cli(*command.split(), "--config", str(path))

    assert outcome.code in (77, 78) if os.geteuid() else outcome.code == 78
    if outcome.code == 78:
        said = outcome.out + outcome.err
        assert f"{path}:2: net.mtu" in said
        assert f"{path}:3: net.subnett" in said
        assert "Traceback" not in said


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "--platform", "windows"),
        ("plan", "extra"),
        ("cleanup", "--all"),
        ("doctor", "--bundle"),
        ("service", "instal"),
        ("service", "print", "--name", "a/b"),
        ("service", "print", "--name", ""),
        ("migrate", "now"),
    ],
)
def test_wrong_arguments_are_a_usage_error(cli: Cli, arguments: tuple[str, ...]) -> None:
    """One line, and where to look."""
    outcome = cli(*arguments)

    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err.startswith("error: ")
    assert "--help" in outcome.err


def test_the_doctor_answers_in_one_document(cli: Cli, config: str) -> None:
    """Exit 1, because the API of this configuration is down and there is no key."""
    outcome = cli("doctor", "--config", config, "--json")

    document = outcome.document()
    assert outcome.code == 1
    assert document["schema"] == "ngrokd.doctor/1"
    assert document["data"]["ok"] is False
    findings = {one["check"]: one for one in document["data"]["findings"]}
    assert {"config", "daemon", "rights", "tun", "routes", "instance", "state", "api-key", "api", "hosts"} <= set(
        findings
    )
    assert all(one["remedy"] for one in findings.values() if one["level"] != "ok")
    assert {one["level"] for one in findings.values()} <= {"ok", "warn", "fail"}


def test_the_doctors_archive_is_named_in_the_document(cli: Cli, config: str, folder: Path) -> None:
    """And cannot be written where there is no directory: then the examination was for nothing but its exit code."""
    path = folder / "report.tar.gz"

    good = cli("doctor", "--config", config, "--json", "--bundle", str(path))
    bad = cli("doctor", "--config", config, "--json", "--bundle", str(folder / "none" / "x.tar.gz"))

    assert good.document()["data"]["bundle"] == str(path)
    assert path.exists()
    assert bad.code == 73
    assert bad.document()["error"]["code"] == 73


def test_the_unit_is_printed_for_the_configuration_in_use(cli: Cli, config: str) -> None:
    """With this program's own path."""
    text = cli("service", "print", "--config", config, "--name", "second").out
    document = cli("service", "print", "--config", config, "--json").document()

    assert f"--config {config} run\n" in text
    assert "RuntimeDirectory=second\n" in text
    assert document["schema"] == "ngrokd.service.print/1"
    assert document["data"]["text"].startswith(systemd_unit(Service()).splitlines()[0])
    assert plistlib.loads(cli("service", "print", "--launchd").out.encode())["RunAtLoad"] is True


def test_a_service_that_is_not_there_is_not_started(cli: Cli) -> None:
    """Status says so by its exit code, as for the daemon."""
    assert cli("service", "start", "--name", "ngrokd-none").code == 69
    assert cli("service", "status", "--name", "ngrokd-none").code == 3


def test_the_services_socket_is_tried_second(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only when nobody listens at the first, and when none was asked for by name."""
    first, second = str(folder / "first.sock"), str(folder / "second.sock")
    monkeypatch.setattr("ngrokd.cli.context.SERVICE_SOCKET", second)
    monkeypatch.setattr("ngrokd.cli.context.DEFAULT_CONFIG", str(folder / "config.toml"))
    monkeypatch.setattr("ngrokd.ask.DEFAULT_SOCKET", first)
    (folder / "other.toml").write_text(f'[control]\nsocket = "{folder}/other.sock"\n')
    context = Context(environ={})

    nobody = context.socket_path()
    with closing(socket.socket(socket.AF_UNIX)) as service:
        service.bind(second)
        service.listen()
        alone = context.socket_path()
        asked = Context(environ={}, config=str(folder / "other.toml")).socket_path()
        named = Context(environ={"NGROKD_SOCKET": first}).socket_path()
        with closing(socket.socket(socket.AF_UNIX)) as daemon:
            daemon.bind(first)
            daemon.listen()
            both = context.socket_path()
        dead = context.socket_path()

    assert (nobody, alone, both, dead) == (first, second, first, second)
    assert (asked, named) == (f"{folder}/other.sock", first)


def test_migrating_is_for_root(cli: Cli, config: str) -> None:
    """And for a machine on which there is something to migrate from."""
    outcome = cli("migrate", "--config", config, "--json", "--go-config", "/nowhere/config.yml")

    assert outcome.code in (69, 77)
    assert json.loads(outcome.out)["error"]["hint"]
