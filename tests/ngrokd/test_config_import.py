"""The Go daemon's config.yml, converted: what has a meaning here, and what is said of the rest."""

from __future__ import annotations

import builtins
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngrokd import config
from ngrokd.cli.app import invoke
from ngrokd.config.manual import commented_file
from ngrokd.config_edit.go import Imported, convert, import_file, read_yaml
from ngrokd.endpoints import Secret
from ngrokd.errors import ConfigError, NgrokdError

CANARY = "2canaryCANARYcanary_0123456789"
WHOLE = f"""\
# as the Go daemon's installer writes it, and then some
api:
  url: "https://api.ngrok.com"
  key: "{CANARY}"
ingressEndpoint: "Ingress.example:8443"
server:
  log_level: warn
  socket_path: /run/go.sock
  client_cert: /var/lib/ngrokd/tls.crt
  client_key: /var/lib/ngrokd/tls.key
  cert_refresh_interval: 3600
  health_address: 127.0.0.1
  health_port: 9081
bound_endpoints:
  poll_interval: 10
  selectors: ['env == "a"']
net:
  interface_name: ngrokd1
  subnet: 10.108.0.0/16
  listen_interface: virtual
  start_port: 9080
dns:
  enabled: true
  upstream: auto
colour: green
"""


def settings_of(imported: Imported) -> config.Settings:
    return config.parse(imported.text, "c.toml", {})


def left_out(imported: Imported) -> dict[str, str]:
    return {each.key: each.reason for each in imported.left_out}


def test_what_has_a_meaning_is_taken_over() -> None:
    """Into the commented file, beneath the explanations; what equals our default is not written."""
    imported = convert(read_yaml(WHOLE, "config.yml"))

    settings = settings_of(imported)
    assert settings.api.key == Secret(CANARY)
    assert settings.ingress.address == "ingress.example:8443"
    assert settings.log.level == "warning"
    assert settings.control.socket == "/run/go.sock"
    assert settings.state.directory == "/var/lib/ngrokd"
    assert settings.http.listen == "127.0.0.1:9081"
    assert settings.api.poll_interval_s == 10.0
    assert settings.api.selectors == ('env == "a"',)
    assert (settings.net.interface, settings.net.subnet) == ("ngrokd1", "10.108.0.0/16")
    assert sorted(settings.origins) == sorted(imported.settings)
    assert "api.url" not in imported.settings
    kept = imported.text.splitlines()
    assert [line for line in kept if line in commented_file().splitlines()] == commented_file().splitlines()
    assert imported.holds_key


def test_what_has_none_is_named_with_the_reason() -> None:
    imported = convert(read_yaml(WHOLE, "config.yml"))

    reasons = left_out(imported)
    assert reasons["server.cert_refresh_interval"] == "the certificate's own dates decide when it is renewed"
    assert reasons["dns.enabled"] == reasons["dns.upstream"] == "names stand in the hosts file"
    assert reasons["colour"] == "no key of the Go ngrokd's"
    assert "net.listen_interface" not in reasons
    assert any("selectors" in note for note in imported.notes)


def test_no_secret_is_shown() -> None:
    """Neither among what was taken over, nor in what is printed instead of written."""
    written, printed = convert(read_yaml(WHOLE, "c")), convert(read_yaml(WHOLE, "c"), with_key=False)

    assert written.settings["api.key"] == "***"
    assert CANARY not in f"{written.settings} {written.lines} {written.left_out} {written.notes}"
    assert CANARY not in printed.text
    assert "set-api-key" in left_out(printed)["api.key"]


@pytest.mark.parametrize(
    ("text", "key", "reason"),
    [
        ("api: {url: 'http://x'}", "api.url", "api.url takes an https:// URL"),
        ("api: {key: 'two words'}", "api.key", "api.key takes an API key"),
        ("server: {log_level: loud}", "server.log_level", "log.level takes one of"),
        ("server: {client_cert: /a/own.crt}", "server.client_cert", "move it there: /a/tls.crt"),
        ("server: {client_cert: /a/tls.crt, client_key: /b/tls.key}", "server.client_cert", "in one directory"),
        ("server: {client_key: /a/own.key}", "server.client_key", "always tls.key"),
        ("server: {client_cert: 5}", "server.client_cert", "no path"),
        ("server: {health_port: none}", "server.health_port", "http.listen takes an address"),
        ("bound_endpoints: {poll_interval: 0}", "bound_endpoints.poll_interval", "api.poll_interval takes a duration"),
        ("bound_endpoints: {selectors: []}", "bound_endpoints.selectors", "api.selectors takes a list"),
        ("net: {subnet: all}", "net.subnet", "net.subnet takes an IPv4 network"),
        ("net: 5", "net", "no key of the Go ngrokd's"),
        ("5: 6", "5", "no key of the Go ngrokd's"),
    ],
)
def test_what_does_not_fit_is_left_out(text: str, key: str, reason: str) -> None:
    """That daemon had ignored it; nothing of its file is an error."""
    imported = convert(read_yaml(text, "c"))

    assert reason in left_out(imported)[key]
    assert imported.text == commented_file()


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("server: {health_address: '::1'}", {"http.listen": "[::1]:8081"}),
        ("server: {health_port: 9999}", {"http.listen": "127.0.0.1:9999"}),
        ("server: {health_address: 0.0.0.0, health_port: 8081}", {"http.listen": "0.0.0.0:8081"}),
        ("server: {client_key: /a/tls.key}", {"state.directory": "/a"}),
        ("server: {client_cert: /etc/ngrokd/tls.crt}", {}),
        ("net: {subnet: 10.109.1.1/16}", {"net.subnet": "10.109.0.0/16"}),
        ("api: {key: ''}", {}),
        ("api:\nserver:\n", {}),
        ("", {}),
        ("# nothing\n", {}),
    ],
)
def test_values_are_written_in_our_form(text: str, settings: dict[str, object]) -> None:
    imported = convert(read_yaml(text, "c"))

    assert imported.settings == settings
    assert imported.left_out == []


_NAMES = (
    "api", "key", "url", "server", "client_cert", "client_key", "health_address", "health_port", "net", "subnet",
    "listen_interface", "overrides", "bound_endpoints", "selectors", "ingressEndpoint", "x",
)  # fmt: skip


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=2)
            | st.dictionaries(
                st.sampled_from(_NAMES),
                inner,
                max_size=4,
            )
        ),
        max_leaves=10,
    ).filter(lambda value: isinstance(value, dict))
)
def test_any_mapping_becomes_a_valid_configuration(document: dict[str, Any]) -> None:
    imported = convert(document)

    settings = settings_of(imported)
    assert sorted(settings.origins) == sorted(imported.settings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "c.yml:1: not YAML: "),
        ("a: b: c", "c.yml:1: not YAML: "),
        ("- a", "it is no mapping"),
        ("text", "it is no mapping"),
        ("a: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("\x00", "c.yml: not YAML: "),
    ],
)
def test_what_is_no_yaml_is_an_error(text: str, message: str) -> None:
    """The safe loader makes no objects."""
    with pytest.raises(ConfigError) as caught:
        read_yaml(text, "c.yml")

    assert message in str(caught.value)


def test_aliases_that_would_fill_the_memory_do_not(tmp_path: Path) -> None:
    """A billion laughs are a few objects that refer to each other, and nobody counts them."""
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60))
    (tmp_path / "config.yml").write_text(bomb)

    imported = import_file(str(tmp_path / "config.yml"))

    assert len(imported.left_out) == 60


def test_the_library_is_asked_for_only_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an extra, and whoever lacks it is told its name."""
    really = builtins.__import__

    def refuse(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "yaml":
            raise ImportError(name)
        return really(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(NgrokdError, match="PyYAML") as caught:
        read_yaml("", "c.yml")

    assert "ngrokd[import]" in caught.value.remedy


# The command


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.setenv("NGROKD_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.delenv("NGROKD_SOCKET", raising=False)
    (tmp_path / "config.yml").write_text(WHOLE)

    def run(*arguments: str) -> tuple[int, str, str]:
        code = invoke("ngrokd", ["config", "import", str(tmp_path / "config.yml"), *arguments])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return run


def test_import_writes_a_private_file_once(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    """It holds a key; and one that is there is not replaced."""
    code, out, err = run()
    again, _, refusal = run()

    target = tmp_path / "config.toml"
    assert (code, again) == (0, 73)
    assert out.startswith(f"wrote {target}, with 10 settings of {tmp_path}/config.yml\n")
    assert '  api.key = "***"\n' in out
    assert "left out: colour: no key of the Go ngrokd's\n" in err
    assert "warning: the Go ngrokd did not send the selectors" in err
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert config.load(str(target), {}).api.key == Secret(CANARY)
    assert f"{target} exists already" in refusal
    assert CANARY not in out + err + refusal
    assert (tmp_path / "config.yml").read_text() == WHOLE


def test_import_prints_when_asked_to(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    import json

    code, out, err = run("--stdout")
    document = json.loads(run("--stdout", "--json")[1])

    assert code == 0
    assert config.parse(out, "c.toml", {}).net.interface == "ngrokd1"
    assert "left out: api.key: a secret is not printed" in err
    assert document["schema"] == "ngrokd.config.import/1"
    assert document["data"]["text"] == out
    assert {"key": "dns.enabled", "reason": "names stand in the hosts file"} in document["data"]["left_out"]
    assert CANARY not in out + err + str(document)
    assert not (tmp_path / "config.toml").exists()


def test_a_file_that_is_not_there_is_78(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    (tmp_path / "config.yml").unlink()

    code, _, err = run()

    assert code == 78
    assert err == f"error: {tmp_path}/config.yml: there is no such file\n"
