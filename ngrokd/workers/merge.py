"""One data plane out of several: limits are divided before, what was counted is added up afterwards. Pure.

Limits are divided evenly and rounded up, because connections are spread by a hash: each worker gets about its share,
and a limit of 1 must not become 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Final

from ngrokd.config import MOST_AUTO_WORKERS
from ngrokd.dataplane import DataPlaneSettings, Limit

MOST_WORKERS: Final = 64  # more would carry nothing faster; the kernel allows 256 queues


def count_workers(configured: int, cpus: int) -> int:
    """How many workers `net.workers` asks for.

    Args:
        configured: the number, or 0 for "auto".
        cpus: processors this process may use. "auto" takes half of them: apps and the kernel's half of the path need
            the other one.
    """
    return min(configured or max(1, min(cpus // 2, MOST_AUTO_WORKERS)), MOST_WORKERS)


def divide(settings: DataPlaneSettings, workers: int) -> DataPlaneSettings:
    """What each of so many workers may have and do."""

    def share(whole: int) -> int:
        return -(-whole // workers)

    stack, pool = settings.stack, settings.pool
    return replace(
        settings,
        stack=replace(
            stack,
            active_flows=share(stack.active_flows),
            max_flows=share(stack.max_flows),
            half_open=share(stack.half_open),
            undecided=share(stack.undecided),
            buffers=share(stack.buffers),
        ),
        dials=share(settings.dials),
        pool=replace(pool, max=share(pool.max), idle=share(pool.idle)),
    )


def divide_limit(limit: Limit, workers: int) -> Limit:
    """What each of so many workers may have of it."""

    def share(whole: int) -> int:
        return -(-whole // workers)

    return replace(
        limit,
        flows=share(limit.flows),
        half_open=share(limit.half_open),
        undecided=share(limit.undecided),
        buffers=share(limit.buffers),
        dials=share(limit.dials),
        pool=replace(limit.pool, max=share(limit.pool.max), idle=share(limit.pool.idle)),
    )


# What is so many now, and not so many since the start: it ends with its worker.
_NOW: Final = frozenset(
    {
        "flows",
        "pool.making",
        "pool.ready",
        "pool.tickets",
        "relay.active",
        "relay.dialing",
        "relay.waiting",
        "stack.buffered_bytes",
        "stack.flow_count",
        "stack.half_open_count",
        "stack.time_wait_count",
        "stack.undecided_count",
    }
)


def add_counters(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The sum of each counter over all that have it, in the order in which they first appear."""
    total: dict[str, int] = {}
    for part in parts:
        for name, count in part.items():
            total[name] = total.get(name, 0) + count
    return total


def lasting(counters: Mapping[str, int]) -> dict[str, int]:
    """What still counts of a worker that has ended."""
    return {name: count for name, count in counters.items() if name not in _NOW}


def add_pools(parts: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """How all pools together are, described as one; see `relay.ingress.Ingress.describe_pool`. {} of none.

    Numbers are added; shares and times are weighted by the dials they are about; the shortest idle limit counts, the
    first problem, and a word in which they differ is "mixed". A member that is new here is treated by its kind.
    """
    if not parts:
        return {}
    names = dict.fromkeys(name for part in parts for name in part)
    dials = [_number(part.get("dials")) for part in parts]
    merged: dict[str, object] = {}
    for name in names:
        values = [part.get(name) for part in parts]
        if name in ("dial_ms", "resumed_share"):
            weighted = sum(_number(value) * count for value, count in zip(values, dials, strict=True))
            merged[name] = round(weighted / sum(dials), 3) if sum(dials) else 0.0
        elif name == "idle_limit_s":
            merged[name] = min((value for value in values if isinstance(value, int | float)), default=None)
        elif name == "problem":
            merged[name] = next((value for value in values if value), "")
        elif all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            merged[name] = sum(map(_number, values))
        else:
            merged[name] = values[0] if all(value == values[0] for value in values) else "mixed"
    return merged


def _number(value: object) -> int | float:
    return value if isinstance(value, int | float) else 0
