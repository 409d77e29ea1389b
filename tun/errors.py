"""What can go wrong on the packet path, and who should care."""

from __future__ import annotations


class TunError(Exception):
    """The family: everything this package raises on its own account."""


class BadPacket(TunError):  # noqa: N818 - it names what was received, as the RFCs do
    """Bytes from outside are wrong. The only thing a cold decoder of network data may raise."""


class DeviceError(TunError):
    """The operating system refused a device, or took it away.

    Attributes:
        errno: the error number of the system call, 0 where none was made.
        remedy: what the person at the keyboard can do about it, one sentence, or "".
    """

    def __init__(self, message: str, *, errno: int = 0, remedy: str = "") -> None:
        super().__init__(message)
        self.errno = errno
        self.remedy = remedy
