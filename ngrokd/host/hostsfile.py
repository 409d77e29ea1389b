"""Change the hosts file without ever losing a line that somebody else wrote.

/etc/hosts belongs to everybody: to the administrator's editor, to DHCP hooks, to Docker, to a second daemon of ours.
There is no lock they all honour. So every change is a read, a pure function from bytes to bytes, and a write that can
tell afterwards whether somebody was faster.

The rename way, wherever it works. The new content is completed and flushed under a temporary name with the mode,
owner and extended attributes (SELinux label) of the file, and then *exchanged* with it (renameat2 RENAME_EXCHANGE).
Readers see the old file or the new one, never a part. Afterwards the file we displaced is in our hands: when it is not
what we had read, a foreign edit slipped in between: we exchange back at once and begin again with it (against somebody
who writes all the time we stop giving back, and add what they wrote to ours instead). A program that had the displaced
file open for writing can still write to it: a lease on it (F_SETLEASE) is refused exactly as long as such a program
exists, so we wait for it and look again. What came late is appended to the file that stands there now, just as its
author did, or, where it is more than an append, merged into it by lines. Where the exchange is missing, a last look at
the file precedes a plain rename.

The in-place way, where a rename is refused: a file that is itself a mount point (Docker, Kubernetes; EBUSY), a
read-only directory with a writable file in it (systemd's ReadWritePaths=/etc/hosts; EROFS), EXDEV, EPERM, EACCES. Only
the part from the first difference on is written, in one call, after its blocks have been reserved; a shorter text is
padded with newlines before the file is cut, so that a failure between the two leaves blank lines and no debris; then
it is read again. Lines before our section are never touched, and no reader can see them torn. An edit in the very
instant of the write cannot be excluded here, only seen and answered by doing it again.

A symbolic link stays one: its target is edited. A file that already says what it should is not written.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar, Final

from ngrokd.errors import Exit, NgrokdError, StateError
from ngrokd.files import (
    SYSTEM,
    Ops,
    StrPath,
    close_quietly,
    copy_attributes,
    create_temp,
    read_descriptor,
    remove_stale,
    sync_directory,
    write_all,
)

LIMIT_BYTES: Final = 64 << 20  # 65,000 endpoints of ours are 3 MiB; the largest block lists are 20 MiB
ATTEMPTS: Final = 30  # edits by others that may come between, one after the other, before we give up for now
SETTLE_S: Final = 0.1  # how long late appends are waited for where the kernel cannot say whether one may come
WRITER_S: Final = 1.0  # how long a program that still has the old file open for writing is waited for
GIVE_BACKS: Final = 3  # after that we go forward: a program that writes every millisecond would keep us out for ever
# Also the least that is waited: a program that has found the file by name but not yet opened it is not counted by the
# kernel as a writer, and needs a moment on a processor to become one.
_POLL_S: Final = 0.01

# What a refused rename looks like; the file itself may still be writable. Measured on Linux: over a bind-mounted file
# EBUSY, in a directory of ProtectSystem=strict EROFS, without the right to write the directory EACCES, for another
# owner's file without CAP_CHOWN EPERM, in some overlays EXDEV.
_TRY_IN_PLACE: Final = frozenset({errno.EBUSY, errno.EROFS, errno.EXDEV, errno.EPERM, errno.EACCES})
_NO_EXCHANGE: Final = frozenset({errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP})
_NO_RESERVE: Final = frozenset({errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENODEV})
_READ_ONLY: Final = frozenset({errno.EROFS, errno.EACCES, errno.EPERM, errno.ETXTBSY})


class HostsFileError(NgrokdError):
    """The hosts file cannot be read or changed now; what stood in it still stands.

    Not fatal to the daemon: endpoints stay reachable by address, and it tries again.

    Attributes:
        errno: of the refused call, 0 where none was.
        read_only: it is a matter of rights or of a read-only mount, so trying again at once is no use.
    """

    exit_code: ClassVar[Exit] = Exit.CANNOT_CREATE

    def __init__(self, message: str, *, errno: int = 0, remedy: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.errno = errno
        self.read_only = errno in _READ_ONLY


def edit_hosts(path: StrPath, edit: Callable[[bytes], bytes], *, limit: int = LIMIT_BYTES, ops: Ops = SYSTEM) -> bool:
    """Apply `edit` to the hosts file.

    Blocks: usually for an fsync, up to a second while another program has the file open for writing. Temporary files
    that killed runs left beside it are removed on the way.

    Args:
        path: the file; missing, it counts as empty and is created with mode 0644 when `edit` returns something.
        edit: pure, and idempotent on its own output; called again for every foreign edit that came between. It must
            keep every byte that is not ours.
        limit: the size, in bytes, beyond which the file is left alone.

    Returns: whether anything was written.

    Raises:
        HostsFileError: the file is as it was before or as others have made it since; where only flushing the directory
            failed, the change is in it.
    """
    return _Editing(os.fspath(path), edit, limit, ops).run()


def read_hosts(path: StrPath, *, limit: int = LIMIT_BYTES, ops: Ops = SYSTEM) -> bytes:
    """Read the hosts file; empty when there is none.

    Raises:
        HostsFileError: it cannot be read, is no regular file, or longer than `limit` bytes.
    """
    editing = _Editing(os.fspath(path), bytes, limit, ops)
    with editing.translated("read"):
        dir_fd, name = editing.open_directory()
        try:
            snapshot = editing.read(dir_fd, name)
            if snapshot is None:
                return b""
            close_quietly(snapshot.fd, ops=ops)
            return snapshot.content
        finally:
            close_quietly(dir_fd, ops=ops)


def fingerprint(path: StrPath, *, ops: Ops = SYSTEM) -> tuple[int, ...]:
    """A cheap mark of the file's content: equal as long as nobody wrote or replaced it. Empty when it is missing.

    For the daemon, to notice that others edited the file without reading it every second.
    """
    try:
        return _signature(ops.stat(path))
    except OSError:
        return ()


def remove_stale_hosts(path: StrPath, *, ops: Ops = SYSTEM) -> list[str]:
    """Remove temporary files that killed runs left beside the hosts file; returns their names."""
    try:
        directory, name = os.path.split(_resolve(os.fspath(path), ops))
    except OSError:
        return []
    return remove_stale(directory or ".", [name], ops=ops)


def merge(base: bytes, theirs: bytes, current: bytes) -> bytes:
    """Apply the edit that made `base` into `theirs` to `current`, by lines.

    The edit is taken as one: from the first line that differs to the last. It goes where those lines are in `current`;
    where they are no longer there, the added lines go to the end: a line too many can be seen and deleted, a lost one
    cannot be.
    """
    if theirs in (base, current):
        return current
    if current == base:
        return theirs
    old, new, lines = (text.splitlines(keepends=True) for text in (base, theirs, current))
    before = _common(old, new)
    after = _common(old[before:][::-1], new[before:][::-1])
    removed, added = old[before : len(old) - after], new[before : len(new) - after]
    if removed:
        at = _find(lines, removed, near=before)
        if at >= 0:
            return b"".join(lines[:at] + added + lines[at + len(removed) :])
        kept = set(removed) | set(lines)
        added = [line for line in added if line not in kept]
        at = len(lines)
    elif lines[:before] == old[:before]:
        at = before
    elif after <= len(lines) and lines[len(lines) - after :] == old[len(old) - after :]:
        at = len(lines) - after
    else:
        at = len(lines)
    if added and at > 0 and not lines[at - 1].endswith(b"\n"):
        lines[at - 1] += b"\n"
    return b"".join(lines[:at] + added + lines[at:])


def _common(one: list[bytes], other: list[bytes]) -> int:
    count = 0
    for left, right in zip(one, other, strict=False):
        if left != right:
            break
        count += 1
    return count


def _find(lines: list[bytes], wanted: list[bytes], near: int) -> int:
    starts = [i for i, line in enumerate(lines) if line == wanted[0] and lines[i : i + len(wanted)] == wanted]
    return min(starts, key=lambda start: abs(start - near), default=-1)


def first_difference(one: bytes, other: bytes) -> int:
    """The offset of the first byte that differs, the shorter length where one begins the other."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # invariant: equal up to low, and the first difference is at most high
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


# --- one edit ---

_Identity = tuple[int, int]


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """What was read, from which inode; `fd` stays open, so that the inode can be asked later what became of it."""

    fd: int
    content: bytes
    status: os.stat_result


@dataclass(frozen=True, slots=True)
class _Outcome:
    """Whether our text stands, and which nameless file may still hold an edit by others of which content."""

    published: bool
    late: int
    base: bytes


@dataclass(frozen=True, slots=True)
class _Patch:
    """A foreign edit that is in no file with a name any more and must be done again."""

    base: bytes
    theirs: bytes


class _Translated:
    """Turns OSError and StateError of the calls within into the documented error."""

    def __init__(self, path: str, verb: str) -> None:
        self._path, self._verb = path, verb

    def __enter__(self) -> None:
        return None

    def __exit__(self, exc_type: object, exc: BaseException | None, traceback: object) -> None:
        if isinstance(exc, OSError):
            number = exc.errno or 0
            reason = exc.strerror or str(exc)
            raise HostsFileError(
                f"cannot {self._verb} {self._path}: {reason}", errno=number, remedy=_remedy(self._path, number)
            ) from exc
        if isinstance(exc, StateError):
            raise HostsFileError(f"cannot {self._verb} {self._path}: {exc}", remedy=exc.remedy) from exc


class _Editing:
    def __init__(self, path: str, edit: Callable[[bytes], bytes], limit: int, ops: Ops) -> None:
        self._path = path
        self._edit = edit
        self._limit = limit
        self._ops = ops
        self._patches: list[_Patch] = []
        self._in_place = False
        self._given_back = 0
        self._written = False

    def translated(self, verb: str) -> _Translated:
        return _Translated(self._path, verb)

    def run(self) -> bool:
        remove_stale_hosts(self._path, ops=self._ops)
        try:
            with self.translated("change"):
                for attempt in range(ATTEMPTS):
                    if attempt > 1:  # once is chance; more is somebody at work, who comes to an end sooner undisturbed
                        self._ops.sleep(min(_POLL_S, 0.001 * attempt))
                    dir_fd, name = self.open_directory()
                    try:
                        if self._attempt(dir_fd, name):
                            return self._written
                    finally:
                        close_quietly(dir_fd, ops=self._ops)
        finally:
            if self._patches:
                self._rescue()
        raise HostsFileError(
            f"{self._path} is being changed by another program again and again",
            remedy=f"find out which with: fuser -v {self._path}",
        )

    def open_directory(self) -> tuple[int, str]:
        directory, name = os.path.split(_resolve(self._path, self._ops))
        return self._ops.open(directory or ".", os.O_RDONLY | os.O_DIRECTORY), name

    def read(self, dir_fd: int, name: str) -> _Snapshot | None:
        try:
            fd = self._ops.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY, dir_fd=dir_fd)
        except FileNotFoundError:
            return None
        try:
            for _ in range(ATTEMPTS):
                status = self._ops.fstat(fd)
                if not stat.S_ISREG(status.st_mode):
                    raise StateError("it is not a regular file", remedy="set hosts.path to the hosts file")
                content = read_descriptor(fd, self._limit, what="it", ops=self._ops)
                if _signature(self._ops.fstat(fd)) == _signature(status) and len(content) == status.st_size:
                    break
                self._ops.sleep(_POLL_S)  # somebody is writing it right now
            return _Snapshot(fd, content, status)
        except BaseException:
            close_quietly(fd, ops=self._ops)
            raise

    def _attempt(self, dir_fd: int, name: str) -> bool:
        """Read, edit, write once. Returns: whether the file now says what it should and no foreign edit is owed."""
        snapshot = self.read(dir_fd, name)
        try:
            old = snapshot.content if snapshot else b""
            wanted = self._edit(self._merged(old))
            if wanted == old:
                return True
            if snapshot is None:
                return self._create(dir_fd, name, wanted)
            if not self._in_place:
                try:
                    return self._replace(dir_fd, name, snapshot, wanted)
                except OSError as error:
                    if error.errno not in _TRY_IN_PLACE:
                        raise
                self._in_place = True
            return self._rewrite(dir_fd, name, snapshot, wanted)
        finally:
            if snapshot is not None:
                close_quietly(snapshot.fd, ops=self._ops)

    def _rescue(self) -> None:
        """We are failing and still owe a foreign edit: write it where it belongs, as plainly as its author would."""
        ops = self._ops
        done = False
        for _ in range(ATTEMPTS):
            if done:
                return
            with suppress(OSError, StateError):
                dir_fd, name = self.open_directory()
                try:
                    snapshot = self.read(dir_fd, name)
                    if snapshot is None:
                        return  # deleted: so is what we owe
                    try:
                        done = self._rewrite(dir_fd, name, snapshot, self._merged(snapshot.content))
                    finally:
                        close_quietly(snapshot.fd, ops=ops)
                finally:
                    close_quietly(dir_fd, ops=ops)

    def _merged(self, text: bytes) -> bytes:
        for patch in self._patches:
            text = merge(patch.base, patch.theirs, text)
        return text

    # the rename way

    def _create(self, dir_fd: int, name: str, wanted: bytes) -> bool:
        ops = self._ops
        fd, temp = create_temp(dir_fd, name, 0o644, ops=ops)
        try:
            write_all(fd, wanted, ops=ops)
            ops.fsync(fd)
            try:
                ops.link(temp, name, dir_fd=dir_fd)  # unlike rename, refuses to replace what came up in between
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMLINK):
                    raise
                ops.rename(temp, name, dir_fd=dir_fd)  # a file system without hard links
        finally:
            with suppress(OSError):
                ops.unlink(temp, dir_fd=dir_fd)
            close_quietly(fd, ops=ops)
        self._written = True
        sync_directory(dir_fd, ops=ops)
        return True

    def _replace(self, dir_fd: int, name: str, snapshot: _Snapshot, wanted: bytes) -> bool:
        ops = self._ops
        fd, temp = create_temp(dir_fd, name, 0o600, ops=ops)
        ours = _identity(ops.fstat(fd))
        outcome = None
        try:
            try:
                write_all(fd, wanted, ops=ops)
                copy_attributes(snapshot.fd, snapshot.status, fd, ops=ops)
                ops.fsync(fd)
                with suppress(OSError):  # so that nobody takes the displaced file for litter before we have read it
                    ops.flock(snapshot.fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
                outcome = self._publish(dir_fd, name, temp, ours, snapshot, wanted)
            finally:
                # Whatever the temporary name now means, our text that was not needed or the displaced file that is
                # held open, it has no use as a name any more; and a kill from here on leaves nothing behind.
                with suppress(OSError):
                    ops.unlink(temp, dir_fd=dir_fd)
            if outcome is None:
                return False
            close_quietly(fd, ops=ops)  # or we would wait for ourselves to stop writing
            fd = -1
            settled = self._settle(dir_fd, name, outcome)
            if not outcome.published:
                return False
            sync_directory(dir_fd, ops=ops)
            try:
                there = ops.stat(name, dir_fd=dir_fd, follow_symlinks=False)
            except FileNotFoundError:
                return False
            return settled and _identity(there) == ours
        finally:
            if outcome is not None and outcome.late != snapshot.fd:
                close_quietly(outcome.late, ops=ops)
            if fd >= 0:
                close_quietly(fd, ops=ops)

    def _publish(
        self, dir_fd: int, name: str, temp: str, ours: _Identity, snapshot: _Snapshot, wanted: bytes
    ) -> _Outcome | None:
        """Put our text in place of what was read. Returns: None when something else stands there now."""
        ops = self._ops
        try:
            ops.exchange(temp, name, dir_fd=dir_fd)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno not in _NO_EXCHANGE:
                raise
            try:
                if _signature(ops.stat(name, dir_fd=dir_fd, follow_symlinks=False)) != _signature(snapshot.status):
                    return None
            except FileNotFoundError:
                return None
            ops.rename(temp, name, dir_fd=dir_fd)
        else:
            try:
                displaced = ops.stat(temp, dir_fd=dir_fd, follow_symlinks=False)
            except OSError:
                displaced = snapshot.status  # unknown; its content is compared all the same
            if _signature(displaced) != _signature(snapshot.status):
                return self._give_back(dir_fd, name, temp, ours, snapshot, wanted)
        self._published()
        return _Outcome(True, snapshot.fd, snapshot.content)

    def _give_back(
        self, dir_fd: int, name: str, temp: str, ours: _Identity, snapshot: _Snapshot, wanted: bytes
    ) -> _Outcome | None:
        """Somebody was faster, and we have displaced what they wrote: exchange again, theirs stands.

        In the moment between, ours may have been edited in turn; what was made of it is looked at next. It may also
        have been replaced, and the replacement displaced by the file given back: it is the newer one, and is given back
        in turn, until what comes out is what we had put in.
        """
        ops = self._ops
        published = self._given_back >= GIVE_BACKS
        if not published:
            self._given_back += 1
            inside = ours
            try:
                for _ in range(ATTEMPTS):
                    given = _identity(ops.stat(temp, dir_fd=dir_fd, follow_symlinks=False))
                    ops.exchange(temp, name, dir_fd=dir_fd)
                    taken = _identity(ops.stat(temp, dir_fd=dir_fd, follow_symlinks=False))
                    if taken == inside:
                        break
                    inside = given
                if taken != ours:
                    return None  # replaced by its own author, as if we had never been there
            except OSError:
                published = True
        if published:  # ours stands, and theirs is added to it
            self._published()
        try:
            late = ops.open(temp, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY, dir_fd=dir_fd)
        except OSError:
            return None  # what is there is no file, and so no edit of one
        return _Outcome(published, late, snapshot.content if published else wanted)

    def _published(self) -> None:
        self._written = True
        self._patches.clear()  # they are part of what was published

    def _settle(self, dir_fd: int, name: str, outcome: _Outcome) -> bool:
        """See what the nameless file holds when nobody can write to it any more. Returns: that it was nothing new."""
        ops = self._ops
        waited = 0.0
        while True:
            ops.sleep(_POLL_S)
            waited += _POLL_S
            verdict = _writers(outcome.late, ops)
            if verdict is False or waited >= (WRITER_S if verdict else SETTLE_S):
                break
        try:
            theirs = read_descriptor(outcome.late, self._limit, what="it", ops=ops)
        except OSError:
            return True  # the disk lost it; there is nothing to merge
        if theirs == outcome.base:
            return True
        if not self._append(dir_fd, name, outcome.base, theirs):
            self._patches.append(_Patch(outcome.base, theirs))
        return False

    def _append(self, dir_fd: int, name: str, base: bytes, theirs: bytes) -> bool:
        """Do a foreign append again. Returns: whether it was one, and has been done."""
        ops = self._ops
        if not theirs.startswith(base) or (base and not base.endswith(b"\n")):
            return False
        try:
            fd = ops.open(name, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY, dir_fd=dir_fd)
        except OSError:
            return False
        try:
            # In one call, which the kernel keeps apart from those of other appenders.
            return ops.write(fd, theirs[len(base) :]) == len(theirs) - len(base)
        except OSError:
            return False
        finally:
            close_quietly(fd, ops=ops)

    # the in-place way

    def _rewrite(self, dir_fd: int, name: str, snapshot: _Snapshot, wanted: bytes) -> bool:
        ops, old = self._ops, snapshot.content
        fd = ops.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY, dir_fd=dir_fd)
        try:
            if len(wanted) > len(old):
                try:
                    ops.fallocate(fd, len(old), len(wanted) - len(old))
                except OSError as error:
                    if error.errno not in _NO_RESERVE:
                        raise  # a full disk says so before anything is touched
            if _signature(ops.fstat(fd)) != _signature(snapshot.status):
                # Also the reservation itself moves ctime; then the content has to be looked at.
                now = read_descriptor(fd, self._limit, what="it", ops=ops)
                if now != old:
                    return False
            start = first_difference(old, wanted)
            try:
                self._overwrite(fd, start, wanted, len(old))
                ops.fsync(fd)
            except BaseException:
                with suppress(OSError):
                    self._overwrite(fd, start, old, ops.fstat(fd).st_size)
                    ops.fsync(fd)
                raise
            self._published()
            return read_descriptor(fd, self._limit, what="it", ops=ops) == wanted
        finally:
            close_quietly(fd, ops=ops)

    def _overwrite(self, fd: int, start: int, text: bytes, size: int) -> None:
        """Make a file of `size` bytes that begins with text[:start] hold `text`."""
        ops = self._ops
        tail = memoryview(text[start:] + b"\n" * (size - len(text)))
        offset = start
        while tail:
            written = ops.pwrite(fd, tail, offset)
            if written <= 0:
                raise OSError(errno.EIO, "nothing was written")
            tail = tail[written:]
            offset += written
        if size > len(text):
            ops.ftruncate(fd, len(text))


def _writers(fd: int, ops: Ops) -> bool | None:
    """Whether anybody has this file open for writing; None where the kernel cannot say.

    A read lease is granted exactly when nobody has (fcntl(2)). It is given back at once; should somebody break it in
    between, the signal for that is one that nobody minds.
    """
    if sys.platform != "linux":
        return None
    try:
        ops.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        ops.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        return True if error.errno == errno.EAGAIN else None
    with suppress(OSError):
        ops.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False


def _resolve(path: str, ops: Ops) -> str:
    """Follow the links of the last component; those of directories are followed by opening them."""
    for _ in range(40):  # MAXSYMLINKS of Linux
        try:
            if not stat.S_ISLNK(ops.stat(path, follow_symlinks=False).st_mode):
                return path
        except FileNotFoundError:
            return path
        path = os.path.join(os.path.dirname(path), ops.readlink(path))
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))


def _identity(status: os.stat_result) -> _Identity:
    return status.st_dev, status.st_ino


def _signature(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _remedy(path: str, number: int) -> str:
    if number in _READ_ONLY:
        return (
            f"make {path} writable (mount, chattr -i, ReadWritePaths=), or set hosts.enabled = false;"
            " endpoints stay reachable by address"
        )
    if number in (errno.ENOSPC, errno.EDQUOT):
        return f"free some space on the file system of {path}"
    if number in (errno.ENOENT, errno.ENOTDIR):
        return "set hosts.path to the hosts file"
    return ""
