"""A whole stage on a real kernel: the lab and the real daemon, each its own process, in one private namespace."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.netns.support import ROOT, Namespace, Running

HOSTS_PATH = "/etc/hosts"


class LabProcess:
    """`python -m ngrokd.lab` inside a namespace, and its command line."""

    def __init__(self, ns: Namespace, directory: Path, *options: str) -> None:
        self.directory = directory
        arguments = [sys.executable, "-m", "ngrokd.lab", "--directory", str(directory), *options]
        self._running = ns.start(arguments)
        self.facts: dict[str, Any] = json.loads(self._running.expect(r"^\{.*\}$")[0])
        self._answers = 1

    @property
    def config(self) -> str:
        """Path of the configuration that makes a daemon use this lab."""
        return str(self.facts["config"])

    def do(self, command: str) -> dict[str, Any]:
        """Give the lab a command and return its answer; fails the test when the lab refuses it."""
        self._running.write(command + "\n")
        self._answers += 1
        self._running.expect(rf"\A(?:.*\n){{{self._answers}}}")
        answer: dict[str, Any] = json.loads(self._running.stdout.splitlines()[self._answers - 1])
        assert answer["ok"], (command, answer)
        return answer


class Stage:
    """A namespace with a lab and, once started, a daemon."""

    def __init__(self, ns: Namespace, *lab_options: str) -> None:
        self.ns = ns
        self.directory = Path(tempfile.mkdtemp(prefix="ngrokd-stage-"))
        self.lab = LabProcess(ns, self.directory, *lab_options)
        self.daemon: Running | None = None

    def start(
        self, *options: str, env: Mapping[str, str] | None = None, ready_timeout: float = 10.0, config: str = ""
    ) -> Running:
        """Start the daemon and wait for its ready line."""
        self.daemon = self.start_unready(*options, env=env, config=config)
        self.daemon.expect(r"^\[ready\] .*\n", timeout=ready_timeout)
        return self.daemon

    def start_unready(self, *options: str, env: Mapping[str, str] | None = None, config: str = "") -> Running:
        """Start the daemon."""
        arguments = [sys.executable, "-m", "ngrokd", "run", "--config", config or self.lab.config, *options]
        self.daemon = self.ns.start(arguments, env=env, cwd=ROOT)
        return self.daemon

    def stop(self, *, timeout: float = 10.0) -> int:
        """Send SIGTERM and return the exit code."""
        assert self.daemon is not None
        self.daemon.terminate()
        return self.daemon.wait(timeout=timeout)

    def ngrokd(self, *arguments: str, check: bool = True, **options: Any) -> Any:
        """Run a command of the command line against this daemon."""
        command = [sys.executable, "-m", "ngrokd", "--socket", f"{self.directory}/ngrokd.sock", *arguments]
        return self.ns.run(command, check=check, **options)

    def status(self) -> dict[str, Any]:
        """What `ngrokd status --json` says."""
        data: dict[str, Any] = json.loads(self.ngrokd("status", "--json").stdout)["data"]
        return data

    def hosts(self) -> str:
        """The hosts file inside, its line ends as they are."""
        return self.ns.call(Path(HOSTS_PATH).read_bytes).decode()

    def network(self) -> str:
        """Links, addresses and routes, to compare before and after."""
        shown = [
            self.ns.run(["ip", *what]).stdout
            for what in (["-o", "link"], ["-o", "addr"], ["route", "show", "table", "all"], ["-6", "route"])
        ]
        return "\n".join(shown)

    def close(self) -> None:
        """Remove the directory; the processes are the namespace's to end."""
        shutil.rmtree(self.directory, ignore_errors=True)
