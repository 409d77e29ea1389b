"""Names over IPv6, in simulated time: which answers of our own door open and close the way, and how soon."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from ngrokd.daemon import Daemon
from ngrokd.daemon.ipv6 import Answer
from ngrokd.host.plan import gateway
from ngrokd.lab.control_plane import Fault
from ngrokd.ops.peers import Peer
from tests.harness.world import World, open_world

ROOT = Peer(pid=1, uid=0, gid=0)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """A lab and a cable. A test asks for `autojump_clock` itself: pytest-trio looks for clocks nowhere else."""
    async with open_world(tmp_path) as opened:
        opened.ipv6 = True
        yield opened


def named(world: World) -> dict[str, str]:
    return world.named("fd")


async def listed(daemon: Daemon) -> dict[str, str]:
    """What `ngrokd list` says of IPv6."""
    rows = await daemon.commands["list"].handler([], ROOT)
    assert isinstance(rows, Iterator)
    return {row["hostname"]: row["ip6"] for row in rows}


async def test_each_name_leads_to_us_over_ipv6_too(world: World, autojump_clock: MockClock) -> None:
    """The way is tried with a real connection, so this needs the whole stack."""
    async with world.running() as daemon:
        await daemon.ready.wait()
        twins = world.machine.twins
        assert twins is not None

        assert {name: str(twins.of(IPv4Address(four))) for name, four in world.named().items()} == named(world)
        assert daemon.status()["subnet6"] == str(twins.subnet6)
        assert await listed(daemon) == named(world)
        source = str(gateway(twins.subnet6))
        stream = await world.apps.connect((named(world)["hello.demo"], 80), source=source)
        await stream.send_all(b"GET / HTTP/1.1\r\nHost: hello.demo\r\nConnection: close\r\n\r\n")
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 200")
        with pytest.raises(ConnectionRefusedError):
            await world.apps.connect((named(world)["hello.demo"], 81), source=source)
    assert named(world) == {}


async def test_the_addresses_are_the_same_after_a_restart(world: World, autojump_clock: MockClock) -> None:
    async with world.running() as daemon:
        await daemon.ready.wait()
        before = named(world)
    async with world.running() as daemon:
        await daemon.ready.wait()
        assert named(world) == before


async def test_a_closed_way_takes_the_lines_at_once_and_an_open_one_brings_them_back(
    world: World, autojump_clock: MockClock
) -> None:
    """Few tell anybody that they have opened or closed a way, so it is tried every ten seconds."""
    async with world.running() as daemon:
        await daemon.ready.wait()
        wanted, four = named(world), world.named()
        world.machine.answers = [Answer.NO_WAY]
        await trio.sleep(10.1)
        assert named(world) == {}
        assert daemon.status()["subnet6"] == ""
        assert set((await listed(daemon)).values()) == {""}
        assert world.named() == four
        assert daemon.state == "ready"

        world.machine.answers = [Answer.REFUSED]
        await trio.sleep(10.1)
        assert named(world) == wanted

        world.machine.answers = [Answer.NO_WAY]
        world.machine.changed()
        await trio.testing.wait_all_tasks_blocked()
        assert named(world) == {}, "what the kernel tells is acted on at once"


async def test_a_hanging_api_does_not_keep_lines_that_lead_nowhere(world: World, autojump_clock: MockClock) -> None:
    async with world.running(api={"poll_interval": "5s"}) as daemon:
        await daemon.ready.wait()
        assert named(world)
        world.lab.plane.set_fault(Fault(hang=True))
        await trio.sleep(6)

        world.machine.answers = [Answer.NO_WAY]
        world.machine.changed()
        await trio.testing.wait_all_tasks_blocked()

        assert named(world) == {}
        assert world.named()


async def test_one_lost_answer_is_no_closed_way(world: World, autojump_clock: MockClock) -> None:
    """A busy second, or a flood that used up the refusals; a rewritten hosts file would make it worse."""
    async with world.running() as daemon:
        await daemon.ready.wait()
        wanted = named(world)
        world.machine.answers = [Answer.SILENCE, Answer.UNKNOWN, Answer.SILENCE, Answer.SILENCE, Answer.REFUSED]
        knocks = world.machine.knocks
        while world.machine.knocks < knocks + 6:
            await trio.sleep(0.1)
            assert named(world) == wanted

        world.machine.answers = [Answer.SILENCE]
        world.machine.changed()
        await trio.sleep(2.9)
        assert named(world) == wanted
        await trio.sleep(0.2)
        assert named(world) == {}


async def test_a_start_does_not_wait_for_a_silent_way(world: World, autojump_clock: MockClock) -> None:
    """A quarter of a second; the lines come when the answer does."""
    async with world.running() as daemon:
        world.machine.answers = [Answer.SILENCE, Answer.REFUSED]
        started = trio.current_time()
        await daemon.ready.wait()
        assert trio.current_time() - started <= 1.0
        await trio.sleep(0.3)
        assert named(world)


async def test_where_ipv6_is_switched_off_nobody_knocks_until_it_is_on(world: World, autojump_clock: MockClock) -> None:
    world.ipv6 = False
    async with world.running() as daemon:
        await daemon.ready.wait()
        world.machine.ipv6_problem = "it is switched off"
        await trio.sleep(100)
        assert world.machine.knocks == 0
        assert named(world) == {}

        world.machine.ipv6_problem = ""
        world.machine.changed()
        await trio.sleep(0.1)

        assert {IPv6Address(address) for address in named(world).values()}
        assert world.machine.knocks


async def test_ipv6_can_be_switched_off(world: World, autojump_clock: MockClock) -> None:
    async with world.running(net={"subnet6": "off"}) as daemon:
        await daemon.ready.wait()
        await trio.sleep(60)

        assert world.machine.knocks == 0
        assert named(world) == {}
        assert daemon.status()["subnet6"] == ""
        assert not (world.directory / "state" / "subnet6").exists()
