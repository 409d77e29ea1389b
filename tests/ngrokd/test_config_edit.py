"""Editing the configuration: what is asked for changes, and nothing else, byte for byte."""

from __future__ import annotations

import os
import stat
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import tomli
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ngrokd.config_edit import (
    EditError,
    format_key,
    format_value,
    has_value,
    parse_key,
    rewrite,
    set_value,
    unset_value,
)
from ngrokd.errors import ConfigError, PermissionMissingError, StateError

ROOT = Path(__file__).resolve().parents[2]

COMMENTED = "".join(
    f"# line {3 * number + 1}\n[s{number}]\t # of its own\nkey{number}  =  {number} # why\n" for number in range(34)
)


def changed_lines(before: str, after: str) -> tuple[list[str], list[str]]:
    """What was removed and what was added, when everything around it is the same."""
    old, new = before.splitlines(keepends=True), after.splitlines(keepends=True)
    while old and new and old[0] == new[0]:
        del old[0], new[0]
    while old and new and old[-1] == new[-1]:
        del old[-1], new[-1]
    return old, new


# Setting


def test_setting_a_key_in_a_commented_file_of_100_lines_changes_one_line() -> None:
    """What people wrote around it stays: spacing, comments, order."""
    assert COMMENTED.count("\n") >= 100

    removed, added = changed_lines(COMMENTED, set_value(COMMENTED, ("s20", "key20"), 99))

    assert removed == ["key20  =  20 # why\n"]
    assert added == ["key20  =  99 # why\n"]


def test_a_key_that_stands_commented_out_is_set_beneath_its_explanation() -> None:
    """In the shipped file, where each key does."""
    shipped = (ROOT / "conf" / "ngrokd.toml").read_text()

    edited = set_value(shipped, ("net", "drain"), "5s")

    assert changed_lines(shipped, edited) == ([], ['drain = "5s"\n'])
    assert '#drain = "3s"\ndrain = "5s"\n' in edited
    assert unset_value(edited, ("net", "drain")) == shipped


@pytest.mark.parametrize(
    ("before", "value", "after"),
    [
        ("", 1, "[a]\nk = 1\n"),
        ("# only a comment", 1, "# only a comment\n\n[a]\nk = 1\n"),
        ("[b]\nx = 1\n", 1, "[b]\nx = 1\n\n[a]\nk = 1\n"),
        ("[a]", 1, "[a]\nk = 1"),
        ("[a] # here\n\n[b]\n", 1, "[a] # here\nk = 1\n\n[b]\n"),
        ("[a]\n  x = 1 # last\n\n# of b\n[b]\n", 1, "[a]\n  x = 1 # last\n  k = 1\n\n# of b\n[b]\n"),
        ("[a]\n#k = [\n#  1,\n#]\n# next\n#x = 2\n", 1, "[a]\n#k = [\n#  1,\n#]\nk = 1\n# next\n#x = 2\n"),
        ("[a]\n# k = what this is\n", 1, "[a]\n# k = what this is\nk = 1\n"),
        ("[a]\n# Not k = 5 here\nx = '#k = 5'\n", 1, "[a]\n# Not k = 5 here\nx = '#k = 5'\nk = 1\n"),
        ("[b]\n#k = 5\n[a]\n", 1, "[b]\n#k = 5\n[a]\nk = 1\n"),
        ("a = { x = 1 }\n", 1, "a = { x = 1, k = 1 }\n"),
        ("a = {} # empty\n", 1, "a = { k = 1 } # empty\n"),
        ("a.x = 1 # dotted\ny = 2\n", 1, "a.x = 1 # dotted\na.k = 1\ny = 2\n"),
        ("[a.sub]\nx = 1\n", 1, "[a.sub]\nx = 1\n\n[a]\nk = 1\n"),
        ("[ 'a' ]\n\"k\" = 0\n", 1, "[ 'a' ]\n\"k\" = 1\n"),
        ("[a]\nk = 0 \t# tab\n", 1, "[a]\nk = 1 \t# tab\n"),
        ("[a]\r\nk = 0 # x\r\nz = 1\r\n", 1, "[a]\r\nk = 1 # x\r\nz = 1\r\n"),
        ("[a]\r\n", 1, "[a]\r\nk = 1\r\n"),
        ("\ufeff[a]\nk = 0", 1, "\ufeff[a]\nk = 1"),
        ("[a]\nk = 'raw'\n", "new", "[a]\nk = 'new'\n"),
        ("[a]\nk = 'raw'\n", "it's", '[a]\nk = "it\'s"\n'),
        ('[a]\nk = """\nlong\n""" # x\n', "new", '[a]\nk = "new" # x\n'),
        ("[a]\nk = [\n\t'x', # of x\n]\n", ["y", "z"], "[a]\n# of x\nk = [\n\t'y',\n\t'z',\n]\n"),
        ("[a]\nk = 2001-02-03 04:05:06 # day\n", True, "[a]\nk = true # day\n"),
        ("[a]\n  k = [ # one\n  ] # two\n", [], "[a]\n  # one\n  k = [] # two\n"),
    ],
)
def test_a_key_is_set_where_it_belongs(before: str, value: object, after: str) -> None:
    """Whatever form its table has."""
    assert set_value(before, ("a", "k"), value) == after
    assert has_value(after, ("a", "k"))


def test_a_key_of_a_table_within_a_section_is_set() -> None:
    """Such a table may be a section of its own, dotted keys or an inline table."""
    path = ("net", "overrides", "my.host")

    assert set_value("", path, "x") == '[net.overrides]\n"my.host" = "x"\n'
    assert set_value('[net]\noverrides.b = "y"\n', path, "x") == (
        '[net]\noverrides.b = "y"\noverrides."my.host" = "x"\n'
    )
    assert set_value("[net]\noverrides = {}\n", path, "x") == '[net]\noverrides = { "my.host" = "x" }\n'
    assert set_value("net = { a = 1 }\n", path, "x") == 'net = { a = 1, overrides."my.host" = "x" }\n'


@pytest.mark.parametrize(
    "text",
    ["a = 5\n", "[[a]]\nx = 1\n", "[a.k]\nx = 1\n", "not toml", "a = [1]\n", "[a]\nk.x = 1\n", f"a={'9' * 9999}"],
)
def test_what_cannot_be_edited_is_refused(text: str) -> None:
    """Rather than guessed at."""
    with pytest.raises(EditError):
        set_value(text, ("a", "k"), 1)


# Removing


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("[a]\nx = 1\nk = 2\ny = 3\n", "[a]\nx = 1\ny = 3\n"),
        ("[a]\n  k = 2 # why\ny = 3\n", "[a]\n  # why\ny = 3\n"),
        ("[a]\nk = [ # one\n  1, # two\n] # three", "[a]\n# one\n# two\n# three\n"),
        ("a = { k = 1 }\n", "a = { }\n"),
        ("a = { k = 1, x = 2 }\n", "a = { x = 2 }\n"),
        ("a = { x = 2, k = 1 } # c\n", "a = { x = 2 } # c\n"),
        ("a.k = 1\nb = 2", "b = 2"),
        ("[a]\r\nk = 1\r\n# end\r\n", "[a]\r\n# end\r\n"),
        ("[a]\nx = 1\n", "[a]\nx = 1\n"),
        ("a = 5\n", "a = 5\n"),
    ],
)
def test_a_key_is_removed_with_its_line_and_its_comments_stay(before: str, after: str) -> None:
    assert unset_value(before, ("a", "k")) == after


def test_a_table_is_not_removed_by_its_name() -> None:
    with pytest.raises(EditError, match="is a table"):
        unset_value("[a.k]\nx = 1\n", ("a", "k"))


# Any edit of any file


@dataclass
class Made:
    """A text that was made up, and what is in it."""

    text: str = ""
    comments: list[str] = field(default_factory=list)
    spans: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)


_VALUES = st.one_of(
    st.integers(-99, 99),
    st.booleans(),
    st.text("ab#\"'\\\n\t\x7f\u2028é[]{}=, ", max_size=8),
    st.lists(st.text("ab#,]'\" ", max_size=4), max_size=3),
)


@st.composite
def files(draw: st.DrawFn) -> Made:
    """Sections with keys in all forms, commented in all places, with odd spacing; each comment has a number."""
    made = Made()
    newline = draw(st.sampled_from(["\n", "\n", "\r\n"]))

    def comment() -> str:
        made.comments.append(f"# c{len(made.comments):03}c")
        return made.comments[-1] + draw(st.sampled_from(["", " k = 1", ' "', " ]"]))

    def space() -> str:
        return draw(st.sampled_from(["", " ", "\t", "  "]))

    def value(item: object) -> str:
        if isinstance(item, list):
            if draw(st.booleans()):
                return format_value(item)
            parts = [f"{space()}{value(each)},{space()}{comment()}{newline}" for each in item]
            return f"[{space()}{comment()}{newline}{''.join(parts)}{space()}]"
        if isinstance(item, str) and "'" not in item and item.isprintable() and draw(st.booleans()):
            return f"'{item}'"
        if isinstance(item, str) and draw(st.booleans()) and item.isprintable() and "\\" not in item:
            inner = item.replace('"', '\\"')
            return f'"""{newline}{inner}{newline}k = 5 # no comment{newline}"""'
        return format_value(item)

    for section in draw(st.permutations(["a", "b", "c"])):
        form = draw(st.sampled_from(["none", "header", "header", "header", "dotted"]))
        if form == "none" or (form == "dotted" and "[" in made.text):
            continue
        for _ in range(draw(st.integers(0, 2))):
            made.text += space() + draw(st.sampled_from([comment(), ""])) + newline
        if form == "header":
            made.text += (
                f"{space()}[{space()}{section}{space()}]{space()}{draw(st.sampled_from(['', comment()]))}{newline}"
            )
        for key in draw(st.lists(st.sampled_from(["k", "l", "m"]), unique=True)):
            if draw(st.booleans()):
                made.text += f"{space()}{comment()}{newline}"
            start = len(made.text)
            name = draw(st.sampled_from([key, f'"{key}"', f"'{key}'"]))
            name = f"{section}{space()}.{space()}{name}" if form == "dotted" else name
            end = draw(st.sampled_from(["", "x"])) and f"{space()}{comment()}"
            made.text += f"{space()}{name}{space()}={space()}{value(draw(_VALUES))}{end}{newline}"
            made.spans[section, key] = start, len(made.text)
    # Those that were drawn and not used.
    made.comments = [each for each in made.comments if each in made.text]
    if draw(st.booleans()):
        made.text = made.text.removesuffix(newline)
    return made


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(files(), st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("klm"), st.none() | _VALUES), max_size=4))
def test_no_edit_loses_a_comment_or_touches_anything_else(made: Made, edits: list[tuple[str, str, object]]) -> None:
    """The parser is the judge of the values, the numbers of the comments; the rest is compared byte for byte."""
    text = made.text
    document = tomli.loads(text)
    for number, (section, key, value) in enumerate(edits):
        path = (section, key)

        edited = unset_value(text, path) if value is None else set_value(text, path, value)

        if value is None:
            document.get(section, {}).pop(key, None)
        else:
            document.setdefault(section, {})[key] = value
        found = tomli.loads(edited)
        assert {name: found.get(name, {}) for name in "abc"} == {name: document.get(name, {}) for name in "abc"}
        for comment in made.comments:
            assert edited.count(comment) == 1
        if number == 0:
            start, end = made.spans.get(path, (-1, -1))
            assert start < 0 or (edited.startswith(text[:start]) and edited.endswith(text[end:]))
            if start < 0:  # something was added in one place
                removed, added = changed_lines(text, edited)
                assert "".join(removed).rstrip("\r\n") in "".join(added)
        text = edited


@given(st.text(max_size=12))
@example("\x00\x1f\x7f\x85\u2028\ud7ff\U0001f600\"'\\")
def test_any_text_can_be_a_value_and_a_key(text: str) -> None:
    """Quoted as TOML asks for, and read again as it was."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        return

    assert tomli.loads(f"k = {format_value(text)}") == {"k": text}
    assert tomli.loads(f"k = {format_value([text, text])}") == {"k": [text, text]}
    assert tomli.loads(f"k = {format_value({text: True})}") == {"k": {text: True}}
    assert parse_key(format_key(("net", text))) == ("net", text)


@pytest.mark.parametrize("text", ["", ".", "a.", "a=1", "a\nb", "[a]", "a b", "a.'b", "a#b", "#"])
def test_what_is_no_key_is_told_apart(text: str) -> None:
    with pytest.raises(ValueError, match="not a key"):
        parse_key(text)


# Files


def test_mode_owner_and_link_are_kept(tmp_path: Path) -> None:
    """A link from a folder of dotfiles stays one, and a private file private."""
    target, link = tmp_path / "real.toml", tmp_path / "config.toml"
    target.write_text("[a]\nk = 1\n")
    target.chmod(0o640)
    link.symlink_to("real.toml")
    if os.geteuid() == 0:
        os.chown(target, 12, 34)
    before = target.stat()

    change = rewrite(str(link), lambda text: set_value(text, ("a", "k"), 2))

    after = target.stat()
    assert (change.before, change.after, change.created) == ("[a]\nk = 1\n", "[a]\nk = 2\n", False)
    assert link.is_symlink()
    assert target.read_text() == "[a]\nk = 2\n"
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    assert sorted(os.listdir(tmp_path)) == ["config.toml", "real.toml"]


def test_a_missing_file_is_made_with_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "new" / "config.toml"

    change = rewrite(str(path), lambda text: set_value(text, ("a", "k"), 2))

    assert change.created
    assert path.read_text() == "[a]\nk = 2\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert os.listdir(path.parent) == ["config.toml"]


def test_a_refused_edit_and_an_unchanged_text_write_nothing(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("[a]\nk = 1\n")
    before = path.stat()

    def refuse(_text: str) -> str:
        raise ConfigError("no")

    with pytest.raises(ConfigError):
        rewrite(str(path), refuse)
    rewrite(str(path), lambda text: text)
    rewrite(str(tmp_path / "none.toml"), lambda text: text)

    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert path.stat().st_ino == before.st_ino
    assert os.listdir(tmp_path) == ["c.toml"]


def test_an_edit_by_others_in_between_is_taken_along(tmp_path: Path) -> None:
    """Somebody's editor saves while we think: we think again."""
    path = tmp_path / "c.toml"
    path.write_text("[a]\nk = 1\n")
    others = iter([f"[a]\nk = 1\nx = {number}\n" for number in range(3)])

    def edit(text: str) -> str:
        other = next(others, None)
        if other is not None:
            (tmp_path / "new").write_text(other)
            (tmp_path / "new").rename(path)
        return set_value(text, ("a", "k"), 2)

    rewrite(str(path), edit)

    assert path.read_text() == "[a]\nk = 2\nx = 2\n"


def test_edits_at_the_same_time_all_arrive(tmp_path: Path) -> None:
    """Also where the first of them makes the file."""
    path = str(tmp_path / "c.toml")

    def work(name: str) -> None:
        for number in range(10):
            rewrite(path, lambda text: set_value(text, ("a", f"{name}{number}"), number))  # noqa: B023 - used at once

    threads = [threading.Thread(target=work, args=(name,)) for name in "xyz"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(tomli.loads(Path(path).read_text())["a"]) == 30
    assert os.listdir(tmp_path) == ["c.toml"]


def test_what_is_no_file_of_text_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "long").write_bytes(b"#" * ((1 << 20) + 1))

    with pytest.raises(StateError):
        rewrite(str(tmp_path), lambda text: text + "#")
    with pytest.raises(StateError):
        rewrite(str(tmp_path / "fifo"), lambda text: text + "#")
    with pytest.raises(ConfigError):
        rewrite(str(tmp_path / "binary"), lambda text: text + "#")
    with pytest.raises(StateError):
        rewrite(str(tmp_path / "long"), lambda text: text + "#")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_who_may_not_write_is_told_what_helps(tmp_path: Path) -> None:
    """In another process, since the identity is the whole process's."""
    path = tmp_path / "c.toml"
    path.write_text("")
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setresuid(65534, 65534, 65534)
            rewrite(str(path), lambda text: text + "#")
        except PermissionMissingError as error:
            code = 0 if "sudo" in error.remedy else 2
        finally:
            os._exit(code)

    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
