"""The configuration changed while the daemon runs: what is heeded, what waits, and what changes nothing."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from ngrokd import config
from ngrokd.config import Settings
from ngrokd.config.schema import Effect, schema
from ngrokd.daemon.daemon import Daemon
from ngrokd.daemon.reload import Change, Outcome, Reloader, changes, merged, outcome_of
from ngrokd.endpoints import Secret
from ngrokd.errors import ConfigError, NgrokdError, TakenError
from ngrokd.log import Log
from ngrokd.ops.peers import Peer
from tests.harness.world import World, in_process, open_world

ROOT = Peer(0, 0, 0, frozenset())


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with open_world(tmp_path) as world:
        yield world


def settings_of(text: str) -> Settings:
    return config.parse(text, "c.toml", {})


# Deciding


def test_differences_are_named_with_when_they_count() -> None:
    """In the order of the schema, whatever that of the file."""
    new = settings_of(
        '[log]\nlevel = "debug"\n[limits]\nflows = 5\n[net]\nsubnet = "10.9.0.0/16"\ndrain = "1s"\n'
        '[api]\nkey = "2secret"\npoll_interval = "30s"\n'
    )

    found = changes(Settings(), new)

    assert found == (
        Change("api.key", Effect.LIVE),
        Change("net.subnet", Effect.RESTART),
        Change("net.drain", Effect.LIVE),
        Change("limits.flows", Effect.NEW_FLOWS),
        Change("log.level", Effect.LIVE),
    )
    assert outcome_of(found) == Outcome(("api.key", "net.drain", "log.level"), ("limits.flows",), ("net.subnet",))
    assert changes(new, new) == ()


def test_what_is_merged_differs_only_where_it_waits() -> None:
    new = settings_of('[net]\nsubnet = "10.9.0.0/16"\ndrain = "1s"\n[limits]\nflows = 5\n[api]\nkey = "2secret"\n')

    running = merged(Settings(), new)

    assert (running.net.drain_s, running.limits.flows, running.api.key) == (1.0, 5, Secret("2secret"))
    assert running.net.subnet == "10.107.0.0/16"
    assert [each.key for each in changes(running, new)] == ["net.subnet"]
    assert running.origins == new.origins


def test_every_key_that_others_depend_on_waits_for_a_restart() -> None:
    """The rest is live; whoever adds a key decides here."""
    waiting = {
        leaf.path for _, leaves in schema().values() for leaf in leaves.values() if leaf.effect is Effect.RESTART
    }

    assert waiting == {
        "api.url",
        "state.directory",
        "net.mode",
        "net.interface",
        "net.subnet",
        "net.subnet6",
        "net.mtu",
        "net.offload",
        "net.workers",
        "net.configure",
        "pool.spin",
        "control.socket",
        "control.group",
    }


# Reading again


class Source:
    """A configuration in a folder, and who reads it."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "config.toml"
        self.file.write_text("")
        self.applied: list[tuple[Settings, Outcome]] = []
        self.refusal: NgrokdError | None = None
        self.clock = 1000.0
        self.reloader = Reloader(
            self.read(), self.read, watched=self.watched, run_sync=self.run_sync, wall=lambda: self.clock
        )

    def read(self) -> Settings:
        return config.load(str(self.file), {})

    def watched(self, running: Settings) -> list[str]:
        return [*config.find_files(str(self.file), {}), *filter(None, [running.api.key_file])]

    async def run_sync(self, function: Callable[..., object], *arguments: object) -> object:
        await trio.lowlevel.checkpoint()
        return function(*arguments)

    async def apply(self, settings: Settings, outcome: Outcome) -> None:
        await trio.lowlevel.checkpoint()
        if self.refusal is not None:
            raise self.refusal
        self.applied.append((settings, outcome))

    async def reload(self) -> Outcome:
        return await self.reloader.reload(self.apply)


async def test_what_waits_for_a_restart_is_named_until_then(tmp_path: Path) -> None:
    """Also when something else changes later; not any more when it is taken back."""
    source = Source(tmp_path)
    source.file.write_text("[net]\nmtu = 1400\n")
    first = await source.reload()
    source.file.write_text('[net]\nmtu = 1400\ndrain = "1s"\n')
    second = await source.reload()
    waiting = source.reloader.needs_restart
    source.file.write_text('[net]\ndrain = "1s"\n')
    third = await source.reload()

    assert (first.changed, first.needs_restart) == ((), ("net.mtu",))
    assert (second.changed, second.needs_restart) == (("net.drain",), ("net.mtu",))
    assert waiting == ("net.mtu",)
    assert third == Outcome()
    assert source.reloader.running.net.drain_s == 1.0


async def test_what_is_wrong_or_refused_changes_nothing_and_is_remembered_since_when(tmp_path: Path) -> None:
    source = Source(tmp_path)
    before = source.reloader.running
    source.file.write_text("[net]\nmtu = 1\n")
    with pytest.raises(ConfigError):
        await source.reload()
    source.clock = 2000.0
    source.file.write_text('[net]\ndrain = "1s"\n')
    source.refusal = TakenError("somebody has it")
    with pytest.raises(TakenError):
        await source.reload()

    assert source.reloader.running is before
    assert source.applied == []
    assert (source.reloader.problem, source.reloader.problem_since) == ("somebody has it", 1000.0)

    source.refusal = None
    await source.reload()
    assert (source.reloader.problem, source.reloader.problem_since) == ("", 0.0)


@pytest.mark.parametrize("kind", ["write", "rename", "folder", "removed", "link"])
async def test_a_change_of_the_files_is_noticed_when_it_is_over(
    tmp_path: Path, kind: str, autojump_clock: MockClock
) -> None:
    """However editors and tools do it, once; and what was reloaded by hand is not reloaded again."""
    source = Source(tmp_path)
    source.file.write_text('[net]\ndrain = "9s"\n')
    if kind == "link":
        source.file.rename(tmp_path / "one")
        source.file.symlink_to("one")
    await source.reload()
    source.applied.clear()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(source.reloader.watch, source.reload)
        await trio.sleep(10)
        assert source.applied == []
        match kind:
            case "write":
                source.file.write_text("")
                await trio.sleep(0.4)
                source.file.write_text('[net]\ndrain = "1s"\n')
            case "rename":
                (tmp_path / "new").write_text('[net]\ndrain = "1s"\n')
                (tmp_path / "new").rename(source.file)
            case "folder":
                (tmp_path / "conf.d").mkdir()
                (tmp_path / "conf.d" / "a.toml").write_text('[net]\ndrain = "1s"\n')
            case "removed":
                source.file.write_text('[net]\ndrain = "1s"\n# a comment\n')
            case "link":
                (tmp_path / "two").write_text('[net]\ndrain = "1s"\n')
                (tmp_path / "link").symlink_to("two")
                (tmp_path / "link").rename(source.file)
        await trio.sleep(2.5)
        assert [settings.net.drain_s for settings, _ in source.applied] == [1.0]
        await trio.sleep(10)
        assert len(source.applied) == 1
        nursery.cancel_scope.cancel()


async def test_a_wrong_file_is_refused_once(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Not once a second; and a second mistake is said again."""
    source = Source(tmp_path)
    refused: list[str] = []

    async def reload() -> None:
        try:
            await source.reload()
        except NgrokdError as error:
            refused.append(str(error))
            raise

    async with trio.open_nursery() as nursery:
        nursery.start_soon(source.reloader.watch, reload)
        await trio.sleep(1)
        source.file.write_text("[net]\nmtu = 1\n")
        await trio.sleep(20)
        source.file.write_text("[net]\nmtu = 23\n")
        await trio.sleep(20)
        source.file.unlink()
        await trio.sleep(20)
        nursery.cancel_scope.cancel()

    assert [text.rpartition(", ")[2] for text in refused[:2]] == ["got 1", "got 23"]
    assert "there is no such file" in refused[2]
    assert len(refused) == 3


async def test_another_key_in_the_key_file_is_noticed(tmp_path: Path, autojump_clock: MockClock) -> None:
    """A secrets manager writes it. A key file that is named only now counts from then on."""
    source = Source(tmp_path)
    key = tmp_path / "key"
    key.write_text("one")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(source.reloader.watch, source.reload)
        await trio.sleep(1)
        source.file.write_text(f'[api]\nkey_file = "{key}"\n')
        await trio.sleep(10)
        assert len(source.applied) == 1
        key.write_text("two!")
        await trio.sleep(10)
        nursery.cancel_scope.cancel()

    assert [outcome.changed for _, outcome in source.applied] == [("api.key_file",), ()]


# In the whole daemon


async def rewrite(world: World, daemon: Daemon, **sections: dict[str, object]) -> dict[str, object]:
    """Write another configuration and have it read. Raises as the command does."""
    sections.setdefault("hosts", {}).setdefault("path", str(world.hosts))
    sections.setdefault("http", {}).setdefault("listen", "")
    sections.setdefault("api", {}).setdefault("poll_interval", "30s")
    path = world.lab.write_config(world.directory, settings=sections)
    daemon.reloader.read = lambda: config.load(str(path), {})
    answer = await daemon.commands["reload"].handler([], ROOT)
    assert isinstance(answer, dict)
    return answer


async def test_limits_and_pool_hold_from_then_on(world: World, autojump_clock: MockClock) -> None:
    """Those who are served go on; the next one is refused."""
    async with world.running() as daemon:
        await daemon.ready.wait()
        address = (world.named()["echo.demo"], 7)
        first = await world.apps.connect(address)

        answer = await rewrite(
            world,
            daemon,
            limits={"flows": 1, "dials": 7, "buffer": "64KiB"},
            pool={"max": 3, "idle": 1, "max_age": "9s"},
            ingress={"connect_timeout": "5s"},
        )

        assert answer == {
            "changed": [
                "pool.max", "pool.max_age", "pool.idle", "limits.buffer",
                "ingress.connect_timeout", "limits.flows", "limits.dials",
            ],
            "live": ["pool.max", "pool.max_age", "pool.idle", "limits.buffer"],
            "new_flows": ["ingress.connect_timeout", "limits.flows", "limits.dials"],
            "needs_restart": [],
        }  # fmt: skip
        with pytest.raises(ConnectionRefusedError):
            await world.apps.connect(address)
        await first.send_all(b"still here")
        assert await first.receive_some() == b"still here"
        assert daemon.plane.describe_pool()["max"] == 3
        assert in_process(daemon).ingress._slots.total_tokens == 7

        await rewrite(world, daemon)
        await world.apps.connect(address)


async def test_names_move_with_the_hosts_file(world: World, autojump_clock: MockClock, tmp_path: Path) -> None:
    """To another file, out of it, and in again; other lines stay in both."""
    other = tmp_path / "other-hosts"
    other.write_text("192.0.2.1\tmine\n")
    before = world.hosts.read_text()
    async with world.running() as daemon:
        await daemon.ready.wait()
        named = world.named()

        await rewrite(world, daemon, hosts={"path": str(other)})
        assert world.hosts.read_text() == before
        assert "echo.demo" in other.read_text()

        await rewrite(world, daemon, hosts={"path": str(other), "enabled": False})
        assert other.read_text() == "192.0.2.1\tmine\n"

        await rewrite(world, daemon)
        assert world.named() == named

        await rewrite(world, daemon, hosts={"path": str(other)})
    assert other.read_text() == "192.0.2.1\tmine\n"
    assert world.hosts.read_text() == before


async def test_fewer_endpoints_are_served_of_the_same_listing(world: World, autojump_clock: MockClock) -> None:
    """The API lists the same; the limit is another one."""
    async with world.running() as daemon:
        await daemon.ready.wait()
        assert len(world.named()) > 2

        await rewrite(world, daemon, limits={"endpoints": 2})
        await daemon.discovery.next_round()

        assert len(daemon.discovery.known.desired.services) == 2
        await rewrite(world, daemon)
        await daemon.discovery.next_round()
        assert len(daemon.discovery.known.desired.services) > 2


async def test_ngrok_is_told_other_selectors(world: World, autojump_clock: MockClock) -> None:
    """At once, and not only when somebody registers."""
    async with world.running() as daemon:
        await daemon.ready.wait()
        [operator] = world.lab.plane.operators.values()
        assert operator.endpoint_selectors == ["true"]

        await rewrite(world, daemon, api={"selectors": ["endpoint.metadata.x == 'y'"]})
        await daemon.discovery.next_round()

        assert operator.endpoint_selectors == ["endpoint.metadata.x == 'y'"]
        assert daemon.problems == []


async def test_selectors_that_changed_while_nobody_ran_are_told_too(world: World, autojump_clock: MockClock) -> None:
    async with world.running() as daemon:
        await daemon.ready.wait()
    async with world.running(api={"selectors": ["'a' == 'a'"]}) as daemon:
        await daemon.ready.wait()
        await daemon.discovery.ask_now()

        [operator] = world.lab.plane.operators.values()
        assert operator.endpoint_selectors == ["'a' == 'a'"]


async def test_health_checks_move(world: World) -> None:
    """From nowhere to a port, another address of it, and away; one that is taken refuses all of it. In real time."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        async with world.running() as daemon:
            await daemon.ready.wait()
            await rewrite(world, daemon, http={"listen": "127.0.0.1:0"})
            assert daemon._web_listener is not None
            first = daemon._web_listener.port
            before = daemon.settings

            with pytest.raises(TakenError):
                await rewrite(
                    world, daemon, http={"listen": f"127.0.0.1:{taken.getsockname()[1]}"}, log={"level": "debug"}
                )
            assert daemon.settings is before
            assert await answers(first)
            status = daemon.status()
            assert "belongs to" in str(status["config"])
            assert daemon.state == "degraded"

            answer = await rewrite(world, daemon, http={"listen": f"0.0.0.0:{first}"})
            assert answer["live"] == ["http.listen"]
            assert await answers(first)
            assert daemon.problems == []

            await rewrite(world, daemon, http={"listen": ""})
            assert not await answers(first)


async def answers(port: int) -> bool:
    """Whether somebody says that the daemon is healthy."""
    try:
        stream = await trio.open_tcp_stream("127.0.0.1", port)
    except OSError:
        return False
    async with stream:
        await stream.send_all(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        return b" 200 " in await stream.receive_some()


async def test_a_wrong_file_is_a_problem_until_it_is_mended(world: World, autojump_clock: MockClock) -> None:
    """It would stop the next start, so somebody should know."""
    async with world.running() as daemon:
        await daemon.ready.wait()

        with pytest.raises(ConfigError):
            await rewrite(world, daemon, net={"mtuu": 5})

        [problem] = daemon.problems
        assert problem.startswith("the configuration is invalid since 20")
        assert "net.mtuu: unknown key" in problem
        shown = daemon.status()["config"]
        assert isinstance(shown, dict)
        assert shown["invalid_since"] is not None
        await rewrite(world, daemon, net={"mtu": 1400})
        assert daemon.problems == []
        shown = daemon.status()["config"]
        assert isinstance(shown, dict)
        assert (shown["problem"], shown["invalid_since"], shown["needs_restart"]) == ("", None, ["net.mtu"])


async def test_a_reload_during_the_end_brings_no_name_back(world: World, autojump_clock: MockClock) -> None:
    """One that is under way is waited for; one that comes later is refused."""
    before = world.hosts.read_text()
    async with world.running(net={"drain": "60s"}) as daemon:
        await daemon.ready.wait()
        stream = await world.apps.connect((world.named()["echo.demo"], 7))

        async def reload() -> None:
            with contextlib.suppress(NgrokdError):  # it may be early or late
                await rewrite(world, daemon)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(reload)
            await trio.lowlevel.checkpoint()
            daemon.stop()
        await trio.sleep(1)
        assert world.hosts.read_text() == before
        with pytest.raises(NgrokdError, match="stopping"):
            await rewrite(world, daemon, hosts={"enabled": False})
        assert world.hosts.read_text() == before
        await stream.aclose()
    assert world.hosts.read_text() == before


async def test_the_log_listens_to_a_reload(world: World, autojump_clock: MockClock, tmp_path: Path) -> None:
    """Only when its keys have changed: a level that was set for a while is not ended by something else."""
    descriptor = os.open(tmp_path / "log", os.O_CREAT | os.O_WRONLY)
    with Log("info", "text", descriptor=descriptor, environ={}) as log_control:
        world.log_control = log_control
        async with world.running() as daemon:
            await daemon.ready.wait()
            log_control.set_level("debug")
            await rewrite(world, daemon, net={"drain": "2s"})
            assert log_control.level == "debug"
            await rewrite(world, daemon, log={"level": "error"})
            assert log_control.level == "error"
    os.close(descriptor)
