"""A device that another process opened."""

from __future__ import annotations

import errno
import os

import pytest

from tun import DeviceError, adopt_device


def test_an_adopted_device_is_what_its_opener_said() -> None:
    """What it can do was settled when it was opened; only the descriptor travels."""
    read, write = os.pipe()
    os.close(write)

    device = adopt_device(read, "ngrokd0", offload=True, mtu=1500, platform="linux")

    assert (device.name, device.mtu, device.offload, device.prefix, device.fileno()) == (
        "ngrokd0",
        1500,
        True,
        10,
        read,
    )
    device.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(read)


def test_where_devices_have_one_queue_nothing_is_adopted() -> None:
    read, write = os.pipe()
    os.close(write)
    try:
        with pytest.raises(DeviceError) as caught:
            adopt_device(read, "utun7", offload=False, mtu=1500, platform="darwin")

        assert caught.value.errno == errno.ENOTSUP
        os.fstat(read)
    finally:
        os.close(read)
