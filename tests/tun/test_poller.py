"""The poller over real descriptors: who is called, who no more, and who gets a turn in between."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from tun.poller import MAX_EVENTS, TURN_S, Poller, SpinBudget

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def poller() -> Iterator[Poller]:
    poller = Poller()
    yield poller
    poller.close()


@pytest.fixture
def make_pair() -> Iterator[Callable[[], Pair]]:
    with contextlib.ExitStack() as stack:

        def make() -> Pair:
            one, two = socket.socketpair()
            for each in (one, two):
                each.setblocking(False)
                stack.callback(each.close)
            return one, two

        yield make


@asynccontextmanager
async def running(poller: Poller) -> AsyncIterator[None]:
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(poller.run)
            yield
            nursery.cancel_scope.cancel()


async def until(true: Callable[[], object]) -> None:
    while not true():  # noqa: ASYNC110 - what is waited for is no event of Trio
        await trio.sleep(0.001)


async def looked_again(poller: Poller, make_pair: Callable[[], Pair]) -> None:
    """Whatever was ready before this has been called when it returns."""
    here, there = make_pair()
    seen = trio.Event()

    def see() -> None:
        here.recv(1)
        poller.watch(here.fileno(), None)
        seen.set()

    poller.watch(here.fileno(), see)
    there.send(b"x")
    await seen.wait()


# -- who is called


async def test_it_calls_while_there_is_something(poller: Poller, make_pair: Callable[[], Pair]) -> None:
    """Level-triggered: a callback that leaves something is called again."""
    here, there = make_pair()
    got: list[bytes] = []
    poller.watch(here.fileno(), lambda: got.append(here.recv(1)))
    async with running(poller):
        there.send(b"abc")
        await until(lambda: len(got) == 3)
        there.send(b"d")
        await until(lambda: len(got) == 4)
    assert got == [b"a", b"b", b"c", b"d"]


async def test_what_was_asked_is_replaced_and_ended(poller: Poller, make_pair: Callable[[], Pair]) -> None:
    here, there = make_pair()
    calls: list[str] = []

    def note(what: str) -> Callable[[], object]:
        def call() -> None:
            calls.append(what)
            with contextlib.suppress(BlockingIOError):
                here.recv(100)
            if what == "writable":
                poller.watch(here.fileno(), note("second"))

        return call

    async with running(poller):
        poller.watch(here.fileno(), note("first"))
        there.send(b"x")
        await until(lambda: calls)
        poller.watch(here.fileno(), note("second"))
        there.send(b"x")
        await until(lambda: len(calls) == 2)
        poller.watch(here.fileno(), None, note("writable"))
        await until(lambda: len(calls) == 3)
        there.send(b"x")
        await until(lambda: len(calls) == 4)
        poller.watch(here.fileno(), None)
        poller.watch(here.fileno(), None)  # there is nothing to end any more
        there.send(b"x")
        await looked_again(poller, make_pair)
    assert calls == ["first", "second", "writable", "second"]


async def test_a_callback_ends_the_watch_of_another_in_the_same_round(
    poller: Poller, make_pair: Callable[[], Pair]
) -> None:
    """Whichever is called first; the other one is over although the kernel had named it already."""
    pairs = [make_pair(), make_pair()]
    calls: list[int] = []

    def end_all(index: int) -> Callable[[], object]:
        def call() -> None:
            calls.append(index)
            for here, _ in pairs:
                poller.watch(here.fileno(), None)
                here.close()

        return call

    for index, (here, there) in enumerate(pairs):
        poller.watch(here.fileno(), end_all(index))
        there.send(b"x")
    async with running(poller):
        await looked_again(poller, make_pair)
    assert len(calls) == 1


@pytest.mark.parametrize("asks_for", ["nothing", "reading"])
async def test_who_ends_its_own_watch_is_not_called_for_the_rest(
    poller: Poller, make_pair: Callable[[], Pair], asks_for: str
) -> None:
    """It may have closed the descriptor because of what it read."""
    here, there = make_pair()
    calls: list[str] = []

    def readable() -> None:
        calls.append("readable")
        here.recv(10)
        poller.watch(here.fileno(), None if asks_for == "nothing" else readable)

    poller.watch(here.fileno(), readable, lambda: calls.append("writable"))
    there.send(b"x")
    async with running(poller):
        await until(lambda: calls)
        await looked_again(poller, make_pair)
    assert calls == ["readable"]


@pytest.mark.parametrize("interest", ["reading", "writing", "both"])
async def test_a_failure_is_told_to_whoever_watches(poller: Poller, interest: str) -> None:
    """The kernel reports a reset whatever was asked for; nobody who hears of it and ends leaves a busy loop."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        here = socket.create_connection(listener.getsockname())
        there, _ = listener.accept()
    with here:
        here.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                here.send(bytes(100_000))
        calls: list[str] = []

        def call(what: str) -> Callable[[], object]:
            def note() -> None:
                calls.append(what)
                if what == "writing" or interest == "reading":
                    poller.watch(here.fileno(), None)

            return note

        poller.watch(
            here.fileno(),
            call("reading") if interest != "writing" else None,
            call("writing") if interest != "reading" else None,
        )
        async with running(poller):
            await trio.testing.wait_all_tasks_blocked()
            assert calls == []
            there.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            there.close()
            await until(lambda: calls)
            rounds = poller.rounds
            await trio.sleep(0.02)
            assert poller.rounds == rounds
    assert set(calls) == ({"reading", "writing"} if interest == "both" else {interest})


async def test_a_number_that_is_used_again_belongs_to_the_new_one(poller: Poller) -> None:
    """Also when it changes hands within a round."""
    calls: list[str] = []
    with contextlib.ExitStack() as stack:
        old, peer = socket.socketpair()
        stack.callback(peer.close)
        number = old.fileno()
        heirs: list[socket.socket] = []

        def first() -> None:
            calls.append("old")
            poller.watch(number, None)
            old.close()
            heir, other = socket.socketpair()
            stack.callback(heir.close)
            stack.callback(other.close)
            heir.setblocking(False)
            assert heir.fileno() == number
            heirs.extend((heir, other))
            poller.watch(number, second)

        def second() -> None:
            with contextlib.suppress(BlockingIOError):
                calls.append(heirs[0].recv(10).decode())

        poller.watch(number, first)
        peer.send(b"x")
        async with running(poller):
            await until(lambda: calls)
            heirs[1].send(b"new")
            await until(lambda: len(calls) == 2)
        poller.watch(number, None)
    assert calls == ["old", "new"]


def test_what_cannot_be_watched_is_not_taken_for_watched(poller: Poller, make_pair: Callable[[], Pair]) -> None:
    """The number may be somebody's later, and then it must be told to the kernel."""
    here, _ = make_pair()
    number = here.fileno()
    here.close()
    with pytest.raises(OSError, match="descriptor"):
        poller.watch(number, lambda: None)
    poller.watch(number, None)  # nothing was asked, so nothing fails


def test_closing_is_final_and_may_be_repeated() -> None:
    poller = Poller()
    poller.close()
    poller.close()
    with pytest.raises(ValueError, match="closed"):
        poller.watch(0, lambda: None)


# -- who gets a turn in between


@pytest.mark.parametrize("_again", range(12))  # Trio throws a coin for who runs first
async def test_a_task_that_was_woken_runs_before_the_next_round(
    poller: Poller, make_pair: Callable[[], Pair], _again: int
) -> None:
    here, _ = make_pair()
    order: list[str] = []
    woken = trio.Event()

    def writable() -> None:  # always
        order.append("call")
        if len(order) == 1:
            woken.set()
            poller.yield_soon()
        if len(order) >= 6:
            poller.watch(here.fileno(), None)

    async with running(poller):
        await trio.testing.wait_all_tasks_blocked()
        poller.watch(here.fileno(), None, writable)
        await woken.wait()
        order.append("task")
        await until(lambda: len(order) == 6)
    assert order[:3] == ["call", "task", "call"]


@pytest.mark.parametrize("descriptors", [1, MAX_EVENTS])
async def test_others_get_their_turn_however_much_is_ready(
    poller: Poller, make_pair: Callable[[], Pair], descriptors: int
) -> None:
    """Counted in callbacks of known length: a busy machine makes all of it slower, and nothing more per turn.

    Every descriptor gets its turn as well.
    """
    cost = TURN_S / 4
    turn: list[int] = []
    longest = 0
    served: set[int] = set()

    def busy(number: int) -> Callable[[], object]:
        def call() -> None:
            served.add(number)
            turn.append(number)
            end = time.perf_counter() + cost
            while time.perf_counter() < end:
                pass

        return call

    for _ in range(descriptors):
        here, _there = make_pair()
        poller.watch(here.fileno(), None, busy(here.fileno()))
    async with running(poller):
        while len(served) < descriptors or longest == 0:
            turn.clear()
            await trio.lowlevel.checkpoint()
            longest = max(longest, len(turn))
    assert longest <= 2 * (TURN_S / cost + 1)  # Trio may run us first in one round and last in the next


async def test_it_can_be_cancelled_while_something_is_always_ready(
    poller: Poller, make_pair: Callable[[], Pair]
) -> None:
    """Between callbacks, and it can run again."""
    here, _ = make_pair()
    calls = 0

    def writable() -> None:
        nonlocal calls
        calls += 1

    poller.watch(here.fileno(), None, writable)
    for _ in range(2):
        before = calls
        async with running(poller):
            await until(lambda before=before: calls > before)  # type: ignore[misc]
        ended = calls
        await trio.sleep(0.005)
        assert calls == ended


@pytest.mark.parametrize("spin", [0.0, 0.0005])
async def test_nothing_costs_nothing(make_pair: Callable[[], Pair], spin: float) -> None:
    """An idle daemon sleeps, also right after it was busy enough to look again."""
    poller = Poller(spin)
    here, there = make_pair()
    poller.watch(here.fileno(), lambda: here.recv(1))
    try:
        async with running(poller):
            for _ in range(200):
                there.send(b"x")
                await trio.lowlevel.checkpoint()
            await trio.testing.wait_all_tasks_blocked()
            await trio.sleep(0.05)
            rounds, used = poller.rounds, time.process_time()
            await trio.sleep(0.3)
            assert poller.rounds == rounds
            assert time.process_time() - used < 0.1
    finally:
        poller.close()


async def test_it_does_not_look_again_while_trio_waits_for_something_as_urgent(
    make_pair: Callable[[], Pair],
) -> None:
    poller = Poller(30.0)  # any look without an end would end the test's patience
    here, there = make_pair()
    poller.watch(here.fileno(), lambda: here.recv(1))
    poller.elsewhere = 1
    try:
        async with running(poller):
            for _ in range(20):
                there.send(b"x")
                await trio.sleep(0.001)
            assert poller.budget.allowed
            await trio.sleep(0.01)
    finally:
        poller.close()


async def test_what_it_finds_by_looking_again_is_called(make_pair: Callable[[], Pair]) -> None:
    """A callback makes the next event, as a question makes its answer; a win each time."""
    poller = Poller(0.05)
    here, there = make_pair()
    answers = 0
    done = trio.Event()

    def question() -> None:
        there.recv(1)
        there.send(b"a")

    def answer() -> None:
        nonlocal answers
        here.recv(1)
        answers += 1
        if answers == 100:
            done.set()
            poller.yield_soon()
        else:
            here.send(b"q")

    poller.watch(here.fileno(), answer)
    poller.watch(there.fileno(), question)
    try:
        async with running(poller):
            here.send(b"q")
            await done.wait()
    finally:
        poller.close()
    assert answers == 100
    assert poller.rounds >= 100


async def test_a_full_pipe_and_its_end_are_seen(poller: Poller) -> None:
    """Pipes report the end of the other side without data or room; it is told to whoever watches."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    calls: list[str] = []

    def writable() -> None:
        calls.append("writable")
        with pytest.raises(BrokenPipeError):
            os.write(writer, b"x")
        poller.watch(writer, None)

    poller.watch(writer, None, writable)
    try:
        async with running(poller):
            await trio.testing.wait_all_tasks_blocked()
            assert calls == []
            os.close(reader)
            await until(lambda: calls)
    finally:
        os.close(writer)
    assert calls == ["writable"]


# -- the bet


def test_nothing_is_bet_before_something_was_won() -> None:
    assert not SpinBudget(0.001).allowed


def test_zero_never_bets() -> None:
    budget = SpinBudget(0.0)
    for _ in range(100):
        budget.slept(0.0)
    assert not budget.allowed


@pytest.mark.parametrize(("slept", "bets"), [(0.0, True), (0.0019, True), (0.002, False), (10.0, False)])
def test_only_short_sleeps_give_credit(slept: float, bets: bool) -> None:
    budget = SpinBudget(0.001)
    budget.slept(slept)
    assert budget.allowed is bets


def test_lost_bets_end_it_soon_and_never_leave_a_debt() -> None:
    budget = SpinBudget(0.001)
    for _ in range(1000):
        budget.won()
    losses = 0
    while budget.allowed:
        budget.lost()
        losses += 1
    assert losses <= SpinBudget.MOST
    budget.slept(0.0)
    assert budget.allowed
