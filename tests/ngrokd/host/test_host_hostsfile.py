"""The hosts file belongs to everybody: no foreign line is lost, whoever writes and whatever fails."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ngrokd.files import Ops
from ngrokd.host.hostsfile import (
    HostsFileError,
    edit_hosts,
    fingerprint,
    first_difference,
    merge,
    read_hosts,
    remove_stale_hosts,
)
from tests.ngrokd.faults import every_fault

FOREIGN = b"127.0.0.1\tlocalhost\n::1 localhost ip6-localhost\n"
BEGIN, END = b"# BEGIN ours\n", b"# END ours\n"


def section(*names: bytes) -> Callable[[bytes], bytes]:
    """An edit as the daemon makes it: our lines between markers at the end, whatever else there is."""

    def edit(text: bytes) -> bytes:
        lines = text.splitlines(keepends=True)
        kept, inside = [], False
        for line in lines:
            if line == BEGIN:
                inside = True
            elif line == END:
                inside = False
            elif not inside or not line.startswith(b"10.107."):
                kept.append(line)
        foreign = b"".join(kept)
        if not names:
            return foreign
        if foreign and not foreign.endswith(b"\n"):
            foreign += b"\n"
        return foreign + BEGIN + b"".join(b"10.107.0.2\t" + name + b"\n" for name in names) + END

    return edit


def appended(path: Path, line: bytes) -> None:
    with path.open("ab") as file:
        file.write(line)


def replaced(path: Path, content: bytes) -> None:
    other = path.with_name("editor~")
    other.write_bytes(content)
    other.replace(path)


@pytest.fixture
def hosts(tmp_path: Path) -> Path:
    path = tmp_path / "hosts"
    path.write_bytes(FOREIGN)
    return path


class BindMount(Ops):
    """A hosts file that is itself a mount point: it cannot be replaced, only written."""

    def exchange(self, one: str, other: str, *, dir_fd: int) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")


class NoExchange(Ops):
    """An old kernel, or a file system without RENAME_EXCHANGE."""

    def exchange(self, one: str, other: str, *, dir_fd: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")


class NoLease(Ops):
    """A file system, or a user, without leases: late writers cannot be seen, only waited for."""

    def fcntl(self, fd: int, command: int, argument: int) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")


WAYS = [Ops, BindMount, NoExchange, NoLease]


# --- what stays ---


@pytest.mark.parametrize("way", WAYS)
def test_our_section_comes_and_goes_and_the_rest_stays(hosts: Path, way: type[Ops]) -> None:
    """Byte for byte, in every way of writing."""
    assert edit_hosts(hosts, section(b"api.prod"), ops=way())
    assert hosts.read_bytes() == FOREIGN + BEGIN + b"10.107.0.2\tapi.prod\n" + END

    assert edit_hosts(hosts, section(), ops=way())
    assert hosts.read_bytes() == FOREIGN
    assert os.listdir(hosts.parent) == ["hosts"]


@pytest.mark.parametrize("way", WAYS)
def test_a_file_that_already_says_so_is_not_written(hosts: Path, way: type[Ops]) -> None:
    """Every write wakes resolvers and file watchers."""
    edit_hosts(hosts, section(b"api.prod"), ops=way())
    before = hosts.stat()

    assert not edit_hosts(hosts, section(b"api.prod"), ops=way())
    after = hosts.stat()
    assert (after.st_ino, after.st_ctime_ns) == (before.st_ino, before.st_ctime_ns)


def test_mode_owner_and_attributes_are_kept(hosts: Path) -> None:
    """A hosts file that only root can read afterwards breaks every other program; a lost SELinux label, too."""
    hosts.chmod(0o664)
    if os.geteuid() == 0:
        os.chown(hosts, 12345, 54321)
    noted = True
    try:
        os.setxattr(hosts, "user.note", b"kept")
    except OSError:  # a tmpfs before Linux 6.6
        noted = False
    before = hosts.stat()

    edit_hosts(hosts, section(b"api.prod"))

    after = hosts.stat()
    assert after.st_ino != before.st_ino  # by renaming
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    assert not noted or os.getxattr(hosts, "user.note") == b"kept"


def test_a_file_whose_owner_cannot_be_kept_is_written_in_place(hosts: Path) -> None:
    """Without CAP_CHOWN a replacement would change hands."""

    class NoChown(Ops):
        def fstat(self, fd: int) -> os.stat_result:
            result = super().fstat(fd)
            return os.stat_result((*result[:4], result.st_uid + len(created), *result[5:]), _times(result))

        def open(
            self, path: str | os.PathLike[str], flags: int, mode: int = 0o600, *, dir_fd: int | None = None
        ) -> int:
            created[:] = [1] if flags & os.O_CREAT else []
            return super().open(path, flags, mode, dir_fd=dir_fd)

        def fchown(self, fd: int, uid: int, gid: int) -> None:
            raise PermissionError(errno.EPERM, "Operation not permitted")

    created: list[int] = []
    inode = hosts.stat().st_ino

    edit_hosts(hosts, section(b"api.prod"), ops=NoChown())

    assert hosts.stat().st_ino == inode
    assert hosts.read_bytes().startswith(FOREIGN + BEGIN)


def _times(result: os.stat_result) -> dict[str, object]:
    names = ("st_atime", "st_mtime", "st_ctime", "st_atime_ns", "st_mtime_ns", "st_ctime_ns")
    return {name: getattr(result, name) for name in names}


@pytest.mark.parametrize("way", WAYS)
def test_a_symbolic_link_stays_one(hosts: Path, way: type[Ops]) -> None:
    """NixOS and some images link /etc/hosts elsewhere; the target is what has to change."""
    target = hosts.with_name("target")
    hosts.rename(target)
    (hosts.parent / "between").symlink_to("target")
    hosts.symlink_to(hosts.parent / "between")

    edit_hosts(hosts, section(b"api.prod"), ops=way())

    assert hosts.is_symlink()
    assert target.read_bytes().startswith(FOREIGN + BEGIN)


def test_a_missing_file_is_created_only_when_there_is_something_to_say(tmp_path: Path) -> None:
    """Removing our section from nothing makes no file; one that we make is readable by everybody."""
    path = tmp_path / "hosts"

    assert not edit_hosts(path, section())
    assert not path.exists()
    assert edit_hosts(path, section(b"api.prod"))
    assert path.stat().st_mode & 0o7777 == 0o644
    assert path.read_bytes() == BEGIN + b"10.107.0.2\tapi.prod\n" + END


def test_a_file_that_comes_up_while_we_create_ours_is_not_replaced(tmp_path: Path) -> None:
    """cloud-init writes /etc/hosts late."""
    path = tmp_path / "hosts"

    class Late(Ops):
        def link(self, source: str, target: str, *, dir_fd: int) -> None:
            if not path.exists():
                path.write_bytes(FOREIGN)
            super().link(source, target, dir_fd=dir_fd)

    edit_hosts(path, section(b"api.prod"), ops=Late())

    assert path.read_bytes() == FOREIGN + BEGIN + b"10.107.0.2\tapi.prod\n" + END
    assert os.listdir(tmp_path) == ["hosts"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no newline",
        b"crlf\r\n",
        b"\x00\xff\xfe\n" * 100,
        b"x" * (1 << 20) + b"\n",
        b"0.0.0.0 ads.example\n" * 200_000,
    ],
    ids=["empty", "no-newline", "crlf", "binary", "long-line", "4MB"],
)
def test_any_content_is_kept(tmp_path: Path, way: type[Ops], content: bytes) -> None:
    """Block lists have megabytes, and nobody promises text."""
    path = tmp_path / "hosts"
    path.write_bytes(content)

    edit_hosts(path, section(b"api.prod"), ops=way())

    assert path.read_bytes().startswith(content)
    assert path.read_bytes().endswith(END)


def test_a_file_beyond_the_limit_is_left_alone(hosts: Path) -> None:
    """Something is wrong with it, and we are not the ones to rewrite it."""
    with pytest.raises(HostsFileError, match="longer than 10 bytes"):
        edit_hosts(hosts, section(b"api.prod"), limit=10)

    assert hosts.read_bytes() == FOREIGN


# --- what cannot be done ---


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_a_read_only_file_is_a_documented_error(hosts: Path, number: int) -> None:
    """The daemon turns it into a warning: endpoints stay reachable by address."""

    class ReadOnly(Ops):
        def open(
            self, path: str | os.PathLike[str], flags: int, mode: int = 0o600, *, dir_fd: int | None = None
        ) -> int:
            if flags & (os.O_RDWR | os.O_WRONLY):
                raise OSError(number, os.strerror(number))
            return super().open(path, flags, mode, dir_fd=dir_fd)

    with pytest.raises(HostsFileError, match="cannot change") as caught:
        edit_hosts(hosts, section(b"api.prod"), ops=ReadOnly())

    assert caught.value.read_only
    assert caught.value.errno == number
    assert "hosts.enabled" in caught.value.remedy
    assert hosts.read_bytes() == FOREIGN


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    """A FIFO would block, a directory cannot be edited, a loop of links never ends."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")

    for name, reason in {"fifo": "regular", ".": "cannot", "a": "symbolic", "none/hosts": "No such"}.items():
        with pytest.raises(HostsFileError, match=reason) as caught:
            edit_hosts(tmp_path / name, section(b"api.prod"))
        assert not caught.value.read_only


def test_reading_and_marking(hosts: Path) -> None:
    """The mark changes with the file, so that it need not be read to be watched."""
    first = fingerprint(hosts)

    assert read_hosts(hosts) == FOREIGN
    assert fingerprint(hosts) == first != ()
    appended(hosts, b"10.0.0.1 new\n")
    assert fingerprint(hosts) != first
    hosts.unlink()
    assert fingerprint(hosts) == ()
    assert read_hosts(hosts) == b""


# --- every failing system call ---


IN_PLACE = {"exchange": errno.EBUSY, "rename": errno.EBUSY}


@pytest.mark.parametrize(
    ("always", "before", "names"),
    [
        ({}, FOREIGN, (b"api.prod",)),
        ({"exchange": errno.ENOSYS}, FOREIGN, (b"api.prod",)),
        (IN_PLACE, FOREIGN, (b"api.prod",)),
        (IN_PLACE, FOREIGN + BEGIN + b"10.107.0.2\tapi.prod\n" * 50 + END, ()),
    ],
    ids=["exchange", "rename", "in-place-longer", "in-place-shorter"],
)
def test_every_failing_call_leaves_the_old_text_or_the_new(
    hosts: Path,
    always: Mapping[str, int],
    before: bytes,
    names: tuple[bytes, ...],
) -> None:
    """Seven errors at every call, once and for good; where files are replaced, a power cut too.

    In place, a file that can no longer be cut may end in blank lines, which mean nothing.
    """
    after = section(*names)(before)

    def reset() -> None:
        for entry in os.listdir(hosts.parent):
            (hosts.parent / entry).unlink()
        hosts.write_bytes(before)

    def check(outcome: str) -> None:
        content = hosts.read_bytes()
        if always is IN_PLACE:
            content = content.rstrip(b"\n") + b"\n"
        assert content == after if outcome == "done" else content in (before, after)
        remove_stale_hosts(hosts)
        assert os.listdir(hosts.parent) == ["hosts"]

    cases = every_fault(
        lambda ops: edit_hosts(hosts, section(*names), ops=ops),
        reset=reset,
        check=check,
        always=always,
        power_cut=always is not IN_PLACE,  # in place there is no protection from it: that is why it comes last
    )

    assert cases > 150


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EROFS, errno.EXDEV, errno.EPERM, errno.EACCES])
def test_a_refused_rename_becomes_a_write_in_place(hosts: Path, number: int) -> None:
    """Bind mounts, systemd's ReadWritePaths, overlays, foreign directories: each refuses with a word of its own."""
    inode = hosts.stat().st_ino

    class Refused(Ops):
        def exchange(self, one: str, other: str, *, dir_fd: int) -> None:
            raise OSError(number, os.strerror(number))

    edit_hosts(hosts, section(b"api.prod"), ops=Refused())

    assert hosts.stat().st_ino == inode
    assert hosts.read_bytes() == FOREIGN + BEGIN + b"10.107.0.2\tapi.prod\n" + END
    assert os.listdir(hosts.parent) == ["hosts"]


def test_in_place_only_the_part_from_the_first_difference_is_written(hosts: Path) -> None:
    """Other people's lines come first, so no reader can ever see them torn."""
    offsets: list[int] = []

    class Recording(BindMount):
        def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
            offsets.append(offset)
            return super().pwrite(fd, data, offset)

    edit_hosts(hosts, section(b"a.one", b"b.two"), ops=Recording())
    edit_hosts(hosts, section(b"a.one", b"c.three"), ops=Recording())

    assert offsets == [len(FOREIGN), len(FOREIGN + BEGIN) + len(b"10.107.0.2\ta.one\n10.107.0.2\t")]


def test_in_place_a_full_disk_is_found_before_anything_is_touched(hosts: Path) -> None:
    """Blocks are reserved first; half a section would be worse than none."""

    class Full(BindMount):
        def fallocate(self, fd: int, offset: int, size: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
            raise AssertionError("nothing may be written")

    with pytest.raises(HostsFileError, match="No space left"):
        edit_hosts(hosts, section(b"api.prod"), ops=Full())

    assert hosts.read_bytes() == FOREIGN


# --- others, at the same time ---


@pytest.mark.parametrize("way", [Ops, NoExchange, NoLease])
@pytest.mark.parametrize("foreign", [appended, replaced])
def test_an_edit_just_before_ours_lands_is_kept(
    hosts: Path, way: type[Ops], foreign: Callable[[Path, bytes], None]
) -> None:
    """Between our read and our rename: appended to the same file, or renamed over it as editors do."""
    line = b"10.0.0.9 foreign\n"
    done: list[bool] = []

    class Raced(way):  # type: ignore[valid-type,misc]  # the same race in each way of writing
        def fsync(self, fd: int) -> None:
            if not done:
                done.append(True)
                foreign(hosts, line if foreign is appended else FOREIGN + line)
            super().fsync(fd)

    edit_hosts(hosts, section(b"api.prod"), ops=Raced())

    assert hosts.read_bytes() == FOREIGN + line + BEGIN + b"10.107.0.2\tapi.prod\n" + END
    assert os.listdir(hosts.parent) == ["hosts"]


@pytest.mark.parametrize("way", [Ops, NoExchange, NoLease])
def test_an_append_to_the_displaced_file_is_kept(hosts: Path, way: type[Ops]) -> None:
    """A program opened the file before our rename and writes after it: into a file without a name."""
    writer = os.open(hosts, os.O_WRONLY | os.O_APPEND)

    class Late(way):  # type: ignore[valid-type,misc]  # the same race in each way of writing
        def sleep(self, seconds: float) -> None:
            nonlocal writer
            if writer >= 0:
                os.write(writer, b"10.0.0.9 late\n")
                os.close(writer)
                writer = -1

    edit_hosts(hosts, section(b"api.prod"), ops=Late())

    assert writer == -1
    assert hosts.read_bytes() == FOREIGN + b"10.0.0.9 late\n" + BEGIN + b"10.107.0.2\tapi.prod\n" + END


def test_a_rewrite_in_progress_is_not_taken_for_an_empty_file(hosts: Path) -> None:
    """An editor that truncates and then writes: we may have read nothing, and must not leave nothing."""
    writer = os.open(hosts, os.O_WRONLY | os.O_TRUNC)

    class Late(Ops):
        def sleep(self, seconds: float) -> None:
            nonlocal writer
            if writer >= 0:
                os.write(writer, FOREIGN)
                os.close(writer)
                writer = -1

    edit_hosts(hosts, section(b"api.prod"), ops=Late())

    assert hosts.read_bytes() == FOREIGN + BEGIN + b"10.107.0.2\tapi.prod\n" + END


def test_a_late_line_is_written_even_when_our_own_edit_fails_afterwards(hosts: Path) -> None:
    """Then the disk was full for us; the line of the other program had been accepted."""
    writer = os.open(hosts, os.O_WRONLY | os.O_APPEND)
    creations = 0

    class LateAndFull(Ops):
        def sleep(self, seconds: float) -> None:
            nonlocal writer
            if writer >= 0:
                os.write(writer, b"10.0.0.9 late\n")
                os.close(writer)
                writer = -1

        def open(
            self, path: str | os.PathLike[str], flags: int, mode: int = 0o600, *, dir_fd: int | None = None
        ) -> int:
            nonlocal creations
            if flags & os.O_CREAT:
                creations += 1
                if creations > 1:
                    raise OSError(errno.ENOSPC, "No space left on device")
            return super().open(path, flags, mode, dir_fd=dir_fd)

    with pytest.raises(HostsFileError, match="No space left"):
        edit_hosts(hosts, section(b"api.prod"), ops=LateAndFull())

    assert b"10.0.0.9 late\n" in hosts.read_bytes()
    assert hosts.read_bytes().startswith(FOREIGN)


def test_both_edits_survive_when_ours_was_edited_in_the_moment_it_stood(hosts: Path) -> None:
    """We exchange, find that we displaced a foreign edit, exchange back; and somebody appended to ours in between."""
    exchanges = 0

    class Busy(Ops):
        def exchange(self, one: str, other: str, *, dir_fd: int) -> None:
            nonlocal exchanges
            exchanges += 1
            if exchanges == 1:
                replaced(hosts, FOREIGN + b"10.0.0.8 before\n")
            if exchanges == 2:
                appended(hosts, b"10.0.0.9 between\n")
            super().exchange(one, other, dir_fd=dir_fd)

    edit_hosts(hosts, section(b"api.prod"), ops=Busy())

    text = hosts.read_bytes()
    assert text.startswith(FOREIGN)
    assert text.count(b"10.0.0.8 before\n") == text.count(b"10.0.0.9 between\n") == 1
    assert text.endswith(BEGIN + b"10.107.0.2\tapi.prod\n" + END)


def test_a_newer_version_is_not_exchanged_for_an_older_one(hosts: Path) -> None:
    """We displaced an editor's file, and before we gave it back its next version had been renamed over ours."""
    exchanges = 0

    class Busy(Ops):
        def exchange(self, one: str, other: str, *, dir_fd: int) -> None:
            nonlocal exchanges
            exchanges += 1
            if exchanges in (1, 2):
                replaced(hosts, FOREIGN + b"10.0.0.8 version-%d\n" % exchanges)
            super().exchange(one, other, dir_fd=dir_fd)

    edit_hosts(hosts, section(b"api.prod"), ops=Busy())

    assert hosts.read_bytes() == FOREIGN + b"10.0.0.8 version-2\n" + BEGIN + b"10.107.0.2\tapi.prod\n" + END
    assert os.listdir(hosts.parent) == ["hosts"]


def test_a_file_that_became_a_link_in_between_stays_one(hosts: Path) -> None:
    """Our exchange put it aside; it comes back, and its target is edited."""
    done: list[bool] = []

    class Raced(Ops):
        def exchange(self, one: str, other: str, *, dir_fd: int) -> None:
            if not done:
                done.append(True)
                hosts.rename(hosts.with_name("target"))
                hosts.symlink_to("target")
            super().exchange(one, other, dir_fd=dir_fd)

    edit_hosts(hosts, section(b"api.prod"), ops=Raced())

    assert hosts.is_symlink()
    assert hosts.with_name("target").read_bytes() == FOREIGN + BEGIN + b"10.107.0.2\tapi.prod\n" + END
    assert sorted(os.listdir(hosts.parent)) == ["hosts", "target"]


def test_litter_of_a_killed_run_is_removed_by_the_next_edit(hosts: Path) -> None:
    """Even when there is nothing to change; and only ours."""
    (hosts.parent / ".hosts.ngrokd-0123456789abcdef").write_bytes(b"x")
    (hosts.parent / ".hosts.swp").write_bytes(b"an editor's")

    assert not edit_hosts(hosts, section())
    assert sorted(os.listdir(hosts.parent)) == [".hosts.swp", "hosts"]


def test_in_place_an_edit_between_reading_and_writing_is_kept(hosts: Path) -> None:
    """The file is looked at once more before it is touched."""
    done: list[bool] = []

    class Raced(BindMount):
        def fallocate(self, fd: int, offset: int, size: int) -> None:
            if not done:
                done.append(True)
                appended(hosts, b"10.0.0.9 foreign\n")
            super().fallocate(fd, offset, size)

    edit_hosts(hosts, section(b"api.prod"), ops=Raced())

    assert hosts.read_bytes() == FOREIGN + b"10.0.0.9 foreign\n" + BEGIN + b"10.107.0.2\tapi.prod\n" + END


def test_an_editor_that_never_stops_is_named_as_the_reason(hosts: Path) -> None:
    """We give up for now rather than fight for ever."""
    lines = iter(range(10_000))

    class Fighting(Ops):
        def exchange(self, one: str, other: str, *, dir_fd: int) -> None:
            replaced(hosts, FOREIGN + b"%d\n" % next(lines))
            super().exchange(one, other, dir_fd=dir_fd)

    with pytest.raises(HostsFileError, match="again and again"):
        edit_hosts(hosts, section(b"api.prod"), ops=Fighting())

    assert hosts.read_bytes().startswith(FOREIGN)


@pytest.mark.parametrize("foreign", [appended, replaced])
def test_no_line_of_a_real_writer_is_lost(hosts: Path, foreign: Callable[[Path, bytes], None]) -> None:
    """Two real writers side by side: a plain read and rename loses about half of the lines.

    The editor that renames edits one line of its own; lines that such editors take from each other are their affair.
    """
    written: list[bytes] = []
    pace = threading.Event()

    def write() -> None:
        for number in range(200):
            line = b"10.1.0.1 line-%d\n" % number
            written.append(line)
            foreign(hosts, line if foreign is appended else FOREIGN + line)
            pace.wait(0.001)

    thread = threading.Thread(target=write)
    thread.start()
    rounds = 0
    while thread.is_alive():
        rounds += 1
        with suppress(HostsFileError):  # "again and again", as it may say on a slow disk
            edit_hosts(hosts, section(b"round-%d" % rounds))
    thread.join()
    edit_hosts(hosts, section())

    lines = hosts.read_bytes().splitlines(keepends=True)
    if foreign is appended:
        assert sorted(lines) == sorted([*FOREIGN.splitlines(keepends=True), *written])
    else:
        assert {*FOREIGN.splitlines(keepends=True), written[-1]} <= set(lines)


# --- the pure parts ---


@given(st.binary(max_size=40), st.binary(max_size=40), st.binary(max_size=40))
def test_the_first_difference_splits_into_equal_and_different(head: bytes, one: bytes, other: bytes) -> None:
    """What lies before it is never written."""
    at = first_difference(head + one, head + other)

    assert at >= len(head)
    assert (head + one)[:at] == (head + other)[:at]
    assert (head + one)[at : at + 1] != (head + other)[at : at + 1] or (one == other and at == len(head + one))


LINES = st.lists(st.sampled_from([b"a\n", b"b\n", b"c\n", b"d\r\n", b"# x\n"]), max_size=8)


@settings(max_examples=300)
@given(base=LINES, added=LINES, at=st.integers(0, 8), ours=LINES)
def test_merging_loses_no_added_line(base: list[bytes], added: list[bytes], at: int, ours: list[bytes]) -> None:
    """Whatever became of the file meanwhile, what the other program added is in the result as often as it added it."""
    text, current = b"".join(base), b"".join(ours)
    theirs = b"".join(base[:at] + added + base[at:])

    merged = merge(text, theirs, current)

    assert merge(text, theirs, text) == theirs
    assert merge(text, text, current) == current
    for line in set(added):
        assert merged.splitlines(keepends=True).count(line) >= added.count(line)


def test_merging_puts_a_change_where_its_lines_are() -> None:
    """Deleted and changed lines too, as long as they can be found; otherwise nothing is lost."""
    assert merge(b"a\nb\nc\n", b"a\nB\nc\n", b"x\na\nb\nc\ny\n") == b"x\na\nB\nc\ny\n"
    assert merge(b"a\nb\nc\n", b"a\nc\n", b"a\nb\nc\nours\n") == b"a\nc\nours\n"
    assert merge(b"a\nb\n", b"a\nB\n", b"a\n") == b"a\nB\n"
    assert merge(b"a", b"a\nb\n", b"a\nours") == b"a\nours\nb\n"
