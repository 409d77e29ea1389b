"""Limits divided before, numbers added afterwards."""

from __future__ import annotations

import pytest

from ngrokd.dataplane import DataPlane, DataPlaneSettings, Limit, limited
from ngrokd.relay.stock import PoolSettings
from ngrokd.relay.transport import Transport
from ngrokd.workers.merge import add_counters, add_pools, count_workers, divide, divide_limit, lasting
from tun import StackSettings
from tun.testing.memory import memory_pair


async def nobody(_host: str, _port: int) -> Transport:
    raise OSError("there is no network here")


def idle_plane() -> DataPlane:
    return DataPlane(memory_pair()[0], SETTINGS, nobody, lambda _report: None)


SETTINGS = DataPlaneSettings(
    StackSettings(max_flows=24000, half_open=1024), b"", dials=64, pool=PoolSettings(128, 60, 2)
)


@pytest.mark.parametrize(
    ("configured", "cpus", "workers"),
    [(1, 16, 1), (4, 2, 4), (64, 1, 64), (0, 1, 1), (0, 2, 1), (0, 3, 1), (0, 4, 2), (0, 16, 8), (0, 256, 8)],
)
def test_auto_takes_half_of_the_processors(configured: int, cpus: int, workers: int) -> None:
    """What is configured is taken literally; apps and the kernel need processors too."""
    assert count_workers(configured, cpus) == workers


def test_limits_are_divided_and_none_becomes_nothing() -> None:
    share = divide(SETTINGS, 3)

    assert (share.stack.max_flows, share.stack.half_open, share.stack.undecided) == (8000, 342, 342)
    assert (share.stack.active_flows, share.stack.buffers) == (22, -(-256 * 2**20 // 3))
    assert (share.dials, share.pool) == (22, PoolSettings(43, 60, 1))
    assert share.stack.receive_buffer == SETTINGS.stack.receive_buffer, "that is of one flow"
    assert divide(SETTINGS, 1) == SETTINGS


def test_limits_that_change_are_divided_alike() -> None:
    """A worker that starts later is told the same, whichever of the two it heard of first."""
    order = Limit(100, 10, 10, 1 << 16, 1 << 20, 1, 5.0, PoolSettings(9, 60.0, 2))

    assert limited(divide(SETTINGS, 3), divide_limit(order, 3)) == divide(limited(SETTINGS, order), 3)


def test_no_pool_stays_no_pool() -> None:
    divided = divide(DataPlaneSettings(StackSettings(), b"", pool=PoolSettings(0, 60, 0)), 2)

    assert (divided.pool.max, divided.pool.idle) == (0, 0)


def test_counters_are_added_by_name() -> None:
    assert add_counters([{"a": 1, "b": 2}, {"b": 3, "c": 4}]) == {"a": 1, "b": 5, "c": 4}
    assert add_counters([]) == {}


async def test_what_is_counted_now_is_told_from_what_was_counted() -> None:
    """The names stand in the stack, in the relay and here: one that is renamed there would live on here."""
    counters = idle_plane().counters()

    now = counters.keys() - lasting(counters).keys()
    assert now == {
        *("flows", "relay.active", "relay.dialing", "relay.waiting", "pool.ready", "pool.making", "pool.tickets"),
        *(f"stack.{name}_count" for name in ("flow", "half_open", "undecided", "time_wait")),
        "stack.buffered_bytes",
    }


def test_pools_are_described_as_one() -> None:
    one = {
        "ready": 2, "hits": 10, "dials": 30, "dial_ms": 4.0, "resumed_share": 1.0, "resumption": "passed",
        "idle_limit_s": None, "problem": "",
    }  # fmt: skip
    other = one | {"ready": 1, "dials": 10, "dial_ms": 8.0, "resumed_share": 0.0, "idle_limit_s": 50.0, "problem": "no"}

    assert add_pools([one, other]) == {
        "ready": 3, "hits": 20, "dials": 40, "dial_ms": 5.0, "resumed_share": 0.75, "resumption": "passed",
        "idle_limit_s": 50.0, "problem": "no",
    }  # fmt: skip
    assert add_pools([one, one | {"resumption": "open"}])["resumption"] == "mixed"
    assert add_pools([one]) == one
    assert add_pools([]) == {}


def test_pools_that_have_not_dialled_have_no_dial_time() -> None:
    silent = {"dials": 0, "dial_ms": 0.0, "resumed_share": 0.0, "idle_limit_s": None}

    assert add_pools([silent, silent]) == silent


async def test_every_member_of_a_pool_is_merged_by_a_rule() -> None:
    """A new one is a number, which is added; anything else needs a rule."""
    shown = idle_plane().describe_pool()

    others = {name for name, value in shown.items() if isinstance(value, bool) or not isinstance(value, int | float)}
    assert others <= {"resumption", "idle_limit_s", "problem"}
