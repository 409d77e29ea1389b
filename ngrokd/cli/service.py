"""`ngrokd service`: let the machine start the daemon."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Final

import click

from ngrokd.cli.context import DEFAULT_CONFIG, Context, command, common_options
from ngrokd.cli.output import clean, fields, paint, print_lines, terminal_width, warn
from ngrokd.errors import Exit, PermissionMissingError

if TYPE_CHECKING:
    from ngrokd.config import Settings
    from ngrokd.host.services import Systemd
    from ngrokd.host.units import Service

_NAME: Final = click.option(
    "--name", default="ngrokd", metavar="NAME", help="Of the service; each instance has its own. [ngrokd]"
)
_KEY: Final = click.option(
    "--api-key-file", "key_file", metavar="FILE", help="Let the service manager hand over the API key in this file."
)


@click.group("service", context_settings={"help_option_names": ["-h", "--help"]})
@common_options
def service() -> None:
    """Install, start and stop the daemon as a service of this machine (systemd)."""


@command("service print")
@_NAME
@_KEY
@click.option("--launchd", is_flag=True, help="The job for macOS instead of the unit for systemd.")
def show(context: Context, name: str, key_file: str | None, launchd: bool) -> None:
    """Print the unit. It is the one that "install" would write for this configuration."""
    from ngrokd.host.units import launchd_plist, systemd_unit

    made = service_of(context, name, key_file or "")
    text = launchd_plist(made).decode() if launchd else systemd_unit(made)
    if context.as_json:
        context.print_document({"name": made.name, "kind": "launchd" if launchd else "systemd", "text": text})
    else:
        print_lines(text.splitlines())


@command("service install")
@_NAME
@_KEY
@click.option("--now", is_flag=True, help="Start it as well, or restart it when it has changed.")
@click.option("--force", is_flag=True, help="Overwrite another unit of that name.")
@click.option("--trust-writable", is_flag=True, help="Install although others than root could change the program.")
def install(context: Context, name: str, key_file: str | None, now: bool, force: bool, trust_writable: bool) -> None:
    """Have it started at each boot. Doing it again brings the unit up to date.

    It refuses while somebody else than root could change the program, a directory on the way to it, or the
    configuration: whoever can, is root from the next boot on.
    """
    from ngrokd import files

    _need_root("install")
    made = service_of(context, name, key_file or "")
    check_ownership(made, trust_writable=trust_writable)
    manager = systemd()
    for directory in made.writable:
        if not os.path.isdir(directory):
            files.ensure_private_directory(directory)  # what is not there cannot be made writable in the unit
    changed = manager.install(made, force=force)
    started = now and _start(context, manager, made.name, changed=changed)
    path = manager.path(made.name)
    if context.as_json:
        context.print_document({"unit": path, "changed": changed, "started": started, "socket": made.socket})
        return
    lines = [f"{'wrote' if changed else 'unchanged:'} {clean(path)}", "it is started at each boot"]
    if started:
        lines.append("it runs; see: ngrokd status")
    elif not manager.is_here:
        lines.append("systemd does not run here now, so it is not started")
    else:
        lines.append(f"start it now with: sudo ngrokd service start{_named(made.name)}")
    print_lines(lines)


@command("service uninstall")
@_NAME
def uninstall(context: Context, name: str) -> None:
    """Stop it and remove its unit. State and configuration stay."""
    _need_root("uninstall")
    manager = systemd()
    there = manager.uninstall(name)
    if context.as_json:
        context.print_document({"unit": manager.path(name), "removed": there})
    else:
        print_lines([f"removed {clean(manager.path(name))}" if there else "there was no service"])


def _verb(verb: str, done: str, text: str) -> click.Command:
    @command(f"service {verb}")
    @_NAME
    def call(context: Context, name: str) -> None:
        manager = systemd()
        _check_installed(manager, name)
        manager.call(verb, name)
        if context.as_json:
            context.print_document({"service": name, "done": done})
        else:
            print_lines([f"{clean(name)}: {done}"])

    call.help = text
    return call


@command("service status")
@_NAME
def status(context: Context, name: str) -> int:
    """Show how the service is. Exit 0 when it runs, 3 when not."""
    manager = systemd()
    state = manager.state(name)
    if context.as_json:
        context.print_document(
            {
                "unit": manager.path(name),
                "installed": state.installed,
                "ours": state.ours,
                "enabled": state.enabled,
                "active": state.active,
                "pid": state.pid,
            }
        )
    else:
        active = paint(state.active, "green" if state.active == "active" else "yellow")
        foreign = "not by us, perhaps by the Go daemon" if state.installed and not state.ours else ""
        pairs = [
            ("Unit", manager.path(name) if state.installed else "not installed"),
            ("Made", foreign),
            ("At boot", state.enabled),
            ("Process", str(state.pid or "")),
        ]
        print_lines([f"service {clean(name)} is {active}", *fields(pairs, terminal_width())])
        if not manager.is_here:
            warn("systemd does not run this machine; is there a daemon? ngrokd status")
    return Exit.OK if state.active in ("active", "activating", "reloading") else Exit.NOT_RUNNING


service.add_command(install, "install")
service.add_command(uninstall, "uninstall")
service.add_command(_verb("start", "started", "Start the service."), "start")
service.add_command(_verb("stop", "stopped", "Stop the service. It undoes everything it did to the machine."), "stop")
service.add_command(_verb("restart", "restarted", "Restart the service."), "restart")
service.add_command(status, "status")
service.add_command(show, "print")


def service_of(context: Context, name: str, key_file: str, settings: Settings | None = None) -> Service:
    """The service for this program and configuration, the one in use unless it is given. Raises UsageError."""
    from ngrokd.config import MOST_AUTO_WORKERS
    from ngrokd.host.units import Service

    if not name.replace("-", "").replace("_", "").isalnum() or not name.isascii():
        raise click.UsageError("the name of a service is made of letters, digits, - and _")
    settings = settings or context.load_settings()
    asked = context.config or context.environ.get("NGROKD_CONFIG", "")
    directories = []
    if settings.hosts.enabled:
        directories.append(os.path.dirname(os.path.realpath(settings.hosts.path)))
    state = settings.state.directory
    if not any(state == one or state.startswith(f"{one.rstrip('/')}/") for one in directories):
        directories.append(state)
    return Service(
        name=name,
        program=program(),
        config=os.path.abspath(asked) if asked else "",
        writable=tuple(directories),
        key_file=os.path.abspath(key_file) if key_file else "",
        group=settings.control.group,
        workers=settings.net.workers or MOST_AUTO_WORKERS,  # 0 is "auto", and there may be more processors some day
        drain_s=settings.net.drain_s,
    )


def program() -> tuple[str, ...]:
    """How a service manager calls this very program: the script beside our interpreter, else the interpreter."""
    script = os.path.join(os.path.dirname(sys.executable), "ngrokd")
    if os.access(script, os.X_OK):
        return (script,)
    return (sys.executable, "-m", "ngrokd")


def check_ownership(made: Service, *, trust_writable: bool) -> None:
    """Make sure that root alone can change what the service runs; or only warn. Raises PermissionMissingError."""
    weak = _weak_spots(made)
    if weak and not trust_writable:
        raise PermissionMissingError(
            "others than root could change what the service runs:\n" + "\n".join(weak),
            remedy="install it for root: sudo make install; then: sudo ngrokd service install",
        )
    for weakness in weak:
        warn(weakness)


def _weak_spots(made: Service) -> list[str]:
    import sysconfig

    import ngrokd
    import tun
    from ngrokd.host.ownership import weak_spots

    paths = sysconfig.get_paths()
    packages = {os.path.dirname(package.__file__ or "") for package in (ngrokd, tun)}
    path = made.config or DEFAULT_CONFIG
    beside = os.path.join(os.path.dirname(path), "conf.d")
    config = [path, beside, *([made.key_file] if made.key_file else [])]
    files = [made.program[0], sys.executable, paths["stdlib"], *(one for one in config if os.path.exists(one))]
    if made.key_file and not os.path.exists(made.key_file):
        raise click.UsageError(f"there is no file {made.key_file}")
    trees = {paths["purelib"], paths["platlib"], *packages, *([beside] if os.path.isdir(beside) else [])}
    return weak_spots(files, trees)


def systemd() -> Systemd:
    """The service manager of this machine. Raises ServiceError where it is another one."""
    from ngrokd.host.services import ServiceError, Systemd

    if sys.platform != "linux":
        raise ServiceError(
            "services are managed on Linux with systemd",
            remedy='write what "ngrokd service print --launchd" prints into /Library/LaunchDaemons',
        )
    return Systemd()


def _start(context: Context, manager: Systemd, name: str, *, changed: bool) -> bool:
    """Start it, or restart it when it has changed. Raises TakenError while one that was started by hand runs."""
    if not manager.is_here:
        return False
    running = manager.state(name).active in ("active", "activating", "reloading")
    if not running:
        from ngrokd.doctor.residue import check_nobody_lives

        check_nobody_lives(context.load_daemons_settings())
    manager.call("restart" if running and changed else "start", name)
    return True


def _check_installed(manager: Systemd, name: str) -> None:
    from ngrokd.host.services import ServiceError

    if manager.unit(name) is None and not manager.state(name).pid:
        raise ServiceError(f"there is no service {name}", remedy=f"sudo ngrokd service install{_named(name)}")


def _named(name: str) -> str:
    return "" if name == "ngrokd" else f" --name {name}"


def _need_root(verb: str) -> None:
    if os.geteuid() != 0:
        raise PermissionMissingError(f"a service is {verb}ed by root", remedy=f"sudo ngrokd service {verb}")
