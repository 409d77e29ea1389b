"""The border to the operating system: devices that packets come from and go to."""

from __future__ import annotations

import errno
import sys

from tun.device.base import Device, QueuedDevice
from tun.errors import DeviceError


def open_device(
    name: str, *, offload: bool = True, mtu: int = 1500, multi_queue: bool = True, platform: str = sys.platform
) -> Device:
    """Make and open this platform's point-to-point interface for IP packets. Nothing is configured.

    Args:
        name: the interface's name. On macOS "utunN" asks for that one, and any other for the next that is free: look at
            the result's `name`.
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
    if platform == "darwin":
        from tun.device.macos import open_utun  # which has neither offload nor queues

        return open_utun(name, mtu=mtu)
    raise DeviceError(
        f"there is no device for packets on {platform}; Linux and macOS have one",
        errno=errno.ENOTSUP,
        remedy="run on Linux or macOS (on Windows: inside WSL2)",
    )


def adopt_device(descriptor: int, name: str, *, offload: bool, mtu: int, platform: str = sys.platform) -> QueuedDevice:
    """Work on a device that another process has opened and configured, through a descriptor of its own.

    Args:
        descriptor: from `QueuedDevice.fileno` there, duplicated on its way here (SCM_RIGHTS, inheritance). It is
            the device's from now on.
        name: as the opener's device says, and so are `offload` and `mtu`.
        offload: see name.
        mtu: see name.
        platform: as `sys.platform`.

    Raises:
        DeviceError: ENOTSUP: not on this system; then the descriptor stays the caller's.
    """
    if platform == "linux":
        from tun.device.linux import adopt_tun

        return adopt_tun(descriptor, name, offload=offload, mtu=mtu)
    raise DeviceError(f"a device for packets has one queue on {platform}", errno=errno.ENOTSUP)


__all__ = ["Device", "QueuedDevice", "adopt_device", "open_device"]
