"""`ngrokd config`: look at the configuration, change it, and be told what is wrong with it.

Nothing here asks the daemon; a running one notices by itself that the file has changed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

import click

from ngrokd.cli.context import Context, command, common_options, setting_option
from ngrokd.cli.output import clean, paint, print_lines, warn
from ngrokd.errors import ConfigError, TakenError

if TYPE_CHECKING:
    from ngrokd.config import Settings
    from ngrokd.config.schema import Leaf

MAX_STDIN_CHARS: Final = 64 << 10
ORIGIN_COLUMN: Final = 44  # where the origins stand at the latest, unless a value is longer
_WHEN: Final = {
    "live": "a running daemon takes it over",
    "new flows only": "a running daemon takes it over for new connections",
    "restart": "it takes effect when the daemon starts the next time",
}


def _complete_key(_ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """What a shell offers for a key: the section first, then its keys."""
    from ngrokd.config import all_keys

    found = [key for key in all_keys() if key.startswith(incomplete)]
    if "." in incomplete or len(found) <= 1:
        return found
    return sorted({key.partition(".")[0] + "." for key in found})


class OrderedGroup(click.Group):
    """Commands in the order in which they were added."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click calls it so
        """The names."""
        return list(self.commands)


@click.group("config", cls=OrderedGroup, context_settings={"help_option_names": ["-h", "--help"]})
@common_options
def config() -> None:
    """Show, change and check the configuration.

    Keys are written as in "net.mtu". What is to be written is checked as a whole before; comments, order and spacing
    of the file stay as they are.
    """


# Looking


@command("config path")
def path(context: Context) -> None:
    """Print where the configuration is read.

    The file of --config, of $NGROKD_CONFIG, or the default one. Files in conf.d beside it count too.
    """
    from ngrokd.config import find_file, find_files

    file = find_file(context.config or None, context.environ)
    if context.as_json:
        found = [each for each in find_files(context.config or None, context.environ) if os.path.exists(each)]
        context.print_document({"file": file, "exists": file in found, "files": found})
        return
    print_lines([clean(file)])
    if not os.path.exists(file):
        click.echo("there is no such file, so defaults hold; write one with: ngrokd config init", err=True)


@command("config show")
@click.argument("names", metavar="[SECTION|KEY]...", nargs=-1)
@click.option("--origin", is_flag=True, help="Say where each value comes from.")
@click.option("--changed", is_flag=True, help="Leave out what is at its default.")
@setting_option
def show(context: Context, names: tuple[str, ...], origin: bool, changed: bool) -> None:
    """Show what holds, and where it comes from.

    Files, environment and options are put together, the later before the earlier. Secrets are shown as "***".
    """
    settings = context.load_settings()
    chosen = [leaf for leaf in _chosen(names) if not changed or leaf.path in settings.origins]
    if context.as_json:
        context.print_document(_shown(settings, chosen))
        return
    lines: list[str] = []
    section = ""
    column = min(max((len(_line(settings, leaf)) for leaf in chosen), default=0), ORIGIN_COLUMN)
    for leaf in chosen:
        if leaf.section != section:
            section = leaf.section
            lines += [""] * bool(lines) + [paint(f"[{section}]", "bold")]
        line = _line(settings, leaf)
        if origin:
            comment = f"# {clean(settings.origins.get(leaf.path, 'default'))}"
            line = f"{line.ljust(column)}  {paint(comment, 'dim')}"
        lines.append(line)
    print_lines(lines)


def _shown(settings: Settings, leaves: Sequence[Leaf]) -> dict[str, object]:
    from ngrokd.config import shown_value

    values: dict[str, dict[str, object]] = {}
    for leaf in leaves:
        values.setdefault(leaf.section, {})[leaf.key] = shown_value(settings, leaf)
    origins = {leaf.path: settings.origins.get(leaf.path, "default") for leaf in leaves}
    return {"file": settings.file, "files": list(settings.files), "settings": values, "origins": origins}


def _line(settings: Settings, leaf: Leaf) -> str:
    from ngrokd.config import shown_value
    from ngrokd.config_edit import format_value

    return f"{leaf.key} = {format_value(shown_value(settings, leaf))}"


@command("config get")
@click.argument("key", shell_complete=_complete_key)
@setting_option
def get(context: Context, key: str) -> None:
    """Print the value of one key.

    Texts and numbers are printed as they are, lists as in TOML, secrets as "***".
    """
    from ngrokd.config import shown_value
    from ngrokd.config_edit import format_value

    leaf = _leaf(key)
    settings = context.load_settings()
    value = shown_value(settings, leaf)
    if context.as_json:
        origin = settings.origins.get(leaf.path, "default")
        context.print_document({"key": leaf.path, "value": value, "origin": origin})
    else:
        print_lines([clean(value) if isinstance(value, str) else format_value(value)])


@command("config validate")
@click.argument("file", required=False, type=click.Path())
@setting_option
def validate(context: Context, file: str | None) -> None:
    """Name every mistake, with its line.

    The configuration is checked as "run" does it, a FILE that is named by itself. Exit code 78 when something is wrong.
    """
    if file is None:
        settings = context.load_settings()
        files, warnings = list(settings.files), list(settings.warnings)
    else:
        from ngrokd.config import load_alone

        load_alone(file)
        files, warnings = [os.path.abspath(file)], []
    if context.as_json:
        context.print_document({"valid": True, "files": files, "warnings": warnings})
        return
    print_lines([f"{clean(each)}: ok" for each in files] or ["there is no configuration file; all defaults hold"])
    for warning in warnings:
        warn(warning)


@command("config schema")
def schema(context: Context) -> None:
    """Print a JSON Schema for editors.

    With it they complete and check. In a file beside the configuration, it is named by the first line
    "#:schema ngrokd.schema.json".
    """
    from ngrokd.config.manual import json_schema, schema_text

    if context.as_json:
        context.print_document(json_schema())
    else:
        print_lines([schema_text().rstrip("\n")])


# Changing


@command("config init")
@click.option("--stdout", "to_stdout", is_flag=True, help="Print it instead.")
def init(context: Context, to_stdout: bool) -> None:
    """Write a file that explains every key.

    All keys are in it at their defaults, commented out. A file that is there already is left alone: exit code 73.
    """
    from ngrokd.config.manual import commented_file
    from ngrokd.config_edit import NEW_FILE_MODE

    if to_stdout:
        text = commented_file()
        if context.as_json:
            context.print_document({"text": text})
        else:
            print_lines([text.rstrip("\n")])
        return
    file = _write_new(context, commented_file(), NEW_FILE_MODE)
    if context.as_json:
        context.print_document({"file": file})
    else:
        print_lines([f"wrote {clean(file)}"])


@command("config set", epilog='A list: "config set api.selectors A B", or as in TOML, \'["A", "B"]\'.')
@click.argument("key", shell_complete=_complete_key)
@click.argument("values", metavar="VALUE...", nargs=-1)
@click.option("--stdin", "from_stdin", is_flag=True, help="Read the value from standard input.")
def set_(context: Context, key: str, values: tuple[str, ...], from_stdin: bool) -> None:
    """Set one key in the file. Only the line of this key changes, or is added where the key belongs."""
    if from_stdin == bool(values):
        raise click.UsageError("give a value, as an argument or with --stdin")
    leaf, rest = _leaf_of(key)
    if from_stdin:
        values = (sys.stdin.read(MAX_STDIN_CHARS).strip(),)
    elif leaf.path == "api.key":
        warn("an argument is visible to other users (ps) and in the shell's history; better: sudo ngrokd set-api-key")
    from ngrokd.config import convert_texts, shown_value
    from ngrokd.config.readers import is_private
    from ngrokd.config_edit import format_key, format_value, set_value

    written = values[-1] if rest else convert_texts(leaf, values)
    place = (leaf.section, leaf.key, *rest)
    shown = "" if is_private(leaf.reader) else f"{format_key(place)} = {format_value(written)}"
    outcome = _edit(context, leaf, lambda text: set_value(text, place, written), format_key(place), shown)
    if context.as_json:
        settings = context.load_settings()
        context.print_document(outcome | {"value": shown_value(settings, leaf)})


@command("config unset")
@click.argument("key", shell_complete=_complete_key)
def unset(context: Context, key: str) -> None:
    """Remove one key from the file.

    Then its default holds again, or what another file says. Its comments stay. A key that is no key of ngrokd's can be
    removed too, so that a mistake can be.
    """
    from ngrokd.config_edit import format_key, unset_value

    place = _parsed_key(key)
    leaves = _leaves()
    leaf = leaves.get(".".join(place[:2]))
    outcome = _edit(context, leaf, lambda text: unset_value(text, place), format_key(place))
    if context.as_json:
        context.print_document(outcome)


@command("config edit")
def edit(context: Context) -> None:
    """Edit the file with $VISUAL or $EDITOR.

    What is wrong is not saved: the editor opens again, with what is wrong in a comment at the top.
    """
    from ngrokd.cli.editor import edit_file
    from ngrokd.config import find_file

    file = find_file(context.config or None, context.environ)
    changed = edit_file(file, context.environ)
    if context.as_json:
        context.print_document({"file": file, "changed": changed})
    else:
        print_lines([f"{clean(file)}: {'saved' if changed else 'nothing changed'}"])


@command("config import", epilog="The Go daemon's file is left as it is.")
@click.argument("file", default="/etc/ngrokd/config.yml", type=click.Path())
@click.option("--stdout", "to_stdout", is_flag=True, help="Print it instead of writing it; without the API key.")
def import_(context: Context, file: str, to_stdout: bool) -> None:
    """Convert the Go ngrokd's config.yml.

    What has no meaning here is left out and named, with the reason. The result is written where this ngrokd reads its
    configuration, unless a file is there already.
    """
    from ngrokd.config_edit import NEW_FILE_MODE
    from ngrokd.config_edit.go import KEY_FILE_MODE, import_file

    found = import_file(file, with_key=not to_stdout)
    target = ""
    if not to_stdout:
        target = _write_new(context, found.text, KEY_FILE_MODE if found.holds_key else NEW_FILE_MODE)
    if context.as_json:
        left_out = [{"key": each.key, "reason": each.reason} for each in found.left_out]
        data = {"source": os.path.abspath(file), "file": target, "text": found.text if to_stdout else None}
        context.print_document(data | {"settings": found.settings, "left_out": left_out, "notes": list(found.notes)})
        return
    if to_stdout:
        print_lines([found.text.rstrip("\n")])
    else:
        taken = f"{len(found.settings)} setting{'s' if len(found.settings) != 1 else ''}"
        print_lines([f"wrote {clean(target)}, with {taken} of {clean(file)}"])
        print_lines(f"  {clean(name)} = {clean(value)}" for name, value in found.lines)
    for each in found.left_out:
        click.echo(f"left out: {clean(each.key)}: {clean(each.reason)}", err=True)
    for note in found.notes:
        warn(note)


for _command in (path, show, get, set_, unset, edit, validate, init, import_, schema):
    config.add_command(_command)


# What they share


def _leaves() -> dict[str, Leaf]:
    from ngrokd.config.schema import schema as sections

    return {leaf.path: leaf for _, leaves in sections().values() for leaf in leaves.values()}


def _parsed_key(key: str) -> tuple[str, ...]:
    from ngrokd.config_edit import parse_key

    try:
        return parse_key(key)
    except ValueError as error:
        raise click.UsageError(f"{error}; a key is written as in net.mtu") from None


def _leaf(key: str) -> Leaf:
    leaf, rest = _leaf_of(key)
    if rest:
        raise click.UsageError(f"{leaf.path} is no table")
    return leaf


def _leaf_of(key: str) -> tuple[Leaf, tuple[str, ...]]:
    """The key of the schema, and what follows where that is a table. Raises UsageError naming the nearest."""
    place, leaves = _parsed_key(key), _leaves()
    leaf = leaves.get(".".join(place[:2]))
    if leaf is None:
        raise click.UsageError(f"there is no key {clean(key)!r}{_meant(key, list(leaves))}")
    if len(place) > 2 and leaf.reader.json_schema().get("type") != "object":
        raise click.UsageError(f"{leaf.path} is no table")
    return leaf, place[2:]


def _meant(key: str, known: Sequence[str]) -> str:
    from difflib import get_close_matches

    same = [each for each in known if each.partition(".")[2] == key.rpartition(".")[2]]
    near = get_close_matches(key, known, n=1)
    found = same if len(same) == 1 or not near else near
    return f" (did you mean {found[0]!r}?)" if found else "; see: ngrokd config show"


def _chosen(names: Sequence[str]) -> list[Leaf]:
    leaves = _leaves()
    sections = {leaf.section for leaf in leaves.values()}
    for name in names:
        if name not in sections and name not in leaves:
            raise click.UsageError(f"there is no section or key {clean(name)!r}{_meant(name, [*sections, *leaves])}")
    return [leaf for leaf in leaves.values() if not names or leaf.path in names or leaf.section in names]


def _write_new(context: Context, text: str, mode: int) -> str:
    """Write the configuration where there is none yet. Returns its path. Raises TakenError."""
    from ngrokd.config import find_file
    from ngrokd.config_edit import rewrite

    file = find_file(context.config or None, context.environ)

    def fill(before: str) -> str:
        if before.strip():
            raise TakenError(f"{file} exists already", remedy="move it away, or print this one with --stdout")
        return text

    rewrite(file, fill, mode=mode)
    return file


def _edit(
    context: Context, leaf: Leaf | None, change: Callable[[str], str], key: str, shown: str = ""
) -> dict[str, object]:
    """Change the file, say on the terminal what that means, and return the same for programs.

    Args:
        context: whose.
        leaf: the key, None for one that is none of ours.
        change: makes the new text.
        key: as it is written.
        shown: what is written, where it may be shown; else what holds then is.
    """
    from ngrokd.config import find_file, parse
    from ngrokd.config_edit import EditError, rewrite

    file = find_file(context.config or None, context.environ)

    def checked(text: str) -> str:
        try:
            changed = change(text)
        except EditError:
            _not_written(lambda: parse(text, file, {}))  # which knows more of what is wrong
            raise
        _not_written(lambda: parse(changed, file, {}))
        return changed

    done = rewrite(file, checked)
    settings = _reload(context)
    origin = settings.origins.get(leaf.path, "default") if leaf is not None and settings is not None else ""
    is_ours = origin == "default" or origin.startswith(f"{file}:")
    if not context.as_json:
        _say_edit(file, leaf, key, settings, shown if is_ours else "", changed=done.before != done.after)
        if origin and not is_ours:
            warn(f"{leaf.path if leaf else key} is {clean(origin)}'s, which goes before {file}")
    return {
        "key": key,
        "file": file,
        "changed": done.before != done.after,
        "effect": str(leaf.effect) if leaf is not None else None,
        "origin": origin or None,
    }


def _say_edit(file: str, leaf: Leaf | None, key: str, settings: Settings | None, shown: str, *, changed: bool) -> None:
    if not changed:
        print_lines([f"{clean(key)}: nothing to change in {clean(file)}"])
        return
    if leaf is None or settings is None:
        print_lines([f"{clean(file)}: {clean(key)} was removed"])
        return
    origin = settings.origins.get(leaf.path, "default")
    line = clean(shown) or f"{leaf.section}.{_line(settings, leaf)}"
    print_lines([f"{line}  {paint(f'# {clean(origin)}', 'dim')}"])
    click.echo(_WHEN[leaf.effect], err=True)


def _reload(context: Context) -> Settings | None:
    """What holds now; None where something else, that this edit did not touch, is wrong."""
    try:
        return context.load_settings()
    except ConfigError:
        return None


def _not_written(check: Callable[[], object]) -> None:
    try:
        check()
    except ConfigError as error:
        message = f"nothing was written, because the whole would be wrong:\n{error}"
        raise ConfigError(message, remedy=error.remedy, mistakes=error.mistakes) from None
