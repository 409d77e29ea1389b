"""What starting workers takes. That it works is tested on a real kernel, in tests/netns/test_netns_workers.py."""

from __future__ import annotations

import os
import pwd

import pytest

from ngrokd.errors import ConfigError
from ngrokd.workers import process, rights
from ngrokd.workers.rights import Identity, RightsError, check_can_drop, worker_identity


def test_elsewhere_there_are_no_workers() -> None:
    with pytest.raises(ConfigError, match="needs Linux"):
        check_can_drop("darwin")


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container drops capabilities of its root."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(rights, "_effective_capabilities", lambda: 1 << 6 | 1 << 12)

    with pytest.raises(RightsError, match="needs CAP_KILL, CAP_SETUID,") as caught:
        check_can_drop("linux")

    assert "CapabilityBoundingSet" in caught.value.remedy


def test_root_needs_three_capabilities_and_others_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rights, "_effective_capabilities", lambda: 1 << 5 | 1 << 6 | 1 << 7)
    check_can_drop("linux")
    monkeypatch.setattr(rights, "_effective_capabilities", lambda: 0)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    check_can_drop("linux")
    assert worker_identity() is None, "who is not root stays who they are"


def test_root_starts_them_as_ngrokd_or_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> pwd.struct_passwd:
        raise KeyError(name)

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(pwd, "getpwnam", none)
    assert worker_identity() == Identity(65534, 65534)

    monkeypatch.setattr(pwd, "getpwnam", lambda _: pwd.struct_passwd(("ngrokd", "x", 42, 43, "", "/", "/")))
    assert worker_identity() == Identity(42, 43)


def test_a_worker_gets_few_variables_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NGROK_API_KEY", "secret")
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    monkeypatch.setenv("SSL_CERT_FILE", "/certificates")

    environment = process.environment()

    assert environment["SSL_CERT_FILE"] == "/certificates"
    assert set(environment) <= {process.MODULES_FROM, "LC_ALL", *process.PASSED_ON}
    assert all(os.path.isabs(place) for place in environment[process.MODULES_FROM].split(os.pathsep))
