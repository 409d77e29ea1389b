"""The plan is data, and the order of its steps is the safety."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

import pytest

from ngrokd.errors import NgrokdError
from ngrokd.host.plan import (
    ADDRESS,
    DEVICE,
    GUARD,
    HOSTS,
    LINK,
    ROUTE,
    Action,
    HostError,
    Plan,
    Step,
    apply,
    ensure,
    linux_plan,
    undo,
)

SUBNET = IPv4Network("10.107.0.0/16")


def test_names_come_last_and_go_first_and_the_guard_the_other_way_round() -> None:
    """At no moment does a name lead to an address that leaves the machine by the default route."""
    plan = linux_plan("ngrokd0", SUBNET, 1500)

    assert [step.kind for step in plan] == [GUARD, DEVICE, LINK, ADDRESS, ROUTE, HOSTS]
    assert [step.kind for step in plan.backwards()] == [HOSTS, ROUTE, ADDRESS, LINK, DEVICE, GUARD]
    assert plan.interface == "ngrokd0"
    assert plan.subnets == (SUBNET,)


def test_the_plan_reads_as_a_shell_script() -> None:
    """What `ngrokd plan` prints can be read, and typed, by the person who has to trust it."""
    script = linux_plan("ngrokd0", SUBNET, 1400, hosts_path="/etc/hosts").shell().splitlines()

    assert [line for line in script if not line.startswith("#")] == [
        "ip route add unreachable 10.107.0.0/16 metric 4278198272",
        "ip tuntap add dev ngrokd0 mode tun multi_queue vnet_hdr  # opened by the daemon",
        "ip link set dev ngrokd0 addrgenmode none",
        "ip link set dev ngrokd0 mtu 1400 txqueuelen 5000",
        "ip link set dev ngrokd0 up",
        "ip addr add 10.107.0.1/32 dev ngrokd0",
        "ip route add 10.107.0.0/16 dev ngrokd0",
    ]
    assert '# /etc/hosts: lines ADDRESS<TAB>NAME between "# BEGIN ngrokd managed section"' in script[-1]


def test_undoing_reads_as_a_shell_script_too() -> None:
    """The hosts section first, the guard last."""
    assert linux_plan("ngrokd0", SUBNET, 1500).shell_undo().splitlines() == [
        "sed -i '/^# BEGIN ngrokd managed section$/,/^# END ngrokd managed section$/d' /etc/hosts",
        "ip route del 10.107.0.0/16 dev ngrokd0",
        "ip addr del 10.107.0.1/32 dev ngrokd0",
        "ip link del dev ngrokd0  # goes with the daemon",
        "ip route del unreachable 10.107.0.0/16 metric 4278198272",
    ]


@pytest.mark.parametrize("interface", ["ngrokd0", "ngrokd1", "a.b*[c]$", "it's"])
def test_the_printed_undo_removes_exactly_our_section(tmp_path: Path, interface: str) -> None:
    """Also for an instance whose name means something to sed or to the shell."""
    suffix = "" if interface == "ngrokd0" else f" ({interface})"
    path = tmp_path / "hosts file"
    foreign = (
        "127.0.0.1 localhost\n# BEGIN ngrokd managed section (other)\n1.2.3.4 x\n# END ngrokd managed section (other)\n"
    )
    path.write_text(
        f"{foreign}# BEGIN ngrokd managed section{suffix}\n10.107.0.2\ta.b\n# END ngrokd managed section{suffix}\n"
    )

    script = linux_plan(interface, SUBNET, 1500, hosts_path=str(path)).only(HOSTS).shell_undo()
    subprocess.run(["sh", "-c", script], check=True)

    assert path.read_text() == foreign


def test_both_families_have_the_same_steps() -> None:
    """IPv6 joins without a rewrite."""
    plan = linux_plan("ngrokd0", SUBNET, 1500, subnet6=IPv6Network("fd00:107::/64"), hosts_path="")

    assert [step.kind for step in plan] == [GUARD, GUARD, DEVICE, LINK, ADDRESS, ADDRESS, ROUTE, ROUTE]
    assert "ip -6 route add fd00:107::/64 dev ngrokd0" in plan.shell()
    assert "ip -6 addr add fd00:107::1/128 dev ngrokd0" in plan.shell()
    assert plan.subnets == (SUBNET, IPv6Network("fd00:107::/64"))


def test_without_configuring_only_the_device_and_the_names_are_ours() -> None:
    """Where an administrator, or systemd-networkd, sets up link and routes."""
    assert [step.kind for step in linux_plan("ngrokd0", SUBNET, 1500, configure=False)] == [DEVICE, HOSTS]


def test_plans_are_equal_when_they_do_the_same() -> None:
    """A reload compares the new plan with the one in force."""
    assert linux_plan("ngrokd0", SUBNET, 1500) == linux_plan("ngrokd0", SUBNET, 1500)
    assert linux_plan("ngrokd0", SUBNET, 1500) != linux_plan("ngrokd0", SUBNET, 1499)
    assert linux_plan("ngrokd0", SUBNET, 1500).only(GUARD) == linux_plan("ngrokd1", SUBNET, 9000).only(GUARD)
    assert len({*linux_plan("ngrokd0", SUBNET, 1500), *linux_plan("ngrokd0", SUBNET, 1500)}) == 6


def test_the_plan_is_data() -> None:
    """For --json, and for whoever asks what would happen."""
    data = linux_plan("ngrokd0", SUBNET, 1500).as_data()

    assert data[0] == {
        "kind": "guard",
        "args": {"subnet": "10.107.0.0/16", "metric": 4278198272},
        "why": "whenever the daemon is dead, connections fail at once instead of leaving by the default route",
        "do": ["ip route add unreachable 10.107.0.0/16 metric 4278198272"],
        "undo": ["ip route del unreachable 10.107.0.0/16 metric 4278198272"],
    }
    assert str(linux_plan("ngrokd0", SUBNET, 1500).steps[4]) == "route interface=ngrokd0 subnet=10.107.0.0/16"


# --- doing and undoing, on a machine made of a set ---


class Machine:
    """What is in force on it, and what it refuses."""

    def __init__(self, *in_force: str, refuses: tuple[str, ...] = ()) -> None:
        self.in_force = set(in_force)
        self.refuses = set(refuses)
        self.log: list[str] = []

    def actions(self) -> dict[str, Action]:
        return {kind: Action(self._do, self._undo) for kind in (GUARD, DEVICE, LINK, ADDRESS, ROUTE, HOSTS)}

    def _do(self, step: Step) -> bool:
        return self._change("+", step, lambda: self.in_force.add(step.kind), step.kind not in self.in_force)

    def _undo(self, step: Step) -> bool:
        return self._change("-", step, lambda: self.in_force.discard(step.kind), step.kind in self.in_force)

    def _change(self, sign: str, step: Step, change: Callable[[], object], needed: bool) -> bool:
        if sign + step.kind in self.refuses:
            raise HostError(f"{sign}{step.kind} refused")
        if needed:
            change()
            self.log.append(sign + step.kind)
        return needed


PLAN = linux_plan("ngrokd0", SUBNET, 1500)


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("before", [(), (GUARD,), (GUARD, HOSTS)])
def test_a_step_that_fails_leaves_the_machine_as_it_was(number: int, before: tuple[str, ...]) -> None:
    """Whichever it is; what was there before us, a killed run's guard say, stays."""
    failing = PLAN.steps[number].kind
    machine = Machine(*before, refuses=(f"+{failing}",))

    with pytest.raises(HostError, match=failing):
        apply(PLAN, machine.actions())

    assert machine.in_force == set(before)


def test_the_first_failure_is_told_even_when_taking_back_fails_too() -> None:
    """It is the one that explains the rest, and the rest is still tried."""
    machine = Machine(refuses=("+hosts", "-address"))

    with pytest.raises(HostError, match="hosts"):
        apply(PLAN, machine.actions())

    assert machine.in_force == {ADDRESS}


def test_doing_twice_changes_nothing() -> None:
    """Repair is the same act as doing."""
    machine = Machine()

    assert [step.kind for step in apply(PLAN, machine.actions())] == [GUARD, DEVICE, LINK, ADDRESS, ROUTE, HOSTS]
    assert apply(PLAN, machine.actions()) == []
    machine.in_force -= {LINK, ROUTE}
    assert [step.kind for step in ensure(PLAN, machine.actions())] == [LINK, ROUTE]


def test_undoing_goes_on_and_reports() -> None:
    """One thing that sticks must not keep the rest."""
    machine = Machine(refuses=("-route",))
    apply(PLAN, machine.actions())

    undone = undo(PLAN, machine.actions())

    assert machine.in_force == {ROUTE}
    assert [step.kind for step in undone.removed] == [HOSTS, ADDRESS, LINK, DEVICE, GUARD]
    assert [str(problem) for problem in undone.problems] == ["-route refused"]


def test_undoing_what_is_gone_is_fine() -> None:
    """Cleanup after a power cut has little to do."""
    assert undo(PLAN, Machine(GUARD).actions()).removed == (PLAN.steps[0],)
    assert undo(PLAN, Machine().actions()).removed == ()


def test_a_mistake_of_ours_is_not_hidden() -> None:
    """Only refusals of the machine are gathered; a bug rises."""

    def broken(step: Step) -> bool:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        undo(Plan(PLAN.steps[:1]), {GUARD: Action(broken, broken)})
    assert not issubclass(ZeroDivisionError, NgrokdError)
