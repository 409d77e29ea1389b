"""How a worker gives up what it could do to this machine, for good; and what the daemon needs to make it so.

In this order, because each step needs what the next one takes away:

    bounding set, ambient set   nothing executed from here ever gets a capability (without CAP_SETPCAP: see below)
    groups, gid, uid            another user; the kernel takes the capabilities away with uid 0 (capabilities(7))
    capset                      and whatever is left, where the daemon is not root but has some
    no_new_privs                executing a setuid file changes nothing (this is also what makes the first step a belt)
    undumpable                  no ptrace, no core, /proc/PID belongs to root (PR_SET_DUMPABLE). The way to its own
                                files in /proc/self/fd stays open: the kernel lets a process look at itself
    parent death signal         last, because a change of user clears it (commit_creds in kernel/cred.c)

A daemon that is not root cannot change users, and its workers keep its own; they lose everything else.

The death signal is a belt as well: it counts for the thread that started the worker, and is not sent by a root without
CAP_KILL. What ends a worker is that its socket ends.
"""

from __future__ import annotations

import ctypes
import errno
import os
import pwd
import signal
import sys
from dataclasses import dataclass
from typing import Final

from ngrokd.errors import ConfigError, Exit, NgrokdError

USER: Final = "ngrokd"
NOBODY: Final = 65534  # where there is no such user; the kernel's own overflow uid

# include/uapi/linux/prctl.h
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
_PR_CAPBSET_DROP: Final = 24
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_GET_NO_NEW_PRIVS: Final = 39
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4
# include/uapi/linux/capability.h
_CAPABILITY_VERSION_3: Final = 0x20080522
_CAPABILITIES: Final = {5: "CAP_KILL", 6: "CAP_SETGID", 7: "CAP_SETUID"}
_MOST_CAPABILITIES: Final = 64


class RightsError(NgrokdError):
    """A worker cannot be made harmless here, so it does not run."""

    exit_code = Exit.NOT_PERMITTED


@dataclass(frozen=True, slots=True)
class Identity:
    """Whom a worker becomes."""

    uid: int
    gid: int


def worker_identity() -> Identity | None:
    """Whom workers of this process become; None: they stay who they are, because this process is not root."""
    if os.geteuid() != 0:
        return None
    try:
        entry = pwd.getpwnam(USER)
    except KeyError:
        return Identity(NOBODY, NOBODY)
    return Identity(entry.pw_uid, entry.pw_gid)


def check_can_drop(platform: str = sys.platform) -> None:
    """Raise RightsError, naming what is missing, where a root process cannot make workers harmless, or end them.

    Raises ConfigError where there are no workers at all.
    """
    if platform != "linux":
        raise ConfigError("net.workers above 1 needs Linux", remedy="leave it out, or set it to 1")
    if os.geteuid() != 0:
        return
    effective = _effective_capabilities()
    missing = [name for number, name in _CAPABILITIES.items() if not effective >> number & 1]
    if missing:
        raise RightsError(
            f"net.workers above 1 needs {', '.join(missing)}, to start workers as another user and to end them",
            remedy="add them to the service's CapabilityBoundingSet (containers: --cap-add), or set net.workers = 1",
        )


def drop_rights(identity: Identity | None) -> None:
    """Give everything up, and look whether it worked. Raises RightsError."""
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        for number in range(_MOST_CAPABILITIES):
            if libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0):
                break  # EINVAL: that was the last one there is; EPERM: no CAP_SETPCAP, and no_new_privs must do
        libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
        if identity is not None:
            os.setgroups([])
            os.setresgid(identity.gid, identity.gid, identity.gid)
            os.setresuid(identity.uid, identity.uid, identity.uid)
        _set_no_capabilities(libc)
        _prctl(libc, _PR_SET_NO_NEW_PRIVS, 1)
        _prctl(libc, _PR_SET_DUMPABLE, 0)
        _prctl(libc, _PR_SET_PDEATHSIG, signal.SIGKILL)
    except OSError as error:
        raise RightsError(f"a worker cannot give up its rights: {error}", remedy=_REMEDY) from error
    _check(libc, identity)


_REMEDY: Final = "set net.workers = 1, or run ngrokd where processes may become another user"


def _check(libc: ctypes.CDLL, identity: Identity | None) -> None:
    """What could not be given up without an error must not be left either."""
    left = []
    if identity is not None:
        if os.getresuid() != (identity.uid,) * 3 or os.getresgid() != (identity.gid,) * 3 or os.getgroups():
            left.append("its user")
        try:
            os.setuid(0)
            left.append("the way back to root")
        except PermissionError:
            pass
    if _effective_capabilities(permitted=True):
        left.append("capabilities")
    if libc.prctl(_PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) != 1:
        left.append("new rights by executing files")
    if left:
        raise RightsError(f"a worker still has {', '.join(left)}", remedy=_REMEDY)


def _prctl(libc: ctypes.CDLL, option: int, value: int) -> None:
    if libc.prctl(option, value, 0, 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Set(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


def _set_no_capabilities(libc: ctypes.CDLL) -> None:
    if libc.capset(ctypes.byref(_Header(_CAPABILITY_VERSION_3, 0)), (_Set * 2)()):
        number = ctypes.get_errno()
        raise OSError(number, f"capset: {os.strerror(number)}")


def _effective_capabilities(*, permitted: bool = False) -> int:
    """The effective set of this process as a number, or everything that could become effective."""
    libc = ctypes.CDLL(None, use_errno=True)
    sets = (_Set * 2)()
    if libc.capget(ctypes.byref(_Header(_CAPABILITY_VERSION_3, 0)), sets):
        raise OSError(errno.EPERM, "capget failed")
    low, high = sets
    if permitted:
        return int((low.effective | low.permitted) | (high.effective | high.permitted) << 32)
    return int(low.effective | high.effective << 32)
