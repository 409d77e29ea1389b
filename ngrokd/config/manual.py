"""The papers about the configuration, made from the schema: the commented file, the page, the JSON Schema for editors.

`make docs` writes all three into a checkout; tests fail while one is out of date. Imported by what
shows them only.
"""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Iterator
from typing import Any, Final

from ngrokd.config.explanations import KEYS, SECTIONS
from ngrokd.config.loading import DEFAULT_PATH
from ngrokd.config.readers import Wrong
from ngrokd.config.schema import Effect, Leaf, Settings, schema
from ngrokd.config.showing import shown_value

FILE: Final = "conf/ngrokd.toml"
PAGE: Final = "docs/configuration.md"
SCHEMA: Final = "conf/ngrokd.schema.json"

_WIDTH: Final = 120
_HEAD: Final = (
    (
        f"The configuration of ngrokd, by default {DEFAULT_PATH} (another one: --config FILE or $NGROKD_CONFIG). "
        "Without a file all defaults hold; every key below stands at its default, commented out. Files in the folder "
        "conf.d beside it go before it."
    ),
    (
        'Durations are texts such as "200us", "30s", "5m" or "1h30m", sizes texts such as "512KiB" or "256MiB". A key '
        'that does not exist, or a value that does not fit, is an error: "ngrokd config validate" and "ngrokd run" '
        "name all of them, with their lines."
    ),
    (
        "A running daemon reads the file again when it changes. The keys marked (live) take effect then, those marked "
        "(live, for new connections) for connections that are made from then on, the others with the next start."
    ),
)
_MARKS: Final = {Effect.LIVE: " (live)", Effect.NEW_FLOWS: " (live, for new connections)", Effect.RESTART: ""}


def commented_file(hint: str = "") -> str:
    """The configuration with every key at its default, commented out and explained; `hint`: where the schema lies."""
    lines = [f"#:schema {hint}", ""] if hint else []
    for number, paragraph in enumerate(_HEAD):
        lines += ["#"] * bool(number) + _comment(paragraph)
    for section, (_, leaves) in schema().items():
        lines += ["", *_comment(SECTIONS[section]), f"[{section}]"]
        for leaf in leaves.values():
            lines += ["", *_comment(KEYS[leaf.path] + _MARKS[leaf.effect]), f"#{leaf.key} = {_default(leaf)}"]
    return "".join(f"{line}\n" for line in lines)


def page(text: str) -> str:
    """The text of docs/configuration.md with its tables made anew; what people wrote around them stays."""
    for name, lines in (("keys", _sections()), ("effects", _effects())):
        begin, end = f"<!-- begin {name}: made from the code by `make docs` -->", f"<!-- end {name} -->"
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = "\n".join([before + begin, "", *lines, "", end + after])
    return text


def json_schema() -> dict[str, Any]:
    """A JSON Schema (draft 7, which editors know) of the file: it knows every key and most of what may stand there."""
    sections = {}
    for section, (_, leaves) in schema().items():
        sections[section] = {
            "type": "object",
            "description": SECTIONS[section],
            "additionalProperties": False,
            "properties": {leaf.key: _property(leaf) for leaf in leaves.values()},
        }
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "The configuration of ngrokd",
        "type": "object",
        "additionalProperties": False,
        "properties": sections,
    }


def schema_text() -> str:
    """The JSON Schema as it is shipped."""
    import json

    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


def _property(leaf: Leaf) -> dict[str, object]:
    described = {"description": KEYS[leaf.path] + _MARKS[leaf.effect], "default": shown_value(Settings(), leaf)}
    return {**leaf.reader.json_schema(), **described}


def _comment(text: str) -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False, break_long_words=False
    )


def _default(leaf: Leaf) -> str:
    return as_toml(shown_value(Settings(), leaf))


def as_toml(value: object) -> str:
    """A value of `showing` as TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(as_toml(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{as_toml(key)} = {as_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, str):
        # What is shown holds printable characters only, which JSON writes as TOML does.
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return str(value)


def expected(leaf: Leaf) -> str:
    """What may stand there, as an error would say it."""
    try:
        leaf.reader.read(None)
    except Wrong as wrong:
        return wrong.expected
    raise AssertionError(f"{leaf.path} takes nothing at all")


# The page


def _sections() -> Iterator[str]:
    for section, (_, leaves) in schema().items():
        yield from (f"### {section}", "", _escaped(SECTIONS[section]), "")
        yield from ("| key | default | takes | |", "|---|---|---|---|")
        for leaf in leaves.values():
            default, takes = f"`{_default(leaf)}`", _escaped(expected(leaf))
            yield f"| `{leaf.path}` | {default} | {takes} | {_escaped(KEYS[leaf.path])} |"
        yield ""


def _effects() -> Iterator[str]:
    yield from ("| key | a change takes effect |", "|---|---|")
    for _, leaves in schema().values():
        for leaf in leaves.values():
            yield f"| `{leaf.path}` | {leaf.effect} |"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def main() -> None:
    """Write all three into the checkout that is the current directory."""
    with open(PAGE) as file:
        tables = page(file.read())
    for path, text in ((FILE, commented_file(os.path.basename(SCHEMA))), (PAGE, tables), (SCHEMA, schema_text())):
        with open(path, "w") as file:
            file.write(text)
        print(path, file=sys.stderr)  # noqa: T201 - a tool for people who develop this


if __name__ == "__main__":
    main()
