"""Connections that are kept ready, seen from the daemon: when they are made, shown, renewed and put away."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from ngrokd.daemon import Daemon
from tests.harness.world import World, open_world


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """A lab and a cable."""
    async with open_world(tmp_path) as opened:
        yield opened


def pool(daemon: Daemon) -> dict[str, Any]:
    shown = daemon.status()["pool"]
    assert isinstance(shown, dict)
    return shown


async def use(world: World) -> None:
    stream = await world.apps.connect((world.named()["echo.demo"], 7))
    await stream.send_all(b"x")
    assert await stream.receive_some(1) == b"x"
    await stream.send_eof()
    assert await stream.receive_some(1) == b""


async def test_the_first_app_finds_a_connection(world: World, autojump_clock: MockClock) -> None:
    async with world.running() as daemon:
        await daemon.ready.wait()
        await trio.sleep(1)
        assert pool(daemon)["ready"] == 2

        await use(world)

        assert (pool(daemon)["hits"], pool(daemon)["misses"]) == (1, 0)
        counters = daemon.plane.counters()
        assert counters["pool.hits"] == 1
        assert counters["pool.dials"] >= 2
    assert world.lab.ingress.live_count == 0


async def test_an_ingress_that_is_down_is_known_before_the_first_app_finds_out(
    world: World, autojump_clock: MockClock
) -> None:
    world.lab.set_ingress_down(True)
    async with world.running() as daemon:
        await daemon.ready.wait()
        await trio.sleep(1)
        ingress = daemon.status()["ingress"]
        assert isinstance(ingress, dict)
        assert "cannot reach the ingress" in ingress["problem"]

        world.lab.set_ingress_down(False)
        await trio.sleep(60)
        ingress = daemon.status()["ingress"]
        assert isinstance(ingress, dict)
        assert ingress["problem"] == ""
        assert pool(daemon)["ready"] == 2


async def test_a_quiet_daemon_holds_no_connection(world: World, autojump_clock: MockClock) -> None:
    async with world.running() as daemon:
        await daemon.ready.wait()
        await trio.sleep(301)
        assert pool(daemon)["ready"] == 0
        assert world.lab.ingress.live_count == 0
        dials = world.lab.ingress.connection_count
        await trio.sleep(3600)
        assert world.lab.ingress.connection_count == dials


async def test_a_renewed_certificate_is_on_every_ready_connection(world: World, autojump_clock: MockClock) -> None:
    world.lab.plane.certificate_lifetime_s = 3600
    async with world.running() as daemon:
        await daemon.ready.wait()
        for _ in range(100):
            await use(world)
            await trio.sleep(60)
        records = [each for each in world.lab.ingress.connections if each.request]
        serials = [each.client_serial for each in records]
        assert len(set(serials)) >= 3
        assert serials == sorted(serials, key=serials.index)  # none comes back that was replaced
        assert pool(daemon)["dial_failures"] == 0
        assert daemon.plane.counters()["relay.refused"] == 0


async def test_without_a_pool_all_is_as_before(world: World, autojump_clock: MockClock) -> None:
    async with world.running(pool={"max": 0}) as daemon:
        await daemon.ready.wait()
        await trio.sleep(1)
        assert world.lab.ingress.connection_count == 0
        await use(world)
        assert pool(daemon)["misses"] == 1


async def test_stopping_puts_them_away_first(world: World, autojump_clock: MockClock) -> None:
    """A flow that drains keeps its connection; those that wait for nobody go at once."""
    async with world.running(net={"drain": "10s"}) as daemon:
        await daemon.ready.wait()
        stream = await world.apps.connect((world.named()["echo.demo"], 7))
        await trio.sleep(1)
        assert world.lab.ingress.live_count == 3
        daemon.stop()
        await trio.sleep(1)
        assert world.lab.ingress.live_count == 1
        await stream.send_eof()
        assert await stream.receive_some(1) == b""
