"""Files are old or new and never between, secrets stay secret, and a lock names its holder."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ngrokd.errors import StateError, TakenError
from ngrokd.files import (
    Lock,
    LockOwner,
    Ops,
    atomic_write,
    check_private_directory,
    check_writable,
    ensure_private_directory,
    lock_owner,
    read_limited,
    read_secret,
    remove,
    remove_stale,
)
from tests.ngrokd.faults import every_fault

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="changes owners")


# --- atomic_write ---


def test_a_written_file_has_exactly_the_mode_asked_for(tmp_path: Path) -> None:
    """The umask may neither widen a secret nor narrow what others must read."""
    old = os.umask(0o077)
    try:
        atomic_write(tmp_path / "open", b"x", 0o644)
        atomic_write(tmp_path / "secret", b"y")
    finally:
        os.umask(old)

    assert (tmp_path / "open").stat().st_mode & 0o7777 == 0o644
    assert (tmp_path / "secret").stat().st_mode & 0o7777 == 0o600
    assert sorted(os.listdir(tmp_path)) == ["open", "secret"]


def test_a_file_is_never_wider_than_its_mode(tmp_path: Path) -> None:
    """Between two system calls a stranger has all the time in the world."""
    seen: list[int] = []

    class Watching(Ops):
        def write(self, fd: int, data: bytes | memoryview) -> int:
            seen.append(os.fstat(fd).st_mode & 0o777)
            return super().write(fd, data)

        def open(
            self, path: str | os.PathLike[str], flags: int, mode: int = 0o600, *, dir_fd: int | None = None
        ) -> int:
            fd = super().open(path, flags, mode, dir_fd=dir_fd)
            if flags & os.O_CREAT:
                seen.append(os.fstat(fd).st_mode & 0o777)
            return fd

    old = os.umask(0)
    try:
        atomic_write(tmp_path / "key", b"secret", 0o600, ops=Watching())
    finally:
        os.umask(old)

    assert seen == [0o600, 0o600]


def test_short_writes_are_continued(tmp_path: Path) -> None:
    """A nearly full disk takes a part of the data before it says no."""

    class Stingy(Ops):
        def write(self, fd: int, data: bytes | memoryview) -> int:
            return super().write(fd, memoryview(data)[:3])

    atomic_write(tmp_path / "file", b"0123456789", ops=Stingy())

    assert (tmp_path / "file").read_bytes() == b"0123456789"


def test_every_failing_system_call_leaves_the_old_content_or_the_new(tmp_path: Path) -> None:
    """The promise of the module, one system call after the other: seven errors, once or for good, or a power cut."""
    path = tmp_path / "state"
    outcomes: set[str] = set()

    def reset() -> None:
        for entry in os.listdir(tmp_path):
            (tmp_path / entry).unlink()
        path.write_bytes(b"old")

    def check(outcome: str) -> None:
        outcomes.add(outcome)
        content = path.read_bytes()
        assert content == b"new" if outcome == "done" else content in (b"old", b"new")
        # A temporary file stays only where even unlink failed, and the next start finds it.
        remove_stale(tmp_path, ["state"])
        assert os.listdir(tmp_path) == ["state"]

    cases = every_fault(lambda ops: atomic_write(path, b"new", ops=ops), reset=reset, check=check)

    assert cases >= 100
    assert outcomes == {"done", "failed", "crashed"}


def test_a_first_file_is_there_entirely_or_not_at_all(tmp_path: Path) -> None:
    """There is no old content to fall back to, so there must be no file."""
    path = tmp_path / "state"

    def check(outcome: str) -> None:
        assert not path.exists() or path.read_bytes() == b"new"

    every_fault(
        lambda ops: atomic_write(path, b"new", ops=ops), reset=lambda: path.unlink(missing_ok=True), check=check
    )


def test_a_write_that_fails_for_a_moment_leaves_nothing_behind(tmp_path: Path) -> None:
    """The temporary file goes at once when its disk is full."""

    class Full(Ops):
        def write(self, fd: int, data: bytes | memoryview) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StateError, match="No space left") as caught:
        atomic_write(tmp_path / "file", b"x", ops=Full())

    assert os.listdir(tmp_path) == []
    assert str(tmp_path) in caught.value.remedy
    assert isinstance(caught.value.__cause__, OSError)


def test_a_symbolic_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    """A link that somebody planted would let them choose what we overwrite."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / "state").symlink_to(victim)

    atomic_write(tmp_path / "state", b"new")

    assert victim.read_bytes() == b"precious"
    assert (tmp_path / "state").read_bytes() == b"new"
    assert not (tmp_path / "state").is_symlink()


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    """The message says where, the remedy what to look at."""
    with pytest.raises(StateError, match=r"cannot write .*/none/file: No such file"):
        atomic_write(tmp_path / "none" / "file", b"")


def test_a_directory_that_cannot_be_flushed_is_good_enough(tmp_path: Path) -> None:
    """Some FUSE and CIFS mounts answer EINVAL to fsync of a directory; the rename has happened all the same."""

    class NoDirectorySync(Ops):
        def fsync(self, fd: int) -> None:
            if os.path.isdir(f"/dev/fd/{fd}"):
                raise OSError(errno.EINVAL, "Invalid argument")

    atomic_write(tmp_path / "file", b"x", ops=NoDirectorySync())

    assert (tmp_path / "file").read_bytes() == b"x"


def test_remove_says_whether_there_was_a_file(tmp_path: Path) -> None:
    """Undo is idempotent: what is gone is fine."""
    (tmp_path / "file").write_bytes(b"")

    assert remove(tmp_path / "file")
    assert not remove(tmp_path / "file")
    assert not remove(tmp_path / "nowhere" / "file")


def test_a_directory_proves_that_it_can_be_written(tmp_path: Path) -> None:
    """Before the first certificate is asked for, not after it was lost."""

    class ReadOnly(Ops):
        def open(
            self, path: str | os.PathLike[str], flags: int, mode: int = 0o600, *, dir_fd: int | None = None
        ) -> int:
            if flags & os.O_CREAT:
                raise OSError(errno.EROFS, "Read-only file system")
            return super().open(path, flags, mode, dir_fd=dir_fd)

    check_writable(tmp_path)
    with pytest.raises(StateError, match="Read-only"):
        check_writable(tmp_path, ops=ReadOnly())

    assert os.listdir(tmp_path) == []


# --- stale temporary files ---


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    """Only names of our own making, only for the file in question, only regular files."""
    stale = ".tls.key.ngrokd-0123456789abcdef"
    others = [
        "tls.key",
        ".other.ngrokd-0123456789abcdef",
        ".tls.key.ngrokd-0123456789abcdeX",
        ".tls.key.ngrokd-0123456789abcdef0",
    ]
    for name in [stale, *others]:
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / ".tls.key.ngrokd-1111111111111111").mkdir()

    assert remove_stale(tmp_path, ["tls.key"]) == [stale]
    assert sorted(os.listdir(tmp_path)) == sorted([*others, ".tls.key.ngrokd-1111111111111111"])


def test_a_living_writer_keeps_its_temporary_file(tmp_path: Path) -> None:
    """Two daemons share /etc: the start of one must not break a write of the other."""
    removed: list[str] = []

    class Interrupted(Ops):
        def rename(self, source: str, target: str, *, dir_fd: int) -> None:
            removed.extend(remove_stale(tmp_path, ["hosts"]))
            super().rename(source, target, dir_fd=dir_fd)

    atomic_write(tmp_path / "hosts", b"x", ops=Interrupted())

    assert removed == []
    assert (tmp_path / "hosts").read_bytes() == b"x"


def test_long_names_still_fit(tmp_path: Path) -> None:
    """NAME_MAX holds for the temporary name too."""
    name = "n" * 255

    atomic_write(tmp_path / name, b"x")

    assert os.listdir(tmp_path) == [name]


# --- reading ---


def test_reading_is_bounded(tmp_path: Path) -> None:
    """A file longer than it may be is an error and never a prefix."""
    (tmp_path / "file").write_bytes(b"12345")

    assert read_limited(tmp_path / "file", 5) == b"12345"
    with pytest.raises(StateError, match="longer than 4 bytes"):
        read_limited(tmp_path / "file", 4)


def test_a_missing_file_is_a_fact_and_not_an_error_of_state(tmp_path: Path) -> None:
    """Callers treat "not there yet" differently from "there and bad"."""
    with pytest.raises(FileNotFoundError):
        read_limited(tmp_path / "none", 5)
    with pytest.raises(FileNotFoundError):
        read_secret(tmp_path / "none")


def test_a_fifo_is_neither_waited_for_nor_read(tmp_path: Path) -> None:
    """Opening one for reading would block the daemon for ever."""
    os.mkfifo(tmp_path / "fifo")

    with pytest.raises(StateError, match="not a regular file"):
        read_limited(tmp_path / "fifo", 5)
    with pytest.raises(StateError, match="not a regular file"):
        read_limited(tmp_path, 5)


def test_links_are_followed_only_where_that_is_wanted(tmp_path: Path) -> None:
    """A configured key file may be a link (Kubernetes mounts them so); a file of our own never is."""
    (tmp_path / "target").write_bytes(b"x")
    (tmp_path / "target").chmod(0o600)
    (tmp_path / "link").symlink_to("target")

    assert read_limited(tmp_path / "link", 5) == b"x"
    assert read_secret(tmp_path / "link", follow=True) == b"x"
    with pytest.raises(StateError, match="symbolic link"):
        read_secret(tmp_path / "link")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o777])
def test_a_secret_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    """Who can read it can be us, who can write it can make us somebody else."""
    path = tmp_path / "key"
    path.write_bytes(b"x")
    path.chmod(mode)

    with pytest.raises(StateError, match=f"open to others .mode 0{mode:o}") as caught:
        read_secret(path)

    assert f"chmod 600 {path}" in caught.value.remedy


@needs_root
def test_a_secret_of_a_stranger_is_refused(tmp_path: Path) -> None:
    """Its owner can change it at any time."""
    path = tmp_path / "key"
    path.write_bytes(b"x")
    path.chmod(0o600)
    os.chown(path, 12345, 0)

    with pytest.raises(StateError, match="uid 12345"):
        read_secret(path)


# --- directories ---


def test_a_missing_directory_is_made_private(tmp_path: Path) -> None:
    """Keys will lie in it. Its new parents are ordinary ones."""
    ensure_private_directory(tmp_path / "a" / "b")

    assert (tmp_path / "a" / "b").stat().st_mode & 0o7777 == 0o700
    assert (tmp_path / "a").stat().st_mode & 0o7777 == 0o755 & ~_umask()


def test_an_existing_directory_keeps_its_mode(tmp_path: Path) -> None:
    """The Go daemon's /etc/ngrokd is 0755 and stays so."""
    (tmp_path / "state").mkdir()
    (tmp_path / "state").chmod(0o755)

    ensure_private_directory(tmp_path / "state")

    assert (tmp_path / "state").stat().st_mode & 0o7777 == 0o755


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o1777])
def test_a_directory_others_can_write_is_refused(tmp_path: Path, mode: int) -> None:
    """Sticky or not: in it, somebody else's file may wait under the name we want to use."""
    (tmp_path / "state").mkdir()
    (tmp_path / "state").chmod(mode)

    with pytest.raises(StateError, match="written by others") as caught:
        ensure_private_directory(tmp_path / "state")

    assert f"chmod go-w {tmp_path / 'state'}" in caught.value.remedy


def test_a_parent_others_can_write_is_refused_and_named(tmp_path: Path) -> None:
    """They could move our directory away and put theirs in its place."""
    parent = tmp_path / "parent"
    (parent / "state").mkdir(parents=True)
    parent.chmod(0o777)

    with pytest.raises(StateError, match=rf"{parent} can be written by others"):
        check_private_directory(parent / "state")


def test_a_private_directory_in_a_sticky_one_is_trusted(tmp_path: Path) -> None:
    """In /tmp nobody can move or remove what is ours or root's."""
    parent = tmp_path / "parent"
    parent.mkdir()
    parent.chmod(0o1777)

    ensure_private_directory(parent / "state")

    assert (parent / "state").stat().st_mode & 0o777 == 0o700


@needs_root
def test_a_stranger_on_the_way_is_refused_even_behind_links(tmp_path: Path) -> None:
    """A link of theirs, or a directory of theirs, can lead elsewhere tomorrow."""
    sticky = tmp_path / "sticky"
    sticky.mkdir()
    sticky.chmod(0o1777)
    (tmp_path / "real").mkdir()
    (sticky / "link").symlink_to(tmp_path / "real")
    check_private_directory(sticky / "link")
    os.chown(sticky / "link", 12345, 0, follow_symlinks=False)

    with pytest.raises(StateError, match="sticky/link belongs to uid 12345"):
        check_private_directory(sticky / "link")


def test_links_are_walked_step_by_step(tmp_path: Path) -> None:
    """The directories that a link leads through are judged like the others; ".." goes where the kernel goes."""
    wide = tmp_path / "wide"
    (wide / "inner").mkdir(parents=True)
    (tmp_path / "state").mkdir()
    (tmp_path / "link").symlink_to("wide/inner/../../state")
    check_private_directory(tmp_path / "link")
    wide.chmod(0o777)

    with pytest.raises(StateError, match=rf"{wide} can be written"):
        check_private_directory(tmp_path / "link")


def test_a_loop_of_links_ends(tmp_path: Path) -> None:
    """Forty links, as in the kernel."""
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")

    with pytest.raises(StateError, match="symbolic links"):
        check_private_directory(tmp_path / "a")


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    """A state directory that is a file is a mistake in the configuration."""
    (tmp_path / "state").write_bytes(b"")

    with pytest.raises(StateError, match="Not a directory"):
        ensure_private_directory(tmp_path / "state")


# --- the lock ---


def test_the_second_holder_is_told_who_the_first_is(tmp_path: Path) -> None:
    """Two daemons on one state directory would take each other's addresses."""
    path = tmp_path / "lock"
    with Lock(path, "ngrokd run, interface ngrokd0"):
        with pytest.raises(TakenError, match=rf"held by process {os.getpid()} \(ngrokd run, interface ngrokd0\)"):
            Lock(path, "other").acquire()
        assert lock_owner(path) == LockOwner(os.getpid(), "ngrokd run, interface ngrokd0")

    assert lock_owner(path) is None
    assert os.listdir(tmp_path) == []


def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    """The file stays, the kernel's lock does not."""
    path = tmp_path / "lock"
    code = (
        f"import os, signal\nfrom ngrokd.files import Lock\nLock({str(path)!r}, 'x').acquire()\nos.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False)
    assert killed.returncode == -9
    assert path.read_text().endswith(" x\n")

    lock = Lock(path, "a shorter text")
    lock.acquire()

    assert path.read_text() == f"{os.getpid()} a shorter text\n"
    lock.release()
    assert not path.exists()


def test_a_lock_file_removed_while_we_opened_it_is_opened_again(tmp_path: Path) -> None:
    """Its last holder removes it; a lock on a file without a name would be held by two."""
    path = tmp_path / "lock"
    opened: list[int] = []

    class Late(Ops):
        def open(
            self, path: str | os.PathLike[str], flags: int, mode: int = 0o600, *, dir_fd: int | None = None
        ) -> int:
            fd = super().open(path, flags, mode, dir_fd=dir_fd)
            if not opened:
                os.unlink(path)
            opened.append(fd)
            return fd

    lock = Lock(path, "x", ops=Late())
    lock.acquire()

    assert len(opened) == 2
    assert lock_owner(path) is not None
    lock.release()


def test_a_hostile_lock_file_cannot_speak_to_the_terminal(tmp_path: Path) -> None:
    """Its text is shown to people."""
    path = tmp_path / "lock"
    with Lock(path, "x"):
        path.write_bytes(b"123 \x1b[2Jred\xff\n456 more")
        assert lock_owner(path) == LockOwner(123, "?[2Jred\ufffd")
        path.write_bytes(b"nonsense")
        assert str(lock_owner(path)) == "another process"


def test_a_lock_that_cannot_be_made_says_why(tmp_path: Path) -> None:
    """Not "taken": nobody has it."""
    with pytest.raises(StateError, match="cannot lock"):
        Lock(tmp_path / "none" / "lock", "x").acquire()


def test_every_failing_call_leaves_the_lock_free(tmp_path: Path) -> None:
    """A lock half taken would be in the way of the next start."""
    path = tmp_path / "lock"

    def act(ops: Ops) -> None:
        with Lock(path, "x", ops=ops):
            pass

    every_fault(act, reset=lambda: None, check=lambda outcome: _assert_free(path))


def _assert_free(path: Path) -> None:
    lock = Lock(path, "next")
    lock.acquire()
    lock.release()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
