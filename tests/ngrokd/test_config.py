"""The configuration: what is read, what is refused, and with which words."""

from __future__ import annotations

import os
import re
import stat
import string
import subprocess
import sys
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tomli
from hypothesis import example, given
from hypothesis import strategies as st

import ngrokd
from ngrokd import config
from ngrokd.config import Settings, manual
from ngrokd.config.explanations import KEYS, SECTIONS
from ngrokd.config.lines import index_lines
from ngrokd.config.readers import Wrong
from ngrokd.config.schema import Effect, Leaf, schema
from ngrokd.endpoints import Secret
from ngrokd.errors import ConfigError, Exit

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "conf" / "ngrokd.toml"
CANARY = "2canaryCANARYcanary_0123456789"


def read(text: str, **environ: str) -> Settings:
    return config.parse(text, "c.toml", environ)


def mistakes(text: str, **environ: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(text, **environ)
    assert caught.value.exit_code is Exit.CONFIG
    return str(caught.value).split("\n")


# What is read


def test_an_empty_file_is_all_defaults() -> None:
    """`ngrokd run` works without a file."""
    assert config.show(read("")) == config.show(Settings())


def test_every_section_and_unit_is_read() -> None:
    """One file that sets something of each kind."""
    settings = read(
        """
        [api]
        url = "https://API.example.com:8443/"
        poll_interval = "1m30s"
        selectors = ["env == 'a'", "true"]
        [ingress]
        address = "Ingress.example"
        ca_fingerprints = [
            "CF:CE:8A:27:B7:4E:0C:51:C6:54:73:9A:35:3E:51:C1:35:26:0B:5B:97:7D:29:DF:67:03:8B:E7:EF:6F:F8:47",
        ]
        connect_timeout = "250ms"
        [net]
        interface = "ngrokd-b"
        subnet = "10.108.0.0/16"
        mtu = 0
        offload = false
        allow_sources = ["172.17.0.0/16", "fd00::/8"]
        [limits]
        buffer = "1MiB"
        [http]
        listen = "[::1]:9000"
        [log]
        level = "debug"
        """
    )

    assert settings.api.url == "https://api.example.com:8443"
    assert settings.api.poll_interval_s == 90.0
    assert settings.api.selectors == ("env == 'a'", "true")
    assert settings.ingress.address == "ingress.example:443"
    assert settings.ingress.ca_fingerprints == (config.NGROK_CA_FINGERPRINT,)
    assert settings.ingress.connect_timeout_s == 0.25
    assert settings.net.interface == "ngrokd-b"
    assert settings.net.offload is False
    assert settings.net.allow_sources == ("172.17.0.0/16", "fd00::/8")
    assert settings.limits.buffer_bytes == 1 << 20
    assert settings.http.listen == "[::1]:9000"


def test_the_number_of_workers_can_be_left_to_the_daemon() -> None:
    settings = read('[net]\nworkers = "auto"')

    assert settings.net.workers == 0
    assert config.show(settings)["net"]["workers"] == "auto"
    assert read("[net]\nworkers = 4").net.workers == 4


def test_the_defaults_are_the_documented_ones() -> None:
    """Others rely on these numbers."""
    assert config.show(Settings()) == {
        "api": {
            "url": "https://api.ngrok.com",
            "key": "",
            "key_file": "",
            "ca_file": "",
            "poll_interval": "30s",
            "timeout": "30s",
            "selectors": ["true"],
        },
        "ingress": {
            "address": "",
            "ca_file": "",
            "ca_fingerprints": [config.NGROK_CA_FINGERPRINT],
            "connect_timeout": "10s",
        },
        "state": {"directory": "/etc/ngrokd"},
        "net": {
            "mode": "auto",
            "interface": "ngrokd0",
            "subnet": "10.107.0.0/16",
            "subnet6": "auto",
            "mtu": 0,
            "offload": True,
            "allow_sources": [],
            "workers": 1,
            "configure": True,
            "drain": "3s",
        },
        "pool": {"max": 128, "max_age": "5m", "idle": 2, "spin": "200us"},
        "limits": {
            "flows": 24000,
            "half_open": 1024,
            "undecided": 1024,
            "dials": 64,
            "buffer": "512KiB",
            "buffers": "256MiB",
            "endpoints": 65533,
        },
        "hosts": {"enabled": True, "path": "/etc/hosts"},
        "control": {"socket": "/var/run/ngrokd.sock", "group": ""},
        "http": {"listen": "127.0.0.1:8081"},
        "log": {"level": "info", "format": "auto"},
    }


def test_variables_go_before_the_file() -> None:
    """The Go daemon's two, and those by which the command line's options survive a reload."""
    settings = read(
        '[control]\nsocket = "/run/file.sock"\n',
        NGROKD_SOCKET="/run/env.sock",
        NGROKD_HOSTS_PATH="/tmp/hosts",
        NGROKD_LOG_LEVEL="debug",
        NGROKD_LOG_FORMAT="json",
    )

    assert settings.control.socket == "/run/env.sock"
    assert settings.hosts.path == "/tmp/hosts"
    assert (settings.log.level, settings.log.format) == ("debug", "json")
    assert settings.origins["control.socket"] == "$NGROKD_SOCKET"


def test_every_key_has_a_variable() -> None:
    """For containers; those with names of their own go before it. What takes no text is written as in the file."""
    settings = read(
        '[net]\nmtu = 1300\nsubnet = "10.9.0.0/16"\n',
        NGROKD__NET__MTU="1400",
        NGROKD__NET__OFFLOAD="false",
        NGROKD__NET__ALLOW_SOURCES='["10.0.0.0/8", "fd00::/8"]',
        NGROKD__API__SELECTORS="env == 'a'",
        NGROKD__LOG__LEVEL="debug",
        NGROKD_LOG_LEVEL="error",
    )

    assert (settings.net.mtu, settings.net.offload) == (1400, False)
    assert settings.net.allow_sources == ("10.0.0.0/8", "fd00::/8")
    assert settings.api.selectors == ("env == 'a'",)
    assert settings.log.level == "error"
    assert settings.net.subnet == "10.9.0.0/16"
    assert settings.origins["net.mtu"] == "$NGROKD__NET__MTU"


def test_a_variable_for_no_key_is_an_error() -> None:
    """A typing error there must not pass either."""
    found = mistakes("", NGROKD__NET__MTUU="5", NGROKD__NET__MTU="5", NGROKD__API__KEY=f"{CANARY} x", NGROKD__X="")

    assert found == [
        "$NGROKD__API__KEY: expected an API key, got a text that holds spaces or unprintable characters",
        "$NGROKD__NET__MTU: expected an integer from 576 to 65535, or 0 for the best, got 5",
        '$NGROKD__NET__MTUU: there is no key net.mtuu (did you mean "net.mtu"?)',
    ]


def test_an_empty_variable_is_none() -> None:
    """`NGROKD_SOCKET= ngrokd run` means the default, as in a shell."""
    assert read("", NGROKD_SOCKET="").control.socket == "/var/run/ngrokd.sock"


def test_origins_say_where_a_value_was_written() -> None:
    """Defaults are not listed."""
    assert dict(read('[net]\n\nmtu = 1400\ninterface = "x0"').origins) == {
        "net.mtu": "c.toml:3",
        "net.interface": "c.toml:4",
    }


# What is refused


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[net]\nmtu = 10", "c.toml:2: net.mtu: expected an integer from 576 to 65535, or 0 for the best, got 10"),
        ('[net]\nmtu = "1500"', 'or 0 for the best, got "1500" (did you mean 1500 without quotes?)'),
        ("[net]\nmtu = true", "expected an integer from 576 to 65535, or 0 for the best, got true"),
        (f"[net]\nmtu = {10**30}", "got an integer that is too big"),
        ("[net]\nworkers = 0", 'c.toml:2: net.workers: expected an integer from 1 to 64, or "auto", got 0'),
        ('[net]\nworkers = "2"', "(did you mean 2 without quotes?)"),
        ("[net]\nworkers = true", 'expected an integer from 1 to 64, or "auto", got true'),
        ('[net]\nsubnett = "x"', 'c.toml:2: net.subnett: unknown key (did you mean "subnet"?)'),
        ('[net]\npoll_interval = "3s"', "c.toml:2: net.poll_interval: unknown key (it belongs under [api])"),
        ('[net]\npol_interval = "3s"', '(did you mean "api.poll_interval"?)'),
        ('[net]\ninterface_name = "x"', "(it is net.interface here)"),
        ("[server]\nhealth_port = 1", "c.toml:1: server: unknown section"),
        ("[nett]\nmtu = 1500", 'c.toml:1: nett: unknown section (did you mean "net"?)'),
        ("[lgo]", '(did you mean "log"?)'),
        ('subnet = "10.0.0.0/8"', "c.toml:1: subnet: unknown key (it belongs under [net])"),
        ('ingressEndpoint = "a:1"', "c.toml:1: ingressEndpoint: unknown key (it is ingress.address here)"),
        ("net = 3", "c.toml:1: net: expected a table [net], got an integer"),
        ("[[net]]\nmtu = 0", "c.toml:1: net: expected a table [net], got a list"),
        (
            "[api]\npoll_interval = 30",
            'api.poll_interval: expected a duration such as "30s", "5m" or "1h30m", got 30 (did you mean "30s"?)',
        ),
        ('[api]\npoll_interval = "30"', '(did you mean "30s"?)'),
        ('[api]\npoll_interval = "30 s"', 'expected a duration such as "30s"'),
        ('[api]\npoll_interval = "999ms"', 'expected a duration from 1s to 24h, got "999ms"'),
        ("[limits]\nbuffer = 524288", 'a size such as "512KiB" or "256MiB", got 524288 (did you mean "512KiB"?)'),
        ('[limits]\nbuffer = "512kb"', '(did you mean "512KiB"?)'),
        ('[limits]\nbuffer = "1KiB"', "expected a size from 64KiB to 64MiB"),
        ('[limits]\nbuffer = "512"', 'got "512" (did you mean "512KiB"?)'),
        ("[limits]\nbuffer = 512", 'got 512 (did you mean "512KiB"?)'),
        ('[limits]\nbuffer = "99GB"', 'expected a size from 64KiB to 64MiB'),
        ('[net]\nsubnet = "10.107.0.1/16"', 'got "10.107.0.1/16" (did you mean "10.107.0.0/16"?)'),
        ('[net]\nsubnet = "10.107.0.0"', 'got "10.107.0.0" (did you mean "10.107.0.0/16"?)'),
        ('[net]\nsubnet = "192.168.7.0"', '(did you mean "192.168.7.0/24"?)'),
        ('[net]\nsubnet = "10.1.2.3"', 'expected an IPv4 network such as "10.107.0.0/16", got "10.1.2.3"'),
        ('[net]\nsubnet = "10.107.0.0/31"', "expected an IPv4 network from /8 to /30"),
        ('[net]\nsubnet = "127.0.0.0/8"', "not a loopback, link-local or multicast one"),
        ('[net]\nsubnet = "fd00::/64"', "expected an IPv4 network"),
        ('[net]\nsubnet6 = "fd00::/120"', "expected an IPv6 network from /8 to /112"),
        ('[net]\nsubnet6 = "10.0.0.0/8"', 'expected "auto", "off" or an IPv6 network such as "fd12:3456:789a::/64"'),
        ('[net]\nsubnet6 = "fe80::/64"', "not a loopback, link-local or multicast one"),
        ('[net]\nsubnet6 = "fd00::1/64"', '(did you mean "fd00::/64"?)'),
        ('[net]\nallow_sources = ["10.0.0.0/8", "x"]', 'net.allow_sources: expected a list of networks such as'),
        ('[net]\nallow_sources = "10.0.0.0/8"', '(did you mean ["10.0.0.0/8"]?)'),
        ('[net]\ninterface = "a/b"', "expected an interface name of 1 to 15"),
        ('[net]\ninterface = "0123456789abcdef"', "expected an interface name of 1 to 15"),
        ('[net]\ninterface = "lo"', "expected an interface name"),
        ('[net]\nmode = "tap"', 'expected one of "auto", "tun", got "tap"'),
        ('[net]\noffload = "true"', "expected true or false, got \"true\" (did you mean true without quotes?)"),
        ("[net]\noffload = 1", "expected true or false, got 1"),
        ('[api]\nurl = "http://api.ngrok.com"', "expected an https:// URL"),
        ('[api]\nurl = "api.ngrok.com"', 'expected a URL such as "https://api.ngrok.com"'),
        ('[api]\nurl = "https://u:p@api.ngrok.com"', 'expected a URL such as "https://api.ngrok.com"'),
        ('[api]\nurl = "https://api.ngrok.com/v1"', 'expected a URL such as "https://api.ngrok.com"'),
        ("[api]\nselectors = []", "expected a list of texts such as"),
        ('[ingress]\naddress = "a:0"', "(the port is a number from 1 to 65535)"),
        ('[ingress]\naddress = "2001:db8::1"', "(an IPv6 address stands in brackets: [2001:db8::1]:443)"),
        ('[ingress]\naddress = "1.2.3"', "(not an IP address)"),
        ('[ingress]\nca_fingerprints = ["abc"]', "expected a list of SHA-256 fingerprints"),
        ('[state]\ndirectory = "relative"', 'expected an absolute path, got "relative"'),
        ('[state]\ndirectory = "/etc/../x"', 'expected an absolute path without ".."'),
        ('[state]\ndirectory = "/"', "expected an absolute path below /"),
        ('[state]\ndirectory = "/a\\u0000b"', "of printable characters"),
        ('[state]\ndirectory = ""', "expected an absolute path"),
        (f'[hosts]\npath = "/{"a" * 5000}"', "expected a path of at most 4095 bytes, got 5001 bytes"),
        (f'[control]\nsocket = "/{"a" * 103}"', "expected a path of at most 103 bytes, got 104 bytes"),
        ('[control]\ngroup = "a b"', "expected the name of a group"),
        ('[http]\nlisten = "example.com:80"', "an IP address of this machine, or localhost"),
        ('[http]\nlisten = "127.0.0.1"', "(a port is missing)"),
        ('[log]\nlevel = "warn"', '(did you mean "warning"?)'),
        ("[log]\nlevel = 1979-05-27", "got a date or time"),
        ("[log]\nlevel = 1.5", "got 1.5"),
        ("[log]\nlevel = {a = 1}", "got a table"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_with_what_would_be_right(line: str, message: str) -> None:
    """The message alone must be enough to correct the file."""
    [mistake] = mistakes(line)

    assert message in mistake


def test_all_mistakes_are_named_at_once_in_the_order_of_the_file() -> None:
    """One run, one correction. Mistakes in the environment come first: they have no line."""
    text = '[net]\nmtu = 1\nfoo = 2\n[log]\nlevel = "loud"\n[api]\ntimeout = 3\n[zzzzz]\n'

    found = mistakes(text, NGROKD_SOCKET="relative")

    assert [each.split(" ")[0] for each in found] == [
        "$NGROKD_SOCKET:",
        "c.toml:2:",
        "c.toml:3:",
        "c.toml:5:",
        "c.toml:7:",
        "c.toml:8:",
    ]


def test_a_flood_of_mistakes_is_cut() -> None:
    """A megabyte of unknown keys is one screen of errors."""
    found = mistakes("[net]\n" + "".join(f"zz{number} = 1\n" for number in range(5000)))

    assert len(found) == 101
    assert found[-1] == "... and 4900 more"


def test_a_wrong_secret_is_not_repeated() -> None:
    """A key pasted with its prompt is still a key."""
    found = [
        *mistakes(f'[api]\nkey = "{CANARY} x"'),
        *mistakes(f'[api]\nkey = ["{CANARY}"]'),
        *mistakes(f"[api]\nkey = {CANARY}"),
        *mistakes(f"api.key = {CANARY}"),
        *mistakes(f"[api]\nkey: {CANARY}"),
        *mistakes(f'[api]\nkey = "{CANARY}'),
        *mistakes(f'[api]\nkey_file = "{CANARY}"'),
        *mistakes(f"[api]\nkey_file = {CANARY}"),
        *mistakes("", NGROKD__API__KEY=f"{CANARY} x", NGROKD__API__KEY_FILE=CANARY),
    ]

    assert CANARY not in "".join(found)
    assert "c.toml:2: api.key: expected an API key, got a text that holds spaces" in found[0]


def test_foreign_text_in_messages_is_escaped() -> None:
    """A key name must not move the cursor of whoever reads the error."""
    [mistake] = mistakes('[net]\n"\\u001b[2J" = 1')

    assert "\x1b" not in mistake
    assert "\\x1b[2J" in mistake


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("a = \n", "c.toml:1:5: a: not TOML: "),
        ("[net]\nmtu = 1400\nmtu = 2\n", "c.toml:3:8: net.mtu: not TOML: "),
        ("[net]\n[net]\n", "c.toml:2:5: not TOML: "),
        ("a = " + "[" * 5000, "c.toml:1: not a configuration: nested too deeply"),
        ("a = " + "9" * 5000, "c.toml:1: not a configuration: a number is too long"),
    ],
)
def test_what_is_not_toml_is_refused_with_its_place(text: str, start: str) -> None:
    """Duplicate keys and tables too; bombs of depth and of digits end in the same error."""
    [mistake] = mistakes(text)

    assert mistake.startswith(start)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("/etc/ngrokd/config.yml", 'api:\n  url: "https://api.ngrok.com"\n'),
        ("/etc/ngrokd/config.toml", "# the Go daemon's\n\napi:\n  key: x\n"),
        ("/etc/ngrokd/config.toml", "---\napi: {}\n"),
        ("/x.yaml", "# nothing but comments\n"),
    ],
)
def test_a_yaml_file_is_named_with_the_command_that_converts_it(file: str, text: str) -> None:
    """Who comes from the Go daemon must not be left with a syntax error."""
    with pytest.raises(ConfigError, match="this is YAML") as caught:
        config.parse(text, file, {})

    assert caught.value.remedy == f"convert it with: ngrokd config import {file}"


TEN_MISTAKES = """\
[api]
poll_interval = 30
keyfile = "/x"
timeout = "10x"
key = 2canaryCANARY
[net]
subnet = "10.107.0.5/16"
mtu = "1400"
level = "debug"
drain = 3s
[limtis]
flows = 5
[log]
level = "warn"
format: json
[http
listen = "localhost"
"""


def test_errors_of_syntax_hide_no_other_mistakes() -> None:
    """The parser stops at the first; whoever corrects the file should not have to do it again and again."""
    found = mistakes(TEN_MISTAKES)

    assert [each.split(" ")[:2] for each in found] == [
        ["c.toml:2:", "api.poll_interval:"],
        ["c.toml:3:", "api.keyfile:"],
        ["c.toml:4:", "api.timeout:"],
        ["c.toml:5:8:", "api.key:"],
        ["c.toml:7:", "net.subnet:"],
        ["c.toml:8:", "net.mtu:"],
        ["c.toml:9:", "net.level:"],
        ["c.toml:10:10:", "net.drain:"],
        ["c.toml:11:", "limtis:"],
        ["c.toml:14:", "log.level:"],
        ["c.toml:15:7:", "log.format:"],
        ["c.toml:16:6:", "not"],
        ["c.toml:17:", "http.listen:"],
    ]
    assert "(it belongs under [log])" in found[6]
    assert '(texts stand in quotes: drain = "3s")' in found[7]
    assert "(a key is set like this: format = ...)" in found[10]
    assert "2canary" not in "".join(found)


@pytest.mark.parametrize(
    ("text", "hints"),
    [
        ("[net]\noffload = True\n", ["did you mean offload = true?"]),
        ("[net]\nmtu =  # none\n", ["the value is missing"]),
        ("[net]\nmtu = 1400\n[net]\nmtu = 1\n", ["this section stands above already"]),
        ("[net]\nmtu = 1400\nmtu = 1\n", ["it is written above already"]),
        ("[api]\nselectors = [\n'a'\n[net]\nmtuu = 1\n", [""]),  # where it should have ended is anybody's guess
        ('[api]\nca_file = """\n[net]\nmtuu = 1\n', [""]),
        ("= 1\n[net]\nmtuu = 1\n", ["", "did you mean"]),
        ("[net]\nsubnet = 10.1.0.0/16 # why\n", ['texts stand in quotes: subnet = "10.1.0.0/16")']),
    ],
)
def test_what_is_said_of_a_syntax_error_is_certain(text: str, hints: list[str]) -> None:
    """No mistakes that only come from reading on after one."""
    found = mistakes(text)

    assert len(found) == len(hints)
    assert all(hint in each for hint, each in zip(hints, found, strict=True))


def test_a_flood_of_syntax_errors_is_cut() -> None:
    assert len(mistakes("a b\n" * 5000)) == 20


# Files


def test_files_of_the_folder_go_before_the_file_in_the_order_of_their_names(tmp_path: Path) -> None:
    """What a package or a tool drops there needs no editing of what people wrote."""
    file, folder = tmp_path / "config.toml", tmp_path / "conf.d"
    folder.mkdir()
    file.write_text('[net]\nmtu = 1300\nsubnet = "10.9.0.0/16"\n[log]\nlevel = "debug"\n')
    (folder / "20-b.toml").write_text("[net]\nmtu = 1420\n")
    (folder / "10-a.toml").write_text('[net]\nmtu = 1410\ndrain = "1s"\n')
    (folder / "30.toml~").write_text("[net]\nmtu = 1\n")
    (folder / ".30.toml").write_text("[net]\nmtu = 1\n")

    settings = config.load(str(file), {"NGROKD__LOG__LEVEL": "error"}, [config.Given("net.drain", "9s", "--set")])

    assert (settings.net.mtu, settings.net.subnet) == (1420, "10.9.0.0/16")
    assert (settings.net.drain_s, settings.log.level) == (9.0, "error")
    assert settings.file == str(file)
    assert settings.files == (str(file), f"{folder}/10-a.toml", f"{folder}/20-b.toml")
    assert settings.origins == {
        "net.mtu": f"{folder}/20-b.toml:2",
        "net.subnet": f"{file}:3",
        "net.drain": "--set",
        "log.level": "$NGROKD__LOG__LEVEL",
    }


def test_the_folder_counts_without_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("ngrokd.config.loading.DEFAULT_PATH", str(tmp_path / "config.toml"))
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d" / "a.toml").write_text("[net]\nmtu = 1400\n")

    settings = config.load(None, {})

    assert (settings.net.mtu, settings.file, settings.files) == (1400, "", (f"{tmp_path}/conf.d/a.toml",))


def test_mistakes_of_all_files_are_named_at_once(tmp_path: Path) -> None:
    """Also of values that another file goes before, and beside files that cannot be read at all."""
    file, folder = tmp_path / "config.toml", tmp_path / "conf.d"
    (folder / "dir.toml").mkdir(parents=True)
    file.write_text("[net]\nmtu = 1\n")
    (folder / "a.toml").write_text("[net]\nmtu = 1400\nfoo = 1\n")
    (folder / "b.toml").write_text("[net\nmtu = 1400\n")

    with pytest.raises(ConfigError) as caught:
        config.load(str(file), {})

    assert [line.split(" ")[0] for line in str(caught.value).splitlines()] == [
        f"{folder}/dir.toml",
        f"{file}:2:",
        f"{folder}/a.toml:3:",
        f"{folder}/b.toml:1:5:",
    ]
    assert [(each.line, each.key) for each in caught.value.mistakes] == [(2, "net.mtu"), (3, "net.foo"), (1, "")]


def test_a_missing_default_file_means_defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A fresh machine has none."""
    monkeypatch.setattr("ngrokd.config.loading.DEFAULT_PATH", str(tmp_path / "config.toml"))

    settings = config.load(None, {})

    assert settings.file == ""
    assert settings.warnings == ()


def test_a_config_of_the_go_daemon_beside_a_missing_one_is_mentioned(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its settings and key would silently not count."""
    monkeypatch.setattr("ngrokd.config.loading.DEFAULT_PATH", str(tmp_path / "config.toml"))
    (tmp_path / "config.yml").write_text("api:\n")

    [warning] = config.load(None, {}).warnings

    assert f"ngrokd config import {tmp_path}/config.yml" in warning


@pytest.mark.parametrize("by_variable", [False, True])
def test_a_missing_file_that_was_asked_for_is_an_error(tmp_path: Path, by_variable: bool) -> None:
    """A typo in the path must not become defaults."""
    file = str(tmp_path / "no.toml")

    with pytest.raises(ConfigError, match="there is no such file"):
        config.load(None if by_variable else file, {"NGROKD_CONFIG": file} if by_variable else {})


def test_who_may_not_read_the_file_is_told_to_use_sudo(tmp_path: Path) -> None:
    """The configuration lies in root's directory, and `ngrokd run` without sudo is the commonest mistake."""
    file = tmp_path / "root.toml"
    file.write_text("")
    file.chmod(0)
    imports = "import os; from ngrokd import config; from ngrokd.errors import ConfigError\n"
    become_somebody = f"{imports}if os.geteuid() == 0: os.setuid(65534)\n"
    load = f"try: config.load({str(file)!r}, {{}})\nexcept ConfigError as error: print(error.remedy)"

    said = subprocess.run([sys.executable, "-c", become_somebody + load], capture_output=True, text=True, check=True)

    assert said.stdout == "start it with sudo, or let this user read the file\n", said.stderr


def test_the_file_of_the_option_goes_before_the_variable(tmp_path: Path) -> None:
    """As everywhere: what was typed last counts."""
    (tmp_path / "a.toml").write_text("[net]\nmtu = 1400\n")

    assert config.load(str(tmp_path / "a.toml"), {"NGROKD_CONFIG": "/nowhere"}).net.mtu == 1400


def test_a_relative_path_is_made_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A reload reads the same file, wherever the daemon stands then."""
    (tmp_path / "a.toml").write_text("")
    monkeypatch.chdir(tmp_path)

    assert config.load("a.toml", {}).file == str(tmp_path / "a.toml")


def test_only_short_regular_files_are_read(tmp_path: Path) -> None:
    """A FIFO would block, a device never end."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "long").write_bytes(b"#" * ((1 << 20) + 1))

    for path in ("/dev/zero", str(tmp_path), str(tmp_path / "fifo"), str(tmp_path / "long")):
        with pytest.raises(ConfigError):
            config.load(path, {})


def test_bytes_that_are_no_text_are_named_with_their_place(tmp_path: Path) -> None:
    """TOML is UTF-8."""
    (tmp_path / "c").write_bytes(b"[net]\nab\xff")

    with pytest.raises(ConfigError, match=r"/c:2:3: not TOML: not UTF-8 text"):
        config.load(str(tmp_path / "c"), {})


def test_a_byte_order_mark_is_forgiven(tmp_path: Path) -> None:
    """Some editors write one."""
    (tmp_path / "c").write_bytes(b"\xef\xbb\xbf[net]\nmtu = 1400\n")

    assert config.load(str(tmp_path / "c"), {}).net.mtu == 1400


def test_a_file_with_a_key_that_others_can_read_is_worth_a_warning(tmp_path: Path) -> None:
    """The key works, and is no secret."""
    file = tmp_path / "c"
    file.write_text(f'[api]\nkey = "{CANARY}"\n')
    file.chmod(0o644)

    [warning] = config.load(str(file), {}).warnings
    file.chmod(0o600)

    assert "chmod 600" in warning
    assert CANARY not in warning
    assert config.load(str(file), {}).warnings == ()


@given(st.binary(max_size=300))
@example(b'"\x80')
@example(b"a = 1e999999")
@example(b"[a]\n[a.b]\n[[a.c]]\nd = {e = [1, 2]}")
def test_no_bytes_raise_anything_but_a_config_error(data: bytes) -> None:
    """Whatever a file holds."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return
    said = ""
    try:
        config.parse(text, "f", {})
    except ConfigError as error:
        said = str(error)
    assert said.replace("\n", "").isprintable()


# conf/ngrokd.toml


def commented_out(text: str) -> str:
    """The shipped file with every key switched on."""
    return re.sub(r"^#(?=[a-z0-9_]+ = )", "", text, flags=re.MULTILINE)


def test_the_shipped_file_holds_every_key_at_its_default() -> None:
    """It is the manual, so it must be complete and true."""
    text = SHIPPED.read_text()

    as_shipped, switched_on = read(text), read(commented_out(text))

    assert not as_shipped.origins
    assert config.show(as_shipped) == config.show(Settings())
    assert config.show(switched_on) == config.show(Settings())
    assert sorted(switched_on.origins) == sorted(config.all_keys())


def test_every_key_is_explained_in_some_words() -> None:
    """And no key that is not there."""
    assert sorted(KEYS) == sorted(config.all_keys())
    assert sorted(SECTIONS) == sorted(schema())
    for path, text in {**KEYS, **SECTIONS}.items():
        assert len(text.split()) >= 3, path
        assert text.endswith((".", ")")), path


@pytest.mark.parametrize(
    ("path", "made"),
    [
        (manual.FILE, lambda: manual.commented_file("ngrokd.schema.json")),
        (manual.SCHEMA, manual.schema_text),
        (manual.PAGE, lambda: manual.page((ROOT / manual.PAGE).read_text())),
    ],
)
def test_the_papers_are_as_the_code_makes_them(path: str, made: Callable[[], str]) -> None:
    """Run `make docs`; what a key is for stands in ngrokd/config/explanations.py."""
    assert (ROOT / path).read_text() == made()


def test_the_file_says_of_each_key_when_a_change_counts() -> None:
    marked = {
        section + found[2]: found[1]
        for section, body in re.findall(r"^\[(\w+)\]\n(.*?)(?=^\[|\Z)", commented(), re.MULTILINE | re.DOTALL)
        for found in re.finditer(r"(\(live(?:, for new connections)?\))?\n#(\w+) = ", body.replace("\n# ", " "))
    }
    expected = {Effect.LIVE: "(live)", Effect.NEW_FLOWS: "(live, for new connections)", Effect.RESTART: None}

    for section, (_, leaves) in schema().items():
        for leaf in leaves.values():
            assert marked[section + leaf.key] == expected[leaf.effect], leaf.path


def commented() -> str:
    return manual.commented_file()


# The schema for editors


def fits(value: object, rule: Mapping[str, Any]) -> bool:
    """Whether a value fits a JSON Schema, as far as ours goes."""
    kinds = {"boolean": bool, "integer": int, "string": str, "array": list, "object": dict}
    kind = kinds.get(rule.get("type", ""), object)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        return False
    if "enum" in rule and value not in rule["enum"]:
        return False
    if "const" in rule and value != rule["const"]:
        return False
    if "anyOf" in rule and not any(fits(value, each) for each in rule["anyOf"]):
        return False
    if isinstance(value, int) and not rule.get("minimum", value) <= value <= rule.get("maximum", value):
        return False
    if isinstance(value, str) and not re.search(rule.get("pattern", ""), value):
        return False
    if isinstance(value, str) and len(value) < rule.get("minLength", 0):
        return False
    if isinstance(value, list):
        if not rule.get("minItems", 0) <= len(value) <= rule.get("maxItems", len(value)):
            return False
        return all(fits(item, rule["items"]) for item in value)
    if isinstance(value, dict) and "properties" in rule:
        return value.keys() <= rule["properties"].keys() and all(
            fits(item, rule["properties"][key]) for key, item in value.items()
        )
    return True


def test_the_schema_takes_all_defaults_and_refuses_typing_errors() -> None:
    rule = manual.json_schema()

    assert fits(config.show(Settings()), rule)
    assert not fits({"net": {"mtuu": 5}}, rule)
    assert not fits({"nett": {}}, rule)
    for section, key, value in [
        ("net", "mtu", 5),
        ("net", "mtu", "1400"),
        ("net", "offload", "yes"),
        ("net", "drain", 3),
        ("net", "drain", "3"),
        ("api", "url", "http://x"),
        ("api", "selectors", []),
        ("limits", "buffer", "5 MB"),
        ("log", "level", "warn"),
        ("hosts", "path", "hosts"),
        ("net", "subnet", "10.1.0.0"),
        ("ingress", "ca_fingerprints", ["12"]),
    ]:
        assert not fits({section: {key: value}}, rule), (section, key)


_ANY = st.one_of(
    st.booleans(),
    st.integers(-1, 70_000),
    st.text("0123456789abmskMKiB./:-_ ", max_size=12),
    st.sampled_from(["auto", "off", "1h30m", "1.5s", "512KiB", "/x", "fd00::/8", "https://X.y:1/", "[::1]:1", "info"]),
    st.lists(st.sampled_from(["a", "10.0.0.0/8", "cf:" * 31 + "CF", "fd00::/8", ""]), max_size=3),
)


@given(st.sampled_from([leaf for _, leaves in schema().values() for leaf in leaves.values()]), _ANY)
def test_the_schema_takes_whatever_is_taken(leaf: Leaf, value: object) -> None:
    """An editor that underlines what is right is switched off."""
    try:
        leaf.reader.read(value)
    except Wrong:
        return

    assert fits(value, manual.json_schema()["properties"][leaf.section]["properties"][leaf.key])


def test_the_version_is_the_one_of_the_package() -> None:
    """It stands twice, because reading it from the package's metadata slows every command down."""
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == ngrokd.__version__


# Line numbers


def test_every_way_of_writing_a_key_has_its_line() -> None:
    """Dotted, quoted, inline, in lists, in arrays of tables, behind strings of several lines."""
    text = (
        "# comment\n"  # 1
        "top.'quoted \\ key'.\"x\\u0041\" = 1\n"  # 2
        "[ a . b ]  # trailing\n"  # 3
        'text = """\n'  # 4
        '[not.a.table] = "x"\\\n'  # 5
        'end""""\n'  # 6
        "raw = '''\n"  # 7
        "''\n"  # 8
        "'''\n"  # 9
        "list = [ # comment ]\n"  # 10
        "  'one', 2,\n"  # 11
        "  [3,\n"  # 12
        "   4], {in = 1,\n"  # 13
        " line = '}'}]\n"  # 14
        "[[many]]\n"  # 15
        "x = 1979-05-27 07:32:00\n"  # 16
        "[[many]]\n"  # 17
        "y = 2 # z = 3\n"  # 18
        "[many.sub]\n"  # 19
        "z = {'q w' = {deep.er = 1}}\n"  # 20
    )
    tomli.loads(text)

    lines = index_lines(text)

    assert lines["top", "quoted \\ key", "xA"] == 2
    assert lines["a", "b"] == 3
    assert lines["a", "b", "text"] == 4
    assert lines["a", "b", "raw"] == 7
    assert lines["a", "b", "list"] == 10
    assert [lines["a", "b", "list", number] for number in range(4)] == [11, 11, 12, 13]
    assert lines["a", "b", "list", 2, 1] == 13
    assert lines["a", "b", "list", 3, "in"] == 13
    assert lines["a", "b", "list", 3, "line"] == 14
    assert lines["many", 0, "x"] == 16
    assert lines["many", 1, "y"] == 18
    assert lines["many", 1, "sub", "z", "q w", "deep", "er"] == 20


def toml_text(value: object) -> str:
    """A value written as TOML, strings in the form that needs no knowledge of escapes."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"'{key}' = {toml_text(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[\n" + ",\n".join(map(toml_text, value)) + "\n]"
    return f"'''{value}'''" if isinstance(value, str) else str(value)


_KEYS = st.text(string.ascii_letters + string.digits + ' .=#"[]{},', max_size=6)
_VALUES = st.recursive(
    st.integers(-9, 9) | st.text(string.ascii_letters + ' \n"#=[]{},\\', max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(_KEYS, _VALUES, max_size=5))
def test_the_index_finds_each_key_of_any_document_on_its_line(document: dict[str, object]) -> None:
    """It agrees with the parser about what is a key, whatever stands in strings and comments."""
    text, expected = "# [x] = 1\n", {}
    for key, value in document.items():
        expected[key] = text.count("\n") + 1
        text += f"'{key}' = {toml_text(value)} # k = 1\n"
    assert tomli.loads(text).keys() == document.keys()

    lines = index_lines(text)

    assert {path[0]: line for path, line in lines.items() if len(path) == 1} == expected


# Durations, sizes, addresses


@given(st.integers(0, 10**13))
def test_a_duration_survives_being_shown(microseconds: int) -> None:
    """`show` writes what `load` reads."""
    seconds = microseconds / 1e6

    assert config.parse_duration(config.format_duration(seconds)) == pytest.approx(seconds, abs=1e-6)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("200us", 0.0002), ("200µs", 0.0002), ("1.5h", 5400.0), ("1h30m", 5400.0), ("2d", 172800.0), ("0s", 0.0)],
)
def test_durations_are_read(text: str, seconds: float) -> None:
    """Go's units, and days."""
    assert config.parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "s", "1", "-1s", "1s ", "1 s", "1S", "1sec", "1e3s", "٣s", "9" * 20 + "s"])
def test_other_durations_are_not(text: str) -> None:
    """Nothing is guessed."""
    with pytest.raises(ValueError, match="not a duration"):
        config.parse_duration(text)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("a.example", ("a.example", 443)),
        ("A.Example:8443", ("a.example", 8443)),
        ("10.0.0.1", ("10.0.0.1", 443)),
        ("[2001:db8::1]", ("2001:db8::1", 443)),
        ("[2001:db8::1]:8443", ("2001:db8::1", 8443)),
    ],
)
def test_addresses_are_split_and_joined(text: str, address: tuple[str, int]) -> None:
    """What the API returns as the ingress goes through the same function."""
    assert config.split_address(text, 443) == address
    assert config.split_address(config.join_address(*address), None) == address


@given(st.text(max_size=40))
@example("[::1")
@example("a:b:c")
@example("host:٣")
@example("[1.2.3.4]:5")
def test_no_text_breaks_the_address_reader(text: str) -> None:
    """It raises ValueError, or gives what can be joined again."""
    try:
        host, port = config.split_address(text, 443)
    except ValueError:
        return
    assert config.split_address(config.join_address(host, port), None) == (host, port)


# The API key


class Files:
    """A file system of key files."""

    def __init__(self, **texts: str) -> None:
        self.texts = {f"/{name}": text for name, text in texts.items()}

    def __call__(self, path: str) -> tuple[str, int]:
        if path not in self.texts:
            raise FileNotFoundError(path)
        return self.texts[path], stat.S_IFREG | 0o600


ALL_SOURCES = {"CREDENTIALS_DIRECTORY": "/cred", "NGROKD_API_KEY_FILE": "/var", "NGROK_API_KEY": "from-env"}


def test_the_sources_of_the_key_have_an_order() -> None:
    """Credential, variable's file, configured file, stored key, configured key, variable; each taken away in turn."""
    settings = read('[api]\nkey = "from-config"\nkey_file = "/file"\n[state]\ndirectory = "/state"\n')
    files = Files(
        **{"cred/api_key": "from-cred\n", "var": "from-var", "file": "from-file", "state/api_key": "from-state"}
    )
    environ = dict(ALL_SOURCES)
    found = []

    def look() -> None:
        key = config.resolve_api_key(settings, environ, files)
        found.append((key.value.reveal(), key.source, key.locked))

    look()
    del environ["CREDENTIALS_DIRECTORY"]
    look()
    del environ["NGROKD_API_KEY_FILE"]
    look()
    settings = read('[api]\nkey = "from-config"\n[state]\ndirectory = "/state"\n')
    look()
    del files.texts["/state/api_key"]
    look()
    settings = read('[state]\ndirectory = "/state"\n')
    look()
    del environ["NGROK_API_KEY"]
    look()

    assert found == [
        ("from-cred", "credential /cred/api_key", True),
        ("from-var", "$NGROKD_API_KEY_FILE /var", True),
        ("from-file", "api.key_file /file", True),
        ("from-state", "set-api-key (/state/api_key)", False),
        ("from-config", "api.key", False),
        ("from-env", "$NGROK_API_KEY", False),
        ("", "", False),
    ]


def test_a_credential_of_another_name_is_not_ours() -> None:
    """systemd passes all of a unit's credentials in one folder."""
    key = config.resolve_api_key(Settings(), ALL_SOURCES | {"NGROKD_API_KEY_FILE": ""}, Files())

    assert key.source == "$NGROK_API_KEY"


def test_a_configured_file_that_is_missing_is_a_problem_and_not_passed_over() -> None:
    """The next source may be another account's key."""
    key = config.resolve_api_key(read('[api]\nkey_file = "/gone"\nkey = "other"'), {}, Files())

    assert (key.value, key.problem, key.locked) == (Secret(""), "/gone does not exist", True)


@pytest.mark.parametrize("text", ["", " \n", "two words", "tab\tinside", "ключ", "x" * 5000, "a\nb"])
def test_what_cannot_be_a_key_is_a_problem(text: str) -> None:
    """It would be sent in a header: nothing that breaks one passes."""
    key = config.resolve_api_key(read('[api]\nkey_file = "/k"'), {}, Files(k=text))

    assert key.value == Secret("")
    assert key.problem.startswith("/k ")


def test_key_files_are_read_from_disk(tmp_path: Path) -> None:
    """With their mode, so that an open one is mentioned; what is no short text is a problem."""
    file = tmp_path / "k"
    file.write_text(f"{CANARY}\n")
    file.chmod(0o644)
    settings = read(f'[api]\nkey_file = "{file}"')

    key = config.resolve_api_key(settings, {})
    file.write_bytes(b"\xff")
    unreadable = config.resolve_api_key(settings, {})

    assert key.value.reveal() == CANARY
    assert "chmod 600" in key.warning
    assert CANARY not in repr(key)
    assert unreadable.problem == f"{file} is not text"


# Showing and comparing


def test_settings_show_no_secret() -> None:
    """Neither as a table, nor as a repr, nor formatted."""
    settings = read(f'[api]\nkey = "{CANARY}"')

    assert CANARY not in f"{settings} {settings!r} {config.show(settings)}"
    assert config.show(settings)["api"]["key"] == "***"
