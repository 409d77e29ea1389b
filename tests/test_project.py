"""The house kept honest: what its papers say exists, and it speaks of nothing but itself."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import pytest

import ngrokd
from ngrokd.cli import app
from ngrokd.config.schema import schema
from ngrokd.errors import Exit
from ngrokd.ops.events import KINDS

ROOT = Path(__file__).parent.parent
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]\n]*\]\(([^)\s]+)\)")
# A command as papers show it: alone in a code span, or on an indented line.
COMMAND = re.compile(r"(?:sudo +)?(?:\.venv/bin/)?(ngrokd|ngrokctl|make)(?= |$)(.*)")


@cache
def tracked() -> list[Path]:
    try:
        listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout, so what belongs to the project is not known")
    return [path for name in listing.split(b"\0") if name and (path := ROOT / os.fsdecode(name)).is_file()]


def papers() -> list[Path]:
    return [path for path in tracked() if path.suffix == ".md"]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def texts() -> dict[str, str]:
    """Everything that people write and read here; not lock files, captures, corpora and the like, programs' work."""
    written = {".py", ".md", ".toml", ".go", ""}
    return {name(path): path.read_text() for path in tracked() if path.suffix in written and "corpus" not in path.parts}


def code_of(paper: Path) -> Iterator[str]:
    """Code spans and the lines of indented and fenced blocks."""
    text = paper.read_text()
    yield from re.findall(r"(?<!`)`([^`\n]+)`(?!`)", FENCED.sub("", text))
    yield from (line.strip() for line in re.findall(r"^ {4}\S.*$", text, re.MULTILINE))
    yield from (line.strip() for block in FENCED.findall(text) for line in block.splitlines()[1:-1])


def commands_in_papers(*programs: str) -> list[tuple[str, list[str]]]:
    """(paper, words after the program) of everything shown as a command of one; optional parts count as given."""
    found = []
    for paper in papers():
        for code in code_of(paper):
            match = COMMAND.fullmatch(code.split("  #")[0].strip())
            if match and match[1] in programs:
                found.append((name(paper), re.sub(r"[\[\]]", "", match[2]).split()))
    return found


# Commands


@pytest.mark.parametrize("target", ["demo", "test", "install", "uninstall"])
def test_readme_shows_what_a_newcomer_needs(target: str) -> None:
    """Two commands to see that it works, one to have it, one to be rid of it."""
    assert f"make {target}" in (ROOT / "README.md").read_text()


def test_every_make_target_in_papers_exists() -> None:
    """And what the Makefile says of itself at its top, and in its help."""
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):(?!=)", makefile, re.MULTILINE))
    shown = {(paper, word) for paper, words in commands_in_papers("make") for word in words[:1]}
    shown |= {("Makefile", word) for word in re.findall(r"^#+ make ([a-z-]+) ", makefile, re.MULTILINE)}
    assert len(shown) > 10

    assert {(paper, word) for paper, word in shown if word not in targets} == set()
    assert targets <= set(" ".join(re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)).split())


def test_every_ngrokd_command_in_papers_exists_with_its_options() -> None:
    """What somebody copies from a page works as it stands there."""
    shown = commands_in_papers("ngrokd", "ngrokctl")
    assert len(shown) > 20
    wrong = []
    for paper, words in shown:
        command: click.Command = app.group
        rest = list(words)
        while rest:
            word = rest.pop(0)
            if word.startswith("-"):
                option = word.partition("=")[0]
                known = {text: entry for entry in [*app.group.params, *command.params] for text in entry.opts}
                if option not in known and option not in ("--help", "-h"):
                    wrong.append((paper, words, word))
                elif option in known and not getattr(known[option], "is_flag", False) and "=" not in word:
                    rest[:1] = []
            elif command is app.group:
                if word not in app.COMMANDS and word not in app.ALIASES:
                    wrong.append((paper, words, word))
                    break
                found = app.group.get_command(click.Context(app.group), word)
                assert found is not None
                command = found
            elif isinstance(command, click.Group):
                inner = command.get_command(click.Context(command), word)
                if inner is None:
                    wrong.append((paper, words, word))
                    break
                command = inner

    assert wrong == []


def test_readme_lists_every_command() -> None:
    """A command that nobody can read about is a command that nobody has."""
    rows = re.findall(r"^\| `ngrokd ([a-z-]+)", (ROOT / "README.md").read_text(), re.MULTILINE)

    assert sorted(rows) == sorted(app.COMMANDS)


# Pages


def test_links_lead_to_files_of_the_project() -> None:
    """Relative ones do; there are no others but to what lies outside."""
    known = {path.resolve() for path in tracked()}
    folders = {folder for path in known for folder in path.parents}
    broken = []
    for paper in papers():
        for target in LINK.findall(FENCED.sub("", paper.read_text())):
            if re.match(r"[a-z]+:", target):
                continue
            path, _, anchor = target.partition("#")
            wanted = (paper.parent / path).resolve() if path else paper.resolve()
            if wanted not in known | folders or (anchor and anchor not in anchors(wanted)):
                broken.append((name(paper), target))

    assert broken == []


def anchors(paper: Path) -> set[str]:
    """The headings of a page as they are linked to."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", paper.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_files_that_papers_name_exist() -> None:
    """A map that shows rooms torn down long ago is worse than none."""
    known = {name(path) for path in tracked()}
    basenames = {path.name for path in tracked()}
    folders = {str(folder) for path in known for folder in Path(path).parents}
    missing = []
    for paper in papers():
        if paper.name == "CHANGELOG.md":  # it tells of the past
            continue
        for code in re.findall(r"(?<!`)`([^`\s]+)`(?!`)", FENCED.sub("", paper.read_text())):
            path = code.rstrip("/")
            if re.fullmatch(r"(?:ngrokd|tun|tests|docs|bench|fuzz|conf|requirements)/[\w./-]*", code):
                if path not in known | folders:
                    missing.append((name(paper), code))
            elif re.fullmatch(r"(?:\w+/)?\w+\.py", code) and not any(each.endswith(f"/{path}") for each in known):
                missing.append((name(paper), code))
    assert "schema.py" in basenames

    assert missing == []


def test_the_map_shows_every_room() -> None:
    """docs/architecture.md is where a newcomer starts; what is not on it does not exist for him."""
    text = (ROOT / "docs/architecture.md").read_text()
    rooms = {name(path) for path in tracked() if path.suffix == ".py" and path.parts[-3:-1] != ()}
    tops = set()
    for path in rooms:
        parts = Path(path).parts
        if parts[0] in ("tun", "ngrokd") and not parts[1].startswith("__"):
            tops.add("/".join(parts[:2]) if len(parts) > 2 else parts[1])

    assert {room for room in tops if room not in text and room.removesuffix(".py") not in text} == set()


def test_decisions_are_numbered_without_gaps_and_listed() -> None:
    """So that a page can be named by its number for ever."""
    pages = sorted(path for path in papers() if path.parent.name == "adr" and path.name != "README.md")
    index = (ROOT / "docs/adr/README.md").read_text()

    assert [page.name[:4] for page in pages] == [f"{number:04}" for number in range(1, len(pages) + 1)]
    for number, page in enumerate(pages, 1):
        title = page.read_text().splitlines()[0]
        assert title.startswith(f"# {number}. ")
        assert f"| [{number}]({page.name}) | {title.removeprefix(f'# {number}. ')} |" in index


# What pages say of the program


def test_exit_codes_are_those_of_the_pages() -> None:
    """Scripts are written from docs/protocol.md."""
    text = (ROOT / "docs/protocol.md").read_text()

    assert {int(code) for code in re.findall(r"^\| (\d+) \| ", text, re.MULTILINE)} == {int(code) for code in Exit}


def test_configuration_keys_that_papers_name_exist() -> None:
    """`net.drain` is one. The keys in the section about the Go daemon are partly its own."""
    sections = schema()
    files = {path.name for path in tracked()} | set(KINDS)  # events have such names too
    unknown = []
    for paper in papers():
        text = re.sub(r"^## The Go daemon$.*?(?=^## )", "", paper.read_text(), flags=re.MULTILINE | re.DOTALL)
        for section, key in re.findall(r"`([a-z]+)\.([a-z_0-9]+)`", text):
            if section in sections and key not in sections[section][1] and f"{section}.{key}" not in files:
                unknown.append((name(paper), f"{section}.{key}"))

    assert unknown == []


def test_control_commands_are_those_of_the_page() -> None:
    """The daemon's table of commands is read from its source: it is made where the daemon is."""
    source = "".join((ROOT / f"ngrokd/daemon/{name}.py").read_text() for name in ("daemon", "observing"))
    commands = set(re.findall(r'^ +"([a-z-]+)": (?:Command|Streaming)\(', source, re.MULTILINE))
    changing = set(re.findall(r'^ +"([a-z-]+)": (?:Command|Streaming)\(.*changes=True', source, re.MULTILINE))
    text = (ROOT / "docs/protocol.md").read_text()
    shown = set(re.findall(r'^ {4}\{"command":"([a-z-]+)"', text, re.MULTILINE)) - {"nonsense"}
    sentence = re.search(r"^(.*) change something\.", text, re.MULTILINE)
    assert sentence is not None

    assert shown == commands
    assert set(re.findall(r"`([^`]+)`", sentence[1])) == changing


# The project


def test_the_version_is_one() -> None:
    """In pyproject.toml, in the package, and not yet in the changelog while it is unreleased."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    assert project["version"] == ngrokd.__version__
    assert "\n## Unreleased\n" in (ROOT / "CHANGELOG.md").read_text()


def test_the_licence_is_there_and_goes_along() -> None:
    """MIT asks for one thing, that its text goes with every copy."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    assert project["license"] == "MIT"
    for pattern in project["license-files"]:
        assert "Permission is hereby granted" in (ROOT / pattern).read_text()


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        (r"(?<![\w.~$])/(?:work|root|home)/\w", "a path of somebody's machine"),
        (r"\b(?:pypi|pythonhosted|npmjs)\.org\b|\bproxy\.golang\b", "where packages come from is for whoever installs"),
        (
            r"(?i)\b(?:issue|ticket|pull request|PR) #?\d+\b|(?<=[\s(])#\d{1,5}\b",
            "a tracker is gone sooner than the code",
        ),
        (r"\b[\w-]+/[\w-]+\.md\b", "a page that is not here"),
        (r"\b(?:TODO|FIXME|XXX)\b", "what is not done is not there"),
    ],
)
def test_the_project_speaks_of_itself_alone(pattern: str, why: str) -> None:
    """Whoever reads this in five years has the repository and nothing else."""
    known = {"bench/RESULTS.md"} | {name(path) for path in tracked()}  # the first is made by `make bench`
    found = [
        (path, match[0])
        for path, text in texts().items()
        if path != name(Path(__file__))
        for match in re.finditer(pattern, text)
        if not any(each.endswith(match[0]) for each in known)
    ]

    assert found == [], why


def test_scripts_can_be_executed() -> None:
    """What begins with an interpreter's name is meant to be started."""
    assert [
        path for path, text in texts().items() if text.startswith("#!") and not os.access(ROOT / path, os.X_OK)
    ] == []
