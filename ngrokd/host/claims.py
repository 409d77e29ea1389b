"""Which daemon an interface belongs to (docs/adr/0009): an abstract Unix socket that is named after it.

It lives in the network namespace, as the interface does, tells who holds it to everybody, and is gone with its holder.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from typing import Final

from ngrokd.errors import TakenError

_ASKING_S: Final = 1.0


def claim_interface(interface: str) -> socket.socket:
    """Hold the name of an interface for this process, as long as the socket is open. Raises TakenError."""
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        claim.bind(_name(interface))
        claim.listen(1)
    except OSError as error:
        claim.close()
        if error.errno != errno.EADDRINUSE:
            raise
        pid = interface_holder(interface)
        raise TakenError(
            f"interface {interface} belongs to another ngrokd" + (f", process {pid}" if pid else ""),
            remedy="stop it, or give this one an interface, subnet, state directory, socket and http port of its own",
        ) from None
    return claim


def interface_holder(interface: str) -> int | None:
    """The process that holds the name; 0 when it cannot be told which, None when nobody does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.settimeout(_ASKING_S)
            probe.connect(_name(interface))
            pid = int(struct.unpack("3i", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0])
        except ConnectionRefusedError:
            return None
        except OSError:
            return 0  # its queue is full
    return 0 if pid == os.getpid() else pid


def _name(interface: str) -> str:
    return f"\0ngrokd/{interface}"
