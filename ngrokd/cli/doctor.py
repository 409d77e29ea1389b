"""`ngrokd doctor`: what is the matter, and what to do about it."""

from __future__ import annotations

import os
import textwrap
from contextlib import aclosing
from typing import TYPE_CHECKING, Final

import click

from ngrokd.cli.context import Context, command
from ngrokd.cli.output import clean, paint, print_lines, terminal_width
from ngrokd.errors import ConfigError, Exit

if TYPE_CHECKING:
    from ngrokd.doctor.findings import Finding
    from ngrokd.doctor.patient import Patient

_COLOURS: Final = {"ok": "green", "warn": "yellow", "fail": "red"}
_COLUMN: Final = 13  # characters of the longest name of a check, and a blank
_WIDEST: Final = 110


@command("doctor")
@click.option("--bundle", metavar="FILE", help="Also write an archive (.tar.gz) for a bug report, without secrets.")
def doctor(context: Context, bundle: str | None) -> int:
    """Check this machine, the configuration and the way to ngrok, and say what to do where something is wrong.

    Each check is ok, warn (it may not matter) or fail. Nothing is changed. Exit 0 when nothing failed, else 1. Without
    root some things cannot be seen.
    """
    import trio

    from ngrokd.doctor.findings import fail, is_well, ok

    try:
        settings = context.load_daemons_settings()
    except ConfigError as error:
        # What the configuration would have said is not known, so nothing else can be judged.
        findings = [
            fail("config", line, "correct it; conf/ngrokd.toml explains every key") for line in str(error).split("\n")
        ]
        _show(context, findings)
        return Exit.CONFIG
    first = ok("config", ", ".join(settings.files) or "no configuration file: the defaults hold")
    from ngrokd.doctor.patient import Patient

    patient = Patient(settings, context.environ)
    found = [first, *trio.run(_examine, context, patient, first)]
    written: list[str] = []
    if bundle:
        from ngrokd.doctor.bundle import write_bundle

        written = write_bundle(os.path.abspath(bundle), patient, found)
    if context.as_json:
        context.print_document(_document(found) | ({"bundle": os.path.abspath(bundle)} if bundle else {}))
    else:
        print_lines(_conclusion(found))
        if bundle:
            print_lines(
                [f"wrote {clean(bundle)}: {len(written)} files, without keys; look through it before handing it on"]
            )
    return Exit.OK if is_well(found) else Exit.NO


async def _examine(context: Context, patient: Patient, first: Finding) -> list[Finding]:
    from ngrokd.doctor.examination import examine

    found: list[Finding] = []
    if not context.as_json:
        print_lines(_lines(first))
    async with aclosing(examine(patient)) as findings:
        async for finding in findings:
            found.append(finding)
            if not context.as_json:
                print_lines(_lines(finding))  # as it comes: some take seconds
    return found


def _show(context: Context, findings: list[Finding]) -> None:
    if context.as_json:
        context.print_document(_document(findings))
    else:
        print_lines([line for finding in findings for line in _lines(finding)] + _conclusion(findings))


def _document(findings: list[Finding]) -> dict[str, object]:
    return {
        "ok": all(finding.level != "fail" for finding in findings),
        "findings": [finding.as_data() for finding in findings],
    }


def _lines(finding: Finding) -> list[str]:
    """One finding: level, name, what was found, and below it what to do."""
    width = min(terminal_width() or _WIDEST, _WIDEST)
    head = f"{finding.level:<5} {finding.check:<{_COLUMN}}"
    indent = " " * len(head)
    text = textwrap.wrap(clean(finding.summary), max(width - len(head), 20), break_on_hyphens=False) or [""]
    level = paint(finding.level, _COLOURS[finding.level]) + head[len(finding.level) :]
    lines = [f"{level}{text[0]}", *(indent + more for more in text[1:])]
    if finding.remedy and finding.level != "ok":
        remedy = textwrap.wrap(clean(finding.remedy), max(width - len(head) - 3, 20), break_on_hyphens=False)
        lines += [indent + ("-> " if number == 0 else "   ") + line for number, line in enumerate(remedy)]
    return lines


def _conclusion(findings: list[Finding]) -> list[str]:
    failed = sum(finding.level == "fail" for finding in findings)
    warned = sum(finding.level == "warn" for finding in findings)
    if not failed and not warned:
        return ["", paint(f"{len(findings)} checks, all is well", "green")]
    counts = [f"{count} {word}" for count, word in ((failed, "failed"), (warned, "with a warning")) if count]
    return ["", f"{len(findings)} checks: {', '.join(counts)}"]
