"""`ngrokd migrate`: from the Go ngrokd to this one, and back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import click

from ngrokd.cli.context import Context, command
from ngrokd.cli.output import clean, fields, paint, print_error, print_lines, terminal_width, warn
from ngrokd.cli.service import check_ownership, service_of, systemd
from ngrokd.errors import Exit, PermissionMissingError

if TYPE_CHECKING:
    from ngrokd.config_edit.go import Imported
    from ngrokd.host.migration import GoDaemon, Migration, Places
    from ngrokd.host.plan import Step
    from ngrokd.host.units import Service

_DONE: Final = "done; see: ngrokd status. Back again: ngrokd migrate --undo"


@command("migrate")
@click.option("--dry-run", "-n", is_flag=True, help="Only show what was found and what would be done.")
@click.option("--undo", is_flag=True, help="Give the Go daemon its place again.")
@click.option("--go-config", metavar="FILE", default="/etc/ngrokd/config.yml", help="The Go daemon's configuration.")
@click.option("--keep-config", is_flag=True, help="Do not convert its configuration.")
@click.option("--trust-writable", is_flag=True, help="Migrate although others than root could change the program.")
def migrate(
    context: Context, dry_run: bool, undo: bool, go_config: str, keep_config: bool, trust_writable: bool
) -> int:
    """Take the place of the Go ngrokd on this machine: its operator, certificate, addresses, configuration and service.

    The old service is stopped and disabled, and what there was is kept, so that --undo gives it its place again. When a
    step fails, those before it are undone. The state directory is used by both as it is.
    """
    from ngrokd.host import linux, migration
    from ngrokd.host.services import ServiceError

    if os.geteuid() != 0 and not dry_run:
        raise PermissionMissingError("another service is put in place by root", remedy="sudo ngrokd migrate")
    places = _places(go_config)
    if undo:
        return _go_back(context, places.state, dry_run=dry_run)
    interface = context.load_settings().net.interface
    found = migration.find(places, interface=interface, kind_of=migration.kind_of_link)
    if not found:
        raise ServiceError(
            "there is no Go ngrokd on this machine: no unit, no configuration, no socket that answers",
            remedy="start anew with: sudo ngrokd service install --now",
        )
    target = _config_path(context)
    imported = None if keep_config or not found.config or os.path.exists(target) else _convert(found)
    service = _service(context, imported, target)
    manager = systemd()
    planned = migration.plan_migration(found, manager, service, config=target, imported=imported)
    if not dry_run:
        check_ownership(service, trust_writable=trust_writable)
        migration.Migrator(manager, service, linux.delete_dummy).migrate(found, planned)
    if context.as_json:
        context.print_document(_document(found, planned, dry_run=dry_run))
    else:
        print_lines(_text(found, planned, dry_run=dry_run))
        for each in imported.left_out if imported else ():
            click.echo(f"left out: {clean(each.key)}: {clean(each.reason)}", err=True)
        for note in (*planned.notes, *(imported.notes if imported else ())):
            warn(note)
    return Exit.OK


def _places(go_config: str) -> Places:
    """Its own places, with the state where its configuration says."""
    from ngrokd.config_edit.go import import_file
    from ngrokd.errors import ConfigError, NgrokdError
    from ngrokd.host.migration import Places

    places = Places(config=os.path.abspath(go_config))
    try:
        settings = import_file(places.config).settings
    except (ConfigError, NgrokdError):
        return places  # it is said when it is to be converted
    state, socket = settings.get("state.directory"), settings.get("control.socket")
    return replace(
        places,
        state=state if isinstance(state, str) else places.state,
        socket=socket if isinstance(socket, str) else places.socket,
    )


def _convert(found: GoDaemon) -> Imported:
    from ngrokd.config_edit.go import import_file

    return import_file(found.config)


def _config_path(context: Context) -> str:
    from ngrokd.config import find_file

    return find_file(context.config or None, context.environ)


def _service(context: Context, imported: Imported | None, target: str) -> Service:
    from ngrokd.config import parse

    settings = parse(imported.text, target, context.environ) if imported else None
    return service_of(context, "ngrokd", "", settings)


def _go_back(context: Context, state: str, *, dry_run: bool) -> int:
    from ngrokd.host import linux, migration

    manager = systemd()
    if dry_run:
        steps = migration.journal_of(state).backwards()
        if context.as_json:
            context.print_document({"dry_run": True, "steps": [str(step) for step in steps]})
        else:
            print_lines(f"would undo {clean(step)}" for step in steps)
        return Exit.OK
    undone = migration.Migrator(manager, service_of(context, "ngrokd", ""), linux.delete_dummy).go_back(state)
    if context.as_json:
        problems = [str(problem) for problem in undone.problems]
        context.print_document({"undone": [step.kind for step in undone.removed], "problems": problems})
    else:
        print_lines([f"undone: {clean(step.kind)}" for step in undone.removed])
        for problem in undone.problems:
            print_error(str(problem), problem.remedy)
        print_lines(["the Go ngrokd has its place again" if not undone.problems else "not everything could be undone"])
    return max((problem.exit_code for problem in undone.problems), default=Exit.OK)


def _document(found: GoDaemon, planned: Migration, *, dry_run: bool) -> dict[str, object]:
    imported = planned.imported
    return {
        "dry_run": dry_run,
        "found": dict(found.facts),
        "steps": planned.steps.as_data(),
        "settings": imported.settings if imported else {},
        "left_out": [{"key": each.key, "reason": each.reason} for each in imported.left_out] if imported else [],
        "notes": [*planned.notes, *(imported.notes if imported else ())],
    }


def _text(found: GoDaemon, planned: Migration, *, dry_run: bool) -> Iterator[str]:
    yield "found the Go ngrokd:"
    yield from fields(found.facts, terminal_width())
    yield ""
    yield "this would be done, in this order:" if dry_run else "done, in this order:"
    for step in planned.steps:
        yield from _step(step)
    yield ""
    yield "nothing was changed" if dry_run else paint(_DONE, "green")


def _step(step: Step) -> Iterator[str]:
    yield paint(f"  # {clean(step.why)}", "dim")
    for line in step.shell:
        yield f"  {clean(line)}"
