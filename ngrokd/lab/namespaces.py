"""A private corner of this machine: a network and a mount namespace for this process and all it starts.

Inside, there is a loopback interface and nothing else; /etc/hosts is a copy that may be written; names are resolved
from it alone. Outside, nothing has changed, and when the last process inside has gone, nothing remains.

Namespaces belong to threads: call `isolate` first thing, while there is one.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import socket
import struct
import sys
from pathlib import Path
from typing import Final

from ngrokd.errors import PermissionMissingError

# sched.h and mount.h of Linux
_CLONE_NEWNS: Final = 0x00020000
_CLONE_NEWNET: Final = 0x40000000
_MS_NOSUID: Final = 0x2
_MS_NODEV: Final = 0x4
_MS_BIND: Final = 0x1000
_MS_REC: Final = 0x4000
_MS_PRIVATE: Final = 1 << 18
_SIOCGIFFLAGS: Final = 0x8913
_SIOCSIFFLAGS: Final = 0x8914
_IFF_UP: Final = 0x1

_HOSTS: Final = Path("/etc/hosts")
_NSSWITCH: Final = Path("/etc/nsswitch.conf")
_NSCD: Final = Path("/run/nscd")


def isolate(directory: Path) -> None:
    """Move this process into namespaces of its own.

    Args:
        directory: where the copies of the hosts file and of nsswitch.conf are put; it must outlive the namespaces.

    Raises:
        PermissionMissingError: the kernel refuses; nothing has changed then.
        OSError: a step after that failed.
    """
    remedy = "run it as root: sudo ngrokd demo --isolated"
    if sys.platform != "linux":
        raise PermissionMissingError("private namespaces exist on Linux only", remedy="try: ngrokd demo")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET | _CLONE_NEWNS) != 0:
        code = ctypes.get_errno()
        if code in (errno.EPERM, errno.EACCES):
            raise PermissionMissingError(
                "cannot make private namespaces: CAP_SYS_ADMIN is missing (unshare: operation not permitted)",
                remedy=remedy,
            )
        raise PermissionMissingError(
            f"this kernel gives no private namespaces (unshare: {os.strerror(code)})", remedy="try: sudo ngrokd demo"
        )
    _mount(libc, "none", Path("/"), "", _MS_REC | _MS_PRIVATE)  # what is mounted from here on is seen by nobody else
    hosts = directory / "hosts"
    hosts.write_bytes(_HOSTS.read_bytes())
    hosts.chmod(0o644)
    _mount(libc, str(hosts), _HOSTS, "", _MS_BIND)
    _resolve_from_files(libc, directory)
    _loopback_up()


def _resolve_from_files(libc: ctypes.CDLL, directory: Path) -> None:
    """Let glibc ask nobody: systemd-resolved and nscd live outside and know the outside's hosts file."""
    if _NSSWITCH.exists():
        text = _NSSWITCH.read_text()
        own = directory / "nsswitch.conf"
        own.write_text(re.sub(r"(?m)^\s*hosts:.*\n?", "", text) + "\nhosts: files\n")
        own.chmod(0o644)
        _mount(libc, str(own), _NSSWITCH, "", _MS_BIND)
    if _NSCD.is_dir():
        _mount(libc, "tmpfs", _NSCD, "tmpfs", _MS_NOSUID | _MS_NODEV)


def _mount(libc: ctypes.CDLL, source: str, target: Path, kind: str, flags: int) -> None:
    arguments = (source.encode(), str(target.resolve()).encode(), kind.encode() or None, ctypes.c_ulong(flags), None)
    if libc.mount(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"cannot mount {source} on {target}: {os.strerror(code)}")


def _loopback_up() -> None:
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = bytearray(struct.pack("16sH22x", b"lo", 0))
        fcntl.ioctl(sock, _SIOCGIFFLAGS, request)
        (flags,) = struct.unpack_from("H", request, 16)
        struct.pack_into("H", request, 16, flags | _IFF_UP)
        fcntl.ioctl(sock, _SIOCSIFFLAGS, request)
