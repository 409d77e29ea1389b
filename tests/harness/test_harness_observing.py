"""The commands that look at a running daemon, answered by the whole daemon."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from ngrokd.errors import Exit
from ngrokd.log import Log
from ngrokd.ops.peers import Peer
from tests.harness.world import World, open_world
from tun.pcap import read_capture
from tun.testing.apppeer import AppStream

ROOT = Peer(pid=1, uid=0, gid=0)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """A lab and a cable."""
    async with open_world(tmp_path) as opened:
        yield opened


class Client:
    """What a client of the control socket reads, line by line."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._data = b""

    async def line(self) -> Any:
        """The next line, or None at the end."""
        while b"\n" not in self._data:
            piece = await self._stream.receive_some()
            if not piece:
                return None
            self._data += piece
        line, _, self._data = self._data.partition(b"\n")
        return json.loads(line)

    async def leave(self) -> None:
        """Hang up."""
        await self._stream.aclose()


async def ask(world: World, command: str, *arguments: str) -> dict[str, Any]:
    """A command that is answered with one line."""
    client = await follow(world, command, *arguments)
    answer = await client.line()
    await client.leave()
    assert isinstance(answer, dict)
    return answer


async def follow(world: World, command: str, *arguments: str) -> Client:
    """A command whose answer goes on."""
    ours, theirs = trio.testing.memory_stream_pair()
    server = world.daemon._control
    trio.lowlevel.spawn_system_task(server.serve_stream, theirs, ROOT, None)
    await ours.send_all(json.dumps({"command": command, "args": list(arguments)}).encode())
    return Client(ours)


async def connect(world: World, name: str, port: int) -> AppStream:
    return await world.apps.connect((world.named()[name], port))


async def test_flows_are_listed_and_closed(world: World, autojump_clock: MockClock) -> None:
    """Those that live, and why the last ones ended."""
    async with world.running() as daemon:
        await daemon.ready.wait()
        app = await connect(world, "echo.demo", 7)
        await app.send_all(b"x" * 100)
        await app.receive_some()
        await trio.sleep(1)

        alive = (await ask(world, "flows"))["data"]
        closed = await ask(world, "close-flow", "1")
        await trio.sleep(1)
        over = (await ask(world, "flows", "ended=1"))["data"]
        again = await ask(world, "close-flow", "1")
        nonsense = await ask(world, "close-flow", "all")

    [flow] = alive["flows"]
    assert (flow["id"], flow["endpoint"], flow["state"]) == (1, "echo.demo:7", "ESTABLISHED")
    assert (flow["bytes_from_app"], flow["bytes_to_app"], flow["process"], flow["uid"]) == (100, 100, "", None)
    assert "ended" not in alive
    assert closed["data"] == "closed 1 flow"
    assert (over["total"], over["flows"]) == (0, [])
    [ended] = over["ended"]
    assert (ended["id"], ended["reason"], ended["outcome"]) == (1, "closed_by_operator", "closed")
    assert (again["code"], nonsense["code"]) == (Exit.NO, Exit.USAGE)


async def test_a_refusal_is_remembered_with_its_reason(world: World, autojump_clock: MockClock) -> None:
    """The endpoint is degraded until a connection to it works again."""
    async with world.running() as daemon:
        await daemon.ready.wait()
        world.lab.ingress.routes.pop(("echo.demo", 7))
        with pytest.raises(ConnectionRefusedError):
            await connect(world, "echo.demo", 7)

        degraded = await row(world, "echo.demo")
        ended = (await ask(world, "flows", "ended=1"))["data"]["ended"]
        unused = await row(world, "hello.demo")
        app = await connect(world, "hello.demo", 80)
        online = await row(world, "hello.demo")
        await app.aclose()

    assert (degraded["state"], degraded["consecutive_failures"]) == ("degraded", 1)
    assert "ERR_NGROK" in degraded["problem"]
    assert [(one["outcome"], one["reason"]) for one in ended] == [("refused", "binding_refused")]
    assert (unused["state"], unused["last_dial_at"]) == ("unknown", None)
    assert (online["state"], online["consecutive_failures"], online["flows"]) == ("online", 0, 1)
    assert online["last_dial_at"] is not None


async def row(world: World, name: str) -> dict[str, Any]:
    """An endpoint as `list` shows it."""
    [found] = [each for each in (await ask(world, "list"))["data"] if each["hostname"] == name]
    assert isinstance(found, dict)
    return found


async def test_top_tells_rates(world: World, autojump_clock: MockClock) -> None:
    """The first look has none; then bytes a second, the busiest flow first."""
    async with world.running() as daemon:
        await daemon.ready.wait()
        quiet = await connect(world, "echo.demo", 7)
        app = await connect(world, "sink.demo", 9)
        client = await follow(world, "top", "interval=2")
        assert (await client.line())["data"] == {"interval_s": 2.0}
        first = await client.line()
        await app.send_all(b"x" * 1000)
        second = await client.line()
        await client.leave()
        await app.aclose()
        await quiet.aclose()

    assert (first["interval_s"], first["total"], first["bytes_from_app_s"]) == (0.0, 2, 0.0)
    assert [flow["endpoint"] for flow in second["flows"]] == ["sink.demo:9", "echo.demo:7"]
    assert second["flows"][0]["rate_from_app"] == pytest.approx(500, rel=0.01)
    assert second["bytes_from_app_s"] == pytest.approx(500, rel=0.01)
    assert second["flows"][1]["rate_from_app"] == 0


async def test_events_are_followed_without_a_gap(world: World, autojump_clock: MockClock) -> None:
    """From now on, or from a number on; flows have theirs."""
    async with world.running() as daemon:
        await daemon.ready.wait()
        client = await follow(world, "events")
        last = (await client.line())["data"]["last"]
        app = await connect(world, "echo.demo", 7)
        opened = await client.line()
        await app.aclose()
        await client.leave()
        past = await follow(world, "events", "since=0", "follow=0")
        await past.line()
        names = []
        while (event := await past.line()) is not None:
            names.append(event["event"])

        restarted = await follow(world, "events", "since=4711", "follow=0")
        await restarted.line()
        begins_with = (await restarted.line())["seq"]

    assert begins_with == 1, "a client that knows the numbers of an earlier daemon misses nothing of this one"
    assert opened["seq"] == last + 1
    assert (opened["event"], opened["endpoint"], opened["flow"]) == ("flow.opened", "echo.demo:7", 1)
    assert names[0] == "daemon.started"
    assert {"operator.registered", "endpoints.changed", "daemon.ready", "ingress.verified"} <= {
        *names,
        "ingress.verified",
    }
    assert len(names) == last + 2 or names[-1] in ("flow.opened", "flow.closed")


async def test_the_log_can_be_read_and_its_level_changed_for_a_while(
    world: World, autojump_clock: MockClock, tmp_path: Path
) -> None:
    with (tmp_path / "log").open("wb") as file, Log("info", "text", descriptor=file.fileno(), environ={}) as control:
        world.log_control = control
        async with world.running() as daemon:
            await daemon.ready.wait()
            client = await follow(world, "logs", "lines=1", "follow=1", "level=info")
            assert (await client.line())["data"] == {"level": "info"}
            [old] = [await client.line()]
            changed = await ask(world, "set-log-level", "level=debug", "for=600")
            said = await client.line()
            while "the log's level" not in said["message"]:
                said = await client.line()
            told = await ask(world, "log-level")
            await trio.sleep(601)
            later = await ask(world, "log-level")
            wrong = await ask(world, "set-log-level", "level=loud")
            await client.leave()

    assert old["level"] == "info"
    assert changed["data"]["level"] == "debug"
    assert said["message"].startswith("the log's level is debug now")
    assert said["seq"] > old["seq"]
    assert 0 < told["data"]["for_s"] <= 600
    assert later["data"] == {"level": "info", "for_s": None}
    assert (wrong["code"], wrong["hint"]) == (Exit.USAGE, "those there are: debug, info, warning, error")


async def test_a_capture_of_an_endpoint_comes_as_lines(world: World, autojump_clock: MockClock) -> None:
    """Its packets and nobody else's; the last line says how many."""
    async with world.running() as daemon:
        await daemon.ready.wait()
        client = await follow(world, "capture", "endpoint=tcp://echo.demo:7", "duration=3")
        head = (await client.line())["data"]
        for name, port in (("echo.demo", 7), ("hello.demo", 80)):
            await (await connect(world, name, port)).aclose()
        data, end = b"", {}
        while (line := await client.line()) is not None:
            data += base64.b64decode(line.get("pcapng", ""))
            end = line
        unknown = await ask(world, "capture", "endpoint=ecco.demo")

    packets = list(read_capture(io.BytesIO(data)))
    assert (head["addresses"][0], head["ports"]) == (world_address(packets), [7])
    assert (end["end"], end["recorded"], end["dropped"]) == ("duration", len(packets), 0)
    assert len(packets) > 3
    assert "did you mean echo.demo?" in unknown["error"]


def world_address(packets: list[Any]) -> str:
    """The one address besides the app's."""
    ends = {each.packet[at : at + 4] for each in packets for at in (12, 16)}
    [address] = [".".join(map(str, end)) for end in ends if end != bytes((10, 107, 0, 1))]
    return address


async def test_a_probe_says_how_long_each_phase_took(world: World, autojump_clock: MockClock) -> None:
    async with world.running() as daemon:
        await daemon.ready.wait()
        good = (await ask(world, "probe", "endpoint=echo.demo"))["data"]
        world.lab.ingress.routes.pop(("echo.demo", 7))
        bad = (await ask(world, "probe", "endpoint=echo.demo:7"))["data"]
        missing = await ask(world, "probe", "endpoint=echo.demo:8")

    assert good["ok"]
    assert [phase["name"] for phase in good["phases"]] == ["connect", "tls", "header"]
    assert (bad["ok"], bad["reason"]) == (False, "binding_refused")
    assert missing["code"] == Exit.NO


async def test_a_paused_daemon_says_so_and_goes_on_naming(world: World, autojump_clock: MockClock) -> None:
    async with world.running() as daemon:
        await daemon.ready.wait()
        await trio.sleep(5)
        assert daemon.health().ready

        said = await ask(world, "pause")
        with pytest.raises(ConnectionRefusedError):
            await connect(world, "echo.demo", 7)
        state, ready = daemon.state, daemon.health().ready
        names = world.named()
        await ask(world, "resume")
        await (await connect(world, "echo.demo", 7)).aclose()
        again = await ask(world, "resume")

    assert said["data"] == "paused: new connections are refused, 0 live on; names stay"
    assert (state, ready) == ("paused", False)
    assert "echo.demo" in names
    assert again["data"] == "it was not paused"


async def test_readiness_takes_a_verified_handshake(world: World, autojump_clock: MockClock) -> None:
    """Also without a pool that would make one by itself; what is missing is said."""
    async with world.running(pool={"idle": 0}) as daemon:
        await daemon.ready.wait()
        before = {each.name: each for each in daemon.conditions()}
        await trio.sleep(5)
        after = daemon.health()

    assert (before["ingress"].holds, before["ingress"].message) == (False, "no handshake yet")
    assert after.ready
    assert [each.name for each in after.conditions] == ["tun", "routes", "names", "ingress", "accepting"]


async def test_an_ingress_that_is_not_trusted_is_a_condition_that_does_not_hold(
    world: World, autojump_clock: MockClock
) -> None:
    async with world.running(ingress={"ca_file": "", "ca_fingerprints": []}) as daemon:
        await daemon.ready.wait()
        await trio.sleep(5)
        [ingress] = [each for each in daemon.conditions() if each.name == "ingress"]
        healthy, ready = daemon.health().healthy, daemon.health().ready

    assert not ingress.holds
    assert "not trusted" in ingress.message
    assert (healthy, ready) == (True, False)


async def test_a_minute_leaves_a_heartbeat(world: World, autojump_clock: MockClock) -> None:
    """With what happened in it."""
    async with world.running() as daemon:
        await daemon.ready.wait()
        app = await connect(world, "echo.demo", 7)
        await app.send_all(b"x" * 100)
        await app.receive_some()
        await trio.sleep(61)
        beats = [event for event in daemon.events.after(0) if event.name == "daemon.heartbeat"]
        await app.aclose()

    assert len(beats) == 1
    figures = beats[0].fields
    assert (figures["flows"], figures["opened"], figures["bytes_from_app"], figures["bytes_to_app"]) == (1, 1, 100, 100)
    assert isinstance(figures["dials"], int)
    assert figures["dials"] >= 1
