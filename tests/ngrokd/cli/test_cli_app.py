"""The command line itself: options before and after, the Go daemon's habits, errors, exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import pytest

import ngrokd
from ngrokd import cli as entry
from ngrokd import config
from ngrokd.cli.app import COMMANDS, LazyGroup, group, normalise
from ngrokd.config import Settings
from ngrokd.errors import Exit, TakenError

Cli = Callable[..., Any]  # the fixture of conftest.py, which is no module to import from


class Runs:
    """Stands in for the daemon: notes with what it was to be run."""

    def __init__(self) -> None:
        self.settings: list[Settings] = []
        self.config_path: str | None = None
        self.environ: Mapping[str, str] = {}
        self.given: Sequence[config.Given] = ()
        self.result: int | BaseException = 0

    def run_daemon(
        self, settings: Settings, *, config_path: str | None, environ: Mapping[str, str], given: Sequence[config.Given]
    ) -> int:
        self.settings.append(settings)
        self.config_path, self.environ, self.given = config_path, environ, given
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    runs = Runs()
    module = types.ModuleType("ngrokd.daemon")
    module.run_daemon = runs.run_daemon  # type: ignore[attr-defined]  # the one name that is imported
    monkeypatch.setitem(sys.modules, "ngrokd.daemon", module)
    return runs


@pytest.fixture
def config_file(folder: Path) -> str:
    (folder / "c.toml").write_text("[net]\nmtu = 1400\n")
    return str(folder / "c.toml")


# run


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "--config=FILE"),
        ("run", "-c", "FILE"),
        ("--config", "FILE", "run"),
        ("--config=FILE",),
        ("-config=FILE",),
        ("-config", "FILE"),
        ("run", "-config=FILE"),
        ("-v", "--config=FILE"),
    ],
)
def test_every_way_to_say_run(cli: Cli, runs: Runs, config_file: str, arguments: tuple[str, ...]) -> None:
    """Ours, and the Go daemon's of two versions, with one dash or two."""
    outcome = cli(*(argument.replace("FILE", config_file) for argument in arguments))

    assert outcome.code == 0
    assert [settings.net.mtu for settings in runs.settings] == [1400]
    assert runs.config_path == config_file


def test_nothing_at_all_means_run(cli: Cli, runs: Runs) -> None:
    """With defaults, and the default file at a reload."""
    assert cli().code == 0
    assert len(runs.settings) == 1
    assert runs.config_path is None


def test_ngrokctl_without_a_command_prints_help(cli: Cli, runs: Runs) -> None:
    """It never was a daemon."""
    outcome = cli(program="ngrokctl")

    assert outcome.out.startswith("Usage: ngrokctl ")
    assert runs.settings == []


def test_options_of_run_hold_for_a_reload_too(
    cli: Cli, runs: Runs, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They go before file and environment whenever those are read."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("NGROKD__NET__MTU", "1300")
    monkeypatch.setenv("NGROKD_LOG_LEVEL", "error")

    cli("run", "--socket", "s", "--log-format", "json", "-v", "--set", "net.mtu=1400")

    [settings] = runs.settings
    assert (settings.control.socket, settings.log.format, settings.log.level) == (f"{folder}/s", "json", "debug")
    assert settings.net.mtu == 1400
    assert settings.origins == {
        "control.socket": "--socket",
        "log.format": "--log-format",
        "log.level": "-v",
        "net.mtu": "--set net.mtu",
    }
    assert config.load(None, runs.environ, runs.given).origins == settings.origins


@pytest.mark.parametrize(
    ("option", "code", "message"),
    [
        ("net.mtu", 2, "error: Invalid value for '--set': 'net.mtu' is not KEY=VALUE"),
        ("net.mtuu=5", 78, 'error: --set net.mtuu: there is no key net.mtuu (did you mean "net.mtu"?)'),
        ("net.mtu=x", 78, 'error: --set net.mtu: expected an integer from 576 to 65535, or 0 for the best, got "x"'),
        ("api.key=a secret", 78, "error: --set api.key: expected an API key, got a text that holds spaces or unprint"),
    ],
)
def test_a_wrong_setting_on_the_command_line_is_named(
    cli: Cli, runs: Runs, option: str, code: int, message: str
) -> None:
    outcome = cli("run", "--set", option)

    assert outcome.code == code
    assert outcome.err.startswith(message)
    assert runs.settings == []


def test_the_daemons_result_is_the_exit_code(cli: Cli, runs: Runs) -> None:
    """And its refusal to start is a line and a code."""
    runs.result = 70
    assert cli("run").code == 70

    runs.result = TakenError("the interface ngrokd0 belongs to process 7", remedy="choose another")
    outcome = cli("run")

    assert outcome.code == Exit.CANNOT_CREATE
    assert outcome.err == "error: the interface ngrokd0 belongs to process 7\n  hint: choose another\n"
    assert outcome.out == ""


def test_a_wrong_configuration_ends_run_with_78_and_all_mistakes(cli: Cli, runs: Runs, folder: Path) -> None:
    """A line each on stderr; with --json one document."""
    (folder / "bad.toml").write_text("[net]\nmtu = 1\nfoo = 2\n")

    text = cli("run", "--config", str(folder / "bad.toml"))
    document = cli("run", "--config", str(folder / "bad.toml"), "--json")

    assert (text.code, document.code) == (78, 78)
    assert [line[:7] for line in text.err.splitlines()] == ["error: ", "error: "]
    assert document.document()["schema"] == "ngrokd.run/1"
    assert document.document()["error"]["code"] == 78
    assert runs.settings == []


def test_a_yaml_file_names_the_command_that_converts_it(cli: Cli, runs: Runs, folder: Path) -> None:
    """`ngrokd --config=/etc/ngrokd/config.yml` is in many units."""
    (folder / "config.yml").write_text("api:\n  key: x\n")

    outcome = cli(f"--config={folder}/config.yml")

    assert outcome.code == 78
    assert f"  hint: convert it with: ngrokd config import {folder}/config.yml" in outcome.err.splitlines()


# Errors


def test_a_bug_is_one_line_and_a_traceback_only_when_asked_for(cli: Cli, runs: Runs) -> None:
    """Exit 70; -vv shows where, before the command or after it."""
    runs.result = ZeroDivisionError("oops\x1b[2J")

    quiet = cli("run")
    loud = cli("run", "-vv")
    louder = cli("-v", "run", "-v")

    assert quiet.code == Exit.INTERNAL
    assert quiet.err.splitlines()[0] == "error: internal error: ZeroDivisionError: oops\\x1b[2J"
    assert "Traceback" not in quiet.err
    assert "Traceback" in loud.err
    assert "Traceback" in louder.err


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (("stauts",), "there is no command 'stauts' (did you mean 'status'?)", "see: ngrokd --help"),
        (("xyzzy",), "there is no command 'xyzzy'", "see: ngrokd --help"),
        (("status", "--jsn"), "No such option '--jsn'. Did you mean '--json'?", "see: ngrokd status --help"),
        (("status", "extra"), "Got unexpected extra argument (extra)", "see: ngrokd status --help"),
        (("--config",), "Option '--config' requires an argument.", "see: ngrokd --help"),
        (("run", "--log-level", "loud"), "Invalid value for '--log-level'", "see: ngrokd run --help"),
    ],
)
def test_a_mistyped_command_line_exits_2_with_a_hint(
    cli: Cli, arguments: tuple[str, ...], message: str, hint: str
) -> None:
    """In the same form as every other error."""
    outcome = cli(*arguments)

    assert outcome.code == Exit.USAGE
    assert outcome.err.startswith(f"error: {message}")
    assert outcome.err.endswith(f"  hint: {hint}\n")
    assert outcome.out == ""


def test_a_mistyped_command_line_with_json_is_a_document(cli: Cli) -> None:
    """A script parses stdout before it looks at anything else."""
    outcome = cli("stauts", "--json")

    assert outcome.code == Exit.USAGE
    assert outcome.document()["error"]["code"] == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt(), click.Abort()])
def test_an_interrupt_is_130_and_no_traceback(cli: Cli, runs: Runs, error: BaseException) -> None:
    """As a shell says it."""
    runs.result = error

    outcome = cli("run")

    assert outcome.code == 128 + signal.SIGINT
    assert outcome.err.strip() == ""


@pytest.mark.parametrize("argument", ["help", "--help"])
def test_a_reader_that_has_seen_enough_is_no_error(argument: str) -> None:
    """`ngrokd help | head -1`: quiet, and what a shell shows for SIGPIPE, since 1 says that a check answered no."""
    reading, writing = os.pipe()
    os.close(reading)

    done = subprocess.run(
        [sys.executable, "-m", "ngrokd", argument], stdout=writing, stderr=subprocess.PIPE, check=False
    )
    os.close(writing)

    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device is always full here")
@pytest.mark.parametrize("arguments", [["help"], ["--help"], ["version", "--json"]])
def test_a_full_disk_is_one_line_and_a_code_of_its_own(arguments: list[str]) -> None:
    """`ngrokd version > /full/disk`: no bug of ours, nothing that is said once more at the end of the process."""
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "ngrokd", *arguments], stdout=full, stderr=subprocess.PIPE, check=False
        )

    assert done.returncode == Exit.OUTPUT
    assert done.stderr == b"error: cannot write the output: No space left on device\n"


def test_another_system_is_told_of_wsl(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, before anything is imported that only Unix has."""
    monkeypatch.setattr(sys, "platform", "win32")

    with pytest.raises(SystemExit) as caught:
        entry.main()

    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "WSL2" in error


# help and version


@pytest.mark.parametrize("arguments", [("--help",), ("-h",), ("-help",), ("help",)])
def test_help_lists_every_command(cli: Cli, arguments: tuple[str, ...]) -> None:
    """Each with its line."""
    outcome = cli(*arguments)

    assert outcome.code == 0
    for name, (_, _, line) in COMMANDS.items():
        assert f"  {name} " in outcome.out
        assert line in outcome.out


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_can_be_imported_and_takes_the_common_options(cli: Cli, name: str) -> None:
    """The table of commands cannot go stale, nor can one forget an option."""
    assert isinstance(group, LazyGroup)
    command = group.get_command(click.Context(group), name)

    assert command is not None
    assert command.name == name
    assert {"config", "socket", "as_json", "verbosity"} <= {parameter.name for parameter in command.params}
    assert cli("help", name).out == cli(name, "--help").out


def test_help_goes_into_groups(cli: Cli) -> None:
    """One level would leave most of it out."""
    assert cli("help", "config", "set").out.startswith("Usage: ngrokd config set ")
    assert cli("help", "config", "nonsense").code == 2
    assert cli("help", "run", "nonsense").err.startswith("error: run has no commands of its own\n")


@pytest.mark.parametrize("argument", ["--version", "-version", "-V"])
def test_the_version_is_one_line(cli: Cli, argument: str) -> None:
    """In the Go daemon's words."""
    assert cli(argument).out == f"ngrokd version {ngrokd.__version__}\n"


def test_version_tells_on_what_it_stands(cli: Cli) -> None:
    """For bug reports."""
    text = cli("version").out
    document = cli("version", "--json").document()

    assert text.startswith(f"ngrokd version {ngrokd.__version__}\n  Python ")
    assert document["schema"] == "ngrokd.version/1"
    assert set(document["data"]) == {"version", "python", "openssl", "platform", "compiled"}


def test_single_dashes_are_understood_up_to_a_double_dash() -> None:
    """What follows it is an argument, whatever it looks like."""
    assert normalise(["-config=F", "-version", "-c", "x", "--", "-config=G"]) == [
        "--config=F",
        "--version",
        "-c",
        "x",
        "--",
        "-config=G",
    ]


def test_the_module_can_be_run() -> None:
    """`python -m ngrokd`."""
    done = subprocess.run(
        [sys.executable, "-m", "ngrokd", "version", "--json"], capture_output=True, text=True, check=True
    )

    assert json.loads(done.stdout)["data"]["version"] == ngrokd.__version__
