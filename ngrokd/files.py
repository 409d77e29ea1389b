"""Careful file I/O: the one place where the daemon's files are written, read and trusted.

Whatever the daemon keeps on disk must survive a full disk, a kill between two system calls and a power cut, and must
not become somebody else's way in. Four rules carry that:

*   A file is replaced, never rewritten. The new content goes into a temporary file beside it (created with
    O_EXCL|O_NOFOLLOW under a random name, never wider than its final mode), is flushed to the disk, and is then
    renamed over the old one. A reader sees the old content or the new one, whatever fails and whenever. The directory
    is opened once and everything happens relative to its descriptor, so that swapping a folder on the way gains
    nothing.
*   A writer holds a flock on its temporary file. One that nobody holds was left by a killed run, and
    `remove_stale` takes it away without ever disturbing a living writer.
*   What is read is a regular file and bounded, judged by the descriptor that is read from, not by its name.
*   A directory is trusted when no stranger can replace an entry of it or of any directory on the way to it (the
    idea of OpenSSH's safe_path, with symbolic links followed step by step).

All calls go through `Ops`, a plain list of system calls. Tests put a double under it that fails the k-th call, one by
one, or forgets what was not flushed; no function here may call `os` behind its back.

Everything blocks; callers in Trio use a thread, or do it at start and shutdown only.
"""

# ruff: noqa: D102 - the methods of Ops are the system calls they are named after
from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from ngrokd.errors import StateError, TakenError

StrPath = str | os.PathLike[str]

RENAME_EXCHANGE: Final = 2  # linux/fs.h
_RENAME_SWAP: Final = 2  # macOS sys/stdio.h
_FALLOC_FL_KEEP_SIZE: Final = 1  # linux/falloc.h
_AT_FDCWD: Final = -2 if sys.platform == "darwin" else -100

_TEMP_NAME = re.compile(r"\.(?P<name>.+)\.ngrokd-[0-9a-f]{16}", re.DOTALL)
_READ_SIZE: Final = 1 << 20
_LINKS_MAX: Final = 40  # MAXSYMLINKS of Linux
# Signatures over the content: a copy of them would be wrong, and the kernel makes its own.
_NOT_COPIED: Final = frozenset({"security.ima", "security.evm"})


class Ops:
    """The system calls this package makes on files, one method each, so that a test can fail any of them."""

    def open(self, path: StrPath, flags: int, mode: int = 0o600, *, dir_fd: int | None = None) -> int:
        return os.open(path, flags | os.O_CLOEXEC, mode, dir_fd=dir_fd)

    def close(self, fd: int) -> None:
        os.close(fd)

    def read(self, fd: int, size: int) -> bytes:
        return os.read(fd, size)

    def pread(self, fd: int, size: int, offset: int) -> bytes:
        return os.pread(fd, size, offset)

    def write(self, fd: int, data: bytes | memoryview) -> int:
        return os.write(fd, data)

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        return os.pwrite(fd, data, offset)

    def ftruncate(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)

    def fallocate(self, fd: int, offset: int, size: int) -> None:
        """Reserve blocks without changing the file's size (fallocate with FALLOC_FL_KEEP_SIZE)."""
        if sys.platform != "linux":
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        call = libc.fallocate64 if hasattr(libc, "fallocate64") else libc.fallocate
        _checked(call(fd, _FALLOC_FL_KEEP_SIZE, ctypes.c_int64(offset), ctypes.c_int64(size)))

    def fsync(self, fd: int) -> None:
        if sys.platform == "darwin":
            # Apple's fsync stops at the drive's cache; F_FULLFSYNC does not. Network file systems lack it.
            with suppress(OSError):
                fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
                return
        os.fsync(fd)

    def fstat(self, fd: int) -> os.stat_result:
        return os.fstat(fd)

    def stat(self, path: StrPath, *, dir_fd: int | None = None, follow_symlinks: bool = True) -> os.stat_result:
        return os.stat(path, dir_fd=dir_fd, follow_symlinks=follow_symlinks)

    def readlink(self, path: StrPath) -> str:
        return os.readlink(path)

    def listdir(self, fd: int) -> list[str]:
        return os.listdir(fd)

    def mkdir(self, path: StrPath, mode: int) -> None:
        os.mkdir(path, mode)

    def fchmod(self, fd: int, mode: int) -> None:
        os.fchmod(fd, mode)

    def fchown(self, fd: int, uid: int, gid: int) -> None:
        os.fchown(fd, uid, gid)

    def listxattr(self, fd: int) -> Sequence[str]:
        return os.listxattr(fd) if sys.platform == "linux" else ()

    def getxattr(self, fd: int, name: str) -> bytes:
        return os.getxattr(fd, name) if sys.platform == "linux" else b""

    def setxattr(self, fd: int, name: str, value: bytes) -> None:
        if sys.platform == "linux":
            os.setxattr(fd, name, value)

    def rename(self, source: str, target: str, *, dir_fd: int) -> None:
        os.rename(source, target, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)

    def exchange(self, one: str, other: str, *, dir_fd: int) -> None:
        """Swap two names in one step (renameat2 with RENAME_EXCHANGE; renameatx_np on macOS). ENOSYS: no such call."""
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        name, flag = ("renameatx_np", _RENAME_SWAP) if sys.platform == "darwin" else ("renameat2", RENAME_EXCHANGE)
        if not hasattr(libc, name):
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        _checked(getattr(libc, name)(dir_fd, os.fsencode(one), dir_fd, os.fsencode(other), ctypes.c_uint(flag)))

    def link(self, source: str, target: str, *, dir_fd: int) -> None:
        os.link(source, target, src_dir_fd=dir_fd, dst_dir_fd=dir_fd, follow_symlinks=False)

    def unlink(self, path: StrPath, *, dir_fd: int | None = None) -> None:
        os.unlink(path, dir_fd=dir_fd)

    def flock(self, fd: int, operation: int) -> None:
        fcntl.flock(fd, operation)

    def fcntl(self, fd: int, command: int, argument: int) -> int:
        return fcntl.fcntl(fd, command, argument)

    def geteuid(self) -> int:
        return os.geteuid()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


SYSTEM: Final = Ops()


def _checked(result: int) -> None:
    if result != 0:
        import ctypes

        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


# --- writing ---


def atomic_write(path: StrPath, data: bytes, mode: int = 0o600, *, ops: Ops = SYSTEM) -> None:
    """Put `data` at `path` so that every reader, at every moment, sees the old content or the new one.

    The file is never wider than `mode`, not even for an instant, and has exactly `mode` in the end, whatever the
    umask. A symbolic link at `path` is replaced, not followed. On success content and name are on the disk.

    Raises:
        StateError: nothing, or only the last step (putting the name on the disk), failed to happen: the file holds the
            old content or, where only that step failed, the new. `__cause__` is the OSError.
    """
    directory, name = _split(path)
    try:
        dir_fd = ops.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fd, temp = create_temp(dir_fd, name, mode, ops=ops)
            try:
                try:
                    write_all(fd, data, ops=ops)
                    ops.fsync(fd)
                    ops.rename(temp, name, dir_fd=dir_fd)
                except BaseException:
                    with suppress(OSError):
                        ops.unlink(temp, dir_fd=dir_fd)
                    raise
            finally:
                close_quietly(fd, ops=ops)
            sync_directory(dir_fd, ops=ops)
        finally:
            close_quietly(dir_fd, ops=ops)
    except OSError as error:
        raise _state_error("write", path, error) from error


def remove(path: StrPath, *, ops: Ops = SYSTEM) -> bool:
    """Delete a file and put its absence on the disk.

    Returns: whether there was one.

    Raises:
        StateError: it could not be deleted.
    """
    directory, name = _split(path)
    try:
        dir_fd = ops.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise _state_error("delete", path, error) from error
    try:
        ops.unlink(name, dir_fd=dir_fd)
        sync_directory(dir_fd, ops=ops)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise _state_error("delete", path, error) from error
    finally:
        close_quietly(dir_fd, ops=ops)
    return True


def check_writable(directory: StrPath, *, ops: Ops = SYSTEM) -> None:
    """Prove that files can be made in `directory` now, by making one, flushing it and removing it.

    Mode bits do not tell: a read-only mount, a quota, a full disk or a missing capability shows only in the attempt.

    Raises:
        StateError: they cannot, and why.
    """
    try:
        dir_fd = ops.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fd, temp = create_temp(dir_fd, "probe", 0o600, ops=ops)
            try:
                write_all(fd, bytes(4096), ops=ops)  # one block: a full disk accepts an empty file
                ops.fsync(fd)
            finally:
                close_quietly(fd, ops=ops)
                ops.unlink(temp, dir_fd=dir_fd)
        finally:
            close_quietly(dir_fd, ops=ops)
    except OSError as error:
        raise _state_error("write into", directory, error) from error


def create_temp(dir_fd: int, name: str, mode: int, *, ops: Ops = SYSTEM) -> tuple[int, str]:
    """Create the temporary file that is to become `name` in the same directory, locked as in use.

    Returns: its descriptor (read and write) and its name; the caller renames or unlinks it. On failure nothing is left.
    """
    while True:
        # NAME_MAX is 255 bytes; a long name is cut, for people the beginning is enough.
        temp = f".{name[:50]}.ngrokd-{os.urandom(8).hex()}"
        try:
            fd = ops.open(temp, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode, dir_fd=dir_fd)
        except FileExistsError:
            continue
        break
    try:
        with suppress(OSError):  # not every file system can; then remove_stale is only less sure
            ops.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if stat.S_IMODE(ops.fstat(fd).st_mode) != mode:  # the umask took something away
            ops.fchmod(fd, mode)
    except BaseException:
        close_quietly(fd, ops=ops)
        with suppress(OSError):
            ops.unlink(temp, dir_fd=dir_fd)
        raise
    return fd, temp


def write_all(fd: int, data: bytes | memoryview, *, ops: Ops = SYSTEM) -> None:
    """Write everything; a full disk first takes a part and only then says ENOSPC."""
    view = memoryview(data)
    while view:
        written = ops.write(fd, view)
        if written <= 0:
            raise OSError(errno.EIO, "nothing was written")
        view = view[written:]


def copy_attributes(source: int, status: os.stat_result, fd: int, *, ops: Ops = SYSTEM) -> None:
    """Give an open file the owner, the extended attributes (ACLs too) and the mode of another one.

    Args:
        source: descriptor of the file to be like.
        status: what fstat said of it.
        fd: descriptor of the file that gets them.
        ops: the system.

    Raises:
        OSError: some cannot be given away, mostly the owner by somebody who is not root.
    """
    have = ops.fstat(fd)
    if (status.st_uid, status.st_gid) != (have.st_uid, have.st_gid):
        ops.fchown(fd, status.st_uid, status.st_gid)
    try:
        names = ops.listxattr(source)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS):
            raise
        names = ()
    for attribute in names:
        if attribute not in _NOT_COPIED:
            ops.setxattr(fd, attribute, ops.getxattr(source, attribute))
    ops.fchmod(fd, stat.S_IMODE(status.st_mode))  # after the owner, since chown takes bits away


def sync_directory(dir_fd: int, *, ops: Ops = SYSTEM) -> None:
    """Put a directory's entries on the disk, where its file system knows how (some FUSE and CIFS mounts do not)."""
    try:
        ops.fsync(dir_fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP):
            raise


def close_quietly(fd: int, *, ops: Ops = SYSTEM) -> None:
    """Close a descriptor whose content is already safe, or already given up."""
    with suppress(OSError):
        ops.close(fd)


def is_temp_name(entry: str, name: str) -> bool:
    """Say whether a directory entry is a temporary file of `create_temp` for `name`."""
    match = _TEMP_NAME.fullmatch(entry)
    return match is not None and match["name"] == name[:50]


def remove_stale(directory: StrPath, names: Sequence[str], *, ops: Ops = SYSTEM) -> list[str]:
    """Remove temporary files that killed runs left in `directory` while writing one of `names`.

    Files a living process still holds are left alone, and so is whatever cannot be removed: it is only litter.

    Returns: the entries removed.
    """
    removed: list[str] = []
    try:
        dir_fd = ops.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return removed
    try:
        entries = sorted(ops.listdir(dir_fd))
        ours = [entry for entry in entries if any(is_temp_name(entry, name) for name in (*names, "probe"))]
        removed.extend(entry for entry in ours if _take_stale(dir_fd, entry, ops))
    except OSError:
        pass  # as good as it gets: what is left is only litter
    finally:
        close_quietly(dir_fd, ops=ops)
    return removed


def _take_stale(dir_fd: int, entry: str, ops: Ops) -> bool:
    try:
        fd = ops.open(entry, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=dir_fd)
    except OSError:
        return False
    try:
        if not stat.S_ISREG(ops.fstat(fd).st_mode):
            return False
        ops.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        ops.unlink(entry, dir_fd=dir_fd)
    except OSError:
        return False
    finally:
        close_quietly(fd, ops=ops)
    return True


# --- reading ---


def read_limited(path: StrPath, limit: int, *, follow: bool = True, ops: Ops = SYSTEM) -> bytes:
    """Read a regular file of at most `limit` bytes.

    Args:
        path: the file; a FIFO or a device there neither blocks nor is read.
        limit: bytes; a longer file is an error, not a prefix.
        follow: whether `path` itself may be a symbolic link (directories on the way always may).

    Raises:
        FileNotFoundError: there is none.
        StateError: it is not a regular file, too long, or cannot be read.
    """
    return _read_file(path, limit, follow=follow, private=False, ops=ops)


def read_secret(path: StrPath, limit: int = 1 << 16, *, follow: bool = False, ops: Ops = SYSTEM) -> bytes:
    """Read a file that must be a secret: ours or root's, and closed to group and others.

    Whoever can write a key can make us use theirs, and whoever can read it can be us; a key found open is therefore
    refused rather than used. Mode and owner are those of the opened file, so there is nothing to swap in between.

    Raises:
        FileNotFoundError: there is none.
        StateError: it is open to others, not ours, not a regular file, too long, or cannot be read.
    """
    return _read_file(path, limit, follow=follow, private=True, ops=ops)


def _read_file(path: StrPath, limit: int, *, follow: bool, private: bool, ops: Ops) -> bytes:
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | (0 if follow else os.O_NOFOLLOW)
    try:
        fd = ops.open(path, flags)
        try:
            status = ops.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise StateError(f"{path} is not a regular file", remedy=f"remove it, or put a file at {path}")
            if private:
                _check_secret(path, status, ops)
            return read_descriptor(fd, limit, what=str(path), ops=ops)
        finally:
            close_quietly(fd, ops=ops)
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno == errno.ELOOP and not follow:
            raise StateError(
                f"{path} is a symbolic link, which is not followed here", remedy="put the file itself there"
            ) from error
        raise _state_error("read", path, error) from error


def read_descriptor(fd: int, limit: int, *, what: str, ops: Ops = SYSTEM) -> bytes:
    """Read an open file from its start to its end without moving its offset; StateError when longer than `limit`."""
    parts: list[bytes] = []
    offset = 0
    while True:
        part = ops.pread(fd, min(_READ_SIZE, limit - offset + 1), offset)
        if not part:
            return b"".join(parts)
        offset += len(part)
        if offset > limit:
            raise StateError(f"{what} is longer than {limit} bytes", remedy="check what wrote it")
        parts.append(part)


def _check_secret(path: StrPath, status: os.stat_result, ops: Ops) -> None:
    if status.st_uid not in (0, ops.geteuid()):
        raise StateError(
            f"{path} belongs to uid {status.st_uid}, who could replace it",
            remedy=f"check who wrote it, then: chown {ops.geteuid()} {path}",
        )
    if status.st_mode & 0o077:
        raise StateError(
            f"{path} is open to others (mode {stat.S_IMODE(status.st_mode):04o})",
            remedy=f"consider the secret known, replace it, and: chmod 600 {path}",
        )


# --- directories ---


def ensure_private_directory(path: StrPath, *, ops: Ops = SYSTEM) -> None:
    """Make sure `path` is a directory only we and root can change; made with mode 0700 where it is missing.

    An existing directory keeps its mode (the Go daemon's is 0755): readable is fine, its secrets are 0600.
    Missing parents are made with mode 0755.

    Raises:
        StateError: it cannot be made, is no directory, or a stranger can change it or one on the way to it.
    """
    wanted = os.path.abspath(os.fspath(path))
    missing: list[str] = []
    try:
        here = wanted
        while True:
            try:
                ops.stat(here)
                break
            except FileNotFoundError:
                missing.append(here)
                here = os.path.dirname(here)
        check_private_directory(here, leaf=not missing, ops=ops)
        for directory in reversed(missing):
            with suppress(FileExistsError):
                ops.mkdir(directory, 0o700 if directory == wanted else 0o755)
    except OSError as error:
        raise _state_error("make", path, error) from error
    if missing:
        check_private_directory(wanted, ops=ops)


def check_private_directory(path: StrPath, *, leaf: bool = True, ops: Ops = SYSTEM) -> None:
    """Check that no stranger can replace `path`, an entry of it, or a directory or link on the way to it.

    Trusted are root and our own effective uid. Every component must belong to one of them and be closed to writing by
    group and others. A directory on the way may be open to writing if it is sticky (/tmp): there, entries of ours and
    of root's are safe from others. The last one may not, since we make files in it (`leaf=False`: it may, since we only
    make a directory in it).

    Raises:
        StateError: names the component, what is wrong with it and the command that sets it right.
    """
    try:
        _walk(os.path.abspath(os.fspath(path)), leaf, ops)
    except OSError as error:
        raise _state_error("check", path, error) from error


def _walk(path: str, leaf: bool, ops: Ops) -> None:
    pending = [part for part in reversed(path.split("/")) if part]
    here = "/"
    _check_component(here, ops.stat(here), last=not pending and leaf, ops=ops)
    links = 0
    while pending:
        part = pending.pop()
        if part in ("", "."):
            continue
        if part == "..":
            here = os.path.dirname(here)  # `here` is free of links, so this is its parent, checked on the way
            continue
        entry = os.path.join(here, part)
        status = ops.stat(entry, follow_symlinks=False)
        if stat.S_ISLNK(status.st_mode):
            _check_owner(entry, status, ops)
            links += 1
            if links > _LINKS_MAX:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            target = ops.readlink(entry)
            if target.startswith("/"):
                here = "/"
            pending.extend(reversed(target.split("/")))
            continue
        if not stat.S_ISDIR(status.st_mode):
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        here = entry
        last = leaf and not any(rest not in ("", ".") for rest in pending)
        _check_component(here, status, last=last, ops=ops)


def _check_owner(path: str, status: os.stat_result, ops: Ops) -> None:
    if status.st_uid not in (0, ops.geteuid()):
        raise StateError(
            f"{path} belongs to uid {status.st_uid}, who could put other files in place of ours",
            remedy=f"chown root {path}, or use another directory",
        )


def _check_component(path: str, status: os.stat_result, *, last: bool, ops: Ops) -> None:
    _check_owner(path, status, ops)
    if not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return
    if last or not status.st_mode & stat.S_ISVTX:
        raise StateError(
            f"{path} can be written by others (mode {stat.S_IMODE(status.st_mode):04o}),"
            " who could put other files in place of ours",
            remedy=f"chmod go-w {path}, or use another directory",
        )


# --- the lock ---


@dataclass(frozen=True, slots=True)
class LockOwner:
    """Who holds a lock, as the holder wrote it: `pid` is 0 and `description` empty where it has not yet."""

    pid: int
    description: str

    def __str__(self) -> str:
        if not self.pid:
            return "another process"
        return f"process {self.pid}" + (f" ({self.description})" if self.description else "")


class Lock:
    """A lock file that names its holder: at most one process holds `path` at a time.

    The kernel's flock decides, so a killed holder holds nothing and there are no stale locks to guess about; pid and
    description are inside for people. Released, the file is gone.
    """

    def __init__(self, path: StrPath, description: str, *, ops: Ops = SYSTEM) -> None:
        self.path = os.fspath(path)
        self.description = description
        self._ops = ops
        self._fd = -1

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._fd >= 0

    def acquire(self) -> None:
        """Take the lock, or say who has it; never waits.

        Raises:
            TakenError: somebody holds it; named.
            StateError: the file cannot be made.
        """
        assert not self.held
        ops = self._ops
        try:
            while True:
                fd = ops.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
                try:
                    ops.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if not self._is_current(fd):
                        close_quietly(fd, ops=ops)  # its holder removed it while we opened it
                        continue
                    # fdatasync is not needed: after a power cut there is no holder either.
                    text = f"{os.getpid()} {self.description}\n".encode("utf-8", "replace")
                    with suppress(OSError):  # on a full disk it is held all the same, only namelessly
                        ops.ftruncate(fd, 0)
                        ops.pwrite(fd, text, 0)
                except BlockingIOError:
                    owner = _read_owner(fd, ops)
                    close_quietly(fd, ops=ops)
                    raise TakenError(
                        f"{self.path} is held by {owner}", remedy="stop it first, or give this one names of its own"
                    ) from None
                except BaseException:
                    close_quietly(fd, ops=ops)
                    raise
                self._fd = fd
                return
        except OSError as error:
            raise _state_error("lock", self.path, error) from error

    def release(self) -> None:
        """Remove the file and let go; nothing happens when it is not held."""
        if not self.held:
            return
        with suppress(OSError):
            if self._is_current(self._fd):
                self._ops.unlink(self.path)  # while still held: nobody else can hold this inode yet
        close_quietly(self._fd, ops=self._ops)
        self._fd = -1

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def _is_current(self, fd: int) -> bool:
        mine = self._ops.fstat(fd)
        try:
            there = self._ops.stat(self.path, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)


def lock_owner(path: StrPath, *, ops: Ops = SYSTEM) -> LockOwner | None:
    """Say who holds the lock at `path` now, without taking it; None when nobody does.

    Raises:
        StateError: the file cannot be read.
    """
    try:
        fd = ops.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _state_error("read", path, error) from error
    try:
        ops.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        return _read_owner(fd, ops)
    except OSError as error:
        raise _state_error("read", path, error) from error
    finally:
        close_quietly(fd, ops=ops)


def _read_owner(fd: int, ops: Ops) -> LockOwner:
    try:
        text = ops.pread(fd, 500, 0).decode("utf-8", "replace")
    except OSError:
        text = ""
    match = re.match(r"([0-9]{1,10}) ?([^\n]*)", text)
    if match is None:
        return LockOwner(0, "")
    description = "".join(letter if letter.isprintable() else "?" for letter in match[2])
    return LockOwner(int(match[1]), description[:200])


# --- words ---


def _split(path: StrPath) -> tuple[str, str]:
    directory, name = os.path.split(os.fspath(path))
    if name in ("", ".", ".."):
        raise StateError(f"{os.fspath(path)!r} is not the name of a file")
    return directory or ".", name


def _state_error(verb: str, path: StrPath, error: OSError) -> StateError:
    reason = error.strerror or str(error)
    return StateError(f"cannot {verb} {os.fspath(path)}: {reason}", remedy=_remedy(path, error))


def _remedy(path: StrPath, error: OSError) -> str:
    directory = os.path.dirname(os.path.abspath(os.fspath(path)))
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return f"free some space on the file system of {directory}"
        case errno.EROFS:
            return f"make the file system of {directory} writable, or configure another directory"
        case errno.EACCES | errno.EPERM:
            return f"run as a user who may use {directory}, or configure another directory"
        case errno.ENOENT | errno.ENOTDIR:
            return f"check that the directory {directory} exists"
        case errno.EMFILE | errno.ENFILE:
            return "raise the limit of open files (ulimit -n, LimitNOFILE=)"
        case _:
            return ""
