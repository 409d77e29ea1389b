"""What service managers are told, judged by their own tools."""

from __future__ import annotations

import os
import plistlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ngrokd.host.units import LABEL, Service, launchd_plist, newsyslog_line, systemd_unit

ROOT = Path(__file__).resolve().parents[3]
BEST = 2.0
BEST_WITH_WORKERS = 2.5


@pytest.fixture
def analyze() -> str:
    """systemd's own judge; without it the test is skipped, but not in CI."""
    tool = shutil.which("systemd-analyze")
    if tool is None:
        if os.environ.get("CI") == "true":
            pytest.fail("systemd-analyze is missing (apt-get install systemd)")
        pytest.skip("systemd-analyze is missing")
    return tool


def written(tmp_path: Path, service: Service) -> Path:
    path = tmp_path / f"{service.name}.service"
    path.write_text(systemd_unit(service))
    return path


def lines(service: Service) -> list[str]:
    return systemd_unit(service).splitlines()


def test_the_unit_in_conf_is_the_one_that_is_installed() -> None:
    """Who writes units with another tool copies it from there."""
    assert (ROOT / "conf/ngrokd.service").read_text() == systemd_unit(Service())


def test_the_job_in_conf_is_the_one_that_is_meant() -> None:
    """Of launchd."""
    assert (ROOT / "conf/com.ngrokd.ngrokd.plist").read_bytes() == launchd_plist(Service())


@pytest.mark.parametrize(
    "service",
    [
        Service(program=("/bin/true",)),
        Service(name="ngrokd-two", program=("/bin/true", "-m", "ngrokd"), config="/etc/a b%c$d;e.toml", workers=4),
        Service(program=("/bin/true",), key_file="/etc/ngrokd/key", group="adm", writable=("/etc", "/var/lib/ng")),
    ],
    ids=["plain", "another", "group"],
)
def test_systemd_understands_every_line(analyze: str, tmp_path: Path, service: Service) -> None:
    """An unknown or misplaced key is only a warning to it, and so never noticed."""
    run = subprocess.run(
        [analyze, "verify", str(written(tmp_path, service))], capture_output=True, text=True, check=False, timeout=60
    )

    said = [line for line in run.stderr.splitlines() if service.name in line]
    assert (run.returncode, said) == (0, []), run.stderr


@pytest.mark.parametrize(("workers", "best"), [(1, BEST), (4, BEST_WITH_WORKERS)])
def test_the_service_is_walled_in(analyze: str, tmp_path: Path, workers: int, best: float) -> None:
    """By systemd's own measure, from 0 (nothing can be reached) to 10."""
    path = written(tmp_path, Service(program=("/bin/true",), workers=workers))
    run = subprocess.run(
        [analyze, "security", "--offline=true", "--no-pager", str(path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )

    exposure = re.search(r"exposure level for \S+: ([0-9.]+)", run.stdout)

    assert exposure, run.stdout + run.stderr
    assert float(exposure[1]) <= best, run.stdout


def test_what_is_written_is_writable_and_nothing_else() -> None:
    """The hosts file's directory as a whole: a file alone would become a mount point that cannot be replaced."""
    assert "ReadWritePaths=/etc" in lines(Service())
    assert "ReadWritePaths=/etc /var/lib/ngrokd" in lines(Service(writable=("/etc", "/var/lib/ngrokd")))
    assert "ProtectSystem=strict" in lines(Service())


def test_workers_may_drop_their_rights_and_one_process_may_not() -> None:
    """Each form has the rights that it needs."""
    one, four = systemd_unit(Service()), systemd_unit(Service(workers=4))

    assert "CapabilityBoundingSet=CAP_NET_ADMIN\n" in one
    assert "CapabilityBoundingSet=CAP_NET_ADMIN CAP_SETUID CAP_SETGID CAP_SETPCAP CAP_KILL\n" in four
    assert "SystemCallFilter=~@privileged @resources" in one
    assert "SystemCallFilter=~@resources" in four


def test_a_group_that_may_ask_is_one_of_the_process() -> None:
    """Then changing the socket's group takes no capability, only the call."""
    grouped = lines(Service(group="ngrok"))

    assert "SupplementaryGroups=ngrok" in grouped
    assert "SystemCallFilter=@chown" in grouped
    assert not any(line.startswith("SupplementaryGroups") for line in lines(Service()))


def test_connections_are_given_their_time_to_end() -> None:
    """systemd kills later than the daemon would give up by itself."""
    assert "TimeoutStopSec=40" in lines(Service())
    assert "TimeoutStopSec=130" in lines(Service(drain_s=120.0))
    assert plistlib.loads(launchd_plist(Service(drain_s=120.0)))["ExitTimeOut"] == 130


def test_an_instance_keeps_to_itself() -> None:
    """Its own socket, runtime directory and configuration, in every command."""
    text = systemd_unit(Service(name="ngrokd-two", config="/etc/two.toml"))

    assert "ExecStart=/usr/local/bin/ngrokd --config /etc/two.toml run\n" in text
    assert "ExecStopPost=/usr/local/bin/ngrokd --config /etc/two.toml cleanup\n" in text
    assert "Environment=NGROKD_SOCKET=/run/ngrokd-two/ngrokd.sock\n" in text
    assert "RuntimeDirectory=ngrokd-two\n" in text


def test_words_that_mean_something_to_systemd_are_quoted() -> None:
    """A path with a blank is one argument; % and $ are themselves."""
    assert 'ExecStart=/bin/true --config "/etc/a b%%c$$d;e.toml" run' in lines(
        Service(program=("/bin/true",), config="/etc/a b%c$d;e.toml")
    )


def test_the_job_of_launchd_is_a_property_list() -> None:
    """Started at boot and after a failure; not slowed down; killed only after it had its time."""
    job = plistlib.loads(launchd_plist(Service(program=("/opt/ngrokd/venv/bin/ngrokd",))))

    assert job["Label"] == LABEL
    assert job["ProgramArguments"] == ["/opt/ngrokd/venv/bin/ngrokd", "run"]
    assert job["KeepAlive"] == {"SuccessfulExit": False}
    assert job["RunAtLoad"] is True
    assert "ProcessType" not in job
    assert {"Label", "ProgramArguments", "RunAtLoad", "KeepAlive", "ThrottleInterval", "ExitTimeOut"} <= job.keys()
    assert newsyslog_line().splitlines()[-1].split() == [
        "/var/log/ngrokd.log",
        "root:wheel",
        "640",
        "5",
        "1024",
        "*",
        "J",
    ]
