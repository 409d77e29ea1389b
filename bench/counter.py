"""Instructions that this thread has executed in user mode, counted by the processor (Linux perf events)."""

from __future__ import annotations

import ctypes
import os
import platform
import struct

_PERF_EVENT_OPEN = {"x86_64": 298, "aarch64": 241}
_HARDWARE, _INSTRUCTIONS = 0, 1
_ATTRIBUTE_SIZE = 112
_EXCLUDE_KERNEL, _EXCLUDE_HYPERVISOR = 1 << 5, 1 << 6


class NoCounterError(Exception):
    """This machine does not let us count; the message says why."""


class InstructionCounter:
    """Counts from its creation on; `read` gives the number so far. Raises NoCounterError where it cannot."""

    def __init__(self) -> None:
        number = _PERF_EVENT_OPEN.get(platform.machine())
        if number is None or platform.system() != "Linux":
            raise NoCounterError(f"perf events are not known on {platform.system()} {platform.machine()}")
        attribute = bytearray(_ATTRIBUTE_SIZE)
        struct.pack_into("=IIQ", attribute, 0, _HARDWARE, _ATTRIBUTE_SIZE, _INSTRUCTIONS)
        struct.pack_into("=Q", attribute, 40, _EXCLUDE_KERNEL | _EXCLUDE_HYPERVISOR)
        libc = ctypes.CDLL(None, use_errno=True)
        pointer = (ctypes.c_char * _ATTRIBUTE_SIZE).from_buffer(attribute)
        self._descriptor = libc.syscall(number, pointer, 0, -1, -1, 0)  # this thread, on any processor
        if self._descriptor < 0:
            raise NoCounterError(f"perf events: {os.strerror(ctypes.get_errno())}")

    def read(self) -> int:
        count: int = struct.unpack("=Q", os.read(self._descriptor, 8))[0]
        return count

    def close(self) -> None:
        os.close(self._descriptor)
