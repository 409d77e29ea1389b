"""Every command, in each way it can fail: one clear message, its exit code, no traceback; a document with --json."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ngrokd.cli.papers import Entry, entries
from ngrokd.errors import ApiError, Exit, NgrokdError, PermissionMissingError

Cli = Callable[..., Any]  # the fixtures of conftest.py, which is no module to import from
Daemon = Callable[..., Any]

ENTRIES = list(entries())

# What asks the daemon: the command line, and the request.
ASKING = {
    "status": "status",
    "list": "list",
    "health": "health",
    "flows": "flows",
    "flows --ended": "flows",
    "flows close 3": "close-flow",
    "top": "top",
    "ping my-api.prod": "probe",
    "events": "events",
    "logs": "logs",
    "log-level": "log-level",
    "log-level debug --for 1m": "set-log-level",
    "capture -w FOLDER/file": "capture",
    "metrics": "metrics",
    "set-api-key --file FOLDER/key": "set-api-key",
    "refresh": "refresh",
    "refresh-cert --force": "refresh-cert",
    "reload": "reload",
    "pause": "pause",
    "resume": "resume",
}
# What reads the configuration, besides what asks the daemon and has to find its socket.
CONFIGURED = (
    "run",
    "plan",
    "cleanup --dry-run",
    "config show",
    "config get net.mtu",
    "config set net.mtu 1400",
    "config unset net.mtu",
    "config validate",
    "service print",
)
BY_ITSELF = {  # neither
    *("config path", "config init", "config edit", "config import", "config schema"),
    *("completion", "version", "help", "demo", "doctor", "wait", "metrics write", "migrate"),
    *("service install", "service uninstall", "service start", "service stop", "service restart", "service status"),
}


def schema_of(line: str) -> str:
    """The schema that the page about the commands names."""
    words = line.split()
    names = [entry for entry in ENTRIES if words[: len(entry.name.split())] == entry.name.split()]
    return max(names, key=lambda entry: len(entry.name)).answer.partition(",")[0]


@pytest.fixture
def try_out(cli: Cli, folder: Path) -> Callable[[str], Any]:
    """Carry out one of these lines, as text and with --json, and make sure that both say the same."""
    (folder / "key").write_text("an-api-key-of-somebody\n")
    (folder / "key").chmod(0o600)

    def run(line: str) -> Any:
        words = line.replace("FOLDER", str(folder)).split()
        text, document = cli(*words), cli(*words, "--json")
        assert "Traceback" not in text.err + document.err
        assert text.code == document.code
        assert document.err == ""
        answer = document.document()
        assert answer["schema"] == schema_of(line)
        if "error" in answer:
            assert set(answer) == {"schema", "error"}
            assert answer["error"]["code"] == text.code
            assert text.out == ""
            assert text.err.startswith(f"error: {answer['error']['message'].splitlines()[0]}")
            assert sum(each.startswith("  hint: ") for each in text.err.splitlines()) == ("hint" in answer["error"])
        return text

    return run


def test_no_command_is_forgotten_here() -> None:
    known = {line.split(" -")[0] for line in (*ASKING, *CONFIGURED)} | BY_ITSELF

    missing = [
        entry.name for entry in ENTRIES if entry.acts and not any((line + " ").startswith(entry.name) for line in known)
    ]

    assert missing == []


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: str(entry.name))
def test_an_option_that_does_not_exist_is_2(cli: Cli, entry: Entry) -> None:
    """With the place where the right ones stand."""
    words = entry.name.split()

    text, document = cli(*words, "--xyzzy"), cli(*words, "--json", "--xyzzy")

    assert (text.code, document.code) == (Exit.USAGE, Exit.USAGE)
    assert text.err.splitlines() == [
        "error: No such option '--xyzzy'.",
        f"  hint: see: ngrokd {entry.name} --help",
    ]
    assert document.document()["error"]["code"] == Exit.USAGE
    assert document.document()["schema"] == f"ngrokd.{entry.name.replace(' ', '.')}/1"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("config sett", "No such command 'sett'."),
        ("service strat", "No such command 'strat'."),
        ("help config shwo", "No such command 'shwo'."),
        ("flows clsoe 3", "No such command 'clsoe'."),
        ("log-level lowd", "Invalid value for '[debug|info|warning|error]': 'lowd' is not one of 'debug'"),
        ("ping", "Missing argument 'NAME'."),
        ("flows close x", "Invalid value for 'ID...'"),
        ("config get net.mut", "there is no key 'net.mut' (did you mean 'net.mtu'?)"),
        ("config set nett.mtu 5", "there is no key 'nett.mtu' (did you mean 'net.mtu'?)"),
        ("config show nett", "there is no section or key 'nett' (did you mean 'net'?)"),
        ("wait --for endpoint", "--for endpoint takes a NAME"),
        ("log-level debug --for soon", "'soon' is not a time such as"),
        ("capture -w x -W 5", "-W goes with -C"),
        ("completion csh", "Invalid value for '{bash|zsh|fish}'"),
    ],
)
def test_what_is_mistyped_is_2_and_says_what_was_meant(cli: Cli, line: str, message: str) -> None:
    """Wherever on the line it stands."""
    outcome = cli(*line.split())

    assert outcome.code == Exit.USAGE
    assert outcome.err.startswith(f"error: {message}")
    assert "  hint: see: ngrokd " in outcome.err
    assert outcome.out == ""


@pytest.mark.parametrize("line", ASKING)
def test_no_daemon_is_3(try_out: Callable[[str], Any], folder: Path, line: str) -> None:
    """And how one is started. `status` says it on stdout, since that is its answer."""
    outcome = try_out(line)

    assert outcome.code == Exit.NOT_RUNNING
    said = outcome.out if line == "status" else outcome.err
    assert f"nobody answers at {folder}/nobody" in said
    assert said.endswith("  hint: start it with: sudo ngrokd run\n")
    assert not (folder / "file").exists()


def test_without_a_daemon_other_commands_keep_their_word(try_out: Callable[[str], Any], folder: Path) -> None:
    """`wait` waits for it, and the metrics say that it is down."""
    assert try_out("wait --timeout 10ms").code == Exit.NO
    assert try_out("metrics write FOLDER/page").code == Exit.NOT_RUNNING
    assert "ngrokd_up 0\n" in (folder / "page").read_text()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (PermissionMissingError("this is for root", remedy="use sudo"), Exit.NOT_PERMITTED),
        (ApiError("ngrok does not answer"), Exit.UNREACHABLE),
    ],
)
@pytest.mark.parametrize("line", ASKING)
def test_what_the_daemon_refuses_is_its_code(
    try_out: Callable[[str], Any], daemon: Daemon, line: str, error: NgrokdError, code: int
) -> None:
    """77 without the right to ask that, 69 when ngrok cannot be reached; in the daemon's words."""
    fake = daemon(**{ASKING[line]: error})

    outcome = try_out(line)

    assert outcome.code == code
    assert outcome.err.splitlines()[0] == f"error: {error}"
    assert {asked for asked, _ in fake.asked} == {ASKING[line]}


@pytest.mark.parametrize("line", ["service install", "service uninstall", "migrate", "migrate --undo"])
def test_what_changes_the_machine_needs_root(
    try_out: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    """Said before anything is looked at."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)

    outcome = try_out(line)

    assert outcome.code == Exit.NOT_PERMITTED
    assert "  hint: sudo ngrokd " in outcome.err


@pytest.mark.parametrize("line", [*ASKING, *CONFIGURED, "wait", "metrics write FOLDER/page"])
def test_a_broken_configuration_is_78(
    try_out: Callable[[str], Any], folder: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    """With file, line and what was meant, also where only the socket is looked up in it."""
    monkeypatch.delenv("NGROKD_SOCKET")
    bad = folder / "bad.toml"
    bad.write_text("[net]\nmtuu = 3\n")

    outcome = try_out(f"{line} --config {bad}")

    assert outcome.code == Exit.CONFIG
    assert f'error: {bad}:2: net.mtuu: unknown key (did you mean "mtu"?)' in outcome.err.splitlines()
    assert bad.read_text() == "[net]\nmtuu = 3\n"
    assert not (folder / "page").exists()


def test_printing_the_commented_file_writes_none(try_out: Callable[[str], Any], folder: Path) -> None:
    """Whether or not there is one, and with --json as well."""
    for _ in range(2):
        assert try_out("config init --stdout").code == Exit.OK
        assert not (folder / "config.toml").exists()
