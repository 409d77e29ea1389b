"""A configuration file replaced as a whole, so that nobody ever sees half of it and nothing else about it changes.

Owner, mode and access lists stay; a symbolic link stays one, and what it leads to is replaced. Two programs that edit
at the same time do so one after the other, and an edit by somebody who knows of no lock is noticed before it is lost.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final

from ngrokd.errors import ConfigError, Exit, NgrokdError, PermissionMissingError, StateError
from ngrokd.files import (
    SYSTEM,
    Ops,
    close_quietly,
    copy_attributes,
    create_temp,
    ensure_private_directory,
    read_descriptor,
    sync_directory,
    write_all,
)

MAX_FILE_BYTES: Final = 1 << 20
NEW_FILE_MODE: Final = 0o644  # what is secret in it, an API key, is better elsewhere; and the directory is private
_TRIES: Final = 100


class ChangedMeanwhileError(NgrokdError):
    """Somebody else changed the file in the meantime; nothing was written."""

    exit_code = Exit.TEMPORARY


@dataclass(frozen=True, slots=True)
class Change:
    """What was done to a file: its text before and after; `created` where there was none."""

    before: str
    after: str
    created: bool = False


def rewrite(path: str, edit: Callable[[str], str], *, mode: int = NEW_FILE_MODE, ops: Ops = SYSTEM) -> Change:
    """Put `edit(text)` in the place of a file's text. A file that is missing has the text "" and is made.

    Args:
        path: the file, or a symbolic link to it.
        edit: makes the new text; what it raises is raised, and nothing has been written.
        mode: of a file that is made. One that exists keeps its own.
        ops: the system.

    Returns: what was done. A text that stays the same is not written.

    Raises:
        PermissionMissingError: this user may not.
        ChangedMeanwhileError: others replace the file again and again.
        ConfigError: what stands there is no text.
        StateError: it cannot be read or written for another reason.
    """
    real = os.path.realpath(path)
    with _explained(path):
        for _ in range(_TRIES):
            try:
                fd = ops.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
            except FileNotFoundError:
                change = _create(real, edit, mode, ops)
            else:
                try:
                    change = _replace(real, fd, edit, ops)
                finally:
                    close_quietly(fd, ops=ops)
            if change is not None:
                return change
    raise ChangedMeanwhileError(f"{path} is changed by others all the time", remedy="try again")


@contextmanager
def _explained(path: str) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        raise PermissionMissingError(
            f"cannot change {path}: {error.strerror}", remedy="do it with sudo, or as the owner of the file"
        ) from error
    except OSError as error:
        busy = error.errno == errno.EBUSY
        remedy = "it is a mount of its own, as in a container; change it where it is mounted from" if busy else ""
        raise StateError(f"cannot change {path}: {error.strerror or error}", remedy=remedy) from error


def _create(path: str, edit: Callable[[str], str], mode: int, ops: Ops) -> Change | None:
    text = edit("")
    if not text:
        return Change("", "")
    directory, name = os.path.split(path)
    if not os.path.isdir(directory):
        ensure_private_directory(directory, ops=ops)
    dir_fd = ops.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fd, temp = create_temp(dir_fd, name, mode, ops=ops)
        try:
            write_all(fd, text.encode(), ops=ops)
            ops.fsync(fd)
            ops.link(temp, name, dir_fd=dir_fd)
        except FileExistsError:
            return None
        finally:
            with suppress(OSError):
                ops.unlink(temp, dir_fd=dir_fd)
            close_quietly(fd, ops=ops)
        sync_directory(dir_fd, ops=ops)
    finally:
        close_quietly(dir_fd, ops=ops)
    return Change("", text, created=True)


def _replace(path: str, fd: int, edit: Callable[[str], str], ops: Ops) -> Change | None:
    """Returns: None when the file is another one by now."""
    with suppress(OSError):  # not every file system can; then only the comparison before renaming is left
        ops.flock(fd, fcntl.LOCK_EX)
    status = ops.fstat(fd)
    if not _is_still(path, status, ops):
        return None
    data = read_descriptor(fd, MAX_FILE_BYTES, what=path, ops=ops)
    try:
        before = data.decode()
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is no text in UTF-8") from None
    after = edit(before)
    if after == before:
        return Change(before, after)
    directory, name = os.path.split(path)
    dir_fd = ops.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        temp_fd, temp = create_temp(dir_fd, name, 0o600, ops=ops)
        try:
            write_all(temp_fd, after.encode(), ops=ops)
            copy_attributes(fd, status, temp_fd, ops=ops)
            ops.fsync(temp_fd)
            if not _is_still(path, status, ops):
                return None
            ops.rename(temp, name, dir_fd=dir_fd)
            temp = ""
        finally:
            if temp:
                with suppress(OSError):
                    ops.unlink(temp, dir_fd=dir_fd)
            close_quietly(temp_fd, ops=ops)
        sync_directory(dir_fd, ops=ops)
    finally:
        close_quietly(dir_fd, ops=ops)
    return Change(before, after)


def _is_still(path: str, status: os.stat_result, ops: Ops) -> bool:
    try:
        now = ops.stat(path)
    except FileNotFoundError:
        return False
    return _signature(now) == _signature(status)


def _signature(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


__all__ = ["Change", "ChangedMeanwhileError", "rewrite", "NEW_FILE_MODE"]
