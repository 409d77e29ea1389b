"""Connections that are ready before somebody needs them, against the lab's ingress, in simulated time."""

from __future__ import annotations

import ssl
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from ngrokd.endpoints import Credentials
from ngrokd.errors import BindingRefused, IngressUnreachable
from ngrokd.lab.ingress import Toxics
from ngrokd.lab.link import Line
from ngrokd.lab.world import Lab, open_lab, open_memory_lab
from ngrokd.relay.connector import Progress
from ngrokd.relay.ingress import Ingress, OpenedStream
from ngrokd.relay.pool import Connection, Pool
from ngrokd.relay.stock import FORGET_S, PROVEN_S, PoolSettings, Stock
from ngrokd.relay.transport import Transport, connect_tcp

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from trio.testing import MockClock

    from ngrokd.relay.dialing import Dial

FAR = Toxics(line=Line(latency_up_s=0.025, latency_down_s=0.025))
ROUND_TRIP_S = 0.05


def credentials(lab: Lab, name: str = "operator") -> Credentials:
    now = time.time()
    issued = lab.clients.client(name, not_before=now - 60, not_after=now + 86400)
    return Credentials(issued.key_pem, issued.chain_pem)


class World:
    """A lab with one echo endpoint, and an ingress of ours that knows it."""

    def __init__(self, lab: Lab, dial: Dial) -> None:
        self.lab = lab
        self.far_connect_s = 0.0  # what a TCP handshake takes: the lab's lines begin after it
        self._dial_lab = dial
        self.dials: list[float] = []
        self.ingress: Ingress
        self.lab.add_endpoint("tcp://echo.demo:7", "echo")

    async def dial(self, address: str, port: int) -> Transport:
        self.dials.append(trio.current_time())
        await trio.sleep(self.far_connect_s)
        return await self._dial_lab(address, port)

    def tell(self, ingress: Ingress, who: Credentials | None = None) -> None:
        host, _, port = self.lab.ingress_address.rpartition(":")
        ingress.set_anchors(False, self.lab.servers.root_pem)
        ingress.set_credentials(who or credentials(self.lab))
        ingress.set_addresses(host, int(port), [host])

    @asynccontextmanager
    async def running(self, **settings: object) -> AsyncIterator[Ingress]:
        """An ingress whose pool runs."""
        settings.setdefault("chance", lambda: 0.0)
        self.ingress = Ingress(self.dial, strict=True, **settings)  # type: ignore[arg-type]
        self.tell(self.ingress)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.ingress.run)
            yield self.ingress
            nursery.cancel_scope.cancel()

    async def use(self) -> float:
        """Open, have one byte echoed, close. Returns how long opening took."""
        opened = await self.ingress.open("echo.demo", 7)
        await check_echo(opened)
        return opened.dial_s

    def count(self, name: str) -> int:
        return self.ingress.counters()[name]

    @property
    def idle_at_ingress(self) -> int:
        """Connections that the lab holds open and that nobody has asked for anything on."""
        return sum(
            not each.ended and bool(each.tls_version) and not each.request for each in self.lab.ingress.connections
        )


async def check_echo(opened: OpenedStream) -> None:
    stream = opened.stream
    assert stream.send_nowait([b"x"]) == 1
    assert bytes(await stream.receive_view()) == b"x"
    await stream.send_eof()
    assert not await stream.receive_view()
    await stream.aclose()


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with open_memory_lab(wall=time.time, simulated_time=False) as lab:
        assert lab.dial is not None
        yield World(lab, lab.dial)


@pytest.fixture
async def far(world: World) -> World:
    """With 50 ms to the ingress and back."""
    world.lab.ingress.toxics = FAR
    world.far_connect_s = ROUND_TRIP_S
    return world


async def settle(seconds: float = 1.0) -> None:
    await trio.sleep(seconds)


# -- what is held


async def test_two_are_ready_before_the_first_request(world: World, autojump_clock: MockClock) -> None:
    """As soon as address and credentials are known: the first app shall not wait either."""
    async with world.running():
        await settle()

        assert world.count("ready") == world.idle_at_ingress == 2
        await world.use()
        assert world.count("hits") == 1


async def test_what_is_taken_is_replaced_a_little_later(world: World, autojump_clock: MockClock) -> None:
    """Not within the request: its own work goes first."""
    async with world.running():
        await settle()
        before = len(world.dials)
        opened = await world.ingress.open("echo.demo", 7)
        assert len(world.dials) == before
        await check_echo(opened)
        await settle()
        assert len(world.dials) == before + 1
        assert world.count("ready") == 2


async def test_nothing_is_held_five_minutes_after_the_last_request(world: World, autojump_clock: MockClock) -> None:
    async with world.running():
        await settle()
        await world.use()
        await trio.sleep(FORGET_S - 2)
        assert world.count("ready") == 2
        await trio.sleep(3)
        assert world.count("ready") == world.idle_at_ingress == 0
        dials = len(world.dials)

        await trio.sleep(3600)
        assert len(world.dials) == dials

        await world.use()
        await settle()
        assert world.count("ready") == 2


async def test_an_old_connection_is_put_away_in_good_order_and_replaced(
    world: World, autojump_clock: MockClock
) -> None:
    """The ingress sees close_notify, and nobody notices anything else."""
    async with world.running(pool=PoolSettings(max_age_s=30)):
        await settle()
        await trio.sleep(31)
        assert world.count("aged") == 2
        assert world.count("ready") == 2
        assert [each.ended for each in world.lab.ingress.connections][:2] == ["done", "done"]


async def test_without_a_pool_every_flow_dials(world: World, autojump_clock: MockClock) -> None:
    async with world.running(pool=PoolSettings(max=0)):
        await settle()
        assert world.dials == []
        await world.use()
        await settle()
        assert len(world.dials) == 1
        assert world.count("misses") == 1


async def test_the_end_puts_everything_away(world: World, autojump_clock: MockClock) -> None:
    async with world.running():
        await settle()
        assert world.idle_at_ingress == 2
    await settle()
    assert world.idle_at_ingress == 0
    assert world.lab.ingress.live_count == 0
    assert (world.count("ready"), world.ingress.dialing) == (0, 0)


async def test_an_idle_pool_does_not_wake(world: World, autojump_clock: MockClock) -> None:
    """Between what happens, no task of it runs."""

    class Steps(trio.abc.Instrument):
        count = 0

        def before_task_step(self, task: trio.lowlevel.Task) -> None:
            self.count += "ngrokd.relay" in task.name

    async with world.running():
        await settle(PROVEN_S + 1)
        steps = Steps()
        trio.lowlevel.add_instrument(steps)
        await trio.sleep(200)
        trio.lowlevel.remove_instrument(steps)
        assert steps.count == 0


# -- demand


async def test_a_far_ingress_costs_one_round_trip_when_connections_are_ready(
    far: World, autojump_clock: MockClock
) -> None:
    """Header and answer; without the pool TCP and TLS cost two more."""
    async with far.running():
        await settle()
        assert await far.use() == pytest.approx(ROUND_TRIP_S, abs=0.002)
    async with far.running(pool=PoolSettings(max=0)):
        assert await far.use() == pytest.approx(3 * ROUND_TRIP_S, abs=0.002)


async def test_five_hundred_a_second_at_fifty_milliseconds(far: World, autojump_clock: MockClock) -> None:
    """The shelf grows within the first second or so; from then on everybody finds a connection on it."""
    times: list[tuple[float, float]] = []

    async def one() -> None:
        begun = trio.current_time()
        times.append((begun, await far.use()))

    async with far.running():
        await settle()
        start = trio.current_time()
        async with trio.open_nursery() as nursery:
            for index in range(1500):
                await trio.sleep_until(start + index / 500)
                nursery.start_soon(one)
        late = [took for begun, took in times if begun > start + 1.5]
        assert len(times) == 1500
        assert max(late) < ROUND_TRIP_S + 0.01
        assert max(took for _, took in times) < 3 * ROUND_TRIP_S + 0.1
        assert far.ingress.describe_pool()["making"] <= 64  # type: ignore[operator]
        assert far.count("resumed") > 0.8 * far.count("dials")
        await trio.sleep(120)
        assert far.count("ready") == 2


async def test_flows_in_need_take_what_is_being_made(far: World, autojump_clock: MockClock) -> None:
    """A request that comes when the shelf is empty gets the dial that is ready first, whoever it was for."""
    async with far.running(pool=PoolSettings(idle=4)):
        await trio.sleep(0.09)  # four have been dialled for 90 of 100 ms
        took = []

        async def one() -> None:
            took.append(await far.use())

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(one)
        counters = far.ingress.counters()
        assert (counters["adopted"], counters["misses"]) == (4, 1)
        assert sorted(round(each, 2) for each in took) == [0.06, 0.06, 0.06, 0.06, 0.15]


async def test_a_flow_whose_connection_in_the_making_fails_dials_itself(far: World, autojump_clock: MockClock) -> None:
    async with far.running(pool=PoolSettings(max=1, idle=1)):
        far.lab.ingress.script.append(Toxics(accept="reset", line=FAR.line))
        await trio.sleep(0.01)
        assert far.count("making") == 1

        await far.use()

        counters = far.ingress.counters()
        assert (counters["adopted"], counters["misses"], counters["failed"]) == (0, 1, 1)


async def test_flows_and_pool_have_a_bound_each(far: World, autojump_clock: MockClock) -> None:
    """Neither can be in the other's way, and together they are bounded."""
    most = {"flows": 0, "pool": 0}

    async def watch() -> None:
        while True:
            most["flows"] = max(most["flows"], far.ingress.dialing)
            most["pool"] = max(most["pool"], far.count("making") + far.count("ready"))
            await trio.sleep(0.001)

    async with far.running(dials=8, pool=PoolSettings(max=20, idle=4)), trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        async with trio.open_nursery() as flows:
            for _ in range(100):
                flows.start_soon(far.use)
        await settle(5)
        nursery.cancel_scope.cancel()
    assert most == {"flows": 8, "pool": 20}


async def test_cancelled_in_the_moment_of_being_given_a_connection(world: World, autojump_clock: MockClock) -> None:
    """The flow is woken with nothing but its end; the connection goes to the shelf."""
    gate = trio.Event()
    made: list[Connection] = []

    async def connect() -> Connection:
        await gate.wait()
        connection = await world.ingress._connector.connect(Progress())
        made.append(connection)
        scope.cancel()  # before the pool gives it away
        return connection

    scope = trio.CancelScope()
    async with world.running(pool=PoolSettings(max=0)):
        stock = Stock(PoolSettings(max=1, idle=1), lambda: 0.0)
        pool = Pool(stock, connect, lambda _: True, lambda _: None, strict=True)
        stock.note_start(trio.current_time())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pool.run)
            await settle(0.1)
            with scope:
                nursery.start_soon(set_later, gate)
                await pool.adopt()
            assert scope.cancelled_caught
            assert len(pool) == 1
            assert pool.take() is made[0]
            made[0].stream.abort()
            nursery.cancel_scope.cancel()


async def set_later(event: trio.Event) -> None:
    await trio.sleep(1)
    event.set()


async def test_cancelled_while_waiting_for_a_connection_in_the_making(far: World, autojump_clock: MockClock) -> None:
    """The connection is not lost: the next one takes it."""
    async with far.running(pool=PoolSettings(idle=1)):
        await trio.sleep(0.02)
        with trio.move_on_after(0.01):
            await far.use()
        await settle()
        assert far.count("ready") >= 1
        assert far.count("adopted") == 0
        await far.use()
        assert far.count("hits") == 1


# -- the ingress misbehaves


async def test_an_ingress_that_is_down_is_not_stormed(world: World, autojump_clock: MockClock) -> None:
    """A handful of tries in ten minutes; and flows hear "refused" at once."""
    world.lab.set_ingress_down(True)
    async with world.running():
        await settle()
        begun = trio.current_time()
        with pytest.raises(IngressUnreachable, match="down"):
            await world.use()
        assert trio.current_time() == begun
        dials = len(world.dials)
        for _ in range(200):
            await trio.sleep(1)
            with pytest.raises(IngressUnreachable):
                await world.use()
        assert len(world.dials) - dials - 200 < 16
        assert "down" in str(world.ingress.describe_pool()["problem"])

        world.lab.set_ingress_down(False)
        await settle(1)
        await world.use()
        await settle()
        assert world.count("ready") == 2
        assert world.ingress.describe_pool()["problem"] == ""


async def test_what_the_ingress_hung_up_on_is_noticed_at_once(world: World, autojump_clock: MockClock) -> None:
    async with world.running():
        await settle(PROVEN_S + 1)
        world.lab.ingress.drop_connections()
        await settle()
        assert world.count("dead") == 2
        assert world.count("ready") == 2


async def test_a_connection_that_died_a_moment_ago_is_not_used(world: World, autojump_clock: MockClock) -> None:
    """Between the ingress's end and the next turn of the loop somebody may want it."""
    async with world.running():
        await settle(PROVEN_S + 1)
        world.lab.ingress.drop_connections()
        opened = await world.ingress.open("echo.demo", 7)
        await check_echo(opened)
        assert world.count("replaced") + world.count("dead") >= 1


async def test_one_that_dies_at_the_header_is_replaced_once(far: World, autojump_clock: MockClock) -> None:
    """The header crosses with the end of the connection: only now can we know. No byte of the app was sent."""
    async with far.running():
        await settle(PROVEN_S + 1)
        far.lab.ingress.drop_connections()  # the reset is on its way for 25 ms
        took = await far.use()
        assert far.count("replaced") == 1
        assert took < 4 * ROUND_TRIP_S


async def test_an_ingress_that_answers_nothing_gets_a_second_chance_and_no_third(
    world: World, autojump_clock: MockClock
) -> None:
    async with world.running(resumption=False):
        await settle(PROVEN_S + 1)
        world.lab.ingress.toxics = Toxics(answer="reset")
        with pytest.raises(BindingRefused, match="closed the connection before it answered"):
            await world.use()
        assert asked(world) == 2


async def test_a_refusal_is_an_answer(world: World, autojump_clock: MockClock) -> None:
    """Nothing is asked twice that was answered once."""
    async with world.running(resumption=False):
        await settle()
        with pytest.raises(BindingRefused, match="ERR_NGROK_706"):
            await world.ingress.open("nobody.demo", 1)
        assert asked(world) == 1
        assert world.count("hits") == 1


def asked(world: World) -> int:
    """Headers that the ingress has got."""
    return sum(each.request is not None for each in world.lab.ingress.connections)


async def test_a_pooled_connection_that_says_nothing_is_given_up_in_time(
    world: World, autojump_clock: MockClock
) -> None:
    """A router forgot it, or this machine slept: three seconds, and all that waited longer go with it."""
    async with world.running():
        await settle(PROVEN_S + 1)
        gone = list(world.lab.ingress.connections)
        async with healing(world, after_s=1.0):
            assert await world.use() == pytest.approx(3.0)
        assert world.count("silent") == 1
        await settle()
        assert all(each.ended for each in gone)
        assert world.count("ready") == 2


async def test_an_endpoint_that_takes_its_time_is_given_it(world: World, autojump_clock: MockClock) -> None:
    """It would be asked twice each time, and cost the others their ready connections."""
    world.lab.ingress.routes["echo.demo", 7].toxics = Toxics(delay_s=4.0)
    async with world.running():
        await settle()
        assert await world.use() == pytest.approx(7.0)
        for _ in range(3):
            assert await world.use() == pytest.approx(4.0)
        assert world.count("silent") == 1
        await settle()
        assert world.count("ready") >= 2
        assert world.count("surplus") == 0


async def test_an_endpoint_that_never_answers_is_asked_once_from_then_on(
    world: World, autojump_clock: MockClock
) -> None:
    world.lab.ingress.routes["echo.demo", 7].toxics = Toxics(answer="hang")
    async with world.running():
        await settle()
        for expected in (2, 3, 4):
            begun = trio.current_time()
            with pytest.raises(IngressUnreachable, match="timed out after 10 s while waiting for the answer"):
                await world.use()
            assert trio.current_time() - begun == pytest.approx(10)
            assert asked(world) == expected
        await settle()
        assert world.count("ready") >= 2


@asynccontextmanager
async def healing(world: World, *, after_s: float) -> AsyncIterator[None]:
    """The ingress answers nothing, until it is well again."""
    world.lab.ingress.toxics = Toxics(answer="hang")

    async def heal() -> None:
        await trio.sleep(after_s)
        world.lab.ingress.toxics = Toxics()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(heal)
        yield


async def test_an_idle_limit_of_the_ingress_is_learned(world: World, autojump_clock: MockClock) -> None:
    """It ends what has waited for 20 seconds. After three such ends connections are renewed before that."""
    world.lab.ingress.patience_s = 20.0
    async with world.running():
        await keep_using(world, 100)
        assert world.ingress.describe_pool()["idle_limit_s"] == pytest.approx(20, abs=0.1)
        dead = world.count("dead")

        await keep_using(world, 300)

        assert world.count("dead") == dead
        assert world.count("aged") > 10


async def keep_using(world: World, seconds: float) -> None:
    """Once a second."""
    for _ in range(round(seconds)):
        await trio.sleep(1)
        await world.use()


async def test_an_ingress_that_lets_nobody_wait_gets_no_pool(world: World, autojump_clock: MockClock) -> None:
    """Connections that die faster than they are used would only be work."""
    world.lab.ingress.patience_s = 0.5
    async with world.running():
        for _ in range(60):
            await trio.sleep(5)
            await world.use()
        assert len(world.dials) < 60 + 40


# -- what changes


async def serials(world: World) -> list[int]:
    return [each.client_serial for each in world.lab.ingress.connections]


async def test_another_certificate_is_used_at_once(world: World, autojump_clock: MockClock) -> None:
    """Ready connections of the old one go; flows that live go on; nothing of it is resumed."""
    async with world.running() as ingress:
        await settle()
        living = await ingress.open("echo.demo", 7)
        await settle()
        before = len(world.lab.ingress.connections)
        ingress.set_credentials(credentials(world.lab, "renewed"))
        assert world.count("ready") == 0

        await world.use()

        fresh = list(world.lab.ingress.connections)[before:]
        assert len({each.client_serial for each in fresh}) == 1
        assert fresh[0].client_serial != world.lab.ingress.connections[0].client_serial
        assert not fresh[0].resumed
        await check_echo(living)
        await settle()
        assert world.count("ready") == 2


async def test_a_connection_in_the_making_is_of_no_use_after_a_change(far: World, autojump_clock: MockClock) -> None:
    """It was begun with the old certificate, and the flow that waits for it dials with the new one."""
    async with far.running() as ingress:
        await trio.sleep(0.05)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(far.use)
            await trio.sleep(0.02)
            ingress.set_credentials(credentials(far.lab, "renewed"))
        used = [each for each in far.lab.ingress.connections if each.request]
        assert len(used) == 1
        assert used[0].client_serial != far.lab.ingress.connections[0].client_serial


async def test_other_anchors_and_addresses_empty_the_shelf(world: World, autojump_clock: MockClock) -> None:
    async with world.running() as ingress:
        await settle()
        ingress.set_anchors(False, world.lab.servers.root_pem)
        assert world.count("ready") == 0
        await settle()
        assert world.count("ready") == 2

        host, _, port = world.lab.ingress_address.rpartition(":")
        ingress.set_addresses(host, int(port), [host])
        assert world.count("ready") == 2  # nothing new
        ingress.set_addresses(host, int(port), ["203.0.113.1", host])
        assert world.count("ready") == 2  # one more
        ingress.set_addresses(host, int(port), ["203.0.113.1"])
        assert world.count("ready") == 0
        await settle()
        ingress.set_addresses(host, 4433, ["203.0.113.1"])
        assert world.count("ready") == 0


async def test_a_change_is_tried_at_once_after_failures(world: World, autojump_clock: MockClock) -> None:
    """Whoever mends the configuration shall not wait for a pause of a minute."""
    world.lab.present("foreign")
    async with world.running() as ingress:
        await trio.sleep(200)
        assert world.count("ready") == 0
        world.lab.present("good")
        ingress.set_anchors(False, world.lab.servers.root_pem)
        await settle(0.1)
        assert world.count("ready") == 2


# -- resumption


async def test_sessions_are_resumed(world: World, autojump_clock: MockClock) -> None:
    async with world.running():
        for _ in range(20):
            await settle()
            await world.use()
        records = list(world.lab.ingress.connections)
        assert not records[0].resumed
        assert sum(each.resumed for each in records) >= 18
        assert len({each.client_serial for each in records}) == 1  # resumed or not, it knows us
        assert world.count("resumed") == sum(each.resumed for each in records)
        assert world.ingress.describe_pool()["resumption"] == "passed"


async def test_resumption_may_be_off_on_either_side(world: World, autojump_clock: MockClock) -> None:
    async with world.running(resumption=False):
        for _ in range(5):
            await settle()
            await world.use()
        assert world.ingress.describe_pool()["resumption"] == "off"
    world.lab.ingress.resumption = False
    async with world.running():
        for _ in range(5):
            await settle()
            await world.use()
    assert not any(each.resumed for each in world.lab.ingress.connections)


async def test_an_ingress_without_tickets_gets_full_handshakes(world: World, autojump_clock: MockClock) -> None:
    world.lab.ingress.set_tls(tickets=0)
    async with world.running():
        for _ in range(5):
            await settle()
            await world.use()
        assert world.count("tickets") == 0
    assert not any(each.resumed for each in world.lab.ingress.connections)


async def test_a_restarted_ingress_knows_no_session_and_nobody_notices(world: World, autojump_clock: MockClock) -> None:
    async with world.running():
        for _ in range(5):
            await settle()
            await world.use()
        world.lab.present("good")  # a new context: none of our tickets can be decrypted
        for _ in range(10):
            await settle()
            await world.use()
        assert world.count("dial_failures") == 0
        assert world.lab.ingress.connections[-1].resumed


async def test_the_certificate_is_seen_again_after_an_hour(world: World, autojump_clock: MockClock) -> None:
    """It may have expired, or been taken back, meanwhile."""
    async with world.running():
        for _ in range(130):
            await trio.sleep(60)
            await world.use()
        full = [each.opened_at for each in world.lab.ingress.connections if not each.resumed]
        late = [each for each in full if each > 120]
        assert late
        assert min(late) == pytest.approx(3600, abs=120)
        assert len(late) < 12


async def test_an_ingress_that_cannot_place_resumed_connections_gets_full_ones(
    world: World, autojump_clock: MockClock
) -> None:
    """It looks at client certificates where a resumed handshake does not pass. The app notices nothing."""
    refuse_resumed(world)
    async with world.running():
        for _ in range(20):
            await settle()
            await world.use()
        assert world.ingress.describe_pool()["resumption"] == "failed"
        assert not any(each.resumed for each in list(world.lab.ingress.connections)[-5:])


async def test_a_refusal_that_a_full_handshake_confirms_acquits_resumption(
    world: World, autojump_clock: MockClock
) -> None:
    """An endpoint that does not exist is no reason to stop resuming; from then on it is not asked twice either."""
    async with world.running():
        while not world.count("tickets"):
            await settle()
        world.ingress._pool.discard(lambda _: True)  # the first ones were full
        await settle()
        for expected in (2, 3, 4):
            with pytest.raises(BindingRefused, match="ERR_NGROK_706"):
                await world.ingress.open("nobody.demo", 1)
            assert asked(world) == expected
        assert world.ingress.describe_pool()["resumption"] == "passed"


class _Choosy:
    """Toxics of an ingress that does not know whom a resumed connection belongs to."""

    def __init__(self, world: World) -> None:
        self._records = world.lab.ingress.connections

    def __get__(self, route: object, owner: object) -> Toxics | None:
        asking = max((each for each in reversed(self._records) if each.request), key=lambda each: each.requested_at)
        return Toxics(error_code="ERR_NGROK_1", error_message="who are you?") if asking.resumed else None


def refuse_resumed(world: World) -> None:
    """Have the ingress refuse the header of a resumed connection."""
    good = world.lab.ingress.routes["echo.demo", 7]
    kind = type("Choosy", (), {"toxics": _Choosy(world)})
    route = kind()
    route.backend, route.endpoint_id, route.proto = good.backend, good.endpoint_id, good.proto
    world.lab.ingress.routes["echo.demo", 7] = route


# -- second tries


async def test_a_refused_connect_is_a_verdict(world: World, autojump_clock: MockClock) -> None:
    """Nobody listens, and the app hears it as it would from the ingress itself."""
    world.lab.set_ingress_down(True)
    async with world.running(pool=PoolSettings(max=0)):
        begun = trio.current_time()
        with pytest.raises(IngressUnreachable):
            await world.use()
        assert trio.current_time() == begun
        assert len(world.dials) == 1


@pytest.mark.parametrize("bad", [Toxics(accept="reset"), Toxics(accept="close")])
async def test_what_may_pass_is_tried_again(world: World, autojump_clock: MockClock, bad: Toxics) -> None:
    """A node of the ingress that goes away resets; the next one serves."""
    world.lab.ingress.script.extend([bad, bad])
    async with world.running(pool=PoolSettings(max=0)):
        took = await world.use()
        assert took == pytest.approx(0.15)
        assert world.count("retried") == 2


async def test_what_does_not_pass_within_a_second_is_a_verdict(world: World, autojump_clock: MockClock) -> None:
    world.lab.ingress.toxics = Toxics(accept="reset")
    async with world.running(pool=PoolSettings(max=0)):
        begun = trio.current_time()
        with pytest.raises(IngressUnreachable):
            await world.use()
        assert trio.current_time() - begun == pytest.approx(0.75)
        assert len(world.dials) == 5


async def test_second_tries_are_bounded_per_endpoint_and_in_all(world: World, autojump_clock: MockClock) -> None:
    """A thousand apps make no storm: those beyond the bounds hear the verdict."""
    world.lab.ingress.toxics = Toxics(accept="reset")
    outcomes: list[float] = []

    async def one(host: str) -> None:
        begun = trio.current_time()
        with pytest.raises(IngressUnreachable):
            await world.ingress.open(host, 7)
        outcomes.append(trio.current_time() - begun)

    async with world.running(pool=PoolSettings(max=0)):
        async with trio.open_nursery() as nursery:
            for _ in range(100):
                nursery.start_soon(one, "echo.demo")
        assert len(world.dials) == 100 + 16 * 4
        world.dials.clear()
        async with trio.open_nursery() as nursery:
            for index in range(200):
                nursery.start_soon(one, f"host-{index % 20}.demo")
        assert len(world.dials) <= 200 + 64 * 4


async def test_an_ingress_that_is_back_serves_the_next_flow(world: World, autojump_clock: MockClock) -> None:
    """No pause of the pool's holds up a flow."""
    world.lab.set_ingress_down(True)
    async with world.running():
        for _ in range(30):
            await trio.sleep(10)
            with pytest.raises(IngressUnreachable):
                await world.use()
        world.lab.set_ingress_down(False)
        begun = trio.current_time()
        await world.use()
        assert trio.current_time() == begun


# -- real sockets


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_real_sockets_and_both_versions(version: ssl.TLSVersion) -> None:
    async with open_lab() as lab:
        lab.ingress.set_tls(version, version)
        world = World(lab, connect_tcp)
        async with world.running() as ingress:
            with trio.fail_after(20):
                while world.count("ready") < 2:  # noqa: ASYNC110 - as anybody would look from outside
                    await trio.sleep(0.01)
                for _ in range(30):
                    await world.use()
                async with trio.open_nursery() as nursery:
                    for _ in range(40):
                        nursery.start_soon(world.use)
                while world.count("ready") < 2 or world.count("making"):  # noqa: ASYNC110
                    await trio.sleep(0.01)
            counters = ingress.counters()
            assert counters["hits"] + counters["adopted"] + counters["misses"] == 70
            assert counters["hits"] >= 20
            assert counters["resumed"] > counters["dials"] / 3
            assert counters["dead"] == 0
            assert {each.tls_version for each in lab.ingress.connections if each.request} == {
                "TLSv1.2" if version is ssl.TLSVersion.TLSv1_2 else "TLSv1.3"
            }
            lab.ingress.drop_connections()
            with trio.fail_after(20):
                await world.use()
