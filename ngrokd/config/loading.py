"""From files, environment and command line to checked settings.

What counts, the later before the earlier: the defaults, the file, the files of `conf.d` beside it in the order of their
names, the environment, the options of the command line. Every value of every source is checked, also one that another
goes before.

The documents are converted leaf by leaf, so that one run names every mistake, each with file, line, key and remedy:

    /etc/ngrokd/config.toml:6: net.mtu: expected an integer from 576 to 65535, or 0 for the best, got 10
    /etc/ngrokd/config.toml:9: net.subnett: unknown key (did you mean "subnet"?)

A wrong file is a `ConfigError` and nothing else, whatever bytes it holds.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from ngrokd import files
from ngrokd.config.lines import KeyPath
from ngrokd.config.readers import Hidden, Wrong, from_text, is_private, meant, nearest, shown_toml, type_name
from ngrokd.config.salvage import salvage
from ngrokd.config.schema import Leaf, Settings, schema
from ngrokd.endpoints import printable
from ngrokd.errors import ConfigError, Mistake, StateError

DEFAULT_PATH: Final = "/etc/ngrokd/config.toml"
FOLDER_NAME: Final = "conf.d"  # beside the file
GO_CONFIG_NAME: Final = "config.yml"  # the Go daemon's, in the same folder
MAX_FILE_BYTES: Final = 1 << 20
MAX_FILES: Final = 1000
MAX_MISTAKES_SHOWN: Final = 100
GENERIC: Final = "NGROKD__"  # NGROKD__NET__MTU=1400


@dataclass(frozen=True, slots=True)
class Given:
    """A value that stands in no file: its dotted key, the text, and where it comes from ("$VARIABLE", "--option")."""

    key: str
    text: str
    origin: str


def find_file(path: str | None, environ: Mapping[str, str]) -> str:
    """The absolute path of the configuration: the one asked for, `$NGROKD_CONFIG`, or the default one."""
    return os.path.abspath(path or environ.get("NGROKD_CONFIG") or DEFAULT_PATH)


def find_files(path: str | None, environ: Mapping[str, str]) -> list[str]:
    """All files that may hold configuration, whether or not they exist: the file, then those of `conf.d`.

    Raises ConfigError: the folder cannot be read, or holds too many.
    """
    file = find_file(path, environ)
    folder = os.path.join(os.path.dirname(file), FOLDER_NAME)
    names: list[str] = []
    if os.path.isdir(folder):  # where that cannot be told, the file cannot be read either, and that is said
        try:
            names = sorted(name for name in os.listdir(folder) if name.endswith(".toml") and not name.startswith("."))
        except OSError as error:
            raise ConfigError(
                f"cannot read {folder}: {error.strerror}", remedy="start it with sudo, or let this user read the folder"
            ) from None
    if len(names) > MAX_FILES:
        raise ConfigError(f"{folder} holds {len(names)} files, more than {MAX_FILES}")
    return [file, *(os.path.join(folder, name) for name in names)]


def load(path: str | None, environ: Mapping[str, str], given: Sequence[Given] = ()) -> Settings:
    """Read the configuration.

    Args:
        path: the file that was asked for; None: `$NGROKD_CONFIG`, else the default one, which may be missing.
        environ: the environment; its variables go before the files. See `variables`.
        given: what the command line says, which goes before all; the last one of a key counts.

    Raises:
        ConfigError: everything that is wrong, one line each.
    """
    required = bool(path or environ.get("NGROKD_CONFIG"))
    conversion = _Conversion(environ, given)
    found = []
    problem: ConfigError | None = None
    for number, file in enumerate(find_files(path, environ)):
        try:
            text = _read_text(file, required=required and number == 0)
        except ConfigError as error:
            problem = problem or error
            continue
        if text is not None:
            found.append(file)
            conversion.read(text, file)
    settings = conversion.settings(problem)
    main = find_file(path, environ)
    return msgspec.structs.replace(
        settings,
        file=main if main in found else "",
        files=tuple(found),
        warnings=tuple(_warnings(main, found, settings)),
    )


def load_alone(path: str) -> Settings:
    """Read one file by itself, without conf.d and environment. Raises ConfigError as `load` does."""
    file = os.path.abspath(path)
    text = _read_text(file, required=True)
    assert text is not None, "it is required"
    return parse(text, file, {})


def convert_texts(leaf: Leaf, texts: Sequence[str]) -> object:
    """The TOML value of a key that somebody gives as texts: one, or the items of a list. Raises ConfigError."""
    value = from_text(leaf.reader, texts[0]) if len(texts) == 1 else list(texts)
    try:
        leaf.reader.read(value)
    except Wrong as wrong:
        raise ConfigError(f"{leaf.path}: {_said(leaf, value, wrong)}") from None
    return value


def parse(text: str, file: str, environ: Mapping[str, str]) -> Settings:
    """Read a configuration from one text; `file` is only for messages. Raises ConfigError as `load` does."""
    conversion = _Conversion(environ, ())
    conversion.read(text, file)
    return conversion.settings()


def variables(environ: Mapping[str, str]) -> Iterator[Given]:
    """What the environment says: `NGROKD__SECTION__KEY` for any key, and a few names of their own that go before it."""
    for name in sorted(environ):
        if name.startswith(GENERIC) and environ[name]:
            section, _, key = name.removeprefix(GENERIC).lower().partition("__")
            yield Given(f"{section}.{key}", environ[name], f"${name}")
    for key, name in VARIABLES.items():
        if environ.get(name):
            yield Given(key, environ[name], f"${name}")


@dataclass(frozen=True, slots=True)
class _Document:
    """One file that was parsed."""

    file: str
    content: Mapping[str, Any]
    lines: Mapping[KeyPath, int]

    def line(self, path: KeyPath) -> int:
        """Where a key is written, or what it stands in."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)


class _Conversion:
    """Documents on their way to `Settings`; collects every mistake before it raises."""

    def __init__(self, environ: Mapping[str, str], given: Sequence[Given]) -> None:
        self._given = [*variables(environ), *given]
        self._schema = schema()
        self._leaves = {leaf.path: leaf for _, leaves in self._schema.values() for leaf in leaves.values()}
        self._mistakes: list[Mistake] = []
        self._values: dict[str, object] = {}
        self._origins: dict[str, str] = {}

    def settings(self, problem: ConfigError | None = None) -> Settings:
        """What all sources say together. Raises ConfigError; `problem` is that of a file that could not be read."""
        in_files, self._mistakes = self._mistakes, []
        for given in self._given:
            self._take(given)
        mistakes = [*self._mistakes, *in_files]  # those that have no line come first
        if problem is not None and not mistakes:
            raise problem
        if problem is not None or mistakes:
            raise _all_at_once(mistakes, problem)
        sections = {}
        for name, (struct, leaves) in self._schema.items():
            found = [leaf for leaf in leaves.values() if leaf.path in self._values]
            sections[name] = struct(**{leaf.attribute: self._values[leaf.path] for leaf in found})
        return Settings(**sections, origins=self._origins)  # type: ignore[arg-type]  # each section under its name

    def read(self, text: str, file: str) -> None:
        """Take over what one file says. Raises ConfigError for one that is nothing like a configuration."""
        secrets = {leaf.key for leaf in self._leaves.values() if is_private(leaf.reader)}
        try:
            found = salvage(text, secrets)
        except RecursionError:
            raise ConfigError(f"{file}:1: not a configuration: nested too deeply") from None
        except ValueError:  # an integer of more digits than int() takes
            raise ConfigError(f"{file}:1: not a configuration: a number is too long") from None
        if (found.mistakes and _looks_like_yaml(file, text)) or (_is_yaml_name(file) and not found.document):
            raise _yaml_error(file)
        before = len(self._mistakes)
        for each in found.mistakes:
            hint = f" ({each.hint})" if each.hint else ""
            self._mistakes.append(Mistake(file, each.line, each.key, f"not TOML: {each.message}{hint}", each.column))
        self._read(_Document(file, found.document, found.lines))
        self._mistakes[before:] = sorted(self._mistakes[before:], key=lambda mistake: mistake.line)

    def _read(self, document: _Document) -> None:
        for name, value in document.content.items():
            if name not in self._schema:
                self._note(document, (name,), printable(name), self._unknown_section(name, value))
            elif not isinstance(value, dict):
                self._note(document, (name,), name, f"expected a table [{name}], got {type_name(value)}")
            else:
                self._read_section(document, name, value)

    def _read_section(self, document: _Document, name: str, table: Mapping[str, object]) -> None:
        _, leaves = self._schema[name]
        for key, value in table.items():
            if key in leaves:
                self._convert(leaves[key], value, document.file, document.line((name, key)))
            else:
                path = f"{name}.{printable(key)}"
                self._note(document, (name, key), path, f"unknown key{self._unknown_key(name, key)}")

    def _take(self, given: Given) -> None:
        leaf = self._leaves.get(given.key)
        if leaf is not None:
            self._convert(leaf, from_text(leaf.reader, given.text), given.origin, 0)
            return
        match = nearest(given.key, self._leaves)
        hint = f' (did you mean "{match}"?)' if match else ""
        self._mistakes.append(Mistake(given.origin, 0, "", f"there is no key {printable(given.key)}{hint}"))

    def _convert(self, leaf: Leaf, value: object, file: str, line: int) -> None:
        """Take over one value, or note what is wrong with it. Line 0: it stands in no file, `file` is its origin."""
        try:
            self._values[leaf.path] = leaf.reader.read(value)
        except Wrong as wrong:
            self._mistakes.append(Mistake(file, line, leaf.path if line else "", _said(leaf, value, wrong)))
        else:
            self._origins[leaf.path] = f"{file}:{line}" if line else file

    def _note(self, document: _Document, path: KeyPath, key: str, text: str) -> None:
        self._mistakes.append(Mistake(document.file, document.line(path), key, text))

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
        everywhere = {leaf.key: leaf for leaf in self._leaves.values()}
        match = nearest(key, everywhere)
        return f' (did you mean "{everywhere[match].path}"?)' if match else ""

    def _unknown_section(self, name: str, value: object) -> str:
        if isinstance(value, dict):
            near = meant(name, self._schema)
            return "unknown section" + (f" ({near})" if near else "")
        homes = [section for section, (_, leaves) in self._schema.items() if name in leaves]
        if name in _GO_KEYS:
            where = f" (it is {_GO_KEYS[name]} here)"
        elif homes:
            where = f" (it belongs under [{homes[0]}])"
        else:
            everywhere = {leaf.key: leaf for leaf in self._leaves.values()}
            match = nearest(name, everywhere)
            where = f' (did you mean "{everywhere[match].path}"?)' if match else ""
        return f"unknown key{where}"


# Variables with names of their own. The first two were the Go daemon's.
VARIABLES: Final = {
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


def _said(leaf: Leaf, value: object, wrong: Wrong) -> str:
    """A verdict in words; of a secret it says only what kind of value it is."""
    got = wrong.got or (type_name(value) if isinstance(leaf.reader, Hidden) else shown_toml(value))
    return f"expected {wrong.expected}, got {got}" + (f" ({wrong.hint})" if wrong.hint else "")


def _all_at_once(mistakes: Sequence[Mistake], problem: ConfigError | None) -> ConfigError:
    shown = [str(problem)] if problem is not None else []
    shown += [str(mistake) for mistake in mistakes[:MAX_MISTAKES_SHOWN]]
    if len(mistakes) > MAX_MISTAKES_SHOWN:
        shown.append(f"... and {len(mistakes) - MAX_MISTAKES_SHOWN} more")
    remedy = problem.remedy if problem is not None else ""
    return ConfigError("\n".join(shown), remedy=remedy, mistakes=mistakes)


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


def _warnings(main: str, found: Sequence[str], settings: Settings) -> Iterator[str]:
    """What is legal and still worth a line in the log."""
    for file in found:
        mode = os.stat(file).st_mode
        if mode & (stat.S_IWGRP | stat.S_IWOTH):
            yield f"{file} can be changed by other users: chmod go-w {file}"
        holds_key = settings.origins.get("api.key", "").startswith(f"{file}:") and settings.api.key
        if holds_key and mode & (stat.S_IRGRP | stat.S_IROTH):
            yield f"{file} holds the API key and can be read by other users: chmod 600 {file}"
    old = os.path.join(os.path.dirname(main), GO_CONFIG_NAME)
    if main not in found and os.path.exists(old):
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
