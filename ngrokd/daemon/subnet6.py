"""Which IPv6 subnet the names get: configured, or one of our own that is made once and kept.

Our own is a unique local one (RFC 4193): fd, 40 random bits, subnet 0. Random, so that two machines joined by a tunnel
later do not have the same; kept, because an address is for ever.
"""

from __future__ import annotations

import logging
import os
import secrets
from ipaddress import IPv4Network, IPv6Network

from ngrokd import files
from ngrokd.config import Settings
from ngrokd.errors import ConfigError, StateError
from ngrokd.host.planning import SUBNET6, read_subnet6
from ngrokd.names.twins import Twins

log = logging.getLogger("ngrokd.daemon")


def choose_twins(settings: Settings) -> Twins | None:
    """The IPv4 subnet and its IPv6 companion; None where IPv6 is off. Raises ConfigError when one is too small."""
    subnet, wanted = IPv4Network(settings.net.subnet), settings.net.subnet6
    if wanted == "off":
        return None
    network = _own(settings.state.directory) if wanted == "auto" else IPv6Network(wanted)
    try:
        return Twins(subnet, network)
    except ValueError as error:
        raise ConfigError(f"net.subnet6: {error}", remedy="choose a larger one, or leave it out") from None


def _own(directory: str) -> IPv6Network:
    path = os.path.join(directory, SUBNET6)
    try:
        return read_subnet6(path)
    except FileNotFoundError:
        pass
    except (StateError, ValueError) as error:
        log.warning("%s cannot be used (%s); it is made anew", path, error)
    network = IPv6Network((b"\xfd" + secrets.token_bytes(5) + bytes(10), 64))
    try:
        files.atomic_write(path, f"{network}\n".encode("ascii"), 0o644)
    except StateError as error:
        log.warning("the names' IPv6 addresses will be others after the next start: %s", error)
    return network
