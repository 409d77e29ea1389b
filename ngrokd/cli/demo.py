"""`ngrokd demo`: the real daemon beside an ngrok in miniature, on this machine or in a corner of it.

The lab (API, ingress, back ends) runs in this process, the daemon in a child of its own, as it would be started by
hand, with a configuration that takes nothing from this machine's: own interface, socket, state and port. Every step is
one line; what failed shows the last lines of the daemon's log. Whatever happens, in the end the daemon is told to stop,
and what it should have taken away is looked for.
"""

from __future__ import annotations

import ipaddress
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final, NoReturn

import click

from ngrokd.cli.context import Context, command
from ngrokd.cli.output import clean, paint
from ngrokd.errors import Exit, NgrokdError, PermissionMissingError

if TYPE_CHECKING:
    import trio

INTERFACE: Final = "ngrokd-demo"
# The daemon's own default first; the others where that is taken.
SUBNETS: Final = tuple(f"10.{second}.0.0/16" for second in range(107, 128))
READY_WITHIN_S: Final = 30.0
STOP_WITHIN_S: Final = 10.0  # from SIGTERM to SIGKILL; the demo's flows drain for a second
LOG_LINES: Final = 12
INTERRUPTED: Final = 130  # before the self-check was done: 128 + SIGINT, as a shell says it
PR_SET_PDEATHSIG: Final = 1  # prctl.h


@command("demo")
@click.option("--isolated", is_flag=True, help="Use private network and mount namespaces; touch nothing outside.")
@click.option("--once", is_flag=True, help="Stop after the self-check; exit 0 when it passed, 1 when not.")
def demo(context: Context, isolated: bool, once: bool) -> int:
    """Try everything with a made-up ngrok on this machine: no account, no key, no internet.

    Starts an embedded ngrok with a few endpoints and the real daemon, checks that the endpoints can be reached by name,
    and leaves both running, with commands to try, until ^C. Then all is undone.

    It needs root, or CAP_NET_ADMIN and a hosts file that may be written; --isolated needs CAP_SYS_ADMIN besides.
    With --json it stops after the self-check, as with --once.
    """
    directory = Path(tempfile.mkdtemp(prefix="ngrokd-demo-"))
    try:
        return _Demo(context, directory, isolated=isolated, once=once or context.as_json).run()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Step:
    """One line of the demo."""

    title: str
    ok: bool
    detail: str
    seconds: float


class StepFailed(NgrokdError):  # noqa: N818 - how a run ends, not an accident
    """A step failed that the others need; it has been shown already. `code` is what the demo exits with."""

    def __init__(self, message: str, code: int, *, remedy: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.code = code


class _Demo:
    """One run of the demo. Invariant: what was begun is undone, in the opposite order, whatever happens between."""

    def __init__(self, context: Context, directory: Path, *, isolated: bool, once: bool) -> None:
        self._context = context
        self._directory = directory
        self._isolated = isolated
        self._once = once
        self._steps: list[Step] = []
        self._out = sys.stderr if context.as_json else sys.stdout
        self._log = directory / "daemon.log"
        self._interrupted = False
        self._checked = False
        self._failure: StepFailed | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @cached_property
    def _subnet(self) -> str:
        return free_subnet(_routes())

    def run(self) -> int:
        """Run it; the exit code."""
        import trio

        self._say("ngrokd demo: the real daemon, and an ngrok in miniature for it\n")
        try:
            if self._isolated:
                self._isolate()
            trio.run(self._main)
        except StepFailed as error:
            self._failure = error
        failure = self._failure
        code = failure.code if failure else int(not all(step.ok for step in self._steps))
        if self._interrupted and not self._checked:
            code = code or INTERRUPTED
        if self._context.as_json:
            if failure:
                self._context.print_failure(failure.code, str(failure), failure.remedy)
            else:
                self._context.print_document({"ok": code == 0, "steps": [asdict(step) for step in self._steps]})
        elif failure is None and self._once and not self._interrupted:
            self._say(paint("\nall is well", "green", self._out) if code == 0 else "\nsomething is wrong, see above")
        return code

    # -- the steps ---------------------------------------------------------------------------------------------

    def _isolate(self) -> None:
        from ngrokd.lab.namespaces import isolate

        started = time.monotonic()
        try:
            isolate(self._directory)
        except PermissionMissingError as error:
            self._fail("private network and mounts", str(error), started, Exit.NOT_PERMITTED, remedy=error.remedy)
        except OSError as error:
            self._fail("private network and mounts", str(error), started, Exit.CANNOT_CREATE)
        self._note("private network and mounts", started, "nothing outside of them is touched")

    async def _main(self) -> None:
        import trio

        async with trio.open_nursery() as nursery:
            scope = trio.CancelScope()
            await nursery.start(self._watch_signals, scope)
            with scope:
                await self._with_lab()
            nursery.cancel_scope.cancel()

    async def _watch_signals(self, scope: trio.CancelScope, *, task_status: trio.TaskStatus[None]) -> None:
        import trio

        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
            task_status.started()
            async for _ in signals:
                if self._interrupted and self._process is not None:
                    self._process.terminate()  # its second one, too: it stops at once
                self._interrupted = True
                scope.cancel()

    async def _with_lab(self) -> None:
        from ngrokd.lab.world import DEMO_ENDPOINTS, open_lab

        started = time.monotonic()
        async with open_lab() as lab:
            lab.add_demo_endpoints()
            where = f"API {lab.api_url}, ingress {lab.ingress_address}, {len(DEMO_ENDPOINTS)} endpoints"
            self._note("an ngrok in miniature", started, where)
            config = lab.write_config(self._directory, settings=_settings(self._subnet))
            try:  # here, before the lab's nursery makes a group of it
                async with self._daemon(config) as daemon:
                    await self._check()
                    self._checked = True
                    if not self._once:
                        await self._leave_running(daemon)
            except StepFailed as error:
                self._failure = error

    @asynccontextmanager
    async def _daemon(self, config: Path) -> AsyncIterator[subprocess.Popen[bytes]]:
        """The daemon as a child, ready; stopped at the end."""
        import trio

        started = time.monotonic()
        process = self._process = self._start(config)
        try:
            assert process.stdout is not None
            with trio.move_on_after(READY_WITHIN_S) as scope:
                line = await trio.to_thread.run_sync(partial(_read_ready_line, process.stdout), abandon_on_cancel=True)
            if scope.cancelled_caught:
                self._fail("the daemon", f"not ready within {READY_WITHIN_S:g} s", started, Exit.NO)
            if not line:
                code = await trio.to_thread.run_sync(process.wait, abandon_on_cancel=True)
                said = next((text for text in self._last_log_lines() if text.startswith("error: ")), "")
                detail = f"it ended with exit code {code}{said and ', '}{said}"
                self._fail("the daemon", detail, started, code if code > 0 else Exit.NO)
            self._note("the daemon", started, line.removeprefix("[ready] "))
            yield process
        finally:
            with trio.CancelScope(shield=True):
                await self._stop(process)

    def _start(self, config: Path) -> subprocess.Popen[bytes]:
        with self._log.open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "ngrokd", "run", "--config", str(config)],
                bufsize=0,  # and so no lock that a thread which waits for a line could hold
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env=_clean_environment(os.environ),
                process_group=0,  # ^C is for us; the daemon is told to stop when its turn comes
                preexec_fn=_die_with_parent(),
            )

    async def _check(self) -> None:
        import trio

        from ngrokd.lab.selfcheck import CheckFailed, checks

        for check in checks(self._subnet):
            started = time.monotonic()
            try:
                detail = await trio.to_thread.run_sync(check.run, abandon_on_cancel=True)
            except (CheckFailed, OSError) as error:
                self._note(check.title, started, str(error), ok=False)
                self._show_log()
            else:
                self._note(check.title, started, detail)

    async def _leave_running(self, daemon: subprocess.Popen[bytes]) -> None:
        import trio

        prefix = f"sudo nsenter --target {os.getpid()} --net --mount " if self._isolated else ""
        ask = prefix or ("sudo " if "SUDO_UID" in os.environ else "")  # the daemon is root's, and so is its socket
        program = _as_typed(sys.argv[0] if sys.argv else "", os.environ)
        self._say(f"""
Everything runs. In another terminal, try:

    {prefix}curl http://hello.demo/
    {prefix}curl -s http://hello.demo/bytes/1000000000 -o /dev/null -w '%{{speed_download}}\\n'
    {prefix}python3 -c 'import socket; print(socket.create_connection(("banner.demo", 25)).recv(99))'
    {ask}{program} --config {self._directory}/config.toml status
    {ask}{program} --config {self._directory}/config.toml list

The daemon's log is {self._log}.  ^C ends it and undoes everything.
""")
        code = await trio.to_thread.run_sync(daemon.wait, abandon_on_cancel=True)
        self._note("the daemon", time.monotonic(), f"it ended by itself with exit code {code}", ok=False)
        self._show_log()

    async def _stop(self, process: subprocess.Popen[bytes]) -> None:
        import trio

        started = time.monotonic()
        if self._interrupted:
            self._say()
        if process.poll() is None:
            process.terminate()
        with trio.move_on_after(STOP_WITHIN_S) as scope:
            await trio.to_thread.run_sync(process.wait, abandon_on_cancel=True)
        if scope.cancelled_caught:
            process.kill()
            await trio.to_thread.run_sync(process.wait)
        assert process.stdout is not None
        process.stdout.close()
        if scope.cancelled_caught:
            detail = f"the daemon did not stop within {STOP_WITHIN_S:g} s and was killed"
            self._note("everything undone", started, detail, ok=False)
            self._show_log()
        elif left := _residue(self._subnet):
            self._note("everything undone", started, f"left behind: {', '.join(left)}", ok=False)
            self._show_log()
        else:
            self._note("everything undone", started, "no interface, no route, no line in /etc/hosts is left")

    # -- speaking ----------------------------------------------------------------------------------------------

    def _say(self, text: str = "") -> None:
        print(text, file=self._out, flush=True)

    def _note(self, title: str, started: float, detail: str, *, ok: bool = True) -> None:
        self._steps.append(Step(title, ok, detail, round(time.monotonic() - started, 3)))
        word = paint("ok", "green", self._out) + "    " if ok else paint("failed", "red", self._out)
        self._say(f"  {word}  {title}: {clean(detail)}")

    def _fail(self, title: str, detail: str, started: float, code: int, *, remedy: str = "") -> NoReturn:
        """Note a failure that the other steps cannot live with, and raise it."""
        self._note(title, started, detail, ok=False)
        self._show_log()
        if remedy:
            self._say(f"          {clean(remedy)}")
        raise StepFailed(f"{title}: {detail}", code, remedy=remedy)

    def _last_log_lines(self) -> list[str]:
        try:
            return self._log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        except OSError:
            return []  # the daemon has not been started

    def _show_log(self) -> None:
        lines = self._last_log_lines()
        if lines:
            self._say("          the last lines of the daemon's log:")
        for line in lines:
            self._say(f"          | {clean(line)}")


def free_subnet(routes: Sequence[ipaddress.IPv4Network], candidates: Sequence[str] = SUBNETS) -> str:
    """The first candidate that no route but the default one touches; the first of all when each is touched.

    The daemon itself then says whose the route is.
    """
    for candidate in candidates:
        network = ipaddress.IPv4Network(candidate)
        if not any(route.prefixlen > 0 and route.overlaps(network) for route in routes):
            return candidate
    return candidates[0]


def _routes() -> list[ipaddress.IPv4Network]:
    """The destinations of the main routing table; none where there is no such file."""
    try:
        lines = Path("/proc/net/route").read_text().splitlines()[1:]
    except OSError:
        return []
    routes = []
    for line in lines:
        columns = line.split()
        address, mask = (int.from_bytes(bytes.fromhex(columns[at]), sys.byteorder) for at in (1, 7))
        routes.append(ipaddress.IPv4Network((address, mask.bit_count()), strict=False))
    return routes


def _settings(subnet: str) -> dict[str, dict[str, object]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {
        "net": {"interface": INTERFACE, "subnet": subnet, "drain": "1s"},
        "http": {"listen": f"127.0.0.1:{port}"},
    }


def _as_typed(program: str, environment: Mapping[str, str]) -> str:
    """How a person calls this program again: by its name where a shell finds it so, else by its path.

    Args:
        program: sys.argv[0].
        environment: its PATH is where a shell looks.
    """
    if os.path.basename(program) == "__main__.py":
        return f"{sys.executable} -m ngrokd"
    name = os.path.basename(program) or "ngrokd"
    found = shutil.which(name, path=environment.get("PATH"))
    return name if found is not None and os.path.samefile(found, program) else os.path.abspath(program)


def _clean_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Without what would reach into the daemon's configuration from outside."""
    foreign = ("NGROKD_", "NGROK_")
    return {
        name: value
        for name, value in environment.items()
        if not name.startswith(foreign) and name not in ("CREDENTIALS_DIRECTORY", "NOTIFY_SOCKET", "WATCHDOG_USEC")
    }


def _die_with_parent() -> Callable[[], object] | None:
    """To be called between fork and exec: SIGTERM when we are gone, however we went, so that nothing stays behind."""
    if sys.platform != "linux":
        return None
    import ctypes  # before the fork: the child must not import

    return partial(ctypes.CDLL(None).prctl, PR_SET_PDEATHSIG, signal.SIGTERM)


def _read_ready_line(stdout: IO[bytes]) -> str:
    """The line that says the daemon is ready; "" when its output ends before."""
    for line in stdout:
        text = line.decode(errors="replace").strip()
        if text.startswith("[ready]"):
            return text
    return ""


def _residue(subnet: str) -> list[str]:
    """What the daemon should have taken away and has not."""
    left = []
    try:
        socket.if_nametoindex(INTERFACE)
        left.append(f"interface {INTERFACE}")
    except OSError:
        pass
    if ipaddress.IPv4Network(subnet) in _routes():
        left.append(f"the route to {subnet}")
    if f"ngrokd managed section ({INTERFACE})" in Path("/etc/hosts").read_text(errors="replace"):
        left.append("its section in /etc/hosts")
    return left
