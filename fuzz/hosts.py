"""The editor of the hosts file, on arbitrary files.

* `render` twice is `render` once; `remove(render(f)) == f` for a file without our markers, else it is `remove(f)`;
* foreign bytes stay: a file without markers is a prefix of the rendered one, another instance's section too;
* between the markers stand exactly the entries, one `ADDRESS<TAB>NAME` a line; what is no name is refused whole;
* the survey finds the same foreign names before and after, and our own ones in our section;
* a tail write that begins at `tail_offset` gives the new file.
"""

# ruff: noqa: PT017 - what an error says is one of the invariants

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv4Network
from typing import Final

from fuzz.reading import Source
from ngrokd.names import hosts

CORPUS: Final = "hosts"
MAX_LEN: Final = 600
TOKENS: Final = (
    b"# BEGIN ngrokd managed section\n", b"# END ngrokd managed section\n",
    b"# BEGIN ngrokd managed section (ngrokd1)\n", b"# END ngrokd managed section (ngrokd1)\n", b"\r\n", b"\n",
    b"10.107.0.2\ta.prod\n", b"127.0.0.1\tlocalhost\n", b"# (the text above ends without a newline)\n",
    b"127.0.1.1\tmyhost\n", b"\xef\xbb\xbf", b"::1\tip6-localhost\n", b" ngrokd managed section", b"# ",
)  # fmt: skip

SUBNET: Final = IPv4Network("10.107.0.0/16")
MARKED: Final = b" ngrokd managed section"
LINE: Final = re.compile(rb"10\.107\.[0-9]{1,3}\.[0-9]{1,3}\t[a-z0-9_](?:[a-z0-9_.-]*[a-z0-9])?")
NAMES: Final = (
    "a.prod",
    "b.prod",
    "my-api.ngrok.app",
    "_grpc.api",
    "x" * 63 + ".y",
    "localhost",
    "A.prod",
    "a b",
    "ip6-x",
    "a..b",
)


def run_one(data: bytes) -> None:
    """One file, some entries, one of two instances."""
    source = Source(data)
    mode = source.byte()
    instance = (None, "ngrokd1", "ngrokd0")[mode % 3]
    subnet = SUBNET if mode & 4 else None
    count = mode >> 4
    entries = [(IPv4Address(f"10.107.{source.byte()}.{source.byte()}"), name_of(source)) for _ in range(count & 7)]
    text = source.rest()
    removed = hosts.remove(text, instance, subnet=subnet)
    assert hosts.remove(removed, instance, subnet=subnet) == removed or not clean(removed)
    try:
        rendered = hosts.render(text, entries, instance, subnet=subnet)
    except hosts.HostsRefused as error:
        assert str(error).isprintable()
        assert any(re.fullmatch(r"[a-z0-9_.-]+", name) is None or name in NAMES or odd(name) for _, name in entries)
        return
    assert hosts.render(rendered, entries, instance, subnet=subnet) == rendered, "not the same twice"
    assert hosts.remove(rendered, instance, subnet=subnet) == removed, "the section leaves something behind"
    check_section(rendered, removed, entries, instance)
    check_survey(text, rendered, entries, instance, subnet)
    check_others(text, rendered, entries, instance, subnet)
    check_tail(text, rendered)
    check_tail(rendered, removed)


def name_of(source: Source) -> str:
    """Mostly a name, sometimes anything."""
    what = source.byte()
    if what < 200:
        return NAMES[what % 5]
    if what < 220:
        return NAMES[what % len(NAMES)]
    return source.take(what & 15).decode("latin-1")


def odd(name: str) -> bool:
    """Names that may stand in no hosts file though all their characters may."""
    return (
        not name
        or name[0] in ".-"
        or name[-1] in ".-_"
        or ".." in name
        or name.endswith(".localhost")
        or len(name) > 250
    )


def clean(text: bytes) -> bool:
    """Is there no marker of anybody in it?"""
    return MARKED not in text


def check_section(
    rendered: bytes, removed: bytes, entries: list[tuple[IPv4Address, str]], instance: str | None
) -> None:
    if not entries:
        assert rendered == removed
        return
    suffix = b"" if instance in (None, "ngrokd0") else b" (ngrokd1)"
    begin, end = b"# BEGIN" + MARKED + suffix + b"\n", b"# END" + MARKED + suffix + b"\n"
    at = rendered.rfind(begin)
    assert at >= 0
    assert at == 0 or rendered[at - 1 : at] == b"\n"
    stop = rendered.index(end, at)
    lines = rendered[at + len(begin) : stop].split(b"\n")
    assert lines.pop() == b""
    if lines[0].startswith(b"#"):
        assert lines.pop(0) + b"\n" == b"# (the text above ends without a newline)\n"
    assert all(LINE.fullmatch(line) for line in lines), lines
    assert {line.decode() for line in lines} == {f"{address}\t{name}" for address, name in entries}
    assert len(lines) == len(set(entries))
    if clean(removed):
        # At the end, perhaps behind a newline of ours, or where it stood already.
        before, behind = rendered[:at], rendered[stop + len(end) :]
        assert before + behind == removed or (before == removed + b"\n" and not behind)


def check_survey(
    text: bytes,
    rendered: bytes,
    entries: list[tuple[IPv4Address, str]],
    instance: str | None,
    subnet: IPv4Network | None,
) -> None:
    after = hosts.survey(rendered, instance, subnet=subnet)
    if not clean(text):
        return
    before = hosts.survey(text, instance, subnet=subnet)
    assert before.foreign == after.foreign
    assert not before.own
    assert set(after.own) == {name for _, name in entries}
    assert not after.elsewhere
    model = {word.decode("latin-1") for line in text.split(b"\n") for word in line.split(b"#")[0].lower().split()}
    assert before.foreign == {word.removesuffix(".") for word in model}


def check_others(
    text: bytes,
    rendered: bytes,
    entries: list[tuple[IPv4Address, str]],
    instance: str | None,
    subnet: IPv4Network | None,
) -> None:
    """Another instance comes and goes, and nobody notices."""
    if not clean(text):
        return
    other = "ngrokd7"
    both = hosts.render(rendered, [(IPv4Address("10.108.0.2"), "c.prod")], other, subnet=subnet)
    assert both.startswith(rendered)
    assert hosts.remove(both, other, subnet=subnet) == rendered
    survey = hosts.survey(both, instance, subnet=subnet)
    assert survey.elsewhere == {"c.prod": other}
    if entries:
        assert hosts.remove(hosts.remove(both, instance, subnet=subnet), other, subnet=subnet) in (text, text + b"\n")


def check_tail(old: bytes, new: bytes) -> None:
    offset = hosts.tail_offset(old, new)
    assert 0 <= offset <= min(len(old), len(new))
    assert old[:offset] + new[offset:] == new
    assert offset in (0, len(new)) or new[offset - 1 : offset] == b"\n"


if __name__ == "__main__":
    from fuzz.driver import main

    main(__file__)
