"""The border to the operating system: devices that packets come from and go to."""

from __future__ import annotations

import errno
import sys

from tun.device.base import Device
from tun.errors import DeviceError


def open_device(
    name: str, *, offload: bool = True, mtu: int = 1500, multi_queue: bool = True, platform: str = sys.platform
) -> Device:
    """Make and open this platform's point-to-point interface for IP packets. Nothing is configured.

    Args:
        name: the interface's name.
        offload: let the kernel do checksums and segmentation where it can.
        mtu: what the link's MTU will be; only remembered.
        multi_queue: allow more queues later, where the platform has them.
        platform: as `sys.platform`.

    Raises:
        DeviceError: the device was refused; `errno` and `remedy` say why and what to do. ENOTSUP: not on this system.
    """
    if platform == "linux":
        from tun.device.linux import open_tun  # elsewhere the module's constants mean nothing

        return open_tun(name, offload=offload, mtu=mtu, multi_queue=multi_queue)
    raise DeviceError(
        f"there is no device for packets on {platform}; Linux has one",
        errno=errno.ENOTSUP,
        remedy="run on Linux (on Windows: inside WSL2)",
    )


__all__ = ["Device", "open_device"]
