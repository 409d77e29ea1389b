"""The configuration: any text is settings or `ConfigError`, and what was accepted can be written again.

* each line of an error begins with file and line (or the variable), the line exists, and the text fits a terminal;
* a secret is not repeated in it;
* what was accepted, shown, written as TOML and read once more is shown the same;
* a value that is set in what was accepted has that value and no other has changed; unset, all is as before;
* of a text that was broken a secret is not repeated either.
"""

from __future__ import annotations

import json
import re
from typing import Final

import tomli

from ngrokd.config import Settings, parse, show
from ngrokd.config_edit import EditError, set_value, unset_value
from ngrokd.errors import ConfigError

CORPUS: Final = "config"
MAX_LEN: Final = 1200
TOKENS: Final = (
    b"[api]\n", b"[ingress]\n", b"[net]\n", b"[limits]\n", b"[hosts]\n", b"[control]\n", b"[http]\n", b"[log]\n",
    b"[state]\n", b'key = "KEY-CANARY-0123"\n', b'poll_interval = "30s"\n', b'subnet = "10.107.0.0/16"\n',
    b"mtu = 1500\n", b'buffer = "512KiB"\n', b'allow_sources = ["172.17.0.0/16"]\n', b'listen = "127.0.0.1:8081"\n',
    b'url = "https://api.ngrok.com"\n', b"[[api]]\n", b'"""', b'"""x""""', b"'''y'''''", b"'''", b"\\u0000",
    b"\\U0010ffff", b"0x", b"inf", b"nan", b"1979-05-27T07:32:00Z", b"{ a = 1 }", b"a.b.c = 1\n",
    b'ca_fingerprints = []\n', b"= 0x" + b"f" * 40, b"[::1]:443", b"fe80::1%eth0/64", b"1e400", b"-1", b"\r\n",
    b"#", b"timeout", b"drain = \"0.0000001s\"\n", b"[a.b]\n", b"log.level = 'debug'\n",
)  # fmt: skip

FILE: Final = "/etc/ngrokd/config.toml"
PLACED: Final = re.compile(r"(/etc/ngrokd/config\.(?:toml|yml)):([0-9]+)(?::[0-9]+)?: .+")
OTHER: Final = re.compile(r"\$[A-Z_]+: .+|\.\.\. and [0-9]+ more")
CANARY: Final = "KEY-CANARY-0123"


def run_one(data: bytes) -> None:
    """One file; the first byte chooses its name and the environment."""
    mode = data[0] if data else 0
    text = data[1:].decode("utf-8", "replace").removeprefix("\ufeff")
    file = FILE.replace(".toml", ".yml") if mode & 7 == 7 else FILE
    environ = {}
    if mode & 8:
        environ["NGROKD_SOCKET"] = text[:40].replace("\0", "")
        environ["NGROKD_LOG_LEVEL"] = text[40:46].replace("\0", "")
    try:
        settings = parse(text, file, environ)
    except ConfigError as error:
        check_error(error, "" if environ else text, text.count("\n") + 1)
        return
    check_settings(settings, text)


def check_error(error: ConfigError, text: str, last: int) -> None:
    lines = str(error).split("\n")
    assert 1 <= len(lines) <= 101
    for line in lines:
        assert line.isprintable(), repr(line)
        placed = PLACED.fullmatch(line)
        assert placed or OTHER.fullmatch(line), line
        if placed:
            assert 1 <= int(placed[2]) <= last, line
        assert len(line) < 800
    bare = [row for row in text.split("\n") if CANARY in row]
    if CANARY in key_of(text) or (bare and all(re.fullmatch(r"\s*key\s*=[^=]*", row) for row in bare)):
        assert CANARY not in str(error), "the key is shown"


def key_of(text: str) -> str:
    """The API key that the file holds, "" where it has none, or where the same word stands elsewhere too."""
    if text.count(CANARY) != 1:
        return ""
    try:
        section = tomli.loads(text).get("api")
    except (ValueError, RecursionError):
        return ""
    key = section.get("key") if isinstance(section, dict) else None
    return key if isinstance(key, str) else ""


def check_settings(settings: Settings, text: str) -> None:
    shown = show(settings)
    if CANARY in key_of(text):
        assert CANARY not in repr(shown)
        assert CANARY not in repr(settings)
    for origin in settings.origins.values():
        file, _, line = origin.partition(":")
        assert origin.startswith("$") or (
            file.startswith("/etc/ngrokd/config.") and 1 <= int(line) <= text.count("\n") + 1
        )
    check_edits(settings, text)
    again = parse(write(shown), FILE, {})
    rewritten = show(again)
    rewritten["api"]["key"] = shown["api"]["key"]
    assert rewritten == shown, "written again it is something else"


def check_edits(settings: Settings, text: str) -> None:
    try:
        edited = set_value(text, ("net", "mtu"), 1400)
        removed = unset_value(text, ("net", "mtu"))
    except EditError:
        return
    wanted = show(settings)
    wanted["net"]["mtu"] = 1400
    assert show(parse(edited, FILE, {})) == wanted
    assert edited.count("#") >= text.count("#"), "a comment is lost"
    wanted["net"]["mtu"] = 0
    assert show(parse(removed, FILE, {})) == wanted
    if text.strip() and "mtu" not in text and "[net]" in text:
        assert unset_value(edited, ("net", "mtu")) in (text, text + "\n")


def write(shown: dict[str, dict[str, object]]) -> str:
    """The settings as TOML; its texts, numbers and lists are written as in JSON."""
    lines = []
    for section, keys in shown.items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in keys.items() if (section, key) != ("api", "key")]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    from fuzz.driver import main

    main(__file__)
