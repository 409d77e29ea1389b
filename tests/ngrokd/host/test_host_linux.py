"""What can be said of the Linux platform without a network of one's own; the rest is in tests/netns."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ngrokd.errors import PermissionMissingError
from ngrokd.host import linux
from ngrokd.host.plan import HostError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="netlink")


def rule(priority: int, **attributes: Any) -> dict[str, Any]:
    """A message as pyroute2 decodes it."""
    fields = {name: attributes.pop(name, 0) for name in ("flags", "tos", "dst_len")}
    attrs = [("FRA_PRIORITY", priority), *((f"FRA_{name.upper()}", value) for name, value in attributes.items())]
    return {"family": 2, "table": 52, "action": 1, **fields, "attrs": attrs}


def test_rules_for_some_connections_only_are_told_apart() -> None:
    """By mark, source, user, interface: not what an ordinary connection of an app meets."""
    for selector in ({"fwmark": 7}, {"src": "192.0.2.1"}, {"uid_range": "0-5"}, {"iifname": "eth0"}, {"tos": 8}):
        assert linux._rule_fact(rule(100, **selector)).selective
    assert not linux._rule_fact(rule(100)).selective
    assert not linux._rule_fact(rule(100, fwmark=51820, flags=2)).selective  # "not fwmark", as wg-quick has it


def test_rules_are_read_with_what_limits_them() -> None:
    """Prefix suppression and destination decide whether a table answers for us."""
    fact = linux._rule_fact(rule(32764, table=254, suppress_prefixlen=0, dst="10.0.0.0", dst_len=8))

    assert (fact.priority, fact.table, fact.suppress, str(fact.destination)) == (32764, 254, 0, "10.0.0.0/8")
    assert linux._rule_fact(rule(1, suppress_prefixlen=0xFFFFFFFF)).suppress == -1
    assert linux._rule_fact(rule(1)).destination is None


def test_routes_with_several_next_hops_are_read() -> None:
    """Each of the gateways may lie in our subnet."""
    message = {
        "family": 2,
        "dst_len": 24,
        "table": 254,
        "type": 1,
        "proto": 4,
        "attrs": [
            ("RTA_DST", "192.0.2.0"),
            (
                "RTA_MULTIPATH",
                [
                    {"oif": 3, "attrs": [("RTA_GATEWAY", "10.107.0.9")]},
                    {"oif": 4, "attrs": [("RTA_GATEWAY", "10.108.0.9")]},
                ],
            ),
        ],
    }

    route = linux._route_fact(message)

    assert (str(route.destination), route.index) == ("192.0.2.0/24", 3)
    assert [str(gateway) for gateway in route.gateways] == ["10.107.0.9", "10.108.0.9"]


def test_a_kernel_without_ipv6_or_policy_routing_is_fine() -> None:
    """It answers that it does not know the question; every other refusal is an error."""
    from pyroute2 import NetlinkError

    def refuse(number: int) -> Any:
        raise NetlinkError(number, "no")

    assert linux._known(lambda: refuse(errno.EAFNOSUPPORT)) == []
    assert linux._known(lambda: refuse(errno.EOPNOTSUPP)) == []
    with pytest.raises(NetlinkError):
        linux._known(lambda: refuse(errno.EPERM))


# --- rights ---


@contextmanager
def opening(monkeypatch: pytest.MonkeyPatch, number: int) -> Iterator[None]:
    """Let /dev/net/tun answer with an error; 0: let it open."""
    real = os.open

    def fake(path: Any, *args: Any, **kwargs: Any) -> int:
        if path != "/dev/net/tun":
            return real(path, *args, **kwargs)
        if number:
            raise OSError(number, os.strerror(number))
        return real("/dev/null", *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fake)
        yield


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOENT, "modprobe tun"),
        (errno.ENODEV, "modprobe tun"),
        (errno.EPERM, "DeviceAllow"),
        (errno.EACCES, "sudo"),
    ],
)
def test_each_way_of_lacking_the_device_has_its_remedy(
    monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    """No driver, a device cgroup, or file permissions: three different things to do."""
    monkeypatch.setattr(linux, "_effective_capabilities", lambda: -1)
    monkeypatch.setattr(linux, "_network_refused", lambda: "")

    with opening(monkeypatch, number):
        [right] = linux.missing_rights()

    assert right.what == "/dev/net/tun"
    assert remedy in right.remedy


def test_what_is_missing_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One message with everything, each with what to do."""
    monkeypatch.setattr(linux, "_effective_capabilities", lambda: 0)

    with opening(monkeypatch, errno.ENOENT), pytest.raises(PermissionMissingError) as caught:
        linux.check_rights()

    assert "CAP_NET_ADMIN" in str(caught.value)
    assert "/dev/net/tun: No such file" in str(caught.value)
    assert "--cap-add=NET_ADMIN" in caught.value.remedy
    assert "modprobe tun" in caught.value.remedy


def test_on_another_system_nobody_is_sent_for_linux_s_rights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")

    with pytest.raises(HostError, match="does not know how on darwin"):
        linux.check_rights()


def test_nothing_missing_is_nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """CAP_NET_ADMIN is bit 12, whatever else there is or is not."""
    monkeypatch.setattr(linux, "_effective_capabilities", lambda: 1 << 12)
    monkeypatch.setattr(linux, "_network_refused", lambda: "")

    with opening(monkeypatch, 0):
        assert linux.missing_rights() == []
        linux.check_rights()


def test_importing_the_watch_and_the_files_costs_no_netlink_library() -> None:
    """pyroute2 takes as long to import as everything else of the command line."""
    code = "import sys, ngrokd.files, ngrokd.host.linux, ngrokd.host.hostsfile; print('pyroute2' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[3], capture_output=True, check=True
    )

    assert result.stdout == b"False\n"
