"""What is known of a Go daemon, and what follows. Taking over a whole one is tested beside a kernel, in tests/netns."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from ngrokd.errors import NgrokdError, StateError, TakenError
from ngrokd.host.migration import (
    INTERFACE,
    JOURNAL,
    GoDaemon,
    Migration,
    Migrator,
    Places,
    find,
    journal_of,
    plan_migration,
)
from ngrokd.host.plan import HostError
from ngrokd.host.services import Systemd
from ngrokd.host.units import Service, systemd_unit

GO_UNIT = "[Service]\nExecStart=/usr/local/bin/ngrokd --config=/etc/ngrokd/config.yml\nRestart=always\n"


def no_systemd(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """`systemctl enable` and `disable` work without a running systemd."""
    assert command[1] in ("enable", "disable"), command
    return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def places(tmp_path: Path) -> Places:
    """Where nothing is yet."""
    for name in ("etc", "state", "package", "jobs"):
        (tmp_path / name).mkdir(mode=0o700)
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n")
    return Places(
        config=str(tmp_path / "state/config.yml"),
        state=str(tmp_path / "state"),
        socket=str(tmp_path / "ngrokd.sock"),
        hosts=str(tmp_path / "hosts"),
        units=(str(tmp_path / "etc"), str(tmp_path / "package")),
        jobs=str(tmp_path / "jobs"),
        programs=(str(tmp_path / "ngrokd"),),
    )


@pytest.fixture
def manager(tmp_path: Path) -> Systemd:
    return Systemd(no_systemd, units=str(tmp_path / "etc"), booted=str(tmp_path / "nowhere"))


def migrate(places: Places, manager: Systemd, kinds: dict[str, str]) -> tuple[GoDaemon, Migration, list[str]]:
    """Take over what is there; the links are a table that deleting takes from."""
    found = find(places, kind_of=lambda name: kinds.get(name, ""))
    planned = plan_migration(found, manager, Service(), config=str(Path(places.state) / "config.toml"), imported=None)

    def delete(name: str) -> bool:
        return kinds.pop(name, "") == "dummy"

    done = Migrator(manager, Service(), delete).migrate(found, planned)
    return found, planned, [step.kind for step in done]


def test_a_machine_without_one(places: Places) -> None:
    """Our own unit, an empty state and a TUN of that name are none."""
    Path(places.units[0], "ngrokd.service").write_text(systemd_unit(Service()))

    found = find(places, kind_of=lambda _: "tun")

    assert not found


def test_everything_it_leaves_is_found(places: Places, tmp_path: Path) -> None:
    """Damaged state is no obstacle."""
    Path(places.units[1], "ngrokd.service").write_text(GO_UNIT)
    Path(places.jobs, "com.ngrokd.daemon.plist").write_text("<plist/>")
    Path(places.state, "operator_id").write_text("k8sop_1\n")
    Path(places.state, "ip_mappings.json").write_text(json.dumps({"a": "10.107.0.2", "b": "10.107.0.2", "c": None}))
    Path(places.hosts).write_text("x\n# BEGIN ngrokd managed section\n# END ngrokd managed section\n")
    (tmp_path / "ngrokd").write_bytes(b"\x7fELF...")

    found = find(places, interface="ngrokd0", kind_of=lambda _: "dummy")
    Path(places.state, "ip_mappings.json").write_text("{")
    damaged = find(places)

    assert found.unit == str(tmp_path / "package/ngrokd.service")
    assert found.job.endswith("com.ngrokd.daemon.plist")
    assert (found.operator_id, found.addresses, found.shared) == ("k8sop_1", 2, 1)
    assert (found.interface, found.in_hosts, found.programs) == ("ngrokd0", True, (str(tmp_path / "ngrokd"),))
    assert (damaged.addresses, damaged.interface) == (0, "")


def test_its_dummy_interface_makes_room(places: Places, manager: Systemd) -> None:
    """Ours has the same name, and cannot be a TUN as long as it is there."""
    Path(places.units[0], "ngrokd.service").write_text(GO_UNIT)
    kinds = {"ngrokd0": "dummy"}

    _, planned, done = migrate(places, manager, kinds)

    assert INTERFACE in done
    assert kinds == {}
    assert "ip link del ngrokd0" in planned.steps.shell()
    assert Path(places.units[0], "ngrokd.service").read_text() == systemd_unit(Service())


def test_a_packages_unit_is_left_where_it_is(places: Places, manager: Systemd) -> None:
    """Ours goes before it, and going back uncovers it."""
    packaged = Path(places.units[1], "ngrokd.service")
    packaged.write_text(GO_UNIT)

    _, planned, _ = migrate(places, manager, {})
    undone = Migrator(manager, Service(), lambda _: False).go_back(places.state)

    assert any("goes before it" in note for note in planned.notes)
    assert packaged.read_text() == GO_UNIT
    assert undone.problems == ()
    assert list(Path(places.units[0]).iterdir()) == []


def test_a_step_that_fails_undoes_those_before(places: Places, manager: Systemd) -> None:
    """The kernel does not let go of the interface: the unit is back, and nothing tells of a migration."""
    Path(places.units[0], "ngrokd.service").write_text(GO_UNIT)
    found = find(places, kind_of=lambda _: "dummy")
    planned = plan_migration(found, manager, Service(), config="/nowhere", imported=None)

    def refuse(name: str) -> bool:
        raise HostError(f"the kernel refused to delete {name}")

    with pytest.raises(HostError):
        Migrator(manager, Service(), refuse).migrate(found, planned)

    assert Path(places.units[0], "ngrokd.service").read_text() == GO_UNIT
    assert not Path(places.state, JOURNAL).exists()


def test_it_is_done_once(places: Places, manager: Systemd) -> None:
    """A second journal would hold our own unit as the one to go back to."""
    Path(places.units[0], "ngrokd.service").write_text(GO_UNIT)
    found, planned, _ = migrate(places, manager, {})

    with pytest.raises(TakenError, match="migrated before"):
        Migrator(manager, Service(), lambda _: False).migrate(found, planned)


def test_a_key_in_the_journal_is_private(places: Places, manager: Systemd) -> None:
    """What there was is kept with the modes of secrets."""
    Path(places.units[0], "ngrokd.service").write_text(GO_UNIT)
    Path(places.state, "operator_id").write_text("k8sop_1")
    Path(places.state, "tls.key").write_text("key")

    migrate(places, manager, {})

    kept = Path(places.state, JOURNAL)
    assert (kept / "tls.key").read_text() == "key"
    assert {path.stat().st_mode & 0o777 for path in kept.iterdir()} == {0o600}
    assert kept.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("text", ["", "[]", '{"steps": [1]}', '{"steps": [{"kind": "x"}]}', "{" * 5000])
def test_a_damaged_journal_is_told(places: Places, text: str) -> None:
    """And where what was kept lies."""
    kept = Path(places.state, JOURNAL)
    kept.mkdir(mode=0o700)
    (kept / "journal.json").write_text(text)

    with pytest.raises(NgrokdError, match="damaged") as told:
        journal_of(places.state)

    assert str(kept) in told.value.remedy


def test_going_back_needs_to_have_gone(places: Places) -> None:
    """Nothing is guessed."""
    with pytest.raises(StateError, match="nothing is known of a migration"):
        journal_of(places.state)


def test_a_configuration_that_was_changed_since_stays(places: Places, manager: Systemd, tmp_path: Path) -> None:
    """It is somebody's work; the rest is undone, and the journal stays for another try."""
    from ngrokd.config_edit.go import convert

    Path(places.units[0], "ngrokd.service").write_text(GO_UNIT)
    Path(places.config).write_text("net: {}\n")
    target = tmp_path / "state/config.toml"
    found = find(places)
    imported = convert({"net": {"subnet": "10.9.0.0/16"}})
    planned = plan_migration(found, manager, Service(), config=str(target), imported=imported)
    Migrator(manager, Service(), lambda _: False).migrate(found, planned)
    target.write_text("# mine\n")

    undone = Migrator(manager, Service(), lambda _: False).go_back(places.state)
    target.unlink()
    again = Migrator(manager, Service(), lambda _: False).go_back(places.state)

    assert "changed since" in str(undone.problems[0])
    assert Path(places.units[0], "ngrokd.service").read_text() == GO_UNIT
    assert again.problems == ()
    assert not Path(places.state, JOURNAL).exists()
