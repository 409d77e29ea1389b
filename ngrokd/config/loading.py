"""From a file to checked settings.

The document is converted leaf by leaf, so that one run names every mistake, each with file, line, key and remedy:

    /etc/ngrokd/config.toml:6: net.mtu: expected an integer from 576 to 65535, or 0 for the best, got 10
    /etc/ngrokd/config.toml:9: net.subnett: unknown key (did you mean "subnet"?)

A wrong file is a `ConfigError` and nothing else, whatever bytes it holds.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import msgspec
import tomli
from msgspec import Struct

from ngrokd import files
from ngrokd.config.lines import KeyPath, index_lines
from ngrokd.config.readers import Hidden, Wrong, meant, nearest, shown_toml, type_name
from ngrokd.config.schema import Leaf, Settings, schema
from ngrokd.endpoints import printable
from ngrokd.errors import ConfigError, StateError

DEFAULT_PATH: Final = "/etc/ngrokd/config.toml"
GO_CONFIG_NAME: Final = "config.yml"  # the Go daemon's, in the same folder
MAX_FILE_BYTES: Final = 1 << 20
MAX_MISTAKES_SHOWN: Final = 100


def load(path: str | None, environ: Mapping[str, str]) -> Settings:
    """Read the configuration.

    Args:
        path: the file that was asked for; None: `$NGROKD_CONFIG`, else the default one, which may be missing.
        environ: the environment; `NGROKD_SOCKET`, `NGROKD_HOSTS_PATH`, `NGROKD_LOG_LEVEL` and `NGROKD_LOG_FORMAT` go
            before the file.

    Raises:
        ConfigError: everything that is wrong, one line each.
    """
    asked = path or environ.get("NGROKD_CONFIG") or ""
    file = os.path.abspath(asked or DEFAULT_PATH)
    text = _read_text(file, required=bool(asked))
    if text is None:
        return msgspec.structs.replace(parse("", file, environ), warnings=tuple(_left_behind(file)))
    settings = parse(text, file, environ)
    return msgspec.structs.replace(settings, file=file, warnings=tuple(_warnings(file, settings)))


def parse(text: str, file: str, environ: Mapping[str, str]) -> Settings:
    """Read a configuration from text; `file` is only for messages. Raises ConfigError as `load` does."""
    try:
        document = tomli.loads(text)
        lines = index_lines(text)
    except tomli.TOMLDecodeError as error:
        if _looks_like_yaml(file, text):
            raise _yaml_error(file) from None
        raise ConfigError(f"{file}:{error.lineno}:{error.colno}: not TOML: {printable(error.msg)}") from None
    except RecursionError:
        raise ConfigError(f"{file}:1: not a configuration: nested too deeply") from None
    except ValueError:  # an integer of more digits than int() takes
        raise ConfigError(f"{file}:1: not a configuration: a number is too long") from None
    if _is_yaml_name(file) and not document:
        raise _yaml_error(file)
    return _Conversion(document, lines, file, environ).settings()


class _Conversion:
    """One document on its way to `Settings`; collects every mistake before it raises."""

    def __init__(
        self, document: dict[str, Any], lines: Mapping[KeyPath, int], file: str, environ: Mapping[str, str]
    ) -> None:
        self._document = document
        self._lines = lines
        self._file = file
        self._environ = environ
        self._schema = schema()
        self._mistakes: list[tuple[int, str]] = []
        self._origins: dict[str, str] = {}

    def settings(self) -> Settings:
        sections = {name: self._section(name, *found) for name, found in self._schema.items()}
        for name, value in self._document.items():
            if name not in self._schema:
                self._mistake((name,), self._unknown_section(name, value))
        if self._mistakes:
            raise _all_at_once([text for _, text in sorted(self._mistakes, key=lambda mistake: mistake[0])])
        return Settings(**sections, origins=self._origins)  # type: ignore[arg-type]  # each section under its name

    def _section(self, name: str, struct: type[Struct], leaves: Mapping[str, Leaf]) -> Struct:
        table = self._document.get(name, {})
        if not isinstance(table, dict):
            self._mistake((name,), f"{name}: expected a table [{name}], got {type_name(table)}")
            table = {}
        for key in table:
            if key not in leaves:
                self._mistake((name, key), f"{name}.{printable(key)}: unknown key{self._unknown_key(name, key)}")
        values = {}
        for key, leaf in leaves.items():
            variable = _VARIABLES.get(leaf.path, "")
            if variable and self._environ.get(variable):
                values[leaf.attribute] = self._convert(leaf, self._environ[variable], f"${variable}")
            elif key in table:
                values[leaf.attribute] = self._convert(leaf, table[key], "")
        return struct(**{attribute: value for attribute, value in values.items() if value is not _FAILED})

    def _convert(self, leaf: Leaf, value: object, origin: str) -> object:
        path: KeyPath = (leaf.section, leaf.key)
        try:
            converted: object = leaf.reader.read(value)
        except Wrong as wrong:
            hidden = isinstance(leaf.reader, Hidden)
            got = wrong.got or (type_name(value) if hidden else shown_toml(value))
            message = f"expected {wrong.expected}, got {got}" + (f" ({wrong.hint})" if wrong.hint else "")
            if origin:
                self._mistakes.append((0, f"{origin}: {message}"))
            else:
                self._mistake(path, f"{leaf.path}: {message}")
            return _FAILED
        self._origins[leaf.path] = origin or f"{self._file}:{self._line(path)}"
        return converted

    def _mistake(self, path: KeyPath, text: str) -> None:
        line = self._line(path)
        self._mistakes.append((line, f"{self._file}:{line}: {text}"))

    def _line(self, path: KeyPath) -> int:
        while path and path not in self._lines:
            path = path[:-1]
        return self._lines.get(path, 1)

    def _unknown_key(self, section: str, key: str) -> str:
        """What the key was probably meant to be, as the end of a sentence."""
        if key in _GO_KEYS:
            return f" (it is {_GO_KEYS[key]} here)"
        homes = [name for name, (_, leaves) in self._schema.items() if key in leaves and name != section]
        near = meant(key, self._schema[section][1])
        if homes and not near:
            return f" (it belongs under [{homes[0]}])"
        if near:
            return f" ({near})"
        everywhere = {leaf.key: leaf for _, leaves in self._schema.values() for leaf in leaves.values()}
        match = nearest(key, everywhere)
        return f' (did you mean "{everywhere[match].path}"?)' if match else ""

    def _unknown_section(self, name: str, value: object) -> str:
        if isinstance(value, dict):
            near = meant(name, self._schema)
            return f"{printable(name)}: unknown section" + (f" ({near})" if near else "")
        homes = [section for section, (_, leaves) in self._schema.items() if name in leaves]
        if name in _GO_KEYS:
            where = f" (it is {_GO_KEYS[name]} here)"
        elif homes:
            where = f" (it belongs under [{homes[0]}])"
        else:
            everywhere = {leaf.key: leaf for _, leaves in self._schema.values() for leaf in leaves.values()}
            match = nearest(name, everywhere)
            where = f' (did you mean "{everywhere[match].path}"?)' if match else ""
        return f"{printable(name)}: unknown key{where}"


_FAILED: Final = object()

# Variables that go before the file. The first two were the Go daemon's.
_VARIABLES: Final = {
    "control.socket": "NGROKD_SOCKET",
    "hosts.path": "NGROKD_HOSTS_PATH",
    "log.level": "NGROKD_LOG_LEVEL",
    "log.format": "NGROKD_LOG_FORMAT",
}

# Keys of the Go daemon whose name or place is another one here.
_GO_KEYS: Final = {
    "ingressEndpoint": "ingress.address",
    "ingress_endpoint": "ingress.address",
    "log_level": "log.level",
    "socket_path": "control.socket",
    "client_cert": "state.directory",
    "client_key": "state.directory",
    "health_address": "http.listen",
    "health_port": "http.listen",
    "interface_name": "net.interface",
}


def _all_at_once(mistakes: Sequence[str]) -> ConfigError:
    shown = list(mistakes[:MAX_MISTAKES_SHOWN])
    if len(mistakes) > len(shown):
        shown.append(f"... and {len(mistakes) - len(shown)} more")
    return ConfigError("\n".join(shown))


def _read_text(file: str, *, required: bool) -> str | None:
    """The file's text; None where it is missing and may be."""
    try:
        data = files.read_limited(file, MAX_FILE_BYTES)
    except FileNotFoundError:
        if required:
            raise ConfigError(f"{file}: there is no such file", remedy=_missing_remedy(file)) from None
        return None
    except StateError as error:
        if not os.access(file, os.R_OK) and os.geteuid() != 0:
            raise ConfigError(str(error), remedy="start it with sudo, or let this user read the file") from None
        raise ConfigError(str(error), remedy="it must be a regular file of at most 1MiB") from None
    try:
        return data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - (data.rfind(b"\n", 0, error.start) + 1) + 1
        raise ConfigError(f"{file}:{line}:{column}: not TOML: not UTF-8 text") from None


def _warnings(file: str, settings: Settings) -> Iterator[str]:
    """What is legal and still worth a line in the log, of a file that was read."""
    mode = os.stat(file).st_mode
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        yield f"{file} can be changed by other users: chmod go-w {file}"
    if settings.api.key and mode & (stat.S_IRGRP | stat.S_IROTH):
        yield f"{file} holds the API key and can be read by other users: chmod 600 {file}"


def _left_behind(file: str) -> Iterator[str]:
    """A configuration of the Go daemon where ours is missing is worth a line as well."""
    old = os.path.join(os.path.dirname(file), GO_CONFIG_NAME)
    if os.path.exists(old):
        yield f"{old} is the configuration of the Go ngrokd and is not read; convert it: ngrokd config import {old}"


def _missing_remedy(file: str) -> str:
    return f"check the path; without --config, {DEFAULT_PATH} is read if it exists" if file != DEFAULT_PATH else ""


def _is_yaml_name(file: str) -> bool:
    return file.endswith((".yml", ".yaml"))


def _looks_like_yaml(file: str, text: str) -> bool:
    """Whether a text that is not TOML was probably written for the Go daemon."""
    if _is_yaml_name(file):
        return True
    for line in text.splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            return line.startswith("---") or re.match(r"[A-Za-z_][A-Za-z0-9_]*:(\s|$)", line) is not None
    return False


def _yaml_error(file: str) -> ConfigError:
    return ConfigError(
        f"{file}:1: this is YAML, as the Go ngrokd reads it; this ngrokd reads TOML",
        remedy=f"convert it with: ngrokd config import {file}",
    )
