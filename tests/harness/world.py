"""A world in one process: the whole daemon on a memory device, the lab over streams in memory, and simulated time.

There is no thread, no socket on the data path and no wait outside Trio's clock, so with `autojump_clock` a day passes
in seconds. Time is two clocks, as in the real world: Trio's, which timers use, and the wall clock, which
certificates and files use; `WallClock.offset` moves the second against the first.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from ipaddress import IPv4Address, ip_address
from pathlib import Path
from typing import Any

import trio

from ngrokd import config
from ngrokd.config import Settings
from ngrokd.daemon import Daemon
from ngrokd.daemon.ipv6 import Answer
from ngrokd.dataplane import DataPlane
from ngrokd.host.plan import gateway
from ngrokd.lab.world import Lab, open_memory_lab
from ngrokd.log import Log
from ngrokd.names.twins import Twins
from ngrokd.relay.transport import Transport
from tun import Device
from tun.testing.apppeer import AppHost
from tun.testing.memory import MemoryDevice, memory_pair

EPOCH = 1_790_000_000.0  # a day in September 2026; certificates of the lab's servers are valid for decades around it


class WallClock:
    """Unix seconds that pass with Trio's, and may jump: change `offset`."""

    def __init__(self) -> None:
        self.offset = 0.0

    def now(self) -> float:
        """Unix seconds."""
        return EPOCH + trio.current_time() + self.offset


class MemoryMachine:
    """`ngrokd.daemon.Machine` without a machine."""

    names: tuple[str, ...] = ("world",)
    problem = ""
    descriptors = 1_000_000

    def __init__(self, lab: Lab, wall: Callable[[], float], cable: tuple[MemoryDevice, MemoryDevice]) -> None:
        self._lab = lab
        self._wall = wall
        self.device, self.app_side = cable
        self.prepared = False
        self.apps: AppHost | None = None
        self.twins: Twins | None = None
        self.ipv6_problem = "nobody has asked for it"
        self.answers: list[Answer] = []
        self.knocks = 0
        self.changed: Callable[[], object] = lambda: None
        self.public: set[str] = set()

    def wall(self) -> float:
        """The simulated wall clock."""
        return self._wall()

    async def run_sync(self, function: Callable[..., Any], /, *args: Any) -> Any:
        """Right here: a thread would let the simulated clock run away."""
        await trio.lowlevel.checkpoint()
        return function(*args)

    async def connect(self, host: str, port: int) -> trio.abc.Stream:
        """A stream to the lab's API."""
        assert self._lab.connect is not None
        return await self._lab.connect(host, port)

    async def dial(self, address: str, port: int) -> Transport:
        """A transport to the lab's ingress."""
        assert self._lab.dial is not None
        return await self._lab.dial(address, port)

    async def resolve(self, host: str, port: int) -> tuple[str, ...]:
        """The lab's ingress is configured by address, and `public` holds the names that others have as well."""
        await trio.lowlevel.checkpoint()
        with contextlib.suppress(ValueError):
            return (str(ip_address(host)),)
        if host in self.public:
            return ("192.0.2.80",)
        raise OSError("no such name")

    @contextlib.contextmanager
    def signals(self) -> Iterator[AsyncIterator[int]]:
        """Nobody sends any; `Daemon.stop` is called instead."""

        async def none() -> AsyncIterator[int]:
            while True:
                await trio.sleep(math.inf)
                yield 0

        yield none()

    async def knock(self, address: str, port: int) -> Answer:
        """What the stack at the other end of the cable answers, unless the test has `answers`; the last one stays."""
        assert not self.ipv6_problem, "nobody was to knock"
        self.knocks += 1
        if not self.answers:
            return await self._really_knock(address, port)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if answer is Answer.SILENCE:
            await trio.sleep_forever()
        await trio.lowlevel.checkpoint()
        return answer

    async def _really_knock(self, address: str, port: int) -> Answer:
        assert self.twins is not None
        assert self.apps is not None
        try:
            await self.apps.connect((address, port), source=str(gateway(self.twins.subnet6)))
        except ConnectionRefusedError:
            return Answer.REFUSED
        return Answer.NO_WAY

    def prepare(self, settings: Settings, twins: Twins | None = None) -> Device:
        """The daemon's end of the cable."""
        assert not self.prepared
        self.prepared = True
        self.twins = twins
        return self.device

    def reopen(self) -> Device:
        """The same end again."""
        return self.device

    def restore(self) -> None:
        """Nothing was changed."""
        self.prepared = False

    def addresses(self) -> frozenset[bytes] | None:
        """The addresses of the link."""
        ours = {IPv4Address("10.107.0.1").packed}
        return frozenset(ours if self.twins is None else {*ours, gateway(self.twins.subnet6).packed})

    async def watch(self, changed: Callable[[], None]) -> None:
        """Nobody changes anything; a test may call `changed` for somebody."""
        self.changed = changed
        await trio.sleep_forever()


class World:
    """Lab, daemon and the app's end of the cable.

    Attributes:
        clock: the wall clock.
        hosts: path of the hosts file.
        apps: this machine's kernel in miniature, at the other end of the cable.
        log_control: the log of the next daemon, None for none.
        ipv6: whether it has IPv6.
    """

    def __init__(self, directory: Path, lab: Lab, clock: WallClock) -> None:
        self.directory = directory
        self.lab = lab
        self.clock = clock
        self.cable = memory_pair(names=("ngrokd0", "app0"))
        self.hosts = directory / "hosts"
        self.output = io.StringIO()
        self.log_control: Log | None = None
        self.daemon: Daemon
        self.machine: MemoryMachine
        self.apps = AppHost(self.cable[1])
        self.ipv6 = False

    @asynccontextmanager
    async def running(self, **sections: dict[str, object]) -> AsyncIterator[Daemon]:
        """Run a daemon from start to a clean end around the body, which may stop it itself."""
        sections.setdefault("hosts", {})["path"] = str(self.hosts)
        sections.setdefault("http", {})["listen"] = ""
        sections.setdefault("api", {}).setdefault("poll_interval", "30s")
        path = self.lab.write_config(self.directory, settings=sections)
        self.machine = MemoryMachine(self.lab, self.clock.now, self.cable)
        self.machine.apps = self.apps
        if self.ipv6:
            self.machine.ipv6_problem = ""
        self.output = io.StringIO()
        self.daemon = Daemon(
            config.load(str(path), {}),
            self.machine,
            environ={},
            output=self.output,
            log_control=self.log_control,
            strict=True,
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.daemon.run)
            yield self.daemon
            self.daemon.stop()

    def named(self, prefix: str = "10.107.") -> dict[str, str]:
        """Host name to address, as the hosts file says, of addresses that begin so."""
        lines = [line.split() for line in self.hosts.read_text().splitlines() if line.startswith(prefix)]
        return {name: address for address, name in lines}


def in_process(daemon: Daemon) -> DataPlane:
    """The daemon's data plane, which is in this process: here nobody asks for workers."""
    assert isinstance(daemon.plane, DataPlane)
    return daemon.plane


@asynccontextmanager
async def open_world(directory: Path) -> AsyncIterator[World]:
    """A lab with its demo endpoints, and a hosts file with foreign lines. `directory` exists."""
    clock = WallClock()
    async with open_memory_lab(wall=clock.now) as lab:
        world = World(directory, lab, clock)
        world.hosts.write_text("127.0.0.1\tlocalhost\n192.0.2.9\tforeign.example\n")
        lab.add_demo_endpoints()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.apps.run)
            yield world
            nursery.cancel_scope.cancel()
