"""The managed section of the hosts file: every byte that is not ours leaves as it came."""

from __future__ import annotations

import re
import time
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ngrokd.names.hosts import Address, HostsRefused, foreign_names, remove, render, survey, tail_offset

BEGIN = b"# BEGIN ngrokd managed section\n"
END = b"# END ngrokd managed section\n"
BEGIN1 = b"# BEGIN ngrokd managed section (tun1)\n"
END1 = b"# END ngrokd managed section (tun1)\n"
DEBIAN = b"127.0.0.1\tlocalhost\n127.0.1.1\tmyhost\n\n::1     ip6-localhost ip6-loopback\n"
SUBNET = IPv4Network("10.107.0.0/16")

A = (IPv4Address("10.107.0.2"), "a.prod")
B = (IPv4Address("10.107.0.10"), "b.prod")
BLOCK = BEGIN + b"10.107.0.2\ta.prod\n10.107.0.10\tb.prod\n" + END


def test_the_section_stands_at_the_end_sorted_by_address() -> None:
    """By address, not by text: 10.107.0.2 comes before 10.107.0.10."""
    assert render(DEBIAN, [B, A]) == DEBIAN + BLOCK


def test_an_instance_on_another_interface_has_its_name_in_both_markers() -> None:
    text = render(render(DEBIAN, [A]), [B], "tun1")

    assert text == DEBIAN + BEGIN + b"10.107.0.2\ta.prod\n" + END + BEGIN1 + b"10.107.0.10\tb.prod\n" + END1
    assert render(DEBIAN, [A, B], "ngrokd0") == render(DEBIAN, [A, B], None)


def test_a_section_that_is_right_stays_where_it_is() -> None:
    """Somebody appended a line below us; that is no reason to move."""
    text = DEBIAN + BLOCK + b"192.168.0.9 printer\n"

    assert render(text, [A, B]) is text


def test_a_section_that_changes_moves_to_the_end() -> None:
    """There a tail write leaves every other byte untouched from then on."""
    text = DEBIAN + BLOCK + b"192.168.0.9 printer\n"

    changed = render(text, [A])

    assert changed == DEBIAN + b"192.168.0.9 printer\n" + BEGIN + b"10.107.0.2\ta.prod\n" + END


def test_without_entries_the_section_goes() -> None:
    assert render(DEBIAN + BLOCK, []) == DEBIAN


def test_sections_of_other_instances_are_untouched() -> None:
    other = BEGIN1 + b"10.9.0.2\tc.prod\n" + END1

    assert remove(DEBIAN + other + BLOCK) == DEBIAN + other
    assert remove(DEBIAN + BLOCK + other, "tun1") == DEBIAN + BLOCK
    assert render(DEBIAN + other, [A, B]) == DEBIAN + other + BLOCK


def test_the_section_of_the_go_daemon_is_adopted() -> None:
    """Random order, names as the API gave them, and the blank line it put before (which is nobody's now)."""
    text = DEBIAN + b"\n" + BEGIN + b"10.107.0.3\tUPPER.Prod\n10.107.0.2\t*.wild.prod\n127.0.0.2\tmac.prod\n" + END

    assert render(text, [A, B]) == DEBIAN + b"\n" + BLOCK


def test_markers_with_carriage_returns_are_markers() -> None:
    text = b"127.0.0.1 localhost\r\n" + BLOCK.replace(b"\n", b"\r\n")

    assert remove(text) == b"127.0.0.1 localhost\r\n"
    assert render(text, [A, B]) == b"127.0.0.1 localhost\r\n" + BLOCK


@pytest.mark.parametrize(
    "line",
    [
        b"# BEGIN ngrokd managed section\t",
        b"# BEGIN ngrokd managed section ",
        b" # BEGIN ngrokd managed section",
        b"## BEGIN ngrokd managed section",
        b"# BEGIN ngrokd managed sections",
        b"# begin ngrokd managed section",
        b"# BEGIN ngrokd managed section (tun1) x",
        b"# BEGIN ngrokd managed section (ngrokd0)",
        b"# BEGIN ngrokd managed section ()",
        b"# BEGIN ngrokd managed section (a b)",
        b"\xef\xbb\xbf# BEGIN ngrokd managed section",
        b"x# BEGIN ngrokd managed section",
        b"# see # BEGIN ngrokd managed section",
        b"# BEGIN ngrokd managed section\x00",
    ],
)
def test_what_only_looks_like_a_marker_is_foreign(line: bytes) -> None:
    """The Go daemon looked for the words anywhere in a line, and dropped what followed."""
    text = DEBIAN + line + b"\n10.107.0.2\ta.prod\n" + END.replace(b"END", b"END of")

    assert remove(text) == text
    assert remove(render(text, [A, B])) == text


def test_foreign_lines_inside_our_section_stay() -> None:
    text = (
        DEBIAN
        + BEGIN
        + b"10.107.0.2\ta.prod\n# mine\n10.0.0.1 box two\n10.107.0.10\tb.prod\n127.0.0.1\tlocalhost\n"
        + END
    )

    assert render(text, [A, B]) == DEBIAN + b"# mine\n10.0.0.1 box two\n127.0.0.1\tlocalhost\n" + BLOCK


def test_after_a_lost_end_only_lines_of_our_subnet_go() -> None:
    """Debian's own lines have our shape. A user who deletes the END line must not lose them."""
    text = BEGIN + b"10.107.0.2\ta.prod\n" + DEBIAN + b"10.107.0.3\tb.prod\n"

    assert remove(text, subnet=SUBNET) == DEBIAN
    assert render(text, [A], subnet=SUBNET) == DEBIAN + BEGIN + b"10.107.0.2\ta.prod\n" + END


def test_after_a_lost_end_lines_of_both_our_subnets_go() -> None:
    """A name has a line of each version."""
    strange = b"fd99::2\tprinter.example\n"
    text = DEBIAN + BEGIN + b"10.107.0.2\ta.prod\n" + strange + b"fd12::a6b:2\ta.prod\n"

    assert remove(text, subnet=(SUBNET, IPv6Network("fd12::/64"))) == DEBIAN + strange


def test_after_a_lost_end_without_a_subnet_only_the_unbroken_run_goes() -> None:
    text = BEGIN + b"10.107.0.2\ta.prod\n10.107.0.3\tb.prod\n" + DEBIAN + b"10.107.0.4\tc.prod\n"

    assert remove(text) == DEBIAN + b"10.107.0.4\tc.prod\n"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (BEGIN, b""),
        (END, b""),
        (BEGIN + END, b""),
        (END + BEGIN, b""),
        (BEGIN[:-1], b""),
        (b"x\n" + END[:-1], b"x\n"),
        (BLOCK + BLOCK, b""),
        (BLOCK + b"x\n" + BLOCK, b"x\n"),
        (BEGIN + BLOCK + END, b""),
        (BEGIN + b"10.107.0.5\tq.prod\n" + BLOCK, b""),
        (BLOCK + b"10.107.0.5\tq.prod\n" + END, b"10.107.0.5\tq.prod\n"),
        (BEGIN + BEGIN1 + b"10.9.0.2\tc.prod\n" + END1 + END, BEGIN1 + b"10.9.0.2\tc.prod\n" + END1),
        (BEGIN1 + BLOCK + END1, BEGIN1 + END1),
        (BEGIN1 + b"10.9.0.2\tc.prod\n" + BLOCK, BEGIN1 + b"10.9.0.2\tc.prod\n"),
        (BEGIN + b"10.107.0.2\ta.prod\n" + END1, END1),
        (BLOCK[:-1], b""),
    ],
)
def test_repeated_nested_and_unclosed_markers(text: bytes, left: bytes) -> None:
    assert remove(text) == left
    assert render(text, [A, B]) in (left + BLOCK, text)
    assert render(text, [A]) == left + BEGIN + b"10.107.0.2\ta.prod\n" + END


@pytest.mark.parametrize("text", [b"x", b"127.0.0.1 localhost", b"\xef\xbb\xbf", b"\r", b"#", b"\n\nx"])
def test_a_missing_final_newline_is_missing_again_afterwards(text: bytes) -> None:
    with_section = render(text, [A, B])

    assert with_section.startswith(text + b"\n" + BEGIN)
    assert with_section.endswith(END)
    assert remove(with_section) == text
    assert render(with_section, [A, B]) is with_section


def test_a_lent_newline_stays_when_somebody_has_written_below() -> None:
    """Taking it away would glue two foreign lines together."""
    text = render(b"x", [A]) + b"y\n"

    assert remove(text) == b"x\ny\n"


def test_a_line_of_a_megabyte_and_no_file_at_all() -> None:
    """The Go daemon gave up on lines above 64 KiB."""
    long = b"#" + b"x" * 2**20 + b"\n"

    assert remove(render(long, [A, B])) == long
    assert render(b"", [A, B]) == BLOCK
    assert remove(BLOCK) == b""


# Generated files


junk = st.one_of(
    st.binary(max_size=30),
    st.sampled_from(
        [DEBIAN, b"\n", b"\r\n", b"# comment\r\n", b"10.0.0.1\tbox\n", b"10.107.0.77\tours.prod\n", b"\xef\xbb\xbf"]
    ),
    st.sampled_from([BEGIN[:-2], b"# BEGIN", b" ngrokd managed section", b"x" + BEGIN, BEGIN[:-1] + b" \n", b"#"]),
)
others = st.sampled_from([BEGIN1, END1, BEGIN1[:-1] + b"\r\n", b"# END ngrokd managed section (x)\n"])
markers = st.sampled_from(
    [BEGIN, END, BEGIN[:-1] + b"\r\n", BEGIN[:-1], END[:-1], BLOCK, BLOCK[:-1], render(b"x", [A])]
)
foreign_files = st.lists(junk | others, max_size=12).map(b"".join).filter(lambda f: not has_our_marker(f))
any_files = st.lists(junk | others | markers, max_size=12).map(b"".join)
entries = st.lists(
    st.tuples(
        st.integers(2, 65534).map(lambda n: IPv4Address(int(SUBNET.network_address) + n)),
        st.from_regex(r"[a-z0-9]([a-z0-9-]{0,5}[a-z0-9])?(\.[a-z]{1,4})?", fullmatch=True).filter(
            lambda name: name != "localhost" and not name.startswith("ip6-")
        ),
    ),
    max_size=5,
)
subnets = st.sampled_from([None, SUBNET])


def has_our_marker(text: bytes) -> bool:
    return any(line.removesuffix(b"\r") in (BEGIN[:-1], END[:-1]) for line in text.split(b"\n"))


@given(foreign_files, entries, subnets)
@example(b"", [A], None)
def test_what_was_foreign_comes_back_byte_for_byte(
    text: bytes, wanted: list[tuple[Address, str]], subnet: IPv4Network | None
) -> None:
    """remove(render(f)) == f, whatever f is: binary, CRLF, other instances' broken sections, no final newline."""
    assert remove(text, subnet=subnet) == text
    assert remove(render(text, wanted, subnet=subnet), subnet=subnet) == text


@given(any_files, entries, subnets)
def test_rendering_twice_is_rendering_once(
    text: bytes, wanted: list[tuple[Address, str]], subnet: IPv4Network | None
) -> None:
    once = render(text, wanted, subnet=subnet)

    assert render(once, wanted, subnet=subnet) == once
    assert remove(once, subnet=subnet) == remove(text, subnet=subnet)
    assert survey(once, subnet=subnet).own == {name: str(address) for address, name in sorted(wanted, reverse=True)}


@given(any_files, subnets)
def test_nothing_goes_but_markers_and_lines_of_our_shape(text: bytes, subnet: IPv4Network | None) -> None:
    """What remains is the file in order, minus lines that only we write."""
    left = remove(text, subnet=subnet)

    assert not has_our_marker(left)
    rest = iter(text.split(b"\n"))
    dropped = []
    for line in left.split(b"\n"):
        for candidate in rest:
            if candidate == line:
                break
            dropped.append(candidate)
        else:
            assert line == b""  # a trailing newline that is now the end
    dropped.extend(rest)
    shape = re.compile(rb"(# (BEGIN|END) ngrokd managed section|[0-9.]+\t[a-z.]+|# \(the text above .*\)|)\r?")
    assert all(shape.fullmatch(line) for line in dropped)


@given(any_files, any_files)
def test_the_tail_begins_where_the_texts_part(old: bytes, new: bytes) -> None:
    offset = tail_offset(old, new)

    assert old[:offset] == new[:offset]
    assert offset in (0, len(new)) or new[offset - 1 : offset] == b"\n"
    assert old != new or offset == len(new)


def test_a_tail_write_leaves_the_foreign_part_alone() -> None:
    before, after = render(DEBIAN, [A]), render(DEBIAN, [A, B])

    assert tail_offset(before, after) == len(DEBIAN + BEGIN + b"10.107.0.2\ta.prod\n")
    assert tail_offset(DEBIAN, after) == len(DEBIAN)


# The second wall


@pytest.mark.parametrize(
    "name",
    [
        "", "a b", "a\tb", "a\n6.6.6.6 evil", "a\r", "a\x00", "A.prod", "é.prod", "#", "a#b", "*.prod", "-a", "a-",
        ".a", "a.", "a..b", "localhost", "x.localhost", "ip6-loopback", "x" * 254, "a\n", "a\u2028b", "a%b", "a/b",
        "a:b",
    ],
)  # fmt: skip
def test_the_writer_refuses_what_is_not_a_name(name: str) -> None:
    """Whoever hands us a name that was not judged: nothing at all is written."""
    with pytest.raises(HostsRefused) as caught:
        render(DEBIAN, [A, (IPv4Address("10.107.0.3"), name)])
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "address", ["", "10.0.0", "10.0.0.1 x", "10.0.0.1\n", "10.0.0.256", "a.prod", "fe80::1%eth0", "01.2.3.4"]
)
def test_the_writer_refuses_what_is_not_an_address(address: str) -> None:
    with pytest.raises(HostsRefused):
        render(DEBIAN, [(address, "a.prod")])


@given(st.text(max_size=12), st.text(max_size=20))
def test_whatever_is_handed_over_only_our_lines_are_written(address: str, name: str) -> None:
    try:
        text = render(b"", [(address, name)])
    except HostsRefused:
        return
    assert re.fullmatch(rb"# BEGIN[^\n]*\n[0-9a-f.:]+\t[a-z0-9._-]+\n# END[^\n]*\n", text)


@pytest.mark.parametrize("instance", ["a b", "x(y)", "tun\n1", "é", "x" * 65])
def test_an_interface_name_that_would_break_the_marker_is_refused(instance: str) -> None:
    with pytest.raises(HostsRefused):
        render(b"", [A], instance)


def test_addresses_of_both_families_fit() -> None:
    text = render(b"", [(IPv6Address("fd00:107::2"), "a.prod"), A])

    assert text == BEGIN + b"10.107.0.2\ta.prod\nfd00:107::2\ta.prod\n" + END
    assert remove(b"x\n" + text) == b"x\n"


# Who has which name


def test_survey_tells_foreign_own_and_elsewhere() -> None:
    text = (
        DEBIAN
        + b"10.0.0.1 Box.Example. box # comment me\n#10.0.0.2 commented\nfe80::1%lo0\tmac\r\n\xff\xfe binary\n"
        + BLOCK
        + BEGIN1
        + b"10.9.0.2\tC.prod\nuser line\n"
        + END1
    )
    found = survey(text)

    assert found.own == {"a.prod": "10.107.0.2", "b.prod": "10.107.0.10"}
    assert found.elsewhere == {"c.prod": "tun1"}
    assert {"localhost", "myhost", "ip6-localhost", "box.example", "box", "mac", "line"} <= found.foreign
    assert not {"comment", "commented", "a.prod", "c.prod", "#10.0.0.2"} & found.foreign
    assert survey(text, "tun1").own == {"c.prod": "10.9.0.2"}
    assert survey(text, "tun1").elsewhere == {"a.prod": "ngrokd0", "b.prod": "ngrokd0"}
    assert foreign_names(text) == found.foreign | {"c.prod"}


def test_an_empty_file_claims_nothing() -> None:
    assert foreign_names(b"") == set()
    assert foreign_names(b"# only a comment") == set()


def test_65533_lines_and_a_large_foreign_part_take_well_below_a_second() -> None:
    """Bounds are generous: the tests share their machine."""
    blocklist = b"".join(b"0.0.0.0 ads%d.example.com # x\n" % number for number in range(100_000))
    hosts = [(IPv4Address(int(SUBNET.network_address) + 2 + i), f"svc-{i}.prod") for i in range(65_533)]
    decoys = b"# ngrokd managed section ngrokd managed section\n" * 10_000
    started = time.monotonic()

    text = render(blocklist + decoys, hosts)
    changed = render(text, hosts[:-1])
    found = survey(changed)

    assert remove(changed) == blocklist + decoys
    assert len(found.own) == 65_532
    assert tail_offset(text, changed) > len(blocklist)
    assert time.monotonic() - started < 6.0
