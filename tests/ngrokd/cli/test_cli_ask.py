"""The commands that ask a running daemon, and what they say when there is none."""

from __future__ import annotations

import io
import os
import pty
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ngrokd.cli import output
from ngrokd.errors import Exit
from ngrokd.ops.control import ControlError

Cli = Callable[..., Any]  # the fixtures of conftest.py, which is no module to import from
Daemon = Callable[..., Any]

GO_STATUS = {"registered": True, "operator_id": "k8sop_2", "endpoint_count": 13, "ingress_endpoint": "ingress:443"}
FULL_STATUS = {
    **GO_STATUS,
    "state": "degraded",
    "version": "0.1.0",
    "pid": 1234,
    "uptime_s": 8130.2,
    "interface": "ngrokd0",
    "subnet": "10.107.0.0/16",
    "api": {
        "url": "https://api.ngrok.com",
        "key_source": "set-api-key (/etc/ngrokd/api_key)",
        "problem": "",
        "remedy": "",
    },
    "certificate": {"not_after": 4_102_444_800.0, "problem": "no answer"},
    "hosts": {"enabled": True, "path": "/etc/hosts", "problem": ""},
    "skipped": [{"id": "ep_1", "url": "http://bad\x1b[2J.prod", "reason": "host name has a control character"}],
    "without_address": [],
    "flows": 4,
    "something": "new",
}
ENDPOINTS = [
    {"id": "ep_2", "hostname": "db.prod", "ip": "10.107.0.3", "port": 5432, "url": "tcp://db.prod:5432"},
    {
        "id": "ep_1",
        "hostname": "api.prod",
        "ip": "10.107.0.2",
        "port": 80,
        "url": "http://api.prod",
        "flags": ["public"],
    },
    {"id": "ep_3", "hostname": "api.prod", "ip": "10.107.0.2", "port": 443, "url": "https://api.prod"},
]


# status


def test_status_shows_what_the_daemon_tells(cli: Cli, daemon: Daemon) -> None:
    """Aligned, each fact on a line, what is wrong below; foreign text escaped, unknown members passed over."""
    daemon(status=FULL_STATUS)

    outcome = cli("status")

    assert outcome.code == 0
    assert outcome.out.splitlines() == [
        "ngrokd 0.1.0 is running, with problems (pid 1234, up 2 h)",
        "",
        "  Registered   yes, as k8sop_2",
        "  API          https://api.ngrok.com",
        "  API key      set-api-key (/etc/ngrokd/api_key)",
        f"  Certificate  valid until 2100-01-01 00:00 UTC ({output.ago(4_102_444_800 - time.time())} left)",
        "  Ingress      ingress:443",
        "  Interface    ngrokd0, 10.107.0.0/16",
        "  Hosts file   /etc/hosts",
        "  Endpoints    13, and 1 skipped",
        "  Connections  4",
        "",
        "  SKIPPED                 REASON",
        "  http://bad\\x1b[2J.prod  host name has a control character",
        "",
        "  problem: no answer",
    ]


@pytest.mark.parametrize(
    ("workers", "shown"),
    [
        ([], None),
        (
            [{"pid": 1, "state": "running"}, {"pid": 2, "state": "running", "restarts": 1}],
            "2 (pid 1, 2), replaced once",
        ),
        (
            [{"pid": 0, "state": "starting", "restarts": 3}, {"pid": 2, "state": "running"}],
            "1 of 2 run (pid 2), replaced 3",
        ),
        ("two", None),
    ],
)
def test_status_names_the_workers(cli: Cli, daemon: Daemon, workers: object, shown: str | None) -> None:
    """Where connections are carried by processes of their own, those are what `kill` and `perf` want to know."""
    daemon(status=FULL_STATUS | {"workers": workers})

    out = cli("status").out

    assert (f"  Workers      {shown}" in out) if shown else ("Workers" not in out)


def test_status_understands_the_go_daemon(cli: Cli, daemon: Daemon) -> None:
    """It tells four facts; the rest is left out."""
    daemon(status={"registered": False, "endpoint_count": 0, "ingress_endpoint": ""})

    assert cli("status").out.splitlines() == [
        "ngrokd is running and waits for an API key",
        "",
        "  Registered  no",
        "  Endpoints   0",
    ]


@pytest.mark.parametrize(
    "data", [None, [], "x", {"skipped": 7, "api": 3, "pid": "x", "certificate": {"not_after": "x"}}]
)
def test_status_survives_any_answer(cli: Cli, daemon: Daemon, data: object) -> None:
    """Another version may mean something else by a name."""
    daemon(status=data)

    assert cli("status").code == 0
    assert cli("--json", "status").document()["schema"] == "ngrokd.status/1"


def test_waiting_for_a_key_says_how_to_give_one(cli: Cli, daemon: Daemon) -> None:
    """The first thing a new user sees."""
    daemon(status={**FULL_STATUS, "registered": False, "state": "waiting_for_key", "certificate": {}})

    out = cli("status").out

    assert out.startswith("ngrokd 0.1.0 is running and waits for an API key")
    assert "problem: no API key\n    hint: sudo ngrokd set-api-key" in out


def test_status_of_a_stopped_daemon_says_so_and_exits_3(cli: Cli, folder: Path) -> None:
    """Not an error: it is the answer."""
    text = cli("status")
    document = cli("status", "--json")

    assert (text.code, document.code) == (Exit.NOT_RUNNING, Exit.NOT_RUNNING)
    assert text.out == (
        f"ngrokd is stopped (nobody answers at {folder}/nobody)\n  hint: start it with: sudo ngrokd run\n"
    )
    assert text.err == document.err == ""
    assert document.document() == {
        "schema": "ngrokd.status/1",
        "data": {"state": "stopped", "registered": False, "endpoint_count": 0, "socket": f"{folder}/nobody"},
    }


@pytest.mark.parametrize("arguments", [("--json", "status"), ("status", "--json")])
def test_json_is_the_daemons_data_in_an_envelope(cli: Cli, daemon: Daemon, arguments: tuple[str, ...]) -> None:
    """Wherever --json stands; one document, ASCII, nothing else."""
    daemon(status=FULL_STATUS)

    outcome = cli(*arguments)

    assert outcome.document() == {"schema": "ngrokd.status/1", "data": FULL_STATUS}
    assert outcome.out.isascii()
    assert outcome.out.count("\n") == 1


# list


@pytest.mark.parametrize("name", ["list", "ls"])
def test_list_is_a_table_sorted_by_name_and_port(cli: Cli, daemon: Daemon, name: str) -> None:
    """Notes have a column only where there are any."""
    daemon(list=ENDPOINTS)

    assert cli(name).out.splitlines() == [
        "URL                 ADDRESS          NOTE",
        "http://api.prod     10.107.0.2:80    public",
        "https://api.prod    10.107.0.2:443",
        "tcp://db.prod:5432  10.107.0.3:5432",
    ]
    assert [entry["id"] for entry in cli(name, "--json").document()["data"]] == ["ep_1", "ep_3", "ep_2"]
    assert cli(name, "--json").document()["schema"] == "ngrokd.list/1"


def test_an_empty_list_prints_nothing_on_stdout(cli: Cli, daemon: Daemon) -> None:
    """A script that counts lines counts none."""
    daemon(list=[])

    outcome = cli("list")

    assert (outcome.code, outcome.out) == (0, "")
    assert "no endpoints are served" in outcome.err
    assert cli("list", "--json").document()["data"] == []


def test_list_escapes_what_others_named(cli: Cli, daemon: Daemon) -> None:
    """The daemon refuses such names; another daemon may not."""
    daemon(list=[{"url": "http://a\x1b[2J\n", "ip": "fd00::1", "port": 80}])

    assert cli("list").out.splitlines()[1] == "http://a\\x1b[2J\\n  [fd00::1]:80"


# health


@pytest.mark.parametrize(
    ("healthy", "ready", "arguments", "code"),
    [(True, True, (), 0), (False, True, (), 1), (False, True, ("--ready",), 0), (True, False, ("--ready",), 1)],
)
def test_health_is_an_exit_code(
    cli: Cli, daemon: Daemon, healthy: bool, ready: bool, arguments: tuple[str, ...], code: int
) -> None:
    """Fit for a container's health check, without HTTP."""
    data = {"healthy": healthy, "ready": ready, "uptime": "2h0m0s", "endpoints": {"ep_1": {}} if healthy else {}}
    daemon(health=data)

    outcome = cli("health", *arguments)

    assert outcome.code == code
    assert outcome.out.splitlines()[0] == ("Healthy  yes (1 endpoint)" if healthy else "Healthy  no (0 endpoints)")
    assert cli("health", "--json", *arguments).document() == {"schema": "ngrokd.health/1", "data": data}


def test_health_of_a_stopped_daemon_is_an_error(cli: Cli) -> None:
    """3 and not 1: nobody was there to judge."""
    outcome = cli("health")

    assert outcome.code == Exit.NOT_RUNNING
    assert outcome.err.splitlines()[1] == "  hint: start it with: sudo ngrokd run"


# set-api-key


def test_a_key_from_stdin_reaches_the_daemon(cli: Cli, daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the end of line that echo adds; and it is never shown."""
    fake = daemon(set_api_key="API key set successfully")
    monkeypatch.setattr(sys, "stdin", io.StringIO("CANARY_key\n"))

    outcome = cli("set-api-key", "--stdin")

    assert fake.asked == [("set-api-key", ["CANARY_key"])]
    assert outcome.out == "API key set successfully\n"
    assert "CANARY" not in outcome.out + outcome.err


def test_a_key_from_a_pipe_needs_no_option(cli: Cli, daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nobody to prompt."""
    fake = daemon(set_api_key="ok")
    monkeypatch.setattr(sys, "stdin", io.StringIO("K\n"))

    cli("set-api-key")

    assert fake.asked == [("set-api-key", ["K"])]


def test_a_key_from_a_file(cli: Cli, daemon: Daemon, folder: Path) -> None:
    """And one that is not there is a mistake of usage."""
    fake = daemon(set_api_key="ok")
    (folder / "k").write_text(" K \n")

    assert cli("set-api-key", "--file", str(folder / "k")).code == 0
    assert cli("set-api-key", "--file", str(folder / "none")).code == Exit.USAGE
    assert fake.asked == [("set-api-key", ["K"])]


def test_a_key_as_an_argument_works_with_a_warning(cli: Cli, daemon: Daemon) -> None:
    """As with the Go daemon's ngrokctl; the warning names the better way and not the key."""
    fake = daemon(set_api_key="API key set successfully")

    outcome = cli("set-api-key", "CANARY", program="ngrokctl")

    assert fake.asked == [("set-api-key", ["CANARY"])]
    assert outcome.code == 0
    assert "--stdin" in outcome.err
    assert "CANARY" not in outcome.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("",), "the key is empty"),
        (("two words",), "the key holds spaces"),
        (("K", "--stdin"), "give the key in one way"),
        (("--stdin", "--file", "x"), "give the key in one way"),
    ],
)
def test_what_cannot_be_a_key_is_not_sent(cli: Cli, arguments: tuple[str, ...], message: str) -> None:
    """There is no daemon here, and it is not missed."""
    outcome = cli("set-api-key", *arguments)

    assert outcome.code == Exit.USAGE
    assert message in outcome.err


def test_a_refused_key_has_the_daemons_code_and_hint(cli: Cli, daemon: Daemon) -> None:
    """In words and in JSON."""
    daemon(set_api_key=ControlError("ngrok refused the key", code=Exit.UNREACHABLE, remedy="make a new one"))

    text = cli("set-api-key", "K")
    document = cli("set-api-key", "K", "--json")

    assert (text.code, document.code) == (69, 69)
    assert text.err.splitlines()[-2:] == ["error: ngrok refused the key", "  hint: make a new one"]
    assert document.document() == {
        "schema": "ngrokd.set-api-key/1",
        "error": {"code": 69, "message": "ngrok refused the key", "hint": "make a new one"},
    }


# refresh


def test_refresh_and_refresh_cert_pass_on_what_the_daemon_says(cli: Cli, daemon: Daemon) -> None:
    """With --force as the argument that the Go daemon takes."""
    fake = daemon(refresh="3 endpoints are served", refresh_cert="Certificate renewal forced (check daemon logs)")

    assert cli("refresh").out == "3 endpoints are served\n"
    assert cli("refresh-cert", "--force").out == "Certificate renewal forced (check daemon logs)\n"
    assert cli("refresh-cert", "--json").document()["data"] == "Certificate renewal forced (check daemon logs)"
    assert fake.asked == [("refresh", []), ("refresh-cert", ["--force"]), ("refresh-cert", [])]


# Where the socket is


def test_the_socket_is_found_by_option_variable_configuration_and_default(
    cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this order."""

    def asked(*arguments: str) -> str:
        return str(cli("status", "--json", *arguments).document()["data"]["socket"])

    (folder / "config.toml").write_text(f'[control]\nsocket = "{folder}/default-config"\n')
    (folder / "other.toml").write_text(f'[control]\nsocket = "{folder}/other-config"\n')
    monkeypatch.chdir(folder)

    assert asked("--socket", "relative") == f"{folder}/relative"
    assert asked("--config", str(folder / "other.toml")) == f"{folder}/nobody"
    monkeypatch.delenv("NGROKD_SOCKET")
    assert asked("--config", str(folder / "other.toml")) == f"{folder}/other-config"
    assert asked() == f"{folder}/default-config"
    (folder / "config.toml").unlink()
    assert asked() == "/var/run/ngrokd.sock"


def test_a_default_configuration_that_may_not_be_read_is_passed_over(
    cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It belongs to root and may hold a key; the group may ask the daemon all the same."""
    monkeypatch.delenv("NGROKD_SOCKET")
    real = os.open

    def refuse(path: str, *arguments: Any, **more: Any) -> int:  # passed through as they are
        if path == str(folder / "config.toml"):
            raise PermissionError(13, "Permission denied")
        return real(path, *arguments, **more)

    monkeypatch.setattr(os, "open", refuse)

    assert cli("status", "--json").document()["data"]["socket"] == "/var/run/ngrokd.sock"


def test_a_wrong_configuration_is_said_before_anybody_is_asked(
    cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guessing the socket would ask the wrong daemon."""
    monkeypatch.delenv("NGROKD_SOCKET")
    (folder / "config.toml").write_text("[net]\nmtu = 1\n[log]\nlevel = 7\n")

    outcome = cli("status")

    assert outcome.code == Exit.CONFIG
    assert [line.partition(" expected")[0] for line in outcome.err.splitlines()] == [
        f"error: {folder}/config.toml:2: net.mtu:",
        f"error: {folder}/config.toml:4: log.level:",
    ]


# Cost


def test_status_imports_no_trio_and_is_quick(daemon: Daemon) -> None:
    """It is asked by prompts and probes. What counts is processor time: the machine has other things to do."""
    daemon(status=FULL_STATUS)
    code = "import sys; from ngrokd.cli.app import invoke; invoke('ngrokd', ['status']); print(*sys.modules)"

    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    times = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "ngrokd", "status"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)

    assert not {"trio", "pyroute2", "cryptography", "h11", "ssl", "msgspec"} & set(loaded.split())
    assert min(times) < 0.1


# What a person sees


def test_a_terminal_gets_colour_and_cut_columns(daemon: Daemon) -> None:
    """60 columns are enough for what matters; a pipe gets everything and no escape."""
    long = {"url": f"https://{'a' * 70}.prod", "hostname": "a", "ip": "10.107.0.2", "port": 443}
    daemon(list=[long])
    leader, follower = pty.openpty()
    os.set_blocking(leader, False)
    environ = {**os.environ, "COLUMNS": "60", "TERM": "xterm"}

    subprocess.run([sys.executable, "-m", "ngrokd", "list"], stdout=follower, check=True, env=environ)
    seen = os.read(leader, 65536).decode().replace("\r\n", "\n").splitlines()
    os.close(leader)
    os.close(follower)

    assert seen[0].startswith("\x1b[2mURL")
    assert seen[1].endswith("…  10.107.0.2:443")
    assert len(seen[1]) == 60


def test_tables_never_get_narrower_than_they_can_be_read() -> None:
    """At eight characters a column is left alone, and the line wraps."""
    assert output.table(("A", "B"), [("x" * 30, "y" * 30)], 5) == ["A         B", "xxxxxxx…  yyyyyyy…"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(-5, "0 s"), (0, "0 s"), (119, "119 s"), (120, "2 min"), (7200, "2 h"), (172800, "2 days")]
)
def test_lengths_of_time_are_rough(seconds: float, text: str) -> None:
    """One number, two digits or three."""
    assert output.ago(seconds) == text


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("2025-11-20T10:00:00Z", 1_763_632_800.0),
        (1_763_632_800, 1_763_632_800.0),
        ("0001-01-01T00:00:00Z", None),
        ("2025-11-20T10:00:00", None),
        (0, None),
        (True, None),
        (1e300, None),
        (float("nan"), None),
        ("x", None),
        (None, None),
    ],
)
def test_times_are_understood_as_text_and_as_numbers(value: object, seconds: float | None) -> None:
    """And what is no time is none."""
    assert output.wall_time(value) == seconds
