"""The configuration, read again while the daemon runs.

What differs is decided by `changes`, a plain function of two configurations: which keys, and when a running daemon
heeds each. `Reloader` reads, and remembers what is to be said of it. It changes nothing itself: `apply` does, all of
it or, raising, nothing. So a file that is wrong, or that cannot be carried out (its port is taken), leaves everything
as it was, and `status` says since when.

Files are looked at once a second rather than watched by the kernel (docs/adr/0025). A change counts when they have been
the same for two looks: editors and tools write in several steps, and half of a change is none.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import msgspec
import trio

from ngrokd.config import Settings
from ngrokd.config.schema import Effect, schema
from ngrokd.config.showing import value_of
from ngrokd.errors import NgrokdError

log = logging.getLogger("ngrokd.daemon")

LOOK_EVERY_S: Final = 1.0

Mark: TypeAlias = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True)
class Change:
    """A key whose value differs, and when a running daemon heeds the new one."""

    key: str
    effect: Effect


def changes(old: Settings, new: Settings) -> tuple[Change, ...]:
    """What differs, in the order of the schema."""
    return tuple(
        Change(leaf.path, leaf.effect)
        for _, leaves in schema().values()
        for leaf in leaves.values()
        if value_of(old, leaf) != value_of(new, leaf)
    )


def merged(old: Settings, new: Settings) -> Settings:
    """`old` with those values of `new` that a running daemon heeds, and with where all values of `new` come from."""
    sections = {}
    for section, (_, leaves) in schema().items():
        heeded = {leaf.attribute: value_of(new, leaf) for leaf in leaves.values() if leaf.effect is not Effect.RESTART}
        sections[section] = msgspec.structs.replace(getattr(old, section), **heeded)
    return msgspec.structs.replace(new, **sections)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a reload came to: keys by when they are heeded. `needs_restart` is what differs from what was started."""

    live: tuple[str, ...] = ()
    new_flows: tuple[str, ...] = ()
    needs_restart: tuple[str, ...] = ()

    @property
    def changed(self) -> tuple[str, ...]:
        """Keys whose new value holds now."""
        return self.live + self.new_flows


def outcome_of(found: Sequence[Change]) -> Outcome:
    """The changes, sorted by when they are heeded."""
    by_effect = {effect: tuple(each.key for each in found if each.effect is effect) for effect in Effect}
    return Outcome(by_effect[Effect.LIVE], by_effect[Effect.NEW_FLOWS], by_effect[Effect.RESTART])


class Reloader:
    """Reads the configuration again, when asked and when its files change.

    Args:
        settings: what the daemon started with.
        read: reads the configuration. Raises ConfigError.
        watched: the files that it depends on, existing or not, given the one that runs; it may raise NgrokdError.
        run_sync: runs a function that takes its time, where it does not hold up the loop.
        wall: the wall clock.

    Attributes:
        running: what runs: what was started, and the live changes since.
        problem: why the configuration could not be taken over, "" when it was.
        problem_since: wall clock, Unix seconds; 0 when there is no problem.
        loaded_at: when what runs was read, wall clock.
        needs_restart: keys whose value waits for the next start.
        one_at_a_time: held while a configuration is read and applied.
    """

    def __init__(
        self,
        settings: Settings,
        read: Callable[[], Settings],
        *,
        watched: Callable[[Settings], Sequence[str]] | None,
        run_sync: Callable[..., Awaitable[Any]],
        wall: Callable[[], float],
    ) -> None:
        self.running = settings
        self.read = read
        self.problem = ""
        self.problem_since = 0.0
        self.loaded_at = wall()
        self.needs_restart: tuple[str, ...] = ()
        self._watched = watched
        self._run_sync = run_sync
        self._wall = wall
        self._mark: Mark = ()
        self.one_at_a_time = trio.Lock()

    async def reload(self, apply: Callable[[Settings, Outcome], Awaitable[None]]) -> Outcome:
        """Read the configuration and have it applied.

        Args:
            apply: makes what it is given hold; where it raises NgrokdError it has changed nothing.

        Raises: NgrokdError, when it is wrong or cannot be applied; then what ran before goes on.
        """
        async with self.one_at_a_time:
            self._mark = await self._look()  # what is written from now on is another change
            try:
                fresh: Settings = await self._run_sync(self.read)
                outcome = outcome_of(changes(self.running, fresh))
                settings = merged(self.running, fresh)
                await apply(settings, outcome)
            except NgrokdError as error:
                self.problem_since = self.problem_since or self._wall()
                self.problem = str(error)
                raise
            self.running = settings
            self.problem, self.problem_since = "", 0.0
            self.needs_restart = outcome.needs_restart
            self.loaded_at = self._wall()
            if outcome.changed:
                self._mark = self._mark_of_others(self._mark, await self._look())
            return outcome

    async def watch(self, reload: Callable[[], Awaitable[object]]) -> None:
        """Call `reload` when the files have changed and are at rest; for ever. What it raises of ours was said."""
        if self._watched is None:
            return
        self._mark = await self._look()
        before = self._mark
        while True:
            await trio.sleep(LOOK_EVERY_S)
            now = await self._look()
            if now != self._mark and now == before:
                log.info("the configuration has changed, and is read again")
                with contextlib.suppress(NgrokdError):  # it was said
                    await reload()
            before = now

    def describe(self) -> Mapping[str, object]:
        """For `status`; the caller adds the times in its own form."""
        return {
            "file": self.running.file,
            "files": list(self.running.files),
            "problem": self.problem,
            "needs_restart": list(self.needs_restart),
        }

    @staticmethod
    def _mark_of_others(before: Mark, now: Mark) -> Mark:
        """Other files may count now, such as another key file: those are known from here on, the rest from before."""
        known = dict(before)
        return tuple((path, known.get(path, mark)) for path, mark in now)

    async def _look(self) -> Mark:
        mark: Mark = await self._run_sync(self._marks)
        return mark

    def _marks(self) -> Mark:
        if self._watched is None:
            return ()
        try:
            paths = self._watched(self.running)
        except NgrokdError:  # the folder cannot be read now; reading will say so
            return (("", ()),)
        return tuple((path, _mark_of(path)) for path in paths)


def _mark_of(path: str) -> tuple[int, ...]:
    """What changes when a file does; () for one that is not there."""
    try:
        status = os.stat(path)
    except OSError:
        return ()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
