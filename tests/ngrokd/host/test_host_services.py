"""systemd through its own command, played by a double that keeps what systemctl keeps."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from ngrokd.errors import StateError, TakenError
from ngrokd.host.services import ServiceError, Systemd
from ngrokd.host.units import Service, systemd_unit

GO_UNIT = "[Service]\nExecStart=/usr/local/bin/ngrokd --config=/etc/ngrokd/config.yml\n"


class Systemctl:
    """What systemd knows: unit files as it read them last, which are enabled and which run."""

    def __init__(self, units: Path) -> None:
        self.units = units
        self.known: dict[str, str] = {}
        self.enabled: set[str] = set()
        self.active: dict[str, str] = {}
        self.calls: list[str] = []

    def __call__(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        assert command[0] == "systemctl"
        verb, *rest = command[1:]
        self.calls.append(" ".join(command[1:]))
        out, code, name = "", 0, rest[0] if rest else ""
        match verb:
            case "daemon-reload":
                self.known = {path.name: path.read_text() for path in self.units.iterdir()}
            case "enable" if (self.units / name).exists():
                self.enabled.add(name)
            case "disable":
                self.enabled.discard(name)
            case "start" | "restart" if name in self.known:
                self.active[name] = self.known[name]
            case "stop":
                self.active.pop(name, None)
            case "show":
                state = "enabled" if name in self.enabled else ""
                active = "active" if name in self.active else "inactive"
                out = f"UnitFileState={state}\nActiveState={active}\nMainPID={42 if name in self.active else 0}\n"
            case _:
                code = 5
        return subprocess.CompletedProcess(command, code, out, f"Unit {name} not found." if code else "")


@pytest.fixture
def booted(tmp_path: Path) -> Path:
    path = tmp_path / "booted"
    path.mkdir()
    return path


@pytest.fixture
def systemctl(tmp_path: Path) -> Systemctl:
    (tmp_path / "units").mkdir()
    return Systemctl(tmp_path / "units")


@pytest.fixture
def manager(systemctl: Systemctl, booted: Path) -> Systemd:
    return Systemd(systemctl, units=str(systemctl.units), booted=str(booted))


def test_installing_twice_is_installing_once(manager: Systemd, systemctl: Systemctl) -> None:
    """The second time nothing is written and nothing read again; a change is."""
    assert manager.install(Service()) is True
    systemctl.calls.clear()
    assert manager.install(Service()) is False
    assert systemctl.calls == ["enable ngrokd.service"]
    assert manager.install(Service(config="/etc/other.toml")) is True
    assert "--config /etc/other.toml run" in systemctl.known["ngrokd.service"]


def test_what_was_installed_can_be_started_seen_and_removed(manager: Systemd, systemctl: Systemctl) -> None:
    """The whole life of a service; in the end nothing is left."""
    manager.install(Service())
    manager.call("start", "ngrokd")

    running = manager.state("ngrokd")
    removed = manager.uninstall("ngrokd")

    assert (running.installed, running.ours, running.enabled, running.active, running.pid) == (
        True,
        True,
        "enabled",
        "active",
        42,
    )
    assert removed
    assert (systemctl.active, systemctl.enabled, systemctl.known) == ({}, set(), {})
    assert list(systemctl.units.iterdir()) == []
    assert manager.uninstall("ngrokd") is False


def test_another_daemons_unit_is_not_overwritten(manager: Systemd, systemctl: Systemctl) -> None:
    """The Go daemon's has the same name."""
    path = systemctl.units / "ngrokd.service"
    path.write_text(GO_UNIT)

    with pytest.raises(TakenError, match="Go daemon") as refused:
        manager.install(Service())
    with pytest.raises(TakenError, match="not ours"):
        manager.uninstall("ngrokd")

    assert "ngrokd migrate" in refused.value.remedy
    assert path.read_text() == GO_UNIT
    assert manager.state("ngrokd").ours is False
    assert manager.install(Service(), force=True) is True
    assert path.read_text() == systemd_unit(Service())


def test_without_systemd_a_service_is_written_and_not_started(systemctl: Systemctl, tmp_path: Path) -> None:
    """In the making of an image, say; starting it says why it does not."""
    manager = Systemd(systemctl, units=str(systemctl.units), booted=str(tmp_path / "nowhere"))

    assert manager.install(Service()) is True
    assert systemctl.calls == ["enable ngrokd.service"]
    with pytest.raises(ServiceError, match="does not run this machine") as refused:
        manager.call("start", "ngrokd")
    assert "sudo ngrokd run" in refused.value.remedy
    assert manager.state("ngrokd").active == "unknown"
    assert manager.uninstall("ngrokd") is True


def test_a_machine_that_knows_nothing_of_systemd(tmp_path: Path) -> None:
    """No directory for units, or no command."""
    nothing = Systemd(units=str(tmp_path / "none"), booted=str(tmp_path / "none"))

    with pytest.raises((ServiceError, StateError), match="no systemd"):
        nothing.install(Service())


def test_what_systemctl_says_is_handed_on(manager: Systemd) -> None:
    """With where to look."""
    with pytest.raises(ServiceError, match=r"Unit ngrokd\.service not found") as refused:
        manager.call("start", "ngrokd")

    assert "journalctl -u ngrokd" in refused.value.remedy
