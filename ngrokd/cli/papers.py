"""The papers about the commands, made from the commands: docs/cli.md and the manual page.

`make docs` writes both into a checkout; tests fail while one is out of date. What a command does is said once, in its
help. Imported by what shows them only.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import click

from ngrokd import __version__
from ngrokd.cli.app import ALIASES, COMMANDS, group
from ngrokd.errors import Exit

PAGE: Final = "docs/cli.md"
MANUAL: Final = "docs/man/ngrokd.1"

MEANINGS: Final[Mapping[int, str]] = {
    Exit.OK: "all went well",
    Exit.NO: "a check answered no",
    Exit.USAGE: "the command line is wrong",
    Exit.NOT_RUNNING: "the daemon is not running",
    Exit.UNREACHABLE: "the API or the ingress cannot be reached, or refuses",
    Exit.INTERNAL: "internal error: a bug, please report it",
    Exit.CANNOT_CREATE: "something cannot be created, or somebody else has it, who is named",
    Exit.OUTPUT: "the output cannot be written: the disk is full",
    Exit.TEMPORARY: "a temporary failure; trying again may help",
    Exit.NOT_PERMITTED: "a right is missing",
    Exit.CONFIG: "the configuration is wrong; every mistake is named",
    130: "it was interrupted (SIGINT, ^C)",
    141: "whoever read its output has gone (SIGPIPE)",
}
ENVIRONMENT: Final[Mapping[str, str]] = {
    "NGROKD_CONFIG": "the configuration file, where --config names none",
    "NGROKD__SECTION__KEY": "any key of the configuration, as in NGROKD__NET__MTU=1400; it goes before the file",
    "NGROKD_SOCKET": "the control socket, where --socket names none",
    "NGROKD_HOSTS_PATH": "the hosts file",
    "NGROKD_LOG_LEVEL, NGROKD_LOG_FORMAT": "what is logged, and in which form",
    "NGROKD_API_KEY_FILE": "a file that holds the API key",
    "NGROK_API_KEY": "the API key itself, the last place where it is looked for",
    "NO_COLOR": "if it is not empty, nothing is coloured; pipes and TERM=dumb never are",
    "VISUAL, EDITOR": 'the editor of "config edit"',
}
FILES: Final[Mapping[str, str]] = {
    "/etc/ngrokd/config.toml": "the configuration; without it all defaults hold",
    "/etc/ngrokd/conf.d/*.toml": "more of it, which goes before that file",
    "/etc/ngrokd": "the state: operator, key, certificate, addresses, the API key that was stored",
    "/var/run/ngrokd.sock": "the control socket; that of the service is /run/ngrokd/ngrokd.sock",
    "/etc/hosts": "the names, in a marked section",
}
_INTRODUCTION: Final = (
    "`ngrokd help COMMAND` prints the same in a terminal; [ngrokd.1](man/ngrokd.1) is the manual page.",
    "`ngrokctl` is the same program under the name that people know from the Go daemon; alone it prints help,",
    "where `ngrokd` runs the daemon.",
)
_ON_JSON: Final = (
    'With `--json` stdout holds one document and nothing else: `{"schema":"ngrokd.list/1","data":[...]}`, or',
    'for a failure `{"schema":"ngrokd.list/1","error":{"code":3,"message":"...","hint":"..."}}`, where `code` is',
    "the exit code. The number behind the slash changes when something is taken away or means something else;",
    "members may be added at any time. Commands that go on print a document on each line, its members beside",
    "`schema`. Each command below names its schema.",
)
# What is printed with --json, where it is not one document.
_STREAMS: Final = frozenset({"events", "logs", "top"})
_ERRORS_ONLY: Final = frozenset({"run"})
_COMMON: Final = frozenset({"config", "socket", "as_json", "verbosity"})


@dataclass(frozen=True, slots=True)
class Entry:
    """One command as the papers show it.

    Attributes:
        name: as it is typed, without the program: "config set".
        usage: what follows the name: "[OPTIONS] KEY VALUE..."; "" for a group.
        paragraphs: what it does.
        options: how each is written, and what it means.
        note: what stands below, or "".
        acts: it does something itself, and is not only the name of a group.
        commands: those of a group.
    """

    name: str
    usage: str
    paragraphs: tuple[str, ...]
    options: tuple[tuple[str, str], ...]
    note: str
    acts: bool
    commands: tuple[str, ...] = ()

    @property
    def answer(self) -> str:
        """What --json prints."""
        schema = f"ngrokd.{self.name.replace(' ', '.')}/1"
        if self.name in _STREAMS:
            return f"{schema}, one on each line"
        return f"{schema}, for errors" if self.name in _ERRORS_ONLY else schema


def entries() -> Iterator[Entry]:
    """Every command, those of a group behind it, in the order of --help."""
    root = click.Context(group, info_name="ngrokd")
    for name in COMMANDS:
        command = group.get_command(root, name)
        assert command is not None
        yield from _entries(command, name, root)


def _entries(command: click.Command, name: str, parent: click.Context) -> Iterator[Entry]:
    ctx = click.Context(command, info_name=name.rpartition(" ")[2], parent=parent)
    inner = command.list_commands(ctx) if isinstance(command, click.Group) else []
    yield Entry(
        name=name,
        usage="" if inner else " ".join(command.collect_usage_pieces(ctx)),
        paragraphs=tuple(_lines_joined(each) for each in (command.help or "").split("\n\n")),
        options=tuple(_options(command, ctx)),
        note=_lines_joined(command.epilog or ""),
        acts=not isinstance(command, click.Group) or command.invoke_without_command,
        commands=tuple(inner),
    )
    for each in inner:
        assert isinstance(command, click.Group)
        found = command.get_command(ctx, each)
        assert found is not None
        yield from _entries(found, f"{name} {each}", ctx)


def _options(command: click.Command, ctx: click.Context, *, common: bool = False) -> Iterator[tuple[str, str]]:
    for parameter in command.params:
        record = parameter.get_help_record(ctx)
        if record is not None and record[1] and (parameter.name in _COMMON) is common:
            yield record[0], _lines_joined(record[1])


def common_options() -> list[tuple[str, str]]:
    """Those that every command takes."""
    return list(_options(group, click.Context(group, info_name="ngrokd"), common=True))


def _lines_joined(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


# The page


def page() -> str:
    """The text of docs/cli.md."""
    return "".join(f"{line}\n" for line in _page_lines())


def _page_lines() -> Iterator[str]:
    yield from (
        "# Commands",
        "",
        "<!-- made from the code by `make docs`: change the help of the command instead -->",
        "",
    )
    yield from _INTRODUCTION
    yield from ("", *_table("command", "", [(_link(name), line) for name, (_, _, line) in COMMANDS.items()]), "")
    yield from ("## For all commands", "")
    yield "They may stand before the command or after it. Data goes to stdout, everything else to stderr."
    yield from ("", *_table("option", "", [(f"`{name}`", _escaped(text)) for name, text in common_options()]), "")
    yield from (*_ON_JSON, "")
    yield from ("## Exit codes", "")
    yield from (*_table("code", "", [(str(int(code)), text) for code, text in MEANINGS.items()]), "")
    yield from ("## Environment", "")
    yield from (*_table("variable", "", [(f"`{name}`", _escaped(text)) for name, text in ENVIRONMENT.items()]), "")
    yield "Where the API key is looked for, in which order: [The API key](operations.md#the-api-key)."
    for entry in entries():
        yield from ("", *_entry_lines(entry))


def _entry_lines(entry: Entry) -> Iterator[str]:
    depth = "###" if " " in entry.name else "##"
    yield from (f"{depth} {entry.name}", "")
    if entry.acts:
        yield from (f"    ngrokd {entry.name} {entry.usage}".rstrip(), "")
    for paragraph in entry.paragraphs:
        yield from (_escaped(paragraph), "")
    if entry.options:
        yield from (*_table("option", "", [(f"`{name}`", _escaped(text)) for name, text in entry.options]), "")
    if entry.note:
        yield from (_escaped(entry.note), "")
    short = [alias for alias, name in ALIASES.items() if name == entry.name]
    if short:
        yield from (f"For short: `{short[0]}`.", "")
    if entry.acts:
        schema, _, more = entry.answer.partition(", ")
        yield f"JSON: `{schema}`{f', {more}' if more else ''}"
    if entry.commands:
        yield from ([""] * entry.acts)
        yield f"Commands: {', '.join(f'`{name}`' for name in entry.commands)}"


def _link(name: str) -> str:
    return f"[`{name}`](#{name})"


def _table(first: str, second: str, rows: Sequence[tuple[str, str]]) -> Iterator[str]:
    yield from (f"| {first} | {second} |", "|---|---|")
    yield from (f"| {left.replace('|', chr(92) + '|')} | {right} |" for left, right in rows)


def _escaped(text: str) -> str:
    return re.sub(r"([|*\\])", r"\\\1", text).replace("<", "&lt;")


# The manual page


def manual() -> str:
    """The text of ngrokd(1), for man."""
    return "".join(f"{line}\n" for line in _manual_lines())


def _manual_lines() -> Iterator[str]:
    yield '.\\" Made from the code by `make docs`.'
    yield f'.TH NGROKD 1 "" "ngrokd {__version__}" "User Commands"'
    yield from (".SH NAME", "ngrokd, ngrokctl \\- reach ngrok's kubernetes\\-bound endpoints by name")
    yield from (".SH SYNOPSIS", ".B ngrokd", "[\\fIOPTIONS\\fR] [\\fICOMMAND\\fR [\\fIARGUMENTS\\fR]]")
    yield ".SH DESCRIPTION"
    for number, paragraph in enumerate((group.help or "").split("\n\n")):
        yield from ([".PP"] * bool(number) + [_roff(_lines_joined(paragraph))])
    yield from (".PP", "ngrokctl is the same program; without a command it prints help.")
    yield ".SH OPTIONS"
    yield "They may stand before the command or after it."
    yield from _roff_items(common_options())
    yield ".SH COMMANDS"
    for entry in entries():
        yield from _manual_entry(entry)
    yield from (".SH EXIT STATUS", *_roff_items((str(int(code)), text) for code, text in MEANINGS.items()))
    yield from (".SH ENVIRONMENT", *_roff_items(ENVIRONMENT.items()))
    yield from (".SH FILES", *_roff_items(FILES.items()))
    yield ".SH SEE ALSO"
    yield ".BR hosts (5),"
    yield ".BR systemd.service (5),"
    yield ".BR wireshark (1)"


def _manual_entry(entry: Entry) -> Iterator[str]:
    if not entry.acts:
        yield f".SS {_roff(entry.name)}"
    else:
        yield f'.SS "{_roff(f"{entry.name} {entry.usage}".rstrip())}"'
    for number, paragraph in enumerate(entry.paragraphs):
        yield from ([".PP"] * bool(number) + [_roff(paragraph)])
    yield from _roff_items(entry.options)
    if entry.note:
        yield from (".PP", _roff(entry.note))
    if entry.acts:
        yield from (".PP", _roff(f"JSON: {entry.answer}"))


def _roff_items(items: Iterable[tuple[str, str]]) -> Iterator[str]:
    for name, text in items:
        yield from (".TP", f".B {_roff(name)}", _roff(text))


def _roff(text: str) -> str:
    """Text that troff takes as it stands: it knows a backslash, a quote, a minus, and what may begin a line."""
    shown = text.replace("\\", "\\e").replace("-", "\\-").replace('"', "\\(dq")
    return f"\\&{shown}" if shown.startswith((".", "'")) else shown


def main() -> None:
    """Write both into the checkout that is the current directory."""
    for path, text in ((PAGE, page()), (MANUAL, manual())):
        with open(path, "w") as file:
            file.write(text)
        print(path, file=sys.stderr)


if __name__ == "__main__":
    main()
