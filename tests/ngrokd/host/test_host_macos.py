"""The plan for macOS is data, and can be looked at on any system."""

from __future__ import annotations

import subprocess
import sys
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

import pytest

from ngrokd.config import parse
from ngrokd.host.macos import macos_plan
from ngrokd.host.plan import ADDRESS, DEVICE, GUARD, HOSTS, LINK, ROUTE
from ngrokd.host.planning import expected_subnet6, plan_run

SUBNET = IPv4Network("10.107.0.0/16")


def test_the_guard_is_a_reject_route_that_two_longer_ones_go_before() -> None:
    """BSD routes have no metric: the longer prefix wins as long as the device is there."""
    plan = macos_plan("ngrokd0", SUBNET)

    assert [line for line in plan.shell().splitlines() if not line.startswith("#")] == [
        "route -n add -inet -net 10.107.0.0/16 127.0.0.1 -reject",
        "ifconfig utunN mtu 9000",
        "ifconfig utunN inet 10.107.0.1 10.107.0.1 netmask 255.255.255.255 up",
        "route -n add -inet -net 10.107.0.0/17 -interface utunN",
        "route -n add -inet -net 10.107.128.0/17 -interface utunN",
        "dscacheutil -flushcache",
        "killall -HUP mDNSResponder",
    ]
    assert [step.kind for step in plan] == [GUARD, DEVICE, LINK, ADDRESS, ROUTE, ROUTE, HOSTS]


def test_it_is_undone_backwards() -> None:
    """Names first, the guard last."""
    lines = [line for line in macos_plan("utun7", SUBNET).shell_undo().splitlines() if not line.startswith("#")]

    assert lines[0].startswith("sed -i '' ")
    assert lines[3:] == [
        "route -n delete -inet -net 10.107.128.0/17 -interface utun7",
        "route -n delete -inet -net 10.107.0.0/17 -interface utun7",
        "ifconfig utun7 inet 10.107.0.1 delete",
        "route -n delete -inet -net 10.107.0.0/16 127.0.0.1 -reject",
    ]


def test_ipv6_has_the_same_steps() -> None:
    """Halves of a /64 are /65s."""
    shell = macos_plan("utun7", SUBNET, subnet6=IPv6Network("fd00:107::/64")).shell()

    assert "route -n add -inet6 -net fd00:107::/64 ::1 -reject" in shell
    assert "ifconfig utun7 inet6 fd00:107::1 prefixlen 128 up" in shell
    assert "route -n add -inet6 -net fd00:107:0:0:8000::/65 -interface utun7" in shell


@pytest.mark.skipif(sys.platform == "darwin", reason="there sed takes the empty word")
@pytest.mark.parametrize("interface", ["ngrokd0", "utun7", "a.b*[c]$"])
def test_the_printed_undo_removes_exactly_our_section(tmp_path: Path, interface: str) -> None:
    """The expression is the same for both kinds of sed; only the option for in-place editing is not."""
    suffix = "" if interface == "ngrokd0" else f" ({interface})"
    path = tmp_path / "hosts"
    path.write_text(f"a\n# BEGIN ngrokd managed section{suffix}\nx\n# END ngrokd managed section{suffix}\nb\n")

    undo = macos_plan(interface, SUBNET, hosts_path=str(path)).only(HOSTS).steps[0].shell_undo[0]
    subprocess.run(["sh", "-c", undo.replace("sed -i '' ", "sed -i ")], check=True)

    assert path.read_text() == "a\nb\n"


def test_both_systems_are_planned_from_one_configuration() -> None:
    """On any of them: state first, names last."""
    settings = parse('[net]\ninterface = "utun7"\nsubnet = "10.9.0.0/24"\n', "c.toml", {})

    plans = {system: plan_run(settings, system, subnet6=None) for system in ("linux", "macos")}

    assert [step.kind for step in plans["linux"].steps][::8] == ["state", "hosts"]
    assert [step.kind for step in plans["macos"].steps][::9] == ["state", "hosts"]
    assert plans["linux"].whole.interface == plans["macos"].whole.interface == "utun7"


def test_what_is_not_configured_is_left_to_the_administrator() -> None:
    """Not missing: it is the other half."""
    settings = parse("[net]\nconfigure = false\n", "c.toml", {})

    for system in ("linux", "macos"):
        planned = plan_run(settings, system, subnet6=None)

        assert {step.kind for step in planned.left} == {GUARD, LINK, ADDRESS, ROUTE}
        assert not {step.kind for step in planned.steps} & {GUARD, LINK, ADDRESS, ROUTE}


def test_an_ipv6_network_that_is_not_made_yet_is_no_secret(tmp_path: Path) -> None:
    """The plan says that steps are missing, and where the network will be kept."""
    text = f'[net]\nsubnet6 = "auto"\n[state]\ndirectory = "{tmp_path}"\n'
    settings = parse(text, "c.toml", {})

    before = expected_subnet6(settings, here=False)
    (tmp_path / "subnet6").write_text("fd12:3456:789a::/64\n")
    after = expected_subnet6(settings, here=False)
    (tmp_path / "subnet6").write_text("2001:db8::/64\n")
    broken = expected_subnet6(settings, here=False)

    assert before[0] is None
    assert str(tmp_path / "subnet6") in before[1][0]
    assert after == (IPv6Network("fd12:3456:789a::/64"), ())
    assert broken[0] is None
    off = parse('[net]\nsubnet6 = "off"\n', "c.toml", {})
    assert expected_subnet6(off, here=True) == (None, ())
