"""A TCP/IP host in a box: give it a device, it gives you connection requests and streams.

    device = open_device("ngrokd0")
    stack = Stack(StackSettings(...), secret)
    network = Network(device, stack, on_request)
    await network.run()

What is not named here is private to the package.
"""

from __future__ import annotations

from tun.core.stack import Stack, StackSettings
from tun.device import adopt_device, open_device
from tun.device.base import Device, QueuedDevice
from tun.errors import BadPacket, DeviceError, TunError
from tun.network import FlowRequest, FlowStream, Network
from tun.pcap import Capture, CaptureFilter, CaptureLimits, RecordingDevice

__all__ = [
    "Network",
    "FlowRequest",
    "FlowStream",
    "Stack",
    "StackSettings",
    "Device",
    "QueuedDevice",
    "open_device",
    "adopt_device",
    "RecordingDevice",
    "Capture",
    "CaptureFilter",
    "CaptureLimits",
    "TunError",
    "DeviceError",
    "BadPacket",
]
