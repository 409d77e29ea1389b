"""Limits: what a flood multiplies is counted, bounded, and gone when the flood is over."""

from __future__ import annotations

import math

import pytest

from tun.core.flows import TIME_WAIT_LIMIT, FlowTable, TimeWait
from tun.core.stack import Flow, Stack, StackSettings, initial_numbers
from tun.testing.playbook import OPEN, Playbook, tuned
from tun.wire.tcp import ACK, FIN, RST, SYN, build_tcp

ENDPOINT = b"\x0a\x6b\x00\x02"
LOCAL = b"\x0a\x6b\x00\x01"
FOREIGN = b"\xac\x11\x00\x02"
OTHER = b"\xac\x11\x00\x03"


def new_stack(settings: StackSettings | None = None, local: frozenset[bytes] | None = frozenset((LOCAL,))) -> Stack:
    stack = Stack(settings or StackSettings(), b"k" * 32)
    stack.set_served({ENDPOINT: frozenset((443,))})
    stack.set_sources(local, [(4, 0xAC110000, 0xFFFF0000)])
    return stack


def send(
    stack: Stack, port: int, flags: int, source: bytes = LOCAL, seq: int = 0, ack: int = 0, now: float = 1.0
) -> None:
    packet = build_tcp(source, ENDPOINT, port, 443, seq=seq, ack=ack & 0xFFFFFFFF, flags=flags, window=65535)
    stack.handle_packet(bytes(packet), 0, True, now)


def opened(stack: Stack, port: int, source: bytes = LOCAL, now: float = 1.0) -> Flow:
    """A flow that is half-open."""
    send(stack, port, SYN, source, now=now)
    (flow,) = stack.take_requests()
    stack.accept(flow, now)
    stack.flush(flow, lambda *_: True, now)
    return flow


def test_limits_change_while_flows_live() -> None:
    """Those beyond a smaller limit go on; new ones are refused, or may come again where there is more room."""
    stack = new_stack(StackSettings(max_flows=3, undecided=30, receive_buffer=1 << 20))
    flows = [opened(stack, port) for port in (1000, 1001, 1002)]

    stack.set_limits(StackSettings(max_flows=2, undecided=3, buffers=1 << 20, receive_buffer=1 << 16))
    send(stack, 1003, SYN)

    assert stack.drops == {"flow_limit": 1}
    assert all(not flow.closed for flow in flows)
    assert stack._host.budget.receive_cap == 1 << 16
    assert stack._host.budget.limit == 1 << 20

    stack.set_limits(StackSettings(max_flows=100, undecided=3))
    for port in range(2000, 2010):
        send(stack, port, SYN)
    assert stack.undecided_count <= 3
    stack.set_limits(StackSettings(max_flows=100, undecided=30))
    for port in range(2000, 2010):
        send(stack, port, SYN, now=2.5)
    assert stack.undecided_count == 10


@pytest.mark.scenario("tcp_listen_backlog")
def test_undecided_requests_are_bounded() -> None:
    """Beyond the limit a SYN is dropped, not refused: its app tries again, and gets a place when there is one."""
    stack = new_stack(tuned(undecided=16))
    for port in range(1000, 1016):
        send(stack, port, SYN)
    assert (stack.undecided_count, stack.drops) == (16, {})

    for port in range(1016, 1050):
        send(stack, port, SYN)
    assert stack.drops == {"first_try": 34}
    assert stack.undecided_count == 2
    for port in range(1000, 1050):
        send(stack, port, SYN, now=2.0)

    assert stack.undecided_count == 16
    assert stack.drops == {"first_try": 34, "duplicate_syn": 2, "undecided_limit": 34}
    assert stack.take_replies() == []


def test_foreign_source_gets_two_thirds_of_two_thirds() -> None:
    """Containers cannot starve this host, and one of them not the next."""
    stack = new_stack(tuned(undecided=90))
    for port in range(1000, 1040):
        send(stack, port, SYN, FOREIGN)
    for port in range(1000, 1020):
        send(stack, port, SYN, OTHER)
    for port in range(1000, 1030):
        send(stack, port, SYN, LOCAL)
    assert (stack.undecided_count, stack.drops) == (90, {})

    for port in range(2000, 2010):
        send(stack, port, SYN, FOREIGN)
    assert stack.drops == {"first_try": 10}
    assert stack._table.others.by_source == {FOREIGN: 7}
    assert len(stack._table.own.flows) == 30


@pytest.mark.parametrize("end", ["refuse", "cancel", "accept", "abort"])
@pytest.mark.rule(27)
@pytest.mark.bug("gvisor-tap-vsock 7dd9c904")
def test_counts_return_to_zero(end: str) -> None:
    """However a request ends; a counter that leaks locks everybody out one day."""
    stack = new_stack()
    for port in range(1000, 1010):
        for source in (LOCAL, FOREIGN):
            send(stack, port, SYN, source)
    for flow in stack.take_requests():
        port, source = flow.source[1], flow.source[0]
        if end == "refuse":
            stack.refuse(flow, 1.0)
        elif end == "cancel":
            send(stack, port, RST, source)
        else:
            stack.accept(flow, 1.0)
            stack.flush(flow, lambda *_: True, 1.0)
            if end == "abort":
                flow.abort(1.0)
                stack.flush(flow, lambda *_: True, 1.0)
            else:
                send(stack, port, ACK, source, seq=1, ack=flow.snd_nxt)
        stack.accept(flow, 1.0)
        stack.refuse(flow, 1.0)

    table = stack._table
    assert (stack.undecided_count, stack.half_open_count) == (0, 0)
    assert (table.others.by_source, table.foreign_half_open) == ({}, {})
    assert stack.flow_count == (20 if end == "accept" else 0)


@pytest.mark.rule(27, 28)
@pytest.mark.bug("Tailscale c5abbcd4b")
def test_silence_returns_the_counts_too() -> None:
    """Apps that vanish in either state."""
    stack = new_stack()
    for port in range(1000, 1010):
        send(stack, port, SYN, FOREIGN)
    for flow in stack.take_requests()[:5]:
        stack.accept(flow, 1.0)
    now = 1.0
    while stack.next_deadline() < math.inf:
        now = stack.next_deadline()
        stack.handle_timeout(now)

    assert now == pytest.approx(32.0)
    assert (stack.undecided_count, stack.half_open_count, stack.flow_count) == (0, 0, 0)
    assert (stack.cancelled, stack.timeouts) == (5, 5)
    assert stack._table.others.by_source == {}
    assert stack._table.foreign_half_open == {}


@pytest.mark.scenario("tcp_listen_backlog")
def test_oldest_half_open_flow_gives_way() -> None:
    """No SYN cookies: a dial that succeeded is worth more than a handshake that does not end."""
    stack = new_stack(tuned(half_open=3))
    flows = [opened(stack, port) for port in range(1000, 1005)]

    assert [flow.failure for flow in flows] == ["evicted", "evicted", "", "", ""]
    assert stack.half_open_count == 3


def test_foreign_source_evicts_its_own() -> None:
    """Two thirds, and then its own oldest goes, not ours."""
    stack = new_stack(tuned(half_open=3))
    ours = opened(stack, 999)
    flows = [opened(stack, port, FOREIGN) for port in range(1000, 1003)]

    assert ours.failure == ""
    assert [flow.failure for flow in flows] == ["evicted", "", ""]


def test_too_many_flows_are_refused() -> None:
    """Beyond all limits the app learns it at once."""
    stack = new_stack(tuned(max_flows=2))
    for port in range(1000, 1003):
        send(stack, port, SYN)

    assert len(stack.take_requests()) == 2
    assert stack.drops["flow_limit"] == 1
    assert len(stack.take_replies()) == 1


def test_half_open_flows_give_way_after_a_second_when_there_are_many() -> None:
    """Each holds a connection to the ingress, and the link's round trip is microseconds."""
    stack = new_stack(tuned(half_open=80))
    first = [opened(stack, port, OTHER, now=1.0) for port in range(1000, 1011)]
    second = opened(stack, 2000, now=1.9)
    assert not any(flow.failure for flow in first)
    third = [opened(stack, 3000 + index, now=2.0) for index in range(20)]

    assert [flow.failure for flow in first] == ["evicted"] * 11
    assert not second.failure
    assert not any(flow.failure for flow in third)
    assert stack.half_open_count == 21


@pytest.mark.rule(66)
def test_time_wait_is_bounded_and_forgets_the_oldest() -> None:
    """100,000 short connections leave 16,384 small records."""
    table = FlowTable(1024)
    stack = new_stack()
    flow = opened(stack, 1000)
    for index in range(TIME_WAIT_LIMIT + 100):
        table.hold(index.to_bytes(12, "big"), TimeWait(flow, 1.0 + index / 1000))
    assert len(table.time_wait) == TIME_WAIT_LIMIT
    assert (99).to_bytes(12, "big") not in table.time_wait
    assert table.next_expiry() == pytest.approx(11.1)

    table.expire(11.2)
    assert len(table.time_wait) == TIME_WAIT_LIMIT - 101
    table.expire(100.0)
    assert table.next_expiry() == math.inf


@pytest.mark.rule(64, 66)
def test_thousands_of_short_connections_leave_nothing() -> None:
    """Ports wrap within TIME-WAIT; each connection opens, and afterwards all is as before."""
    stack = new_stack()
    now = 1.0
    for round_ in range(3):
        for port in range(2000, 3000):
            now += 0.001
            start = round_ * 1000
            send(stack, port, SYN, seq=start, now=now)
            (flow,) = stack.take_requests()
            stack.accept(flow, now)
            stack.flush(flow, lambda *_: True, now)
            send(stack, port, ACK, seq=start + 1, ack=flow.snd_nxt, now=now)
            flow.finish(now)
            stack.flush(flow, lambda *_: True, now)
            send(stack, port, ACK | FIN, seq=start + 1, ack=flow.snd_nxt, now=now)
            for touched in stack.take_touched():
                stack.flush(touched, lambda *_: True, now)
            assert flow.closed
            assert flow.failure == ""
            if stack.next_deadline() <= now:
                stack.handle_timeout(now)
    assert stack.flow_count == 0
    assert stack.time_wait_count == 1000
    assert len(stack._host.heap) < 3000

    stack.handle_timeout(now + 11)
    assert stack.time_wait_count == 0
    assert stack.next_deadline() == math.inf
    assert stack._host.heap == []


@pytest.mark.rule(25)
@pytest.mark.bug("smoltcp 52e087e4")
def test_initial_numbers_grow_and_tell_nothing() -> None:
    """RFC 6528: per tuple with the clock, across tuples and secrets without relation; chi-square over the high byte."""
    first, offset = initial_numbers(b"s" * 16, b"a" * 12, 1.0)
    later, same = initial_numbers(b"s" * 16, b"a" * 12, 2.0)
    assert (later - first) & 0xFFFFFFFF == 250_000
    assert same == offset
    assert initial_numbers(b"t" * 16, b"a" * 12, 1.0)[0] != first

    counts = [0] * 256
    for port in range(10000):
        counts[initial_numbers(b"s" * 16, b"a" * 8 + port.to_bytes(4, "big"), 1.0)[0] >> 24] += 1
    expected = 10000 / 256
    assert sum((count - expected) ** 2 / expected for count in counts) < 350  # 255 degrees of freedom, p < 1e-4


@pytest.mark.rule(24)
def test_timestamps_of_flows_are_unrelated() -> None:
    """RFC 7323 5.4: they must not tell this machine's uptime."""
    offsets = {initial_numbers(b"s" * 16, port.to_bytes(12, "big"), 1.0)[1] for port in range(1000)}

    assert len(offsets) == 1000


# -- memory -----------------------------------------------------------------------------------------------------------


def test_what_flows_hold_is_counted_and_returned() -> None:
    """Both directions, and nothing is left when the flow is gone."""
    book = Playbook()
    book.play(OPEN)
    book.play("""
        app > P. 1:1001(1000) ack 1
        app < .  1:1(0) ack 1001
        us  | write 5000
        app < P. 1:5001(5000) ack 1001
    """)
    assert book.stack.buffered_bytes == 6000

    book.play("""
        us  | read 1000
        app > .  1001:1001(0) ack 5001 win 512
    """)
    assert book.stack.buffered_bytes == 0

    book.play("""
        us  | write 5000
        app < P. 5001:10001(5000) ack 1001
        us  | abort
        app < R. 10001:10001(0) ack 1001
    """)
    assert book.stack.buffered_bytes == 0


def test_short_memory_shrinks_windows_and_stops_writers() -> None:
    """Above three quarters buffers go down to 64 KiB; when all is used, a flow that holds nothing may a little."""
    stack = new_stack(tuned(buffers=1000000, send_buffer=100_000))
    flows = [opened(stack, port) for port in range(1000, 1014)]
    for flow in flows:
        send(stack, flow.source[1], ACK, seq=1, ack=flow.snd_nxt)
        flow.bytes_to_app = 1_000_000  # each has earned its buffer
    taken = []
    for flow in flows:
        taken.append(flow.write(memoryview(bytes(400000)), 1.0))
        stack.flush(flow, lambda *_: True, 1.0)

    assert taken == [100_000] * 8 + [65536] * 4 + [16384] * 2
    assert stack._host.budget.receive_cap == 65536
    assert flows[0].send_space == 0
    assert stack.buffered_bytes <= 1000000 + 14 * 16384


def test_where_many_could_fill_the_memory_a_send_buffer_is_earned() -> None:
    """Who reads nothing holds 64 KiB; who reads may have twice as much more as he has read. Few need not earn it."""
    stack = new_stack(tuned(buffers=8 * 2**20, send_buffer=2**20))
    flows = [opened(stack, port) for port in range(1000, 1004)]
    for flow in flows:
        send(stack, flow.source[1], ACK, seq=1, ack=flow.snd_nxt)
    assert [flow.send_space for flow in flows] == [2**20] * 4

    reader = opened(stack, 2000)
    send(stack, 2000, ACK, seq=1, ack=reader.snd_nxt)
    assert [flow.send_space for flow in flows] == [65536] * 4
    while reader.bytes_to_app < 2**20:
        reader.write(memoryview(bytes(2**20)), 1.0)
        assert reader.held_bytes == min(65536 + 2 * reader.bytes_to_app, 2**20)
        stack.flush(reader, lambda *_: True, 1.0)
        send(stack, 2000, ACK, seq=1, ack=reader.snd_nxt)

    for flow in flows:
        flow.abort(1.0)
        stack.flush(flow, lambda *_: True, 1.0)
    opened(stack, 3000)
    assert not stack._host.budget.crowded


def test_stalled_flows_give_way_when_memory_is_full() -> None:
    """sockstress: those that hold most and have not moved for half a minute are ended; the others are not."""
    stack = new_stack(tuned(buffers=1300000))
    flows = [opened(stack, port) for port in range(1000, 1004)]
    for flow in flows:
        send(stack, flow.source[1], ACK, seq=1, ack=flow.snd_nxt)
    for flow in flows[:3]:
        flow.bytes_to_app = 1_000_000
        assert flow.write(memoryview(bytes(400000)), 1.0) == 400000
        stack.flush(flow, lambda *_: True, 1.0)
    now = 1.0
    while now < 40.0 and not any(flow.failure for flow in flows):
        now += 1.0
        mover = flows[2]
        mover_ack = min(mover.snd_una + 70000, mover.snd_nxt)
        send(stack, mover.source[1], ACK, seq=1, ack=mover_ack, now=now)
        mover.write(memoryview(bytes(400000)), now)
        stack.handle_timeout(now)
        for flow in stack.take_touched():
            stack.flush(flow, lambda *_: True, now)

    assert sorted(flow.failure for flow in flows[:2]) == ["", "evicted"]
    assert flows[2].failure == ""
    assert 30.0 <= now <= 34.0


def test_nothing_is_ended_while_there_is_memory() -> None:
    """A reader that pauses for an hour is nobody's enemy."""
    book = Playbook()
    book.play(OPEN)
    book.play("""
        us  | write 65000
        app < .  1:64241(64240) ack 1
        app < P. 64241:65001(760) ack 1
        app > .  1:1(0) ack 65001 win 0
        us  | write 65000
    """)
    for _ in range(30):
        book._pass(60.0)
        book._outputs.clear()
        book._app_sends("app > .  1:1(0) ack 65001 win 0")
        book._serve()

    book.play("us  | open")
