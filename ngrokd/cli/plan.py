"""`ngrokd plan` and `ngrokd cleanup`: what a run changes on the machine, shown before and removed after."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final, cast

import click

from ngrokd.cli.context import Context, command
from ngrokd.cli.output import clean, paint, print_error, print_lines, terminal_width, warn
from ngrokd.errors import Exit

if TYPE_CHECKING:
    from ngrokd.doctor.obstacles import Survey
    from ngrokd.host.plan import Plan
    from ngrokd.host.planning import Platform, RunPlan

_NAMES: Final = {"linux": "Linux", "macos": "macOS"}
_WIDEST: Final = 100  # characters of a comment; longer lines are not read


@command("plan")
@click.option("--platform", type=click.Choice(["linux", "macos"]), help="For that system instead of this one.")
@click.option("--undo", is_flag=True, help="Show how all of it is undone by hand.")
def plan(context: Context, platform: str | None, undo: bool) -> int:
    """Show every step that "ngrokd run" takes on this machine, and who is in its way. Nothing is changed.

    It needs no root. What is printed is a shell script: a line for each change, a comment saying why. Where
    net.configure is false, it ends with the steps that are left to you. Exit 1 when the daemon would not start because
    something belongs to somebody else.
    """
    from ngrokd.doctor.obstacles import Survey, survey
    from ngrokd.host.planning import expected_subnet6, plan_run

    settings = context.load_daemons_settings()
    own = "macos" if sys.platform == "darwin" else "linux"
    chosen = cast("Platform", platform or own)
    subnet6, notes = expected_subnet6(settings, here=chosen == own == "linux")
    planned = plan_run(settings, chosen, subnet6=subnet6, notes=notes)
    found = survey(settings, planned) if chosen == own else Survey()
    if context.as_json:
        context.print_document(_document(planned, found))
    else:
        width = min(terminal_width() or _WIDEST, _WIDEST)
        print_lines(_undo_text(planned, width) if undo else _text(planned, found, width, here=chosen == own))
    return Exit.NO if found.obstacles else Exit.OK


def _document(planned: RunPlan, found: Survey) -> dict[str, object]:
    return {
        "platform": planned.platform,
        "steps": planned.steps.as_data(),
        "left_to_you": planned.left.as_data(),
        "conflicts": [obstacle.as_data() for obstacle in found.obstacles],
        "warnings": [*found.shadows, *found.unseen],
        "notes": list(planned.notes),
        "running": found.daemon,
    }


def _text(planned: RunPlan, found: Survey, width: int, *, here: bool) -> Iterator[str]:
    where = "this machine" if here else f"a machine with {_NAMES[planned.platform]}"
    yield from _comment(
        f'What "ngrokd run" does on {where}, in this order; when it stops, it undoes it backwards.', width
    )
    if found.daemon:
        yield from _comment(f"It has been done: ngrokd runs as {found.daemon}.", width)
    yield ""
    yield from _script(planned.steps, width)
    if planned.left:
        yield ""
        yield from _comment(
            "Left to you (net.configure = false), once the daemon runs and its device is there:", width, colour="bold"
        )
        yield ""
        yield from _script(planned.left, width)
    said = [
        *(("note", note, "") for note in planned.notes),
        *(("warning", warning, "") for warning in (*found.shadows, *found.unseen)),
        *(("CONFLICT", obstacle.what, obstacle.remedy) for obstacle in found.obstacles),
    ]
    if said:
        yield ""
    for word, text, remedy in said:
        yield from _comment(f"{word}: {text}", width, colour="red" if word == "CONFLICT" else "yellow")
        if remedy:
            yield from _comment(f"  hint: {remedy}", width)
    if here and not found.obstacles and not found.daemon:
        yield ""
        yield from _comment("Nothing is in its way.", width, colour="green")


def _undo_text(planned: RunPlan, width: int) -> Iterator[str]:
    yield from _comment(
        'How all of it is undone by hand; "ngrokd cleanup" does so for a daemon that was killed.', width
    )
    for step in planned.whole.backwards():
        yield from step.shell_undo


def _script(steps: Plan, width: int) -> Iterator[str]:
    before = ""
    for step in steps:
        if step.why != before:
            yield from ["", *_comment(step.why, width)] if before else _comment(step.why, width)
        before = step.why
        for line in step.shell:
            yield from _comment(line.removeprefix("# "), width) if line.startswith("#") else [line]


def _comment(text: str, width: int, *, colour: str = "dim") -> Iterable[str]:
    indent = "#" + " " * (len(text) - len(text.lstrip()) + 1)
    lines = textwrap.wrap(
        clean(text.strip()), width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )
    return [paint(line, colour) for line in lines]


@command("cleanup")
@click.option("--dry-run", "-n", is_flag=True, help="Only show what would be removed.")
def cleanup(context: Context, dry_run: bool) -> int:
    """Remove what a killed daemon left on this machine, and nothing else: routes, names, socket and locks.

    It refuses while a daemon runs. The state (operator, key, certificate, addresses) is kept. The next start would
    take over what is left as well, so this is for machines on which there is none.
    """
    from ngrokd.doctor import residue

    settings = context.load_daemons_settings()
    residue.check_nobody_lives(settings)
    found = residue.find(settings)
    done = residue.Removed((), ()) if dry_run else residue.remove(settings)
    if context.as_json:
        context.print_document(
            {
                "dry_run": dry_run,
                "found": [{"kind": piece.kind, "what": piece.what} for piece in found.pieces],
                "removed": [{"kind": piece.kind, "what": piece.what} for piece in done.removed],
                "problems": [str(problem) for problem in done.problems],
                "notes": list(found.notes),
            }
        )
    else:
        verb = "would remove" if dry_run else "removed"
        pieces = found.pieces if dry_run else done.removed
        print_lines([f"{verb} {piece.kind}: {clean(piece.what)}" for piece in pieces] or ["nothing was left behind"])
        for note in found.notes:
            warn(note)
        for problem in done.problems:
            print_error(str(problem), problem.remedy)
    return max((problem.exit_code for problem in done.problems), default=Exit.OK)
