"""What the data plane answers when it is asked: flows, an end for one of them, a probe, a recording."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from ngrokd.dataplane import RECORDINGS, FlowInfo, Pause, RecordOrder, TooManyRecordingsError
from ngrokd.relay.handler import FlowEvent
from tests.harness.world import World, in_process, open_world
from tun.pcap import read_capture
from tun.testing.apppeer import AppStream


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """A lab and a cable."""
    async with open_world(tmp_path) as opened:
        yield opened


async def connect(world: World, name: str, port: int) -> AppStream:
    """An app's connection to an endpoint."""
    return await world.apps.connect((world.named()[name], port))


async def only_flow(world: World) -> FlowInfo:
    [flow] = await world.daemon.plane.flows()
    return flow


def listen(world: World) -> list[FlowEvent]:
    """All events of flows from now on."""
    heard: list[FlowEvent] = []
    note = world.daemon.traffic.note

    def noted(event: FlowEvent, wall: float) -> None:
        heard.append(event)
        note(event, wall)

    world.daemon.traffic.note = noted  # type: ignore[method-assign]
    return heard


async def test_a_flow_is_told_with_what_it_carried(world: World, autojump_clock: MockClock) -> None:
    """Who, where to, since when, how much each way."""
    async with world.running() as daemon:
        await daemon.ready.wait()
        app = await connect(world, "echo.demo", 7)
        await app.send_all(b"x" * 1000)
        assert len(await app.receive_some(4000)) == 1000
        await trio.sleep(2)

        flow = await only_flow(world)

        assert (flow.host, flow.port, flow.state, flow.number) == ("echo.demo", 7, "ESTABLISHED", 1)
        assert flow.destination == (world.named()["echo.demo"], 7)
        assert flow.source[0] == "10.107.0.1"
        assert (flow.bytes_from_app, flow.bytes_to_app) == (1000, 1000)
        assert 2 <= flow.age_s < 3
        assert 0 <= flow.rtt_s < 1
        await app.aclose()


async def test_bytes_are_counted_once_while_a_flow_lives_and_when_it_is_over(
    world: World, autojump_clock: MockClock
) -> None:
    """A counter that went back would be read as a restart."""
    async with world.running() as daemon:
        await daemon.ready.wait()
        app = await connect(world, "echo.demo", 7)
        await app.send_all(b"x" * 1000)
        await app.receive_some(4000)
        await trio.sleep(1)
        alive = daemon.plane.counters()
        await app.send_eof()
        assert await app.receive_some() == b""
        await trio.sleep(1)

        over = daemon.plane.counters()

    assert await daemon.plane.flows() == []
    assert (alive["relay.bytes_from_app"], alive["relay.bytes_to_app"]) == (1000, 1000)
    assert (over["relay.bytes_from_app"], over["relay.bytes_to_app"]) == (1000, 1000)


async def test_a_flow_that_is_closed_here_is_reset_and_says_so(world: World, autojump_clock: MockClock) -> None:
    """The app sees a reset; the event says who did it."""
    async with world.running() as daemon:
        await daemon.ready.wait()
        events = listen(world)
        app = await connect(world, "echo.demo", 7)
        other = await connect(world, "echo.demo", 7)
        number = (await daemon.plane.flows())[0].number

        assert await daemon.plane.close_flow(number)

        with pytest.raises(trio.BrokenResourceError):
            await app.receive_some()
        assert not await daemon.plane.close_flow(number)
        await other.send_all(b"still here")
        assert await other.receive_some() == b"still here"
        await other.aclose()

    [closed] = [event for event in events if event.kind == "closed" and event.flow == number]
    assert closed.reason == "closed_by_operator"


async def test_the_end_of_a_flow_says_how_much_it_carried_and_why(world: World, autojump_clock: MockClock) -> None:
    async with world.running() as daemon:
        await daemon.ready.wait()
        events = listen(world)
        app = await connect(world, "echo.demo", 7)
        await app.send_all(b"x" * 500)
        await app.receive_some()
        await trio.sleep(2)
        await app.send_eof()
        await app.receive_some()
        await trio.sleep(1)

    assert [event.kind for event in events] == ["opened", "closed"]
    end = events[-1]
    assert (end.reason, end.bytes_from_app, end.bytes_to_app) == ("completed", 500, 500)
    assert end.destination[1] == 7
    assert 2 <= end.age_s < 3


async def test_a_paused_data_plane_refuses_new_flows_and_keeps_the_old(world: World, autojump_clock: MockClock) -> None:
    async with world.running() as daemon:
        await daemon.ready.wait()
        old = await connect(world, "echo.demo", 7)
        daemon.plane.tell(Pause(True))

        with pytest.raises(OSError, match="refused"):
            await connect(world, "echo.demo", 7)
        await old.send_all(b"x")
        assert await old.receive_some() == b"x"
        daemon.plane.tell(Pause(False))
        await (await connect(world, "echo.demo", 7)).aclose()
        await old.aclose()


async def test_a_probe_times_each_phase(world: World, autojump_clock: MockClock) -> None:
    """A fresh connection with a full handshake, and the header; no flow, no byte of an app."""
    async with world.running() as daemon:
        await daemon.ready.wait()

        probe = await daemon.plane.probe("echo.demo", 7)
        bare = await daemon.plane.probe("", 0)
        wrong = await daemon.plane.probe("nobody.demo", 7)

    assert [phase for phase, _ in probe.phases] == ["connect", "tls", "header"]
    assert (probe.problem, probe.tls) == ("", "TLSv1.3")
    assert probe.endpoint_id.startswith("ep_")
    assert [phase for phase, _ in bare.phases] == ["connect", "tls"]
    assert (wrong.reason, [phase for phase, _ in wrong.phases]) == ("binding_refused", ["connect", "tls", "header"])


async def test_a_recording_is_a_capture_file_of_what_was_asked_for(world: World, autojump_clock: MockClock) -> None:
    """One endpoint's packets, cut to so many bytes; the device is as before afterwards."""
    async with world.running() as daemon:
        await daemon.ready.wait()
        device = in_process(daemon).network.device
        address = world.named()["echo.demo"]
        with daemon.plane.record(RecordOrder(addresses=(address,), snaplen=60, duration_s=5)) as recording:
            for name, port in (("echo.demo", 7), ("hello.demo", 80)):
                app = await connect(world, name, port)
                await app.send_all(b"x" * 1000)
                await app.aclose()
            data = b""
            while piece := await recording.read():
                data += piece

            assert recording.ended == "duration"
        assert in_process(daemon).network.device is device

    packets = list(read_capture(io.BytesIO(data)))
    assert len(packets) == recording.recorded > 5
    assert max(len(each.packet) for each in packets) == 60
    assert max(each.size for each in packets) > 1000
    assert {ip for each in packets for ip in (each.packet[12:16], each.packet[16:20])} == {
        bytes(map(int, address.split("."))),
        bytes((10, 107, 0, 1)),
    }


async def test_recordings_come_and_go_in_any_order(world: World, autojump_clock: MockClock) -> None:
    """Each sees what passes while it runs; there is a bound; a device that is replaced is recorded on."""
    async with world.running() as daemon:
        await daemon.ready.wait()
        plane = in_process(daemon)
        device = plane.network.device
        recordings = [plane.record(RecordOrder()) for _ in range(RECORDINGS)]
        with pytest.raises(TooManyRecordingsError):
            plane.record(RecordOrder())
        recordings[1].close()
        plane.replace_device(device)
        await (await connect(world, "echo.demo", 7)).aclose()
        recordings[0].close()
        recordings[3].close()
        await (await connect(world, "echo.demo", 7)).aclose()
        await trio.sleep(1)
        last = recordings[2]
        last.close()

        assert plane.network.device is device
        assert last.recorded > recordings[0].recorded > 0
        assert recordings[1].recorded == 0
