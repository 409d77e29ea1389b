"""Private namespaces for tests on the real kernel.

    def test_something(netns):
        ns = netns()                                  # fresh: only lo, which is up
        ns.run(["ip", "addr", "add", "192.0.2.1/32", "dev", "lo"])
        daemon = ns.start([sys.executable, "-m", "ngrokd", "run"])
        daemon.expect(r"^\\[ready\\] ", timeout=10)
        assert ns.run(["curl", "-s", "http://my-api.prod/"]).stdout == "hello"
        daemon.terminate()
        assert daemon.wait(timeout=5) == 0

A `Namespace` has a network of its own and, laid over the machine's files, an /etc, a /run and a /sys of its own: what
is written there (hosts file, state directory, control socket) is seen by nobody else and gone afterwards. /etc/hosts
knows localhost only, DNS answers nothing, at once. `private` does the same for more directories. All other paths are
the machine's own.

Descriptors keep the namespace they were made in. So `call` runs a function of the test itself inside, in a thread, and
a socket or TUN device that it returns can be used by the test's own event loop while kernel clients run inside:

    device = ns.call(open_tun, "tun0")
    client = ns.call(socket.create_server, ("127.0.0.1", 0))

In async tests use `await ns.run_async(...)`, or the loop stands still while the program runs.

Everything is bounded in time, and all processes inside are killed at the end (see holder.py), even when the test run
itself was killed. Programs inside never see proxy settings or NGROK* variables of the person who runs the tests.
"""

from __future__ import annotations

import codecs
import contextlib
import ctypes
import functools
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Final, ParamSpec, TypeVar

import pytest
import trio

P = ParamSpec("P")
T = TypeVar("T")

ROOT: Final = Path(__file__).resolve().parents[2]
HOLDER: Final = Path(__file__).with_name("holder.py")
START_TIMEOUT_S: Final = 20.0
RUN_TIMEOUT_S: Final = 30.0
# The holder alone gives up after 5 s.
CLOSE_TIMEOUT_S: Final = 10.0

_CLONE_FS: Final = 0x00000200
_CLONE_NEWNS: Final = 0x00020000
_CLONE_NEWNET: Final = 0x40000000


@functools.cache
def missing_for_namespaces() -> str:
    """Why no namespace with a TUN device can be made here, one sentence; "" when one can."""
    if sys.platform != "linux":
        return "network namespaces need Linux"
    tools = [tool for tool in ("curl", "ip", "mount", "nsenter", "unshare") if find_tool(tool) is None]
    if tools:
        return f"these tools are missing: {', '.join(tools)}"
    if not os.path.exists("/dev/net/tun"):
        return "/dev/net/tun is missing (modprobe tun)"
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"/dev/net/tun cannot be opened ({error.strerror}); run as root"
    result = subprocess.run(
        ["unshare", "--net", "--mount", "true"], env=_environment(), capture_output=True, text=True, check=False
    )
    return f"namespaces cannot be made ({result.stderr.strip()}); run as root" if result.returncode else ""


def require_namespaces() -> None:
    """Skip the test where no namespace can be made, with the reason; but fail it when CI=true.

    There, a test that silently does not run is worse than one that fails.
    """
    _require(missing_for_namespaces())


def find_tool(name: str) -> str | None:
    """The path of a program as it is found inside, None where it is not installed."""
    return shutil.which(name, path=_environment()["PATH"])


def require_tools(*names: str) -> None:
    """Skip the test where one of these programs is not installed, but fail it when CI=true: .ci/run installs them."""
    missing = [name for name in names if find_tool(name) is None]
    _require(f"these tools are missing: {', '.join(missing)}" if missing else "")


def _require(reason: str) -> None:
    if reason and os.environ.get("CI") == "true":
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)


class Failed(AssertionError):  # noqa: N818 - a verdict on the program, not a mistake of the test
    """A program in the namespace did not do what the test needs; the message holds what it printed."""


class Namespace:
    """A private network and private files. Made by the `netns` fixture or `open_namespace`.

    Attributes:
        pid: a process inside, for `ip link set LINK netns PID`.
    """

    def __init__(self, holder: subprocess.Popen[str]) -> None:
        self.pid = holder.pid
        self._holder = holder
        self._started: list[Running] = []

    def command(self, arguments: Sequence[str | Path], *, cwd: str | Path = ROOT) -> list[str]:
        """What to execute, from outside, to run `arguments` inside. The process keeps its pid all the way."""
        # Entering a mount namespace puts a process at its root; `nsenter --wd` would lead to a directory outside it.
        enter = ["nsenter", f"--net=/proc/{self.pid}/ns/net", f"--mount=/proc/{self.pid}/ns/mnt", "--"]
        return [*enter, "sh", "-c", 'cd "$0" && exec "$@"', str(cwd), *map(str, arguments)]

    def run(
        self,
        arguments: Sequence[str | Path],
        *,
        timeout: float = RUN_TIMEOUT_S,
        check: bool = True,
        input: str | None = None,  # noqa: A002 - as in subprocess.run
        env: Mapping[str, str] | None = None,
        cwd: str | Path = ROOT,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program inside and wait for it.

        Args:
            arguments: the program and its arguments.
            timeout: seconds after which it is killed and the test fails.
            check: fail the test when it exits with anything but 0.
            input: its standard input; nothing otherwise.
            env: variables to add.
            cwd: where it runs; the repository otherwise.

        Returns: exit code, stdout and stderr as text (bytes that are no UTF-8 as surrogate escapes).
        """
        process = self._popen(
            arguments, stdin=subprocess.DEVNULL if input is None else subprocess.PIPE, env=env, cwd=cwd
        )
        shown = " ".join(map(str, arguments))
        with process:
            try:
                stdout, stderr = process.communicate(input, timeout)
            except subprocess.TimeoutExpired as error:
                _kill_group(process)
                raise Failed(
                    f"`{shown}` still ran after {timeout} s\n{_text(error.stdout)}\n{_text(error.stderr)}"
                ) from None
            except BaseException:
                _kill_group(process)
                raise
        if check and process.returncode:
            raise Failed(f"`{shown}` exited with {process.returncode}\n{stdout}\n{stderr}")
        return subprocess.CompletedProcess([str(a) for a in arguments], process.returncode, stdout, stderr)

    async def run_async(
        self,
        arguments: Sequence[str | Path],
        *,
        timeout: float = RUN_TIMEOUT_S,  # noqa: ASYNC109 - it is the program's, and it ends in a failed test
        check: bool = True,
        input: str | None = None,  # noqa: A002
        env: Mapping[str, str] | None = None,
        cwd: str | Path = ROOT,
    ) -> subprocess.CompletedProcess[str]:
        """As `run`, while the test's event loop goes on. When cancelled, the program runs on until its timeout."""
        run = functools.partial(self.run, arguments, timeout=timeout, check=check, input=input, env=env, cwd=cwd)
        return await trio.to_thread.run_sync(run, abandon_on_cancel=True)

    def start(
        self, arguments: Sequence[str | Path], *, env: Mapping[str, str] | None = None, cwd: str | Path = ROOT
    ) -> Running:
        """Start a program inside that goes on while the test does; it is killed at the end at the latest."""
        running = Running(self._popen(arguments, stdin=subprocess.PIPE, env=env, cwd=cwd), list(map(str, arguments)))
        self._started.append(running)
        return running

    def python(
        self, source: str, *arguments: str | Path, timeout: float = RUN_TIMEOUT_S, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run Python source text inside, in a fresh interpreter that can import the repository. Otherwise as `run`."""
        return self.run([sys.executable, "-c", source, *arguments], timeout=timeout, check=check)

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `function` in a thread that is inside, and return what it returns or raise what it raises.

        Descriptors it makes keep the namespace and can be used outside. Fails when it takes longer than 60 s. Not for
        what uses threads itself, as an event loop does for looking up names and for files: Trio's worker threads serve
        the whole process, and would carry work out of the namespace or, worse, into it later. Use `python` for that.
        """
        if function is trio.run:
            raise ValueError("an event loop uses threads that are outside: run it with `python` or `start`")
        outcome: list[T] = []
        failure: list[BaseException] = []

        def inside() -> None:
            try:
                self._enter_thread()
                outcome.append(function(*args, **kwargs))
            except BaseException as error:  # noqa: BLE001 - the caller's to handle, in its own thread
                failure.append(error)

        thread = threading.Thread(target=inside, daemon=True)
        thread.start()
        thread.join(60)
        if failure:
            raise failure[0]
        if not outcome:
            raise Failed(f"{function} still ran after 60 s")
        return outcome[0]

    def private(self, directory: str | Path) -> None:
        """Let what is written in `directory` from now on, inside, stay inside. What was there stays visible."""
        self.run([sys.executable, "-I", "-S", HOLDER, "private", str(directory)])

    def write_file(self, path: str | Path, text: str) -> None:
        """Write a file as it is seen inside; on a path that is not private this writes the machine's own file."""
        self.call(Path(path).write_text, text)

    def read_file(self, path: str | Path) -> str:
        """Read a file as it is seen inside."""
        return self.call(Path(path).read_text)

    def close(self) -> None:
        """Kill what runs inside and give the namespaces back. Idempotent."""
        with self._holder as holder:  # closes its standard input, which ends it
            assert holder.stdin is not None
            holder.stdin.close()
            try:
                holder.wait(CLOSE_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                holder.kill()
                raise Failed("the namespace did not end") from None
            finally:
                for running in self._started:
                    running._close()

    def _popen(
        self, arguments: Sequence[str | Path], *, stdin: int, env: Mapping[str, str] | None, cwd: str | Path
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(arguments, cwd=cwd),
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="surrogateescape",
            env={**_environment(), **(env or {})},
            start_new_session=True,
        )

    def _enter_thread(self) -> None:
        # A thread has a network namespace of its own anyway; for the mount namespace it must first stop sharing
        # its working directory and root with the other threads.
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(_CLONE_FS):
            raise OSError(ctypes.get_errno(), "unshare(CLONE_FS)")
        for kind, flag in (("net", _CLONE_NEWNET), ("mnt", _CLONE_NEWNS)):
            fd = os.open(f"/proc/{self.pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                if libc.setns(fd, flag):
                    raise OSError(ctypes.get_errno(), f"setns({kind})")
            finally:
                os.close(fd)
        os.chdir(ROOT)


class Running:
    """A program that goes on inside a namespace. Made by `Namespace.start`. What it prints is gathered all the time."""

    def __init__(self, process: subprocess.Popen[str], arguments: list[str]) -> None:
        self.pid = process.pid
        self._process = process
        self._arguments = arguments
        self._changed = threading.Condition()
        self._texts = {"stdout": "", "stderr": ""}
        self._open = 2
        assert process.stdout is not None
        assert process.stderr is not None
        self._threads = [
            threading.Thread(target=self._gather, args=(name, pipe), daemon=True)
            for name, pipe in (("stdout", process.stdout), ("stderr", process.stderr))
        ]
        for thread in self._threads:
            thread.start()

    def __repr__(self) -> str:
        return f"<Running {' '.join(self._arguments)}>"

    @property
    def stdout(self) -> str:
        """What it has printed so far."""
        return self._texts["stdout"]

    @property
    def stderr(self) -> str:
        """What it has printed on standard error so far."""
        return self._texts["stderr"]

    def expect(self, pattern: str, *, timeout: float = RUN_TIMEOUT_S, stream: str = "stdout") -> re.Match[str]:
        """Wait until `pattern` (a regular expression; ^ and $ match at lines) is found in all that was printed.

        Fails the test after `timeout` seconds, or at once when the program ended without it.
        """
        deadline = time.monotonic() + timeout
        with self._changed:
            while (match := re.search(pattern, self._texts[stream], re.MULTILINE)) is None:
                left = deadline - time.monotonic()
                if left <= 0 or not self._open:
                    why = "ended" if not self._open else f"ran {timeout} s"
                    raise Failed(f"{self!r} {why} without {pattern!r}\n{self.stdout}\n{self.stderr}")
                self._changed.wait(left)
        return match

    def write(self, text: str) -> None:
        """Write to its standard input."""
        assert self._process.stdin is not None
        self._process.stdin.write(text)
        self._process.stdin.flush()

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the program alone."""
        self._process.send_signal(number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self._process.terminate()

    def kill(self) -> None:
        """Send SIGKILL."""
        self._process.kill()

    @property
    def returncode(self) -> int | None:
        """Its exit code, minus the signal's number, or None while it runs."""
        return self._process.poll()

    def wait(self, *, timeout: float = RUN_TIMEOUT_S) -> int:
        """Wait for its end and for the last it printed; returns the exit code. Fails the test after `timeout` s."""
        deadline = time.monotonic() + timeout
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise Failed(f"{self!r} still ran after {timeout} s\n{self.stdout}\n{self.stderr}") from None
        for thread in self._threads:  # a child of the program may hold the pipe open
            thread.join(max(0.0, deadline - time.monotonic()))
        return code

    def _gather(self, name: str, pipe: IO[str]) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        while data := os.read(pipe.fileno(), 65_536):  # prompts have no line end, so lines are not waited for
            with self._changed:
                self._texts[name] += decoder.decode(data)
                self._changed.notify_all()
        with self._changed:
            self._open -= 1
            self._changed.notify_all()

    def _close(self) -> None:
        _kill_group(self._process)
        for thread in self._threads:
            thread.join(5)
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


@contextlib.contextmanager
def open_namespace() -> Iterator[Namespace]:
    """Make a fresh namespace, and take it away with everything in it at the end."""
    holder = subprocess.Popen(
        ["unshare", "--net", "--mount", "--propagation", "private", sys.executable, "-I", "-S", str(HOLDER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env=_environment(),
        start_new_session=True,  # ^C is for the test run, which then ends the holder in order
    )
    namespace = Namespace(holder)
    try:
        assert holder.stdout is not None
        assert holder.stderr is not None
        readable, _, _ = select.select([holder.stdout], [], [], START_TIMEOUT_S)
        if not readable or holder.stdout.readline() != "ready\n":
            holder.kill()
            raise Failed(f"no namespace after {START_TIMEOUT_S} s: {holder.stderr.read()}")
        yield namespace
    finally:
        namespace.close()


@functools.cache
def _environment() -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.lower().endswith("_proxy") and not name.upper().startswith("NGROK")
    }
    return {**kept, "PATH": os.environ.get("PATH", os.defpath) + ":/usr/local/sbin:/usr/sbin:/sbin"}


def _kill_group(process: subprocess.Popen[str]) -> None:
    """Kill the program and its children: it leads a session of its own."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _text(printed: bytes | str | None) -> str:
    return printed.decode(errors="replace") if isinstance(printed, bytes) else printed or ""
