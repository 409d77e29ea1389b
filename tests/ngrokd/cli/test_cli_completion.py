"""The tab key: what is offered, by whom, and that it is silent when nothing can be."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ngrokd.cli.app import ALIASES, COMMANDS, invoke
from ngrokd.errors import PermissionMissingError

Daemon = Callable[..., Any]  # the fixtures of conftest.py, which is no module to import from
Cli = Callable[..., Any]
Offer = Callable[..., list[str]]

ROOT = Path(__file__).parents[3]

ENDPOINTS = [
    {"id": "ep_1", "hostname": "api.prod", "port": 80},
    {"id": "ep_2", "hostname": "api.prod", "port": 443},
    {"id": "ep_3", "hostname": "apt.prod", "port": 80},
    {"id": "ep_4", "hostname": "db.prod", "port": 5432},
    {"id": "ep_5", "hostname": "ap\x1b[2J.prod", "port": 1},
    {"id": "ep_6"},
    "nonsense",
]


@pytest.fixture
def offer(cli: Cli, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Offer:
    """What bash is offered behind these words, the last of which is being typed."""

    def ask(*words: str, program: str = "ngrokd") -> list[str]:
        monkeypatch.setenv(f"_{program.upper()}_COMPLETE", "bash_complete")
        monkeypatch.setenv("COMP_WORDS", " ".join([program, *words]))
        monkeypatch.setenv("COMP_CWORD", str(len(words)))
        with pytest.raises(SystemExit) as caught:
            invoke(program, [])
        out, err = capfd.readouterr()
        assert caught.value.code == 0
        assert err == ""
        return [line.removeprefix("plain,") for line in out.splitlines() if line]

    return ask


def test_commands_are_offered_in_the_order_of_help(offer: Offer) -> None:
    assert offer("") == list(COMMANDS)
    assert offer("re") == ["refresh", "refresh-cert", "resume", "reload"]


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("status", "--j"), ["--json"]),
        (("--so",), ["--socket"]),
        (("config", "se"), ["set"]),
        (("config", "set", "net.m"), ["net.mode", "net.mtu"]),
        (("log-level", "de"), ["debug"]),
        (("completion", ""), ["bash", "zsh", "fish"]),
        (("help", "conf"), ["config"]),
        (("help", "config", "va"), ["validate"]),
        (("help", "run", ""), []),
        (("service", "st"), ["start", "status", "stop"]),
        (("ls", "--j"), ["--json"]),
        (("nonsense", "x"), []),
        (("--config", ""), ["file,"]),
        (("ping", ""), []),
    ],
)
def test_what_is_offered_without_a_daemon(offer: Offer, words: tuple[str, ...], offered: list[str]) -> None:
    """Silently: an error would be printed into the line that is being typed."""
    found = offer(*words)

    assert sorted(found) == sorted(offered)


@pytest.mark.parametrize(
    "words", [("ping",), ("wait", "--for", "endpoint"), ("flows", "--endpoint"), ("capture", "--endpoint")]
)
def test_names_of_endpoints_come_from_the_daemon(offer: Offer, daemon: Daemon, words: tuple[str, ...]) -> None:
    """Each once, in order; what could move a cursor is not offered."""
    daemon(list=ENDPOINTS)

    assert offer(*words, "") == ["api.prod", "apt.prod", "db.prod"]
    assert offer(*words, "AP") == ["api.prod", "apt.prod"]
    assert offer(*words, "x") == []


def test_connections_can_be_named_by_their_numbers(offer: Offer, daemon: Daemon) -> None:
    daemon(flows={"flows": [{"id": 12}, {"id": 7}, {"id": 1}, {"id": "x"}, {}]})

    assert offer("flows", "close", "1") == ["1", "12"]


def test_the_daemon_of_this_line_is_asked(
    offer: Offer, daemon: Daemon, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    """Who has two daemons says which one before the tab key too."""
    socket = daemon(list=ENDPOINTS).socket
    monkeypatch.setenv("NGROKD_SOCKET", str(folder / "another"))

    assert offer("ping", "d") == []
    assert offer("--socket", socket, "ping", "d") == ["db.prod"]
    assert offer("ping", "--socket", socket, "d", program="ngrokctl") == ["db.prod"]


@pytest.mark.parametrize("data", ["nonsense", None, {"flows": 5}, [], PermissionMissingError("no")])
def test_a_daemon_of_another_kind_offers_nothing(offer: Offer, daemon: Daemon, data: object) -> None:
    daemon(list=data, flows=data)

    assert offer("ping", "") == []
    assert offer("flows", "close", "") == []


def test_a_wrong_configuration_offers_nothing(offer: Offer, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """It says where the socket is."""
    (folder / "bad.toml").write_text("[nonsense\n")
    monkeypatch.delenv("NGROKD_SOCKET")

    assert offer("--config", str(folder / "bad.toml"), "ping", "") == []


@pytest.mark.parametrize(("words", "number"), [("ngrokd ", 1), ("ngrokd ping ", 2)])
def test_no_trio_is_needed_for_a_tab(folder: Path, words: str, number: int) -> None:
    """Nor anything else that takes its time; the commands are offered without importing one."""
    source = (
        "import os, sys\n"
        "from ngrokd.cli.app import invoke\n"
        "try:\n    invoke('ngrokd', [])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'trio', 'ssl', 'cryptography', 'ngrokd.config'} & set(sys.modules)),"
        " len({name for name in sys.modules if name.startswith('ngrokd.cli.')}) < 12)\n"
    )
    asked = {"_NGROKD_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(number)}
    environ = {**os.environ, **asked, "NGROKD_SOCKET": str(folder / "nobody")}

    done = subprocess.run(
        [sys.executable, "-c", source], env=environ, capture_output=True, text=True, check=True, cwd=ROOT
    )

    assert done.stdout.splitlines()[-1] == "[] True"
    assert done.stderr == ""


# The scripts


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize("program", ["ngrokd", "ngrokctl"])
def test_each_shell_gets_a_script_for_the_program_that_was_called(cli: Cli, shell: str, program: str) -> None:
    text = cli("completion", shell, program=program)
    document = cli("completion", shell, "--json", program=program).document()

    assert text.code == 0
    assert f"_{program.upper()}_COMPLETE={shell}_complete" in text.out
    assert document == {
        "schema": "ngrokd.completion/1",
        "data": {"shell": shell, "script": text.out.removesuffix("\n")},
    }


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_takes_its_script(cli: Cli, shell: str) -> None:
    """Where this machine has it."""
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell} here")
    script = cli("completion", shell).out

    done = subprocess.run([shell, "-n"], input=script, capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr) == (0, "")


TYPED = """
type() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _ngrokd_completion "$1"; echo "${COMPREPLY[@]@Q}"; }
"""


def test_bash_offers_it(cli: Cli, daemon: Daemon, folder: Path) -> None:
    """The real shell, with a daemon and without one, and with names that are nothing to expand."""
    fake = daemon(list=[*ENDPOINTS, {"hostname": "*"}, {"hostname": "a b"}])
    program = folder / "ngrokd"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m ngrokd "$@"\n')
    program.chmod(0o755)
    lines = ("ngrokd ping ''", "ngrokd stat", "ngrokd --socket /nonexistent ping ''", "ngrokd config uns")
    script = cli("completion", "bash").out + TYPED + "".join(f"type {line}\n" for line in lines)
    path = f"{folder}:{os.environ['PATH']}"

    done = subprocess.run(
        ["bash", "--norc"],
        input=script,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "NGROKD_SOCKET": fake.socket},
        capture_output=True,
        text=True,
        check=True,
        cwd=folder,
    )

    assert done.stderr == ""
    offered = done.stdout.splitlines()
    assert offered == ["'*' 'a b' 'api.prod' 'apt.prod' 'db.prod'", "'status'", "", "'unset'"]


def test_every_command_and_alias_is_completed(offer: Offer) -> None:
    """None fails while it is looked at: its options are offered."""
    for name in (*COMMANDS, *ALIASES):
        assert "--json" in offer(name, "--js"), name
