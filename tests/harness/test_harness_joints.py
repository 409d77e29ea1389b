"""What happens between the parts: at start, at stop, and when one of them cannot do its work."""

from __future__ import annotations

import io
import json
import math
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import trio
from trio.testing import MockClock

from ngrokd import config, files
from ngrokd.errors import NgrokdError, StateError, TakenError
from ngrokd.host.hostsfile import HostsFileError, edit_hosts
from ngrokd.lab.control_plane import Fault
from ngrokd.lab.world import DEMO_ENDPOINTS
from ngrokd.names.reconcile import SHADOWS_PUBLIC
from ngrokd.ops.peers import Peer
from tests.harness import world as worlds
from tests.harness.world import MemoryMachine, World, in_process, open_world

ROOT = Peer(pid=1, uid=0, gid=0)


class Machine(MemoryMachine):
    """A machine whose parts take time and fail when a test wants it."""

    resolve_s = 0.0
    thread_s = 0.0
    slow_functions: tuple[str, ...] = ()
    looked_up: ClassVar[list[str]]
    restored = 0
    fails_after_s = math.inf

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._send, self._signals = trio.open_memory_channel[int](10)

    async def run_sync(self, function: Callable[..., Any], /, *args: Any) -> Any:
        """As a thread does it: once begun, it is not to be stopped, and the result comes later."""
        await trio.lowlevel.checkpoint()
        if getattr(function, "__name__", "") in self.slow_functions:
            with trio.CancelScope(shield=True):
                await trio.sleep(self.thread_s)
                return function(*args)
        return function(*args)

    async def resolve(self, host: str, port: int) -> tuple[str, ...]:
        """A name server that takes its time."""
        self.looked_up.append(host)
        await trio.sleep(self.resolve_s)
        return await super().resolve(host, port)

    @contextmanager
    def signals(self) -> Iterator[AsyncIterator[int]]:
        """Those of `kill`."""
        yield self._signals

    def kill(self, number: int) -> None:
        """Send a signal."""
        self._send.send_nowait(number)

    def restore(self) -> None:
        """Count, because it must happen exactly once."""
        super().restore()
        type(self).restored += 1

    async def watch(self, changed: Callable[[], None]) -> None:
        """Nobody changes anything, until this fails."""
        await trio.sleep(self.fails_after_s)
        raise TakenError("somebody has it")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> type[Machine]:
    """The class of the next world's machines; set its attributes before the daemon starts."""

    class Fresh(Machine):
        looked_up: ClassVar[list[str]] = []

    monkeypatch.setattr(worlds, "MemoryMachine", Fresh)
    return Fresh


@pytest.fixture
async def world(tmp_path: Path, machine: type[Machine]) -> AsyncIterator[World]:
    """A lab and a cable."""
    async with open_world(tmp_path) as opened:
        yield opened


def saved(world: World, name: str) -> Any:
    return json.loads((world.directory / "state" / name).read_bytes())


# The end


async def test_names_are_withdrawn_after_the_last_writer_is_done(
    world: World, machine: type[Machine], autojump_clock: MockClock
) -> None:
    """A thread that is just writing them cannot be stopped; withdrawing beside it could lose the race."""
    machine.thread_s, machine.slow_functions = 0.5, ("_write_hosts",)
    async with world.running() as daemon:
        await daemon.ready.wait()
        world.lab.add_endpoint("http://late.demo", "http")
        daemon.discovery.poke()
        await trio.sleep(0.1)

        daemon.stop()

    assert world.named() == {}


@pytest.mark.parametrize("when", ["at once", "while restoring", "while polling", "ready"])
async def test_a_signal_at_any_time_leaves_nothing(
    world: World, machine: type[Machine], autojump_clock: MockClock, when: str
) -> None:
    machine.thread_s, machine.slow_functions = 0.5, ("_plan",)
    async with world.running():
        await trio.sleep(0.3)  # the daemon's own end
    async with world.running() as daemon:
        await daemon.ready.wait()
    machine.restored = 0

    async with world.running() as daemon:
        if when == "ready":
            await daemon.ready.wait()
        await trio.sleep({"at once": 0.0, "while restoring": 0.3, "while polling": 0.8, "ready": 0.0}[when])
        assert isinstance(daemon.machine, Machine)
        daemon.machine.kill(signal.SIGTERM)

    assert world.named() == {}
    assert machine.restored == 1
    assert not (world.directory / "ngrokd.sock").exists()
    assert not (world.directory / "state" / "lock").exists()


async def test_a_part_that_fails_ends_the_daemon_with_its_own_error_and_undoes_all(
    world: World, machine: type[Machine], autojump_clock: MockClock
) -> None:
    """The exit code says what happened only if the one error comes out of all the nurseries."""
    machine.fails_after_s = 5.0

    with pytest.RaisesGroup(TakenError):
        async with world.running() as daemon:
            await daemon.ready.wait()
            assert world.named()
            await trio.sleep_forever()

    assert world.named() == {}
    assert machine.restored == 1
    assert not (world.directory / "ngrokd.sock").exists()


async def test_stop_before_the_api_answers(world: World, autojump_clock: MockClock) -> None:
    """A hanging API is no reason to hang with it."""
    world.lab.plane.set_fault(Fault(hang=True))
    async with world.running() as daemon:
        await trio.sleep(3)
        assert daemon.state == "starting"
        started = trio.current_time()
    assert trio.current_time() - started < 1
    assert world.output.getvalue() == ""


async def test_what_ngrok_has_made_is_saved_although_we_stop(
    world: World, machine: type[Machine], autojump_clock: MockClock
) -> None:
    """An operator whose certificate nobody kept would stay at ngrok for ever."""
    machine.thread_s, machine.slow_functions = 0.5, ("save",)
    async with world.running() as daemon:
        while not world.lab.plane.operators:
            await trio.testing.wait_all_tasks_blocked()
        daemon.stop()

    assert (world.directory / "state" / "tls.crt").exists()


# The ready line


async def test_the_first_connection_after_the_ready_line_works(
    world: World, machine: type[Machine], autojump_clock: MockClock
) -> None:
    """Also when the ingress's name takes its time to resolve, and when the API names an ingress only now."""
    machine.resolve_s = 1.0
    async with world.running(ingress={"address": None}) as daemon:
        await daemon.ready.wait()

        await world.apps.connect((world.named()["echo.demo"], 7))

        assert machine.looked_up[:1] == ["198.51.100.7"], "no other ingress is looked up before the API has named ours"


async def test_a_name_server_that_is_away_does_not_hold_the_ready_line_back(
    world: World, autojump_clock: MockClock
) -> None:
    world.lab.plane.ingress_endpoint = "nowhere.lab.test:443"
    async with world.running(ingress={"address": None}) as daemon:
        with trio.fail_after(10):
            await daemon.ready.wait()
        assert daemon.state == "degraded"
        assert "nowhere.lab.test" in str(daemon.status()["ingress"])


async def test_an_api_that_refuses_does_not_cost_a_second(world: World, autojump_clock: MockClock) -> None:
    """With endpoints known, the first verdict is enough, whatever it is."""
    async with world.running() as daemon:
        await daemon.ready.wait()
    world.lab.set_api_down(True)

    async with world.running() as daemon:
        started = trio.current_time()
        await daemon.ready.wait()
        assert trio.current_time() - started < 0.5


class ClosedOutput(io.StringIO):
    """What print finds when the reader of the pipe is gone."""

    def write(self, _text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


async def test_nobody_need_read_the_ready_line(world: World, autojump_clock: MockClock) -> None:
    """Who started the daemon may be gone; the apps are served all the same."""
    async with world.running() as daemon:
        daemon._output = ClosedOutput()
        await daemon.ready.wait()
        await trio.sleep(1)
        await world.apps.connect((world.named()["echo.demo"], 7))


# The API key and the configuration


async def test_a_reload_brings_the_key_that_was_waited_for(world: World, autojump_clock: MockClock) -> None:
    """SIGHUP counts from the first moment on, not only once the daemon is ready."""
    async with world.running(api={"key": ""}) as daemon:
        await trio.sleep(1)
        assert daemon.state == "waiting_for_key"
        path = world.lab.write_config(world.directory, settings={"hosts": {"path": str(world.hosts)}})
        daemon.reloader.read = lambda: config.load(str(path), {})

        assert isinstance(daemon.machine, Machine)
        daemon.machine.kill(signal.SIGHUP)

        with trio.fail_after(5):
            await daemon.ready.wait()


async def test_a_reload_that_cannot_be_carried_out_changes_nothing(world: World, autojump_clock: MockClock) -> None:
    """The file is well-formed, but names a CA file that is not there."""
    async with world.running() as daemon:
        await daemon.ready.wait()
        before = daemon.settings
        sections = {"ingress": {"ca_file": str(world.directory / "missing.pem")}, "net": {"drain": "9s"}}
        path = world.lab.write_config(world.directory, settings=sections)
        daemon.reloader.read = lambda: config.load(str(path), {})

        with pytest.raises(NgrokdError, match=r"missing\.pem"):
            await daemon.commands["reload"].handler([], ROOT)

        assert daemon.settings is before
        assert daemon.discovery.settings is before


# Files that cannot be written


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Switches writing of state files off and on."""
    really = files.atomic_write
    full = False

    def write(path: Any, *arguments: Any, **options: Any) -> None:
        if full:
            raise StateError(f"cannot write {path}: No space left on device")
        really(path, *arguments, **options)

    def switch(on: bool) -> None:
        nonlocal full
        full = on

    monkeypatch.setattr(files, "atomic_write", write)
    return switch


async def test_what_a_full_disk_did_not_take_is_saved_when_there_is_room(
    world: World, full_disk: Callable[[bool], None], autojump_clock: MockClock
) -> None:
    """Addresses are for ever, so one that was not saved must not wait for the next change of the listing."""
    async with world.running(api={"poll_interval": "5m"}) as daemon:
        await daemon.ready.wait()
        full_disk(True)
        world.lab.add_endpoint("http://new.demo", "http")
        daemon.discovery.poke()
        await trio.sleep(1)
        assert "new.demo" in world.named()
        assert "new.demo" not in saved(world, "ip_mappings.json")
        assert daemon.state == "degraded"
        assert "No space" in str(daemon.status()["state_directory"])

        full_disk(False)
        await trio.sleep(35)

        assert saved(world, "ip_mappings.json")["new.demo"] == world.named()["new.demo"]
        assert daemon.state == "ready"


async def test_a_renewal_that_cannot_be_saved_does_not_stop_the_polls(
    world: World, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    """The old certificate still holds, so endpoints come and go as ever."""
    world.lab.plane.certificate_lifetime_s = 3 * 3600
    async with world.running() as daemon:
        await daemon.ready.wait()

        def refuse(*_: object, **__: object) -> None:
            raise StateError("cannot write to the state directory: Read-only file system")

        monkeypatch.setattr(files, "check_writable", refuse)
        await trio.sleep(2.5 * 3600)
        world.lab.add_endpoint("http://new.demo", "http")
        await trio.sleep(35)

        assert "new.demo" in world.named()
        assert daemon.state == "degraded"
        assert "Read-only" in str(daemon.status()["certificate"])


async def test_what_a_killed_run_left_half_written_is_removed(world: World, autojump_clock: MockClock) -> None:
    directory = world.directory / "state"
    directory.mkdir(mode=0o700)
    left: list[Path] = []
    for where, name in ((directory, "ip_mappings.json"), (directory, "api_key"), (world.directory, "hosts")):
        where_fd = files.SYSTEM.open(where, 0o200000)
        fd, temp = files.create_temp(where_fd, name, 0o600)
        files.close_quietly(fd)
        files.close_quietly(where_fd)
        left.append(where / temp)
    assert all(path.exists() for path in left)

    async with world.running() as daemon:
        await daemon.ready.wait()
        assert not any(path.exists() for path in left)


# The hosts file belongs to everybody


@pytest.mark.parametrize("outage", [False, True])
@pytest.mark.parametrize("edit", ["rewritten", "deleted", "truncated"])
async def test_names_that_others_remove_come_back_soon(
    world: World, autojump_clock: MockClock, edit: str, outage: bool
) -> None:
    async with world.running(api={"poll_interval": "5m"}) as daemon:
        await daemon.ready.wait()
        names = world.named()
        await trio.sleep(10)
        world.lab.set_api_down(outage)
        if edit == "deleted":
            world.hosts.unlink()
        else:
            world.hosts.write_text("192.0.2.1\tedited.example\n" if edit == "rewritten" else "")

        await trio.sleep(2.1)

        assert world.named() == names
        assert ("edited.example" in world.hosts.read_text()) == (edit == "rewritten")


async def test_whoever_fights_for_the_hosts_file_is_answered_ever_more_slowly(
    world: World, autojump_clock: MockClock
) -> None:
    """Two programs that undo each other as fast as they can would wear out a disk."""
    async with world.running(api={"poll_interval": "5m"}) as daemon:
        await daemon.ready.wait()
        restored = 0
        for _ in range(2400):
            if world.named():
                restored += 1
                world.hosts.write_text("127.0.0.1\tlocalhost\n")
            await trio.sleep(0.1)
        assert restored < 12


async def test_many_edits_in_a_long_time_are_no_fight(world: World, autojump_clock: MockClock) -> None:
    """Polls may be hours apart; an edit now and then must not make us slower and slower until the next."""
    async with world.running(api={"poll_interval": "24h"}) as daemon:
        await daemon.ready.wait()
        for _ in range(20):
            world.hosts.write_text("127.0.0.1\tlocalhost\n")
            await trio.sleep(61)
            assert world.named()


async def test_a_name_that_somebody_else_takes_is_let_go_at_the_next_poll(
    world: World, autojump_clock: MockClock
) -> None:
    async with world.running() as daemon:
        await daemon.ready.wait()
        world.hosts.write_text("192.0.2.1\thello.demo\n" + world.hosts.read_text())

        await trio.sleep(35)

        assert "hello.demo" not in world.named()
        assert "hello.demo" in str(daemon.status()["skipped"])


async def test_a_hosts_file_that_becomes_writable_is_written(
    world: World, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    """Also during an outage of the API, and however long the polls are apart."""

    def refuse(path: object, *_: object, **__: object) -> bool:
        raise HostsFileError(f"cannot change {path}: Read-only file system")

    monkeypatch.setattr("ngrokd.discovery.edit_hosts", refuse)
    async with world.running(api={"poll_interval": "10m"}) as daemon:
        await daemon.ready.wait()
        assert world.named() == {}
        assert daemon.state == "degraded"
        monkeypatch.setattr("ngrokd.discovery.edit_hosts", edit_hosts)

        await trio.sleep(35)

        assert "hello.demo" in world.named()
        assert daemon.state == "ready"


# What ngrok answers


async def test_an_api_that_denies_every_new_operator_does_not_get_one_each_second(
    world: World, autojump_clock: MockClock
) -> None:
    """Registering again is right once; again and again it fills the account."""
    async with world.running() as daemon:
        await daemon.ready.wait()
        world.lab.plane.set_fault(Fault(status=404, code="ERR_NGROK_410"), path="bound_endpoints")
        before = len(world.lab.plane.operators)
        names = world.named()

        await trio.sleep(600)

        assert len(world.lab.plane.operators) - before < 120
        assert world.named() == names


async def test_one_that_asks_twice_waits_for_a_round_that_began_after_the_question(
    world: World, autojump_clock: MockClock
) -> None:
    async with world.running() as daemon:
        await daemon.ready.wait()
        world.lab.plane.set_fault(Fault(delay_s=2.0), path="bound_endpoints")
        daemon.discovery.poke()
        await trio.sleep(1)
        world.lab.add_endpoint("http://new.demo", "http")

        await daemon.discovery.ask_now()

        assert "new.demo" in world.named()


async def test_an_empty_listing_is_believed_the_second_time(world: World, autojump_clock: MockClock) -> None:
    async with world.running() as daemon:
        await daemon.ready.wait()
        names = world.named()
        for url, _, _ in DEMO_ENDPOINTS:
            world.lab.remove_endpoint(url)
        daemon.discovery.poke()
        await trio.sleep(4)
        assert world.named() == names

        await trio.sleep(3)

        assert world.named() == {}


async def test_a_flag_found_while_a_plan_is_made_is_kept(
    world: World, machine: type[Machine], autojump_clock: MockClock
) -> None:
    machine.thread_s, machine.slow_functions = 1.0, ("_plan",)
    async with world.running() as daemon:
        await daemon.ready.wait()
        world.lab.add_endpoint("http://new.demo", "http")
        daemon.discovery.poke()
        await trio.sleep(0.5)
        known = daemon.discovery.known
        known.desired = known.desired.with_flags({"hello.demo": (SHADOWS_PUBLIC,)})
        await trio.sleep(1)

        assert "new.demo" in known.desired.names()
        assert known.desired.flags == {"hello.demo": (SHADOWS_PUBLIC,)}


# Endpoints that go while they are used


@pytest.mark.parametrize("comes_back", [False, True])
async def test_flows_of_a_removed_endpoint_get_five_minutes_unless_it_comes_back(
    world: World, autojump_clock: MockClock, comes_back: bool
) -> None:
    async with world.running() as daemon:
        await daemon.ready.wait()
        address = world.named()["echo.demo"]
        stream = await world.apps.connect((address, 7))
        world.lab.remove_endpoint("tcp://echo.demo:7")
        await trio.sleep(35)
        assert "echo.demo" not in world.named()
        with pytest.raises(ConnectionRefusedError):
            await world.apps.connect((address, 7))
        await trio.sleep(200)
        if comes_back:
            world.lab.add_endpoint("tcp://echo.demo:7", "echo")
        await trio.sleep(40)
        await stream.send_all(b"still here")
        assert await stream.receive_some(100) == b"still here"

        await trio.sleep(60)

        assert stream.peer.error == ("" if comes_back else "reset")
        assert daemon.plane.flow_count == (1 if comes_back else 0)
        assert ("echo.demo" in world.named()) == comes_back


# What the API says besides


async def test_a_refused_key_keeps_everything_and_a_new_one_counts_at_once(
    world: World, autojump_clock: MockClock
) -> None:
    async with world.running(api={"key": ""}) as daemon:
        store = world.directory / "state" / "api_key"
        await trio.sleep(1)
        assert daemon.state == "waiting_for_key"
        await daemon.commands["set-api-key"].handler(["lab-api-key"], ROOT)
        await daemon.ready.wait()
        names = world.named()
        world.lab.plane.keys = {"rotated"}
        await trio.sleep(120)
        assert daemon.state == "degraded"
        assert daemon.discovery.known.auth_failed
        assert world.named() == names
        await world.apps.connect((names["echo.demo"], 7))

        started = trio.current_time()
        await daemon.commands["set-api-key"].handler(["rotated"], ROOT)

        assert trio.current_time() - started < 2
        assert daemon.state == "ready"
        assert store.read_text() == "rotated"


async def test_too_many_requests_are_answered_with_the_patience_that_is_asked_for(
    world: World, autojump_clock: MockClock
) -> None:
    async with world.running() as daemon:
        await daemon.ready.wait()
        world.lab.plane.set_fault(Fault.rate_limited(120))
        await trio.sleep(31)
        asked = daemon.discovery.known.polls
        await trio.sleep(85)
        assert daemon.discovery.known.polls == asked
        world.lab.plane.set_fault(None)
        await trio.sleep(60)  # a tenth is added at random to what was asked for
        assert daemon.state == "ready"


@pytest.mark.parametrize("outage_s", [5, 60, 500])
async def test_a_short_outage_is_over_within_ten_seconds_of_its_end(
    world: World, autojump_clock: MockClock, outage_s: float
) -> None:
    async with world.running() as daemon:
        await daemon.ready.wait()
        await trio.sleep(28)
        world.lab.set_api_down(True)
        await trio.sleep(outage_s)
        world.lab.set_api_down(False)
        world.lab.add_endpoint("http://new.demo", "http")

        await trio.sleep(10.5)

        assert "new.demo" in world.named()
        assert daemon.state == "ready"


async def test_a_certificate_that_cannot_be_used_is_a_problem_and_no_end(
    world: World, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    """What ngrok signs is not ours to choose; OpenSSL may refuse it. The one in use stays."""
    async with world.running() as daemon:
        await daemon.ready.wait()
        before = daemon.discovery.known.credentials

        def refuse(_credentials: object) -> None:
            raise NgrokdError("the client certificate and its key cannot be used: ee key too small")

        monkeypatch.setattr(in_process(daemon).ingress, "set_credentials", refuse)
        with pytest.raises(NgrokdError, match="too small"):
            await daemon.commands["refresh-cert"].handler(["--force"], ROOT)

        assert daemon.state == "degraded"
        assert daemon.discovery.known.credentials is before
        await world.apps.connect((world.named()["echo.demo"], 7))
