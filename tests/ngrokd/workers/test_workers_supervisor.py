"""The daemon's side of the workers: who is told what, who is asked, and what happens when one ends."""

from __future__ import annotations

import io
import logging
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from ipaddress import IPv4Address
from itertools import pairwise
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from ngrokd import __version__
from ngrokd.dataplane import (
    RECORDINGS,
    Accept,
    CaFound,
    DataPlaneSettings,
    DeviceLost,
    Dial,
    Pause,
    Reach,
    RecordOrder,
    Report,
    Serve,
    TooManyRecordingsError,
    Trust,
    Use,
)
from ngrokd.endpoints import Credentials, Endpoint
from ngrokd.lab.ca import Authority
from ngrokd.lab.world import Lab, open_memory_lab
from ngrokd.names.directory import Directory
from ngrokd.relay.handler import CLOSED, CUT, OPENED, FlowEvent
from ngrokd.relay.trust import BadCredentials, fingerprint
from ngrokd.workers import supervisor
from ngrokd.workers.channel import Channel
from ngrokd.workers.messages import (
    FROM_WORKER,
    MOST_FROM_WORKER,
    AskCounts,
    AskFlows,
    BadMessage,
    Begin,
    Commit,
    Counts,
    Done,
    Drain,
    Drained,
    End,
    Entries,
    Failed,
    Flows,
    Hello,
    Lost,
    Said,
    Truth,
    encode,
    settings_of,
)
from ngrokd.workers.supervisor import WORKER_LOST, WorkerFailedError, WorkerRightsError, WorkersPlane
from ngrokd.workers.worker import Outbox
from tests.ngrokd.workers.crew import Crew, MemoryLink, Script, nobody
from tun import DeviceError, StackSettings
from tun.pcap import read_capture
from tun.testing.apppeer import AppHost, AppStream

SETTINGS = DataPlaneSettings(StackSettings(), secret=b"s" * 32)
ADDRESS = "10.107.0.2"
ENDPOINT = Endpoint("ep_echo", "tcp://echo.demo:7", "tcp", "echo.demo", 7, "tcp")
DIRECTORY = Directory([(IPv4Address(ADDRESS), ENDPOINT)])


class Play:
    """A plane of workers that are tasks, and what it reports."""

    def __init__(self, nursery: trio.Nursery, link: MemoryLink, workers: int) -> None:
        self.reports: list[Report] = []
        self.link = link
        self.crew = Crew(nursery, link)
        self.device = link.open_queue()
        self.plane = WorkersPlane(self.device, SETTINGS, workers, self.reports.append, self.crew)

    def cast(self, scripts: list[Script | None]) -> None:
        """Who plays the first worker of each queue, then the others."""
        count = len(self.plane.describe_workers())
        self.crew.first = dict(enumerate(scripts[:count]))
        self.crew.scripts = scripts[count:]

    def events(self, kind: str) -> list[FlowEvent]:
        return [report for report in self.reports if isinstance(report, FlowEvent) and report.kind == kind]


@asynccontextmanager
async def open_play(
    workers: int = 2, *, scripts: list[Script | None] | None = None, dial: Dial = nobody
) -> AsyncIterator[Play]:
    """A plane that runs, and is drained at the end."""
    async with trio.open_nursery() as nursery:
        play = Play(nursery, MemoryLink(), workers)
        play.cast(scripts or [])
        play.crew.dial = dial
        async with trio.open_nursery() as running:
            await running.start(play.plane.run)
            try:
                yield play
            finally:
                play.plane.drain(0)
        assert all(process.code is not None for _, _, process in play.crew.started), "no worker outlives it"
        nursery.cancel_scope.cancel()


class Stage:
    """A play whose workers carry the connections of apps to a lab."""

    def __init__(self, play: Play, lab: Lab, apps: list[AppHost]) -> None:
        self.play = play
        self.plane = play.plane
        self.crew = play.crew
        self.lab = lab
        self.apps = apps

    async def connect(self, index: int) -> AppStream:
        """An app whose packets the kernel puts on this queue."""
        return await self.apps[index].connect((ADDRESS, 7))


async def echo(app: AppStream) -> bytes:
    await app.send_all(b"hello")
    return await app.receive_some(100)


@asynccontextmanager
async def open_stage() -> AsyncIterator[Stage]:
    async with AsyncExitStack() as stack:
        lab = await stack.enter_async_context(open_memory_lab(wall=lambda: 1_790_000_000.0))
        assert lab.dial is not None
        lab.add_demo_endpoints()
        play = await stack.enter_async_context(open_play(dial=lab.dial))
        issued = lab.clients.client("op", not_before=1_789_000_000, not_after=1_799_000_000)
        host, _, port = lab.ingress_address.rpartition(":")
        for order in (
            Trust(False, lab.servers.root_pem + lab.servers.intermediate_pem, ()),
            Use(Credentials(issued.key_pem, issued.chain_pem)),
            Reach(host, int(port), (host,)),
            Accept(None),
            Serve(DIRECTORY),
        ):
            play.plane.tell(order)
        await play.plane.in_force()
        async with trio.open_nursery() as nursery:
            apps = [AppHost(side) for side in play.link.app_sides]
            for app in apps:
                nursery.start_soon(app.run)
            yield Stage(play, lab, apps)
            nursery.cancel_scope.cancel()


# Workers that are not the real one


async def say(channel: Channel, *messages: Any) -> None:
    for message in messages:
        await channel.send(encode(message))


class Listener:
    """A worker that does as it is told, and remembers what that was."""

    def __init__(self, *, counts: Counts | None = None, deaf_to: tuple[type, ...] = ()) -> None:
        self.heard: list[Any] = []
        self.counts = counts or Counts({}, {}, "")
        self.deaf_to = deaf_to
        self.channel: Channel
        self.gone = trio.Event()

    async def __call__(self, channel: Channel) -> None:
        self.channel = channel
        await say(channel, Hello(__version__, 1))
        while (received := await channel.receive()) is not None:
            number, message = received
            self.heard.append(message)
            if isinstance(message, self.deaf_to):
                continue
            if isinstance(message, AskCounts):
                await channel.send(encode(self.counts, number) + encode(Done(), number))
            elif isinstance(message, Drain):
                await say(channel, Drained())
            elif isinstance(message, End):
                return
        self.gone.set()

    def kinds(self) -> list[str]:
        return [type(message).__name__ for message in self.heard if not isinstance(message, AskCounts)]

    def directory(self) -> Directory:
        """What it has been told to serve, and committed."""
        building = served = Directory.empty()
        for message in self.heard:
            if isinstance(message, Entries):
                building = building.changed(message.put, message.drop)
            elif isinstance(message, Commit):
                served = building
        return served


async def ends_at_once(channel: Channel) -> None:
    pass


async def hello_and_gone(channel: Channel) -> None:
    await say(channel, Hello(__version__, 1))


# The way to an endpoint


async def test_both_carry_connections_and_what_they_count_is_added(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        apps = [await stage.connect(0), await stage.connect(1), await stage.connect(1)]

        answers = [await echo(app) for app in apps]
        flows = await stage.plane.flows()
        await stage.plane.in_force()

        assert answers == [b"hello"] * 3
        assert stage.plane.flow_count == 3
        assert stage.plane.counters()["relay.accepted"] == 3
        assert [worker["flows"] for worker in stage.plane.describe_workers()] == [1, 2]
        assert [worker["state"] for worker in stage.plane.describe_workers()] == ["running", "running"]
        assert sorted(flow.number for flow in flows) == [1, 2, 4], "workers share the numbers: odd and even"
        assert [(flow.host, flow.port, flow.bytes_from_app) for flow in flows] == [("echo.demo", 7, 5)] * 3
        assert stage.plane.describe_pool()["dials"] == stage.plane.counters()["pool.dials"]
        assert stage.plane.interface == "ngrokd0"
        assert (stage.plane.problem, stage.plane.ingress_problem) == ("", "")
        assert len(stage.play.events(OPENED)) == 3

        assert await stage.plane.close_flow(4)
        with pytest.raises(trio.BrokenResourceError):
            await apps[2].receive_some(1)
        assert not await stage.plane.close_flow(4)
        assert not await stage.plane.close_flow(99)
        probe = await stage.plane.probe("echo.demo", 7)
        assert [phase for phase, _ in probe.phases] == ["connect", "tls", "header"]
        assert await echo(apps[0]) == await echo(apps[1]) == b"hello"


async def test_a_killed_worker_is_replaced_and_the_others_go_on(autojump_clock: MockClock) -> None:
    """Its own connections end, visibly; everybody learns of it; the next one knows all that holds."""
    async with open_stage() as stage:
        lost, kept = await stage.connect(0), await stage.connect(1)
        assert await echo(lost) == await echo(kept) == b"hello"
        await trio.sleep(10)
        await stage.plane.in_force()
        before = stage.plane.counters()
        stage.crew.latest(0).kill()
        killed_at = trio.current_time()
        await trio.sleep(0.001)

        assert await echo(kept) == b"hello"
        restarted = await stage.connect(0)
        took = trio.current_time() - killed_at
        assert await echo(restarted) == b"hello"
        await lost.send_all(b"still there?")
        with pytest.raises(trio.BrokenResourceError):
            await lost.receive_some(1)

        assert took < 1
        assert len(stage.crew.times(0)) == 2
        assert [(event.reason, event.host) for event in stage.play.events(CUT)] == [(WORKER_LOST, "echo.demo")]
        assert [event.reason for event in stage.play.events(CLOSED)] == [WORKER_LOST]
        await stage.plane.in_force()
        after = stage.plane.counters()
        assert all(after[name] >= before[name] for name in ("relay.accepted", "stack.packets", "pool.dials"))
        assert after["relay.active"] == stage.plane.flow_count == 2
        assert [worker["restarts"] for worker in stage.plane.describe_workers()] == [1, 0]
        numbers = [event.flow for event in stage.play.events(OPENED)]
        assert len(numbers) == len(set(numbers)), "a number is never given twice"
        assert {number % 2 for number in numbers if number > 2} == {1}
        assert stage.plane.problem == ""


async def test_what_holds_is_told_before_the_first_packet_is_read(autojump_clock: MockClock) -> None:
    """A worker that takes over finds SYNs that waited for it, and must not refuse them because it knows nothing yet."""
    listeners = [Listener(), Listener(), Listener()]
    async with open_play(scripts=list(listeners)) as play:
        for order in (Accept(None), Serve(DIRECTORY), Pause(True), Reach("h", 1, ()), Pause(False)):
            play.plane.tell(order)
        await play.plane.in_force()

        play.crew.latest(1).kill()
        await trio.sleep(1)

        assert listeners[1].kinds()[:3] == ["Begin", "Attach", "Run"], "nothing was to tell at the start"
        told = listeners[2].kinds()
        assert told[:2] == ["Begin", "Attach"]
        assert told[-1] == "Run"
        assert sorted(told[2:-1]) == ["Accept", "Commit", "Entries", "Pause", "Reach"]
        assert Pause(False) in listeners[2].heard, "the latest of each kind"
        assert listeners[2].directory() == DIRECTORY
        assert settings_of(next(each for each in listeners[0].heard if isinstance(each, Begin))).secret == b"s" * 32


async def test_a_directory_travels_in_pieces_and_only_as_changes(autojump_clock: MockClock) -> None:
    """65,000 endpoints at once would hold up the packets of whoever decodes them."""
    listener = Listener()
    async with open_play(scripts=[listener, None]) as play:
        big = Directory((IPv4Address(0x0A6B0002 + number), ENDPOINT) for number in range(1000))
        one_more = big.changed([(bytes((10, 107, 99, 99)), ENDPOINT)], [(bytes((10, 107, 0, 2)), 7)])

        play.plane.tell(Serve(big))
        await play.plane.in_force()
        pieces = [message for message in listener.heard if isinstance(message, Entries)]
        play.plane.tell(Serve(one_more))
        play.plane.tell(Serve(one_more))
        await play.plane.in_force()
        changes = [message for message in listener.heard if isinstance(message, Entries)][len(pieces) :]

        assert [len(piece.put) for piece in pieces] == [250] * 4
        assert len(changes) == 2
        assert sum(len(change.put) + len(change.drop) for change in changes) == 2
        assert set(listener.directory()) == set(one_more)


async def test_nobody_waits_long_for_a_worker_that_does_not_answer(autojump_clock: MockClock) -> None:
    """Names appear when those that answer are told; the other one will be replaced by one that knows."""
    stuck = Listener()
    async with open_play(scripts=[stuck, None]) as play:
        await trio.sleep(1)
        stuck.deaf_to = (AskCounts,)
        play.plane.tell(Serve(DIRECTORY))
        began = trio.current_time()

        await play.plane.in_force()

        assert trio.current_time() - began == pytest.approx(supervisor.ANSWER_S)
        await trio.sleep(supervisor.ASK_EVERY_S + supervisor.PATIENCE_S + 1)
        assert len(play.crew.times(0)) == 2
        assert len(play.crew.times(1)) == 1
        began = trio.current_time()
        await play.plane.in_force()
        assert trio.current_time() == began


# Starting, and starting again


async def test_one_that_ends_again_and_again_is_started_less_and_less_often(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """Once within 0.1 s, because that was an accident; the tenth time not, because it is none."""
    caplog.set_level(logging.INFO, "ngrokd")
    async with open_play(scripts=[Listener(), Listener(), *[hello_and_gone] * 12]) as play:
        await trio.sleep(100)
        play.crew.latest(0).kill()
        killed_at = trio.current_time()
        await trio.sleep(60)

        starts = [at - killed_at for at in play.crew.times(0)[1:]]
        assert starts[0] <= 0.1
        pauses = [later - earlier for earlier, later in pairwise(starts)]
        assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5, 5, 5, 5, 5, 5], rel=0.01)
        assert play.plane.problem == "", "the real one that came last stands"
        assert "worker 0 (process 1001): it ended with code 0; 0 connections ended with it" in caplog.text
        assert "worker 0 runs again, as process 1013" in caplog.text
        assert play.plane.describe_workers()[0]["restarts"] == 13


async def test_while_a_worker_does_not_run_that_is_a_problem(autojump_clock: MockClock) -> None:
    async with open_play(scripts=[Listener(), Listener()]) as play:
        play.crew.refuse = True
        play.crew.latest(1).kill()
        await trio.sleep(1)

        problem, shown = play.plane.problem, play.plane.describe_workers()[1]
        play.crew.refuse = False
        await trio.sleep(supervisor.PAUSE_MOST_S)

        assert problem == "worker 1 does not run: it cannot be started: [Errno 11] no more processes"
        assert (shown["state"], shown["pid"], shown["problem"]) == (
            "starting",
            0,
            "it cannot be started: [Errno 11] no more processes",
        )
        assert play.plane.problem == ""


@pytest.mark.parametrize(
    ("failed", "error"),
    [
        (Failed("a worker still has capabilities", "do this", 77), WorkerRightsError),
        (Failed("a defect of ours"), WorkerFailedError),
        (None, WorkerFailedError),
    ],
)
async def test_a_daemon_whose_workers_do_not_start_does_not_start(
    failed: Failed | None, error: type[Exception], autojump_clock: MockClock
) -> None:
    async def fails(channel: Channel) -> None:
        if failed is not None:
            await say(channel, failed)

    link = MemoryLink()
    async with trio.open_nursery() as nursery:
        play = Play(nursery, link, 2)
        play.cast([fails, None])

        with pytest.raises(error) as caught:
            await play.plane.run()

        assert failed is None or str(caught.value) == failed.problem
        assert all(process.code is not None for _, _, process in play.crew.started)
        assert [queue.fileno() >= 0 for queue in link.queues] == [True, False], "the first queue is not ours to close"


async def test_one_that_never_stands_is_given_up(autojump_clock: MockClock) -> None:
    async def silent(channel: Channel) -> None:
        await channel.receive()
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        play = Play(nursery, MemoryLink(), 2)
        play.cast([silent, silent])

        with pytest.raises(WorkerFailedError, match="not ready after 20 s"):
            await play.plane.run()


async def test_a_worker_of_another_version_is_not_used(autojump_clock: MockClock) -> None:
    """The files were replaced while the daemon ran."""

    async def newer(channel: Channel) -> None:
        await say(channel, Hello("9.9\x1b[31m", 1))
        await trio.sleep_forever()

    async with open_play(scripts=[None, None, *[newer] * 3]) as play:
        play.crew.latest(0).kill()
        await trio.sleep(1)

        assert "it is ngrokd 9.9\\x1b[31m, and this is" in play.plane.problem


# What is not believed


@pytest.mark.parametrize(
    "junk",
    [
        b"\xff\xff\xff\xff",
        b"\x00\x00\x00\x01\xc1",
        encode(Truth(True)),  # an answer that nobody asked for
        encode(CaFound(b"no certificate at all")),
        encode(DeviceLost("but it is there")),  # another one would end the connections of all
    ],
    ids=["length", "content", "answer", "ca", "device"],
)
async def test_a_worker_that_talks_junk_is_replaced(junk: bytes, autojump_clock: MockClock) -> None:
    listener = Listener()
    async with open_play(scripts=[listener, None]) as play:
        play.plane.tell(Trust(False, b"", ("00" * 32,)))
        await play.plane.in_force()
        process = play.crew.latest(0)

        await listener.channel.send(junk)
        await trio.sleep(1)

        assert process.code is not None
        assert len(play.crew.times(0)) == 2
        assert not [report for report in play.reports if isinstance(report, CaFound | DeviceLost)]


async def test_junk_before_hello_is_junk(autojump_clock: MockClock) -> None:
    async def impatient(channel: Channel) -> None:
        await say(channel, Drained())
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        play = Play(nursery, MemoryLink(), 2)
        play.cast([impatient])

        with pytest.raises(BadMessage, match="before Hello"):
            await play.plane.run()


async def test_what_a_worker_says_is_shown_without_tricks(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    listener = Listener(counts=Counts({}, {}, "no\x1b[2Jthing"))
    caplog.set_level(logging.INFO, "ngrokd")
    async with open_play(scripts=[listener, None]) as play:
        event = FlowEvent(OPENED, "evil\u202e", 1, ("1.2.3.4\n", 5), "opened", "hi\x07", "", flow=3)
        await say(listener.channel, event, Said(30, "x\n", "a line"), Lost(7))
        await trio.sleep(0.1)

        [shown] = play.events(OPENED)
        assert (shown.host, shown.source, shown.message) == ("evil\\u202e", ("1.2.3.4\\n", 5), "hi\\x07")
        assert play.plane.ingress_problem == "no\\x1b[2Jthing"
        assert "worker 0: a line" in caplog.text
        assert "7 reports of worker 0 were lost" in caplog.text


async def test_a_worker_without_measure_is_replaced(autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it says fills our memory, not its own."""
    monkeypatch.setattr(supervisor, "MOST_ANSWERS", 10)
    monkeypatch.setattr(supervisor, "MOST_FLOWS", 10)

    async def floods(channel: Channel) -> None:
        await say(channel, Hello(__version__, 1))
        while (received := await channel.receive()) is not None:
            if isinstance(received[1], AskCounts):
                await channel.send(encode(Counts({}, {}, ""), received[0]) + encode(Done(), received[0]))
            elif isinstance(received[1], AskFlows):
                with suppress(OSError):
                    for _ in range(50):
                        await channel.send(encode(Flows(()), received[0]))

    crowd = Listener()
    async with open_play(scripts=[floods, crowd]) as play:
        await play.plane.flows()
        for flow in range(11):
            await say(crowd.channel, FlowEvent(OPENED, "a", 1, ("1.2.3.4", 5), "opened", "", flow=flow))
        await trio.sleep(1)

        assert [len(play.crew.times(index)) for index in (0, 1)] == [2, 2]


async def test_a_ca_that_one_has_found_is_told_to_the_others(autojump_clock: MockClock) -> None:
    """Looked at first: it must be the one whose fingerprint is pinned, whoever says so."""
    authority = Authority("somebody")
    pem = authority.intermediate_pem
    pinned = fingerprint(ssl.PEM_cert_to_DER_cert(pem.decode()))
    finder, other = Listener(), Listener()
    async with open_play(scripts=[finder, other]) as play:
        play.plane.tell(Trust(True, b"BEFORE", (pinned,)))
        await play.plane.in_force()

        await say(finder.channel, CaFound(authority.root_pem + b"junk" + pem))
        await say(other.channel, CaFound(pem))
        await trio.sleep(1)

        assert [report for report in play.reports if isinstance(report, CaFound)] == [CaFound(pem)]
        assert [type(message) for message in finder.heard].count(Trust) == 1, "it knows"
        assert [message for message in other.heard if isinstance(message, Trust)][1:] == [
            Trust(True, b"BEFORE\n" + pem, (pinned,))
        ]


# Orders


async def test_credentials_that_are_no_use_are_refused_here(autojump_clock: MockClock) -> None:
    """Discovery judges them, and keeps the ones before; no worker hears of these."""
    listener = Listener()
    async with open_play(scripts=[listener, None]) as play:
        with pytest.raises(BadCredentials):
            play.plane.tell(Use(Credentials(b"no key", b"no certificate")))
        await play.plane.in_force()

        assert "Use" not in listener.kinds()


async def test_a_worker_says_which_order_it_could_not_carry_out(caplog: pytest.LogCaptureFixture) -> None:
    """It goes on with what it was told before."""
    async with open_play() as play:
        play.plane._put(Use(Credentials(b"no key", b"no certificate")))
        await play.plane.in_force()
        await play.plane.in_force()

        assert play.plane.problem == ""


# The device


async def test_a_lost_device_is_reported_once_and_replaced_for_all(autojump_clock: MockClock) -> None:
    listeners = [Listener(), Listener()]
    async with open_play(scripts=list(listeners)) as play:
        play.link.delete()
        await say(listeners[0].channel, DeviceLost("deleted"))
        await say(listeners[1].channel, DeviceLost("deleted"))
        await trio.sleep(1)
        old = play.link.queues[:]
        another = MemoryLink()
        play.plane.replace_device(another.open_queue())
        await play.plane.in_force()
        another.delete()
        await say(listeners[1].channel, DeviceLost("deleted again"))
        await trio.sleep(1)

        lost = [report for report in play.reports if isinstance(report, DeviceLost)]
        assert lost == [DeviceLost("deleted"), DeviceLost("deleted again")]
        assert [listener.kinds().count("Attach") for listener in listeners] == [2, 2]
        assert [queue.fileno() >= 0 for queue in old] == [True, False]
        assert len(another.queues) == 2


async def test_a_device_that_is_gone_again_is_reported_again(autojump_clock: MockClock) -> None:
    async with open_play() as play:
        another = MemoryLink()
        device = another.open_queue()
        device.close()  # so that it has no second queue

        play.plane.replace_device(device)

        assert isinstance(play.reports[-1], DeviceLost)
        play.plane.replace_device(MemoryLink().open_queue())


async def test_a_device_with_one_queue_is_refused(autojump_clock: MockClock) -> None:
    link = MemoryLink()
    device = link.open_queue()

    def no_more() -> None:
        raise DeviceError("one queue", errno=22)

    device.extra_queue = no_more  # type: ignore[method-assign, assignment]
    async with trio.open_nursery() as nursery:
        with pytest.raises(DeviceError, match="one queue"):
            WorkersPlane(device, SETTINGS, 2, lambda _report: None, Crew(nursery, link))


async def test_connections_go_on_over_another_device(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        apps = [await stage.connect(0), await stage.connect(1)]
        stage.play.link.delete()
        await trio.sleep(0.5)
        assert [type(report) for report in stage.play.reports].count(DeviceLost) == 1

        another = MemoryLink()
        stage.crew.link = another
        stage.plane.replace_device(another.open_queue())
        for host, side in zip(stage.apps, another.app_sides, strict=True):
            host.device = side
        await stage.plane.in_force()

        assert stage.plane.flow_count == 2
        assert stage.plane.problem == ""
        del apps


async def test_a_worker_that_starts_while_there_is_no_device_waits_for_one(autojump_clock: MockClock) -> None:
    """The old one is closed, and somebody keeps the new one from being made."""
    async with open_play() as play:
        play.plane.tell(Serve(DIRECTORY))
        play.link.delete()
        await trio.sleep(0.1)
        play.device.close()
        play.crew.latest(0).kill()
        await trio.sleep(10)
        assert play.plane.describe_workers()[0]["state"] == "starting"

        play.plane.replace_device(MemoryLink().open_queue())
        await trio.sleep(0.1)

        assert [worker["state"] for worker in play.plane.describe_workers()] == ["running", "running"]
        assert len(play.crew.times(0)) == 2


# The end


async def test_draining_gives_flows_their_time_and_can_be_cut_short(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        app = await stage.connect(1)
        began = trio.current_time()
        stage.plane.drain(60.0)
        await trio.sleep(10)

        assert await echo(app) == b"hello"
        with pytest.raises(OSError, match="refused"):
            await stage.connect(0)
        stage.plane.drain(1.0)
        with pytest.raises(trio.BrokenResourceError):
            await app.receive_some(1)

        assert trio.current_time() - began == pytest.approx(11, abs=0.5)
        assert len(stage.crew.started) == 2, "a worker that has drained is not replaced"


async def test_one_that_does_not_end_is_ended(autojump_clock: MockClock) -> None:
    stubborn = Listener(deaf_to=(Drain,))
    async with open_play(scripts=[stubborn, None]) as play:
        process = play.crew.latest(0)
        began = trio.current_time()
        play.plane.drain(2.0)
        await trio.sleep(2 + supervisor.DRAIN_GRACE_S + 1)

        assert process.code is not None
        assert trio.current_time() - began <= 2 + supervisor.DRAIN_GRACE_S + 1


async def test_one_that_is_killed_while_draining_stays_dead(autojump_clock: MockClock) -> None:
    async with open_play() as play:
        play.plane.drain(60.0)
        play.crew.latest(0).kill()
        await trio.sleep(1)

        assert len(play.crew.started) == 2


async def test_cancelled_it_leaves_no_worker(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        play = Play(nursery, MemoryLink(), 3)
        async with trio.open_nursery() as running:
            await running.start(play.plane.run)
            running.cancel_scope.cancel()

        assert all(process.code is not None for _, _, process in play.crew.started)
        assert [queue.fileno() >= 0 for queue in play.link.queues] == [True, False, False]


# The outbox


async def test_the_outbox_is_bounded_for_reports_but_not_for_answers() -> None:
    """A daemon that does not read costs reports, which are counted, and no memory."""
    outbox = Outbox(most_bytes=1000)
    for _ in range(100):
        outbox.report(Said(20, "x", "y" * 100))
    outbox.add(encode(Truth(True), 1))

    taken = await outbox.take()
    outbox.report(Said(20, "x", "again"))
    rest = await outbox.take()

    from ngrokd.workers.messages import Frames

    read = [message for _, message in Frames(FROM_WORKER, MOST_FROM_WORKER).feed(taken + rest)]
    kept = [message for message in read if isinstance(message, Said)]
    [lost] = [message.reports for message in read if isinstance(message, Lost)]
    assert len(kept) - 1 + lost == 100
    assert len(taken) < 1500
    assert Truth(True) in read


async def test_the_outbox_says_when_all_is_sent(autojump_clock: MockClock) -> None:
    outbox = Outbox()
    outbox.add(b"last words")
    with trio.move_on_after(1) as scope:
        await outbox.sent()
    assert scope.cancelled_caught

    assert await outbox.take() == b"last words"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(outbox.take)  # whoever takes again has sent what it took
        await outbox.sent()
        nursery.cancel_scope.cancel()


# Recording


async def test_what_passes_any_worker_is_recorded(autojump_clock: MockClock) -> None:
    """One file, an interface for each; over when its time is, with nothing left behind in the workers."""
    async with open_stage() as stage:
        with stage.plane.record(RecordOrder(duration_s=10.0, snaplen=100)) as tape:
            await stage.plane.in_force()
            apps = [await stage.connect(0), await stage.connect(1)]
            assert [await echo(app) for app in apps] == [b"hello"] * 2
            pieces = []
            while piece := await tape.read():
                pieces.append(piece)

        packets = list(read_capture(io.BytesIO(b"".join(pieces))))
        syns = [packet for packet in packets if packet.packet[33] == 0x02]
        assert len(syns) == 2
        assert len({packet.interface for packet in packets}) == 1, "they are queues of one link"
        assert tape.recorded == len(packets) >= 10
        assert (tape.dropped, tape.ended) == (0, "duration")
        assert await echo(apps[0]) == b"hello"


async def test_a_recording_can_be_left_while_nothing_comes(autojump_clock: MockClock) -> None:
    """And there are so many at a time, here as in one process."""
    async with open_stage() as stage:
        tapes = [stage.plane.record(RecordOrder()) for _ in range(RECORDINGS)]
        with pytest.raises(TooManyRecordingsError):
            stage.plane.record(RecordOrder())
        tapes.pop().close()
        with pytest.raises(ValueError, match="does not appear"):
            stage.plane.record(RecordOrder(addresses=("nowhere",)))

        for tape in tapes:
            with trio.move_on_after(1):
                while True:
                    await tape.read()
            tape.close()
        await stage.plane.in_force()
        assert await tapes[0].read() == b""

        with stage.plane.record(RecordOrder(max_packets=3)) as again:
            await stage.plane.in_force()
            app = await stage.connect(1)
            assert await echo(app) == b"hello"
            while await again.read():
                pass
        assert again.ended == "packets"
        assert again.recorded == 3


async def test_a_worker_that_ends_takes_its_part_of_a_recording_with_it(autojump_clock: MockClock) -> None:
    async with open_stage() as stage:
        with stage.plane.record(RecordOrder(duration_s=30.0)) as tape:
            await stage.plane.in_force()
            stage.crew.latest(0).kill()
            app = await stage.connect(1)
            assert await echo(app) == b"hello"
            data = b""
            while piece := await tape.read():
                data += piece

        assert len(list(read_capture(io.BytesIO(data)))) == tape.recorded >= 5
        assert tape.ended == "duration"
