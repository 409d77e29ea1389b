"""The Go ngrokd's config.yml, converted: what has a meaning here is set in the commented file, the rest is named.

That daemon takes any key and ignores what it does not know, and some that it documents besides. So nothing of a file of
its can be an error here: what does not fit is left out, with the reason.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from ngrokd import files
from ngrokd.config.loading import MAX_FILE_BYTES
from ngrokd.config.manual import as_toml, commented_file
from ngrokd.config.readers import Hidden, Wrong
from ngrokd.config.schema import Leaf, Settings, schema
from ngrokd.config.showing import value_of
from ngrokd.config_edit.text import set_value
from ngrokd.endpoints import printable
from ngrokd.errors import ConfigError, NgrokdError, StateError

KEY_FILE_MODE: Final = 0o600
MAX_LEFT_OUT: Final = 200


@dataclass(frozen=True, slots=True)
class _Not:
    """A value has no meaning here, and why."""

    reason: str


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A key of the Go daemon's that was not taken over, and why."""

    key: str
    reason: str


@dataclass(slots=True)
class Imported:
    """What came of a config.yml.

    Attributes:
        text: the configuration, as TOML.
        settings: dotted key -> value as it is shown, so without secrets.
        left_out: what was not taken over. What equals our default is not listed.
        notes: what a person should know besides.
        holds_key: the text holds an API key, and should be a private file.
    """

    text: str = ""
    settings: dict[str, object] = field(default_factory=dict)
    left_out: list[LeftOut] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    holds_key: bool = False

    @property
    def lines(self) -> list[tuple[str, str]]:
        """Key and value as TOML, for people."""
        return [(key, as_toml(value)) for key, value in self.settings.items()]


def import_file(path: str, *, with_key: bool = True) -> Imported:
    """Convert a config.yml. Raises ConfigError for what is no YAML, NgrokdError where the YAML library is missing."""
    try:
        text = files.read_limited(path, MAX_FILE_BYTES).decode()
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not YAML: not UTF-8 text") from None
    except StateError as error:
        raise ConfigError(str(error), remedy=error.remedy) from None
    return convert(read_yaml(text, path), with_key=with_key)


def read_yaml(text: str, path: str) -> Mapping[str, Any]:
    """The document of a YAML text, read by the library's safe loader. Raises as `import_file`."""
    try:
        import yaml
    except ImportError:
        raise NgrokdError(
            "reading YAML needs the package PyYAML, which is not installed",
            remedy="install it beside ngrokd, which has it as an extra: ngrokd[import]",
        ) from None
    try:
        document = yaml.load(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        place = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{place}: not YAML: {printable(error.problem or 'it ends too early')}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not YAML: {printable(str(error) or type(error).__name__)}") from None
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: not a configuration of the Go ngrokd: it is no mapping of keys to values")
    return document


def convert(document: Mapping[str, Any], *, with_key: bool = True) -> Imported:
    """Convert what a config.yml says.

    Args:
        document: as YAML gives it.
        with_key: whether the text may hold the API key.
    """
    return _Import(document, with_key=with_key).done()


class _Import:
    """One document on its way."""

    def __init__(self, document: Mapping[str, Any], *, with_key: bool) -> None:
        self._document = document
        self._with_key = with_key
        self._leaves = {leaf.path: leaf for _, leaves in schema().values() for leaf in leaves.values()}
        self._result = Imported(text=commented_file())

    def done(self) -> Imported:
        result = self._result
        for key, value in _flat(self._document):
            if value is None or len(result.left_out) >= MAX_LEFT_OUT:
                continue
            rule = _RULES.get(key)
            if rule is None:
                self._leave_out(
                    key, _WITHOUT.get(key) or _WITHOUT.get(key.partition(".")[0]) or "no key of the Go ngrokd's"
                )
                continue
            target, read = rule
            found = read(value, self._document)
            if isinstance(found, _Not):
                if found.reason:
                    self._leave_out(key, found.reason)
            elif target not in self._leaves:
                self._leave_out(key, "this version has nothing like it")
            else:
                self._take(key, self._leaves[target], found)
        if "api.selectors" in result.settings:
            result.notes.append(
                "the Go ngrokd did not send the selectors to ngrok, and was given all endpoints; "
                "now they count: see api.selectors"
            )
        return result

    def _take(self, key: str, leaf: Leaf, value: object) -> None:
        try:
            read = leaf.reader.read(value)
        except Wrong as wrong:
            self._leave_out(key, f"{leaf.path} takes {wrong.expected}")
            return
        if read == value_of(Settings(), leaf):
            return
        hidden = isinstance(leaf.reader, Hidden)
        if hidden and not self._with_key:
            self._leave_out(key, "a secret is not printed; give it with: sudo ngrokd set-api-key")
            return
        result = self._result
        result.holds_key |= hidden
        result.text = set_value(result.text, (leaf.section, leaf.key), value)
        result.settings[leaf.path] = leaf.reader.show(read)

    def _leave_out(self, key: str, reason: str) -> None:
        self._result.left_out.append(LeftOut(printable(key), reason))


def _flat(document: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """Dotted keys and values, two levels deep, as the Go daemon's file is."""
    for name, value in document.items():
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                yield f"{name}.{key}", inner
        else:
            yield str(name), value


Rule: TypeAlias = tuple[str, Callable[[Any, Mapping[str, Any]], object]]


def _same(value: object, _document: Mapping[str, Any]) -> object:
    return value


def _seconds(value: object, _document: Mapping[str, Any]) -> object:
    return f"{value}s" if isinstance(value, int) else value


def _level(value: object, _document: Mapping[str, Any]) -> object:
    word = str(value).lower()
    return {"warn": "warning", "trace": "debug", "fatal": "error", "panic": "error"}.get(word, word)


def _state(value: object, document: Mapping[str, Any]) -> object:
    server = document.get("server")
    key = server.get("client_key") if isinstance(server, dict) else None
    if not isinstance(value, str):
        return _Not("no path")
    folder, name = os.path.split(value)
    if name != "tls.crt":
        return _Not(f"the certificate is always tls.crt in state.directory; move it there: {folder}/tls.crt")
    if isinstance(key, str) and key != os.path.join(folder, "tls.key"):
        return _Not("certificate and key are always tls.crt and tls.key in one directory, state.directory")
    return folder


def _state_key(value: object, document: Mapping[str, Any]) -> object:
    server = document.get("server")
    if isinstance(server, dict) and server.get("client_cert"):
        return _Not("")  # what is to be said is said of the certificate
    if not isinstance(value, str) or os.path.basename(value) != "tls.key":
        return _Not("the key is always tls.key in state.directory")
    return os.path.dirname(value)


def _listen(_value: object, document: Mapping[str, Any]) -> object:
    server = document["server"]
    host = str(server.get("health_address") or "127.0.0.1")
    return (
        f"[{host}]:{server.get('health_port') or 8081}"
        if ":" in host
        else f"{host}:{server.get('health_port') or 8081}"
    )


def _listen_port(value: object, document: Mapping[str, Any]) -> object:
    return _Not("") if document["server"].get("health_address") else _listen(value, document)


def _network(value: object, _document: Mapping[str, Any]) -> object:
    from ipaddress import ip_network

    try:
        return str(ip_network(str(value), strict=False))
    except ValueError:
        return value


def _interface(value: object, _document: Mapping[str, Any]) -> object:
    return _Not("") if value in ("virtual", "") else value


# The Go daemon's key -> ours, and how its value becomes one of ours. The order of a file is kept.
_RULES: Final[Mapping[str, Rule]] = {
    "api.url": ("api.url", _same),
    "api.key": ("api.key", _same),
    "ingressEndpoint": ("ingress.address", _same),
    "server.log_level": ("log.level", _level),
    "server.socket_path": ("control.socket", _same),
    "server.client_cert": ("state.directory", _state),
    "server.client_key": ("state.directory", _state_key),
    "server.health_address": ("http.listen", _listen),
    "server.health_port": ("http.listen", _listen_port),
    "bound_endpoints.poll_interval": ("api.poll_interval", _seconds),
    "bound_endpoints.selectors": ("api.selectors", _same),
    "net.interface_name": ("net.interface", _same),
    "net.subnet": ("net.subnet", _network),
    "net.listen_interface": ("net.listen_interface", _interface),
    "net.start_port": ("net.start_port", _same),
    "net.overrides": ("net.overrides", _same),
}
_WITHOUT: Final = {
    "server.cert_refresh_interval": "the certificate's own dates decide when it is renewed",
    "dns": "names stand in the hosts file",
}
