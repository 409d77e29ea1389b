"""docs/cli.md and the manual page are what the commands say of themselves."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ngrokd.cli import papers
from ngrokd.cli.app import COMMANDS
from ngrokd.cli.context import Context
from ngrokd.errors import Exit

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(("path", "made"), [(papers.PAGE, papers.page), (papers.MANUAL, papers.manual)])
def test_the_papers_are_as_the_commands_make_them(path: str, made: Callable[[], str]) -> None:
    """Run `make docs`; what a command is for stands in its help."""
    assert (ROOT / path).read_text() == made()


def test_the_papers_do_not_depend_on_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor on the machine: they are compared everywhere."""
    before = papers.page(), papers.manual()
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("NGROKD_CONFIG", "/nonexistent")

    assert (papers.page(), papers.manual()) == before


def test_every_command_is_on_the_page_once() -> None:
    names = [entry.name for entry in papers.entries()]
    headings = re.findall(r"^###? ([a-z][a-z -]*)$", papers.page(), re.MULTILINE)

    assert headings == names
    assert len(set(names)) == len(names)
    assert [name for name in names if " " not in name] == list(COMMANDS)
    assert {"config set", "flows close", "metrics write", "service install"} <= set(names)


def test_every_command_and_option_is_explained() -> None:
    """In some words: an option without any is one that nobody can use."""
    for entry in papers.entries():
        assert len(" ".join(entry.paragraphs).split()) >= 3, entry.name
        for option, text in entry.options:
            assert text, (entry.name, option)


def test_every_exit_code_has_a_meaning() -> None:
    assert set(papers.MEANINGS) == {int(code) for code in Exit} | {130, 141}


def test_no_text_is_troffs_to_interpret() -> None:
    """A line that begins with a dot would be taken for a request, and what stands there would be missing."""
    for line in papers.manual().splitlines():
        if line.startswith((".", "'")):
            assert re.match(r"\.(\\\"|TH|SH|SS|PP|TP|B |BR )", line), line


@pytest.mark.skipif(shutil.which("groff") is None, reason="there is no groff here")
def test_troff_takes_the_manual_page() -> None:
    """Without a warning, and with everything in it."""
    done = subprocess.run(
        ["groff", "-man", "-Tascii", "-ww", "-P-c"], input=papers.manual(), capture_output=True, text=True, check=True
    )
    shown = re.sub(r".\x08", "", done.stdout)

    assert done.stderr == ""
    assert "config set [OPTIONS] KEY VALUE..." in shown
    assert 'say "net.drain=10s"' in re.sub(r"\s+", " ", shown)


def test_the_schema_on_the_page_is_the_one_that_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """Both come from the name of the command."""
    Context(command="config.set").print_document({})
    found = {entry.name: entry.answer for entry in papers.entries()}

    assert f'"{found["config set"]}"' in capsys.readouterr().out
    assert found["top"] == "ngrokd.top/1, one on each line"
