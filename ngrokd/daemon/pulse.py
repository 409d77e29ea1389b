"""How long the event loop keeps everybody waiting, and a line a minute with the figures that matter.

A task that wants to run every few seconds notes by how much it was late: that is how late everything else was, packets
included. The numbers of a minute are differences of counters that are there anyway.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Final

import trio

from ngrokd.metrics import Distribution, Histogram, unflatten
from ngrokd.ops.events import Events

EVERY_S: Final = 5.0
HEARTBEAT_S: Final = 60.0
LOOP_BOUNDS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)


class Pulse:
    """Run it beside the daemon.

    Args:
        events: gets the heartbeats.
        counters: the data plane's.
        in_force: sees to it that they are of now.

    Attributes:
        delays: of the event loop.
        longest_s: the longest delay of this minute so far, seconds.
    """

    def __init__(
        self, events: Events, counters: Callable[[], Mapping[str, int]], in_force: Callable[[], Awaitable[None]]
    ) -> None:
        self._events = events
        self._in_force = in_force
        self._counters = counters
        self.delays = Histogram(LOOP_BOUNDS_S)
        self.longest_s = 0.0

    async def run(self) -> None:
        """Measure, and say so; for ever."""
        before = self._counters()
        while True:
            until = trio.current_time() + HEARTBEAT_S
            while (now := trio.current_time()) < until - 1e-6:
                wake_at = min(now + EVERY_S, until)
                await trio.sleep_until(wake_at)
                late = trio.current_time() - wake_at
                self.delays.observe(late)
                self.longest_s = max(self.longest_s, late)
            await self._in_force()
            counters = self._counters()
            numbers = figures(before, counters) | {"loop_delay_ms": _ms(self.longest_s)}
            self._events.emit("daemon.heartbeat", _in_words(numbers), **numbers)
            before, self.longest_s = counters, 0.0


def figures(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, int | float]:
    """What happened between two readings of the data plane's counters, in the words of `daemon.heartbeat`."""

    def since(*names: str) -> int:
        return sum(after.get(name, 0) - before.get(name, 0) for name in names)

    dials = dial_times(after).minus(dial_times(before))
    drops = [name for name in after if name.startswith(("drops.", "device."))]
    return {
        "flows": after.get("flows", 0),
        "opened": since("relay.accepted"),
        "refused": since("relay.refused"),
        "cut": since("relay.cut"),
        "dials": since("pool.dials"),
        "dials_failed": since("pool.dial_failures"),
        "dial_p95_ms": _ms(dials.quantile(0.95)),
        "bytes_from_app": since("relay.bytes_from_app"),
        "bytes_to_app": since("relay.bytes_to_app"),
        "drops": since(*drops),
    }


def _in_words(numbers: Mapping[str, int | float]) -> str:
    up, down = (f"{numbers[f'bytes_{way}'] / 1e6:.1f} MB" for way in ("from_app", "to_app"))
    return (
        "{flows} live; in the last minute {opened} opened, {refused} refused, {cut} cut, "
        "{up} from apps, {down} to apps, {dials} dials ({dials_failed} failed, p95 {dial_p95_ms} ms), "
        "{drops} packets dropped, event loop late by up to {loop_delay_ms} ms"
    ).format(**numbers, up=up, down=down)


def dial_times(counters: Mapping[str, int]) -> Distribution:
    """How long dials took, TCP and TLS."""
    return unflatten(counters, "pool.dial_seconds")


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 1)
