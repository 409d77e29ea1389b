"""65,000 endpoints from the API to the hosts file, while a heartbeat on the same loop must not stop.

What decides and writes runs in a thread, as in the daemon. A thread shares the interpreter with the loop, so one long
call into C, or one collection of garbage over all those endpoints, stops every packet as surely as work on the loop.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio

from ngrokd import config
from ngrokd.cloud.api import NgrokApi, api_ssl_context
from ngrokd.cloud.identity import IdentityStore
from ngrokd.daemon import SWITCH_INTERVAL_S
from ngrokd.discovery import Discovery, mark_of
from ngrokd.lab.control_plane import DEFAULT_KEY
from ngrokd.lab.world import open_memory_lab
from ngrokd.names import reconcile
from ngrokd.names.directory import Directory
from ngrokd.ops.answers import json_pieces

ENDPOINTS = 65_000
# 10 to 25 ms; 100 to 400 before this was looked at.
LONGEST_MS = 100.0


@pytest.fixture
def as_in_the_daemon() -> Iterator[None]:
    """The daemon's settings of the interpreter, and none of the test run's garbage."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    sys.setswitchinterval(before)


class Heartbeat:
    """How long a task that wants to run every millisecond was kept from it at worst, by what went on meanwhile.

    Counted is the processor time that this process used instead: what other programs take of the machine is not ours.
    """

    def __init__(self) -> None:
        self.longest_ms: dict[str, float] = {}
        self._now = ""

    async def run(self) -> None:
        while True:
            started = time.process_time()
            await trio.sleep(0.001)
            used_ms = (time.process_time() - started) * 1000
            self.longest_ms[self._now] = max(used_ms, self.longest_ms.get(self._now, 0.0))

    @contextlib.contextmanager
    def during(self, what: str) -> Iterator[None]:
        self._now = what
        yield
        self._now = ""


async def in_a_thread(function: Any, /, *args: Any) -> Any:
    return await trio.to_thread.run_sync(function, *args)


@pytest.mark.usefixtures("as_in_the_daemon")
async def test_a_poll_of_a_whole_subnet_does_not_stop_the_loop(tmp_path: Path) -> None:
    """Parse, plan, save, write, publish, list: whatever it takes, packets pass meanwhile."""
    hosts = tmp_path / "hosts"
    hosts.write_bytes(b"127.0.0.1\tlocalhost\n")
    (tmp_path / "state").mkdir(mode=0o700)
    file = tmp_path / "config.toml"
    file.write_text(f'[state]\ndirectory = "{tmp_path}/state"\n[hosts]\npath = "{hosts}"\n')
    settings = config.load(str(file), {})
    published: list[Directory] = []

    async def publish(directory: Directory) -> None:
        published.append(directory)

    heartbeat = Heartbeat()
    async with open_memory_lab(wall=time.time, simulated_time=False) as lab, trio.open_nursery() as nursery:
        for number in range(ENDPOINTS):
            lab.plane.add_endpoint(f"http://svc-{number * 7919 % ENDPOINTS:05}.scale.test")
        lab.plane.page_size = 1000
        assert lab.connect is not None
        discovery = Discovery(
            settings,
            NgrokApi(
                url=lab.api_url,
                key=DEFAULT_KEY,
                connect=lab.connect,
                ssl_context=api_ssl_context(lab.servers.root_pem),
                now=time.time,
            ),
            IdentityStore(settings.state.directory),
            has_key=lambda: True,
            publish=publish,
            use=lambda credentials: None,
            reach=lambda endpoint: None,
            wall=time.time,
            run_sync=in_a_thread,
        )
        await discovery.restore()
        nursery.start_soon(heartbeat.run)

        with heartbeat.during("the first poll"):
            nursery.start_soon(discovery.run)
            await discovery.first_success.wait()
        with heartbeat.during("a poll like the last"):
            await discovery.ask_now()
        lab.plane.add_endpoint("http://new.scale.test")
        lab.plane.remove_endpoint("http://svc-00007.scale.test")
        with heartbeat.during("a poll with a change"):
            await discovery.ask_now()
        with heartbeat.during("a list"):
            listed = 0
            for piece in json_pieces({"data": reconcile.rows(discovery.known.desired)}):
                listed += len(piece)
                await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()

    assert hosts.read_bytes().count(b"\n10.107.") == ENDPOINTS
    assert len(published[-1]) == ENDPOINTS
    assert listed > 100 * ENDPOINTS
    assert max(heartbeat.longest_ms.values()) < LONGEST_MS, heartbeat.longest_ms


def test_a_listing_is_told_from_others_by_its_mark() -> None:
    """Only what tells it is remembered, so anything at all that the API may send must have a mark, and its own."""
    deep: list[object] = []
    for _ in range(5000):
        deep = [deep]
    listings: Sequence[Sequence[object]] = (
        [],
        [{"id": "ep_1", "url": "http://a.prod"}],
        [{"id": "ep_1", "url": "http://b.prod"}],
        [{"id": "ep_1", "url": "http://a.prod", "name": "\ud800"}],
        ["text", None, 1.5, True, 1 << 80],
        [{"id": f"ep_{number}"} for number in range(2500)],
        [{"id": f"ep_{number}"} for number in range(2501)],
    )

    marks = [mark_of(listing) for listing in listings]

    assert len(set(marks)) == len(marks)
    assert all(marks)
    assert marks == [mark_of(listing) for listing in listings]
    assert mark_of([deep]) == b""
