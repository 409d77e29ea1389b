"""The schema: every section and key, its default and its reader.

Attribute names carry the unit where there is one; `name=` is the key in the file where the two differ. Defaults live
here only; `conf/ngrokd.toml` explains each key and is tested against this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, Final, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Struct, field

from ngrokd.config.readers import (
    Address,
    Count,
    Duration,
    Fingerprints,
    Flag,
    Group,
    Hidden,
    Interface,
    Networks,
    Origin,
    Path,
    Reader,
    Size,
    Subnet,
    Subnet6,
    Texts,
    Word,
    Workers,
)
from ngrokd.endpoints import Secret

INGRESS_PORT: Final = 443
MOST_AUTO_WORKERS: Final = 8

# ngrok's private intermediate CA, under which the binding ingress presents itself: "CN=Intermediate CA, OU=prod,
# O=ngrok Inc", valid 2022-08-31 to 2032-08-28, SHA-256 of its DER form.
NGROK_CA_FINGERPRINT: Final = "cfce8a27b74e0c51c654739a353e51c135260b5b977d29df67038be7ef6ff847"


class ApiSettings(Struct, frozen=True, kw_only=True):
    """[api]: ngrok's API, and how often it is asked."""

    url: Annotated[str, Origin()] = "https://api.ngrok.com"
    key: Annotated[Secret, Hidden(live=True)] = Secret("")
    key_file: Annotated[str, Path(optional=True, live=True, private=True)] = ""
    ca_file: Annotated[str, Path(optional=True, live=True)] = ""
    poll_interval_s: Annotated[float, Duration(low=1.0, high=86400.0, live=True)] = field(
        name="poll_interval", default=30.0
    )
    timeout_s: Annotated[float, Duration(low=1.0, high=600.0, live=True)] = field(name="timeout", default=30.0)
    selectors: Annotated[tuple[str, ...], Texts(example='["true"]', live=True)] = ("true",)


class IngressSettings(Struct, frozen=True, kw_only=True):
    """[ingress]: ngrok's door for bound endpoints."""

    address: Annotated[str, Address(default_port=INGRESS_PORT, live=True)] = ""  # as HOST:PORT, or ""
    ca_file: Annotated[str, Path(optional=True, live=True)] = ""
    ca_fingerprints: Annotated[tuple[str, ...], Fingerprints(live=True)] = (NGROK_CA_FINGERPRINT,)
    connect_timeout_s: Annotated[float, Duration(low=0.1, high=120.0, live=True, only_new=True)] = field(
        name="connect_timeout", default=10.0
    )


class StateSettings(Struct, frozen=True, kw_only=True):
    """[state]: where identity and addresses are kept."""

    directory: Annotated[str, Path()] = "/etc/ngrokd"


class NetSettings(Struct, frozen=True, kw_only=True):
    """[net]: the interface that apps' connections arrive on."""

    mode: Annotated[str, Word(words=("auto", "tun"))] = "auto"
    interface: Annotated[str, Interface()] = "ngrokd0"
    subnet: Annotated[str, Subnet()] = "10.107.0.0/16"
    subnet6: Annotated[str, Subnet6()] = "auto"
    mtu: Annotated[int, Count(low=576, high=65535, zero="the best")] = 0
    offload: Annotated[bool, Flag()] = True
    allow_sources: Annotated[tuple[str, ...], Networks(live=True)] = ()
    workers: Annotated[int, Workers(high=64)] = 1  # 0: auto
    configure: Annotated[bool, Flag()] = True
    drain_s: Annotated[float, Duration(low=0.0, high=3600.0, live=True)] = field(name="drain", default=3.0)


class PoolSettings(Struct, frozen=True, kw_only=True):
    """[pool]: connections to the ingress that are ready before somebody needs them."""

    max: Annotated[int, Count(low=0, high=10_000, live=True)] = 128
    max_age_s: Annotated[float, Duration(low=1.0, high=86400.0, live=True)] = field(name="max_age", default=300.0)
    idle: Annotated[int, Count(low=0, high=10_000, live=True)] = 2
    spin_s: Annotated[float, Duration(low=0.0, high=0.01)] = field(name="spin", default=200e-6)


class LimitSettings(Struct, frozen=True, kw_only=True):
    """[limits]: what one machine's apps, or a stranger, may cost us."""

    flows: Annotated[int, Count(low=1, high=1_000_000, live=True, only_new=True)] = 24000
    half_open: Annotated[int, Count(low=1, high=1_000_000, live=True, only_new=True)] = 1024
    undecided: Annotated[int, Count(low=1, high=1_000_000, live=True, only_new=True)] = 1024
    dials: Annotated[int, Count(low=1, high=10_000, live=True, only_new=True)] = 64
    buffer_bytes: Annotated[int, Size(low=64 << 10, high=64 << 20, live=True)] = field(name="buffer", default=512 << 10)
    buffers_bytes: Annotated[int, Size(low=1 << 20, high=64 << 30, live=True)] = field(
        name="buffers", default=256 << 20
    )
    endpoints: Annotated[int, Count(low=1, high=16_777_213, live=True)] = 65533


class HostsSettings(Struct, frozen=True, kw_only=True):
    """[hosts]: the hosts file."""

    enabled: Annotated[bool, Flag(live=True)] = True
    path: Annotated[str, Path(live=True)] = "/etc/hosts"


class ControlSettings(Struct, frozen=True, kw_only=True):
    """[control]: the socket that `ngrokd status` and its like ask."""

    socket: Annotated[str, Path(socket=True)] = "/var/run/ngrokd.sock"
    group: Annotated[str, Group()] = ""


class HttpSettings(Struct, frozen=True, kw_only=True):
    """[http]: health checks over HTTP."""

    listen: Annotated[str, Address(default_port=None, local=True, live=True)] = "127.0.0.1:8081"  # as HOST:PORT, or ""


class LogSettings(Struct, frozen=True, kw_only=True):
    """[log]: what is said on stderr."""

    level: Annotated[str, Word(words=("debug", "info", "warning", "error"), live=True)] = "info"
    format: Annotated[str, Word(words=("auto", "text", "json"), live=True)] = "auto"


class Settings(Struct, frozen=True, kw_only=True):
    """The whole configuration, checked.

    Attributes:
        file: the absolute path of the main file, "" where there was none.
        files: all that were read, in their order: the main file, and those of conf.d.
        warnings: sentences worth a line in the log at start.
        origins: dotted key -> where its value came from ("FILE:LINE", "$VARIABLE" or "--option"); defaults are not
            listed.
    """

    api: ApiSettings = ApiSettings()
    ingress: IngressSettings = IngressSettings()
    state: StateSettings = StateSettings()
    net: NetSettings = NetSettings()
    pool: PoolSettings = PoolSettings()
    limits: LimitSettings = LimitSettings()
    hosts: HostsSettings = HostsSettings()
    control: ControlSettings = ControlSettings()
    http: HttpSettings = HttpSettings()
    log: LogSettings = LogSettings()

    file: str = ""
    files: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    origins: Mapping[str, str] = {}


class Effect(StrEnum):
    """When a running daemon heeds a new value of a key."""

    LIVE = "live"
    NEW_FLOWS = "new flows only"
    RESTART = "restart"


@dataclass(frozen=True, slots=True)
class Leaf:
    """One key of the schema."""

    section: str
    attribute: str
    key: str
    reader: Reader[Any]  # each field's own type

    @property
    def path(self) -> str:
        """The dotted key."""
        return f"{self.section}.{self.key}"

    @property
    def effect(self) -> Effect:
        """When a running daemon heeds a new value."""
        if not self.reader.live:
            return Effect.RESTART
        return Effect.NEW_FLOWS if self.reader.only_new else Effect.LIVE


def schema() -> dict[str, tuple[type[Struct], dict[str, Leaf]]]:
    """Section -> its struct, and its keys in the order of writing. Built when needed: it costs a few milliseconds."""
    sections: dict[str, tuple[type[Struct], dict[str, Leaf]]] = {}
    for section, hint in get_type_hints(Settings).items():
        if not (isinstance(hint, type) and issubclass(hint, Struct)):
            continue
        hints = get_type_hints(hint, include_extras=True)
        leaves = {}
        for spec in msgspec.structs.fields(hint):
            annotation = hints[spec.name]
            assert get_origin(annotation) is Annotated, spec.name
            leaves[spec.encode_name] = Leaf(section, spec.name, spec.encode_name, get_args(annotation)[1])
        sections[section] = (hint, leaves)
    return sections


def all_keys() -> list[str]:
    """Every key of the schema as "section.key", in the order of writing."""
    return [leaf.path for _, leaves in schema().values() for leaf in leaves.values()]
