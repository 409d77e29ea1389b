"""Who could put other code in place of ours, before root is made to run it at every boot.

A path is safe when it, every directory on the way to it and every link that is followed belong to root and are closed
to writing by others. A directory with the sticky bit may be open: root's entries are safe there. A tree is safe when
that holds for everything in it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator

from ngrokd.endpoints import printable

_LINKS_MAX = 40


def weak_spots(paths: Iterable[str], trees: Iterable[str] = (), *, most: int = 5) -> list[str]:
    """What others than root could change, each a sentence; empty when nothing.

    Args:
        paths: files that are run or read, with everything on the way to them.
        trees: directories in which everything counts.
        most: after so many, looking ends.
    """
    found: dict[str, None] = {}
    for weakness in _all(paths, trees):
        found[weakness] = None
        if len(found) >= most:
            break
    return list(found)


def _all(paths: Iterable[str], trees: Iterable[str]) -> Iterator[str]:
    whole = list(dict.fromkeys(map(os.path.realpath, trees)))
    for path in (*paths, *whole):
        yield from _way(os.path.abspath(path))
    for tree in whole:
        for directory, _, names in os.walk(tree):
            for path in (directory, *(os.path.join(directory, name) for name in names)):
                yield from _entry(path, sticky_helps=False)


def _way(path: str) -> Iterator[str]:
    """Everything on the way from / to the path, links followed."""
    pending = [part for part in reversed(path.split("/")) if part]
    here, links = "/", 0
    yield from _entry(here, sticky_helps=bool(pending))
    while pending:
        part = pending.pop()
        if part == "..":
            here = os.path.dirname(here)
            continue
        if part in ("", "."):
            continue
        entry = os.path.join(here, part)
        try:
            mode = os.lstat(entry).st_mode
        except OSError as error:
            yield f"{printable(entry)} cannot be looked at: {error.strerror}"
            return
        yield from _entry(entry, sticky_helps=bool(pending))
        if stat.S_ISLNK(mode):
            links += 1
            if links > _LINKS_MAX:
                yield f"{printable(path)} leads through too many links"
                return
            target = os.readlink(entry)
            here = "/" if target.startswith("/") else here
            pending.extend(reversed(target.split("/")))
        else:
            here = entry


def _entry(path: str, *, sticky_helps: bool) -> Iterator[str]:
    try:
        status = os.lstat(path)
    except OSError:
        return  # it went away meanwhile
    if status.st_uid != 0:
        yield f"{printable(path)} belongs to uid {status.st_uid}"
    if stat.S_ISLNK(status.st_mode) or (
        stat.S_ISDIR(status.st_mode) and sticky_helps and status.st_mode & stat.S_ISVTX
    ):
        return
    if status.st_mode & stat.S_IWOTH or (status.st_mode & stat.S_IWGRP and status.st_gid != 0):
        who = "everybody" if status.st_mode & stat.S_IWOTH else f"group {status.st_gid}"
        yield f"{printable(path)} can be changed by {who}"
