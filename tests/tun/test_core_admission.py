"""Who gets a place when a flood wants all of them, with literal times: a second try tells people from floods."""

from __future__ import annotations

import random
import struct

import pytest

from tun.core.admission import TURN_NOTES, TURN_S, name_of
from tun.core.flows import FlowTable, TimeWait
from tun.core.stack import Flow, Stack
from tun.testing.playbook import tuned
from tun.wire.tcp import SYN, build_tcp

ENDPOINT = b"\x0a\x6b\x00\x02"
APP = b"\x0a\x6b\x00\x01"
GUEST = b"\xac\x10\x00\x05"


class Door:
    """A stack, and SYNs at chosen times; what the stack had to say to them."""

    def __init__(self, undecided: int = 80) -> None:
        self.stack = Stack(tuned(undecided=undecided), b"k" * 32)
        self.stack.set_served({ENDPOINT: frozenset((443,))})
        self.stack.set_sources(frozenset((APP,)), [(4, 0xAC100000, 0xFFF00000)])
        self.random = random.Random(1)

    def syn(self, port: int, now: float, *, source: bytes = APP, seq: int = 7, verified: bool = True) -> str:
        """Hand in a SYN. Returns: why it was dropped, or "" when it is a request now."""
        before = dict(self.stack.drops)
        packet = build_tcp(source, ENDPOINT, port, 443, seq=seq, flags=SYN, window=65535)
        if self.stack.next_deadline() <= now:
            self.stack.handle_timeout(now)
        self.stack.handle_packet(bytes(packet), 0, verified, now)
        reasons = [reason for reason, count in self.stack.drops.items() if count != before.get(reason, 0)]
        assert len(reasons) <= 1
        return reasons[0] if reasons else ""

    def flood(self, count: int, now: float, *, source: bytes = APP, verified: bool = True) -> None:
        """So many SYNs of which none comes again."""
        for _ in range(count):
            numbers = self.random.getrandbits(48)
            self.syn(numbers & 0x3FFF | 1, now, source=source, seq=numbers >> 16, verified=verified)

    @property
    def waiting(self) -> int:
        return self.stack.undecided_count

    def decide(self, count: int, now: float) -> None:
        """The oldest get their answer."""
        for flow in list(self.stack._table.own.flows.values())[:count]:
            self.stack.refuse(flow, now)


def test_nobody_is_put_off_while_there_are_places() -> None:
    """Eighty at once, as a load test does: none of them waits for its second try."""
    door = Door(80)

    assert [door.syn(port, 1.0) for port in range(20000, 20080)] == [""] * 80
    assert door.waiting == 80
    assert door.stack.next_deadline() == 4.0  # their silence


def test_under_a_flood_the_second_try_gets_a_place_at_once() -> None:
    """The app's kernel waits a second and sends the same SYN; ten thousand others do not."""
    door = Door()
    door.flood(10_000, 1.0)
    assert door.syn(30000, 1.1) == "first_try"
    door.flood(10_000, 2.0)

    assert door.syn(30000, 2.1) == ""
    assert 30000 in [flow.source[1] for flow in door.stack._table.own.flows.values()]
    assert door.waiting <= 80 // 8 + 1


def test_those_who_wait_give_way_to_those_who_come_again() -> None:
    """All but the first few lose their place without a word, and get it back with their second try."""
    door = Door()
    for port in range(20000, 20080):
        door.syn(port, 1.0)
    (first, *_), last = door.stack.take_requests()[:1], None
    door.flood(1, 1.1)
    assert door.waiting == 10
    assert door.stack.put_off == 70
    assert door.stack.take_replies() == []
    assert [flow.failure for flow in door.stack.take_touched()] == ["put off"] * 70

    last = [door.syn(port, 2.0) for port in range(20000, 20080)]
    assert last == ["duplicate_syn"] * 10 + [""] * 70
    assert first.failure == ""


def test_who_has_come_again_is_not_put_off() -> None:
    """A slow ingress keeps eighty honest apps waiting; the flood that comes then does not take their places."""
    door = Door()
    for now in (1.0, 2.0):
        for port in range(20000, 20080):
            door.syn(port, now)
    door.flood(1000, 2.5)

    assert door.waiting == 80
    assert door.stack.put_off == 0


@pytest.mark.parametrize("gap", [0.0, 0.05, 0.4])
def test_a_second_try_too_soon_is_a_first_one(gap: float) -> None:
    """No kernel is so quick; a flood that sends the same thousand SYNs over and over is."""
    door = Door()
    door.flood(200, 1.0)
    now = 1.0
    while now < 8.0:
        assert door.syn(30000, now) == "first_try"
        door.flood(20, now)
        now += gap or 0.25

    now = 8.0
    assert door.syn(30001, now) == "first_try"
    assert door.syn(30001, now + gap) == "first_try"
    assert door.syn(30001, now + gap + 0.5) == ""


def test_another_number_is_another_try() -> None:
    """Only the same SYN proves that somebody waits for its answer."""
    door = Door()
    door.flood(200, 1.0)

    assert door.syn(30000, 1.5, seq=1) == "first_try"
    assert door.syn(30000, 2.5, seq=2) == "first_try"
    assert door.syn(30000, 3.5, seq=2) == ""


def test_a_slow_flood_is_pressure_too() -> None:
    """Fewer than there are places, more than can be dialled: a newcomer would wait at the end of a queue that grows."""
    door = Door(800)
    now = 1.0
    answers = []
    while now < 8.0:
        door.flood(3, now)
        door.decide(2, now)
        if int(now * 100) % 50 == 0:
            answers.append((door.syn(30000 + int(now * 10), now), door.waiting))
        now += 0.01

    assert max(waiting for _, waiting in answers) < 500
    assert [answer for answer, _ in answers[-3:]] == ["first_try"] * 3
    assert answers[-1][1] <= 100


def test_slow_answers_alone_are_no_pressure() -> None:
    """Sixty wait for an endpoint that hangs, and all mean it: whoever wants another one is not slowed down."""
    door = Door(80)
    for now in (1.0, 2.0, 4.0, 8.0):
        for port in range(20000, 20060):
            door.syn(port, now)

        assert door.syn(30000 + int(now), now + 0.9) == ""
    assert not door.stack._table.own.pressed


def test_few_who_gave_up_are_no_pressure() -> None:
    """They wait unproven, and are forgotten after three seconds."""
    door = Door(80)
    for port in range(20000, 20009):
        door.syn(port, 1.0)

    assert door.syn(30000, 3.5) == ""


def test_pressure_ends_when_nobody_presses() -> None:
    """One turn after the last flood the first try is enough, and nothing is left of what was noted."""
    door = Door()
    door.flood(1000, 1.0)
    own = door.stack._table.own
    pressed = []
    for turn in range(3):
        door.stack.handle_timeout(1.0 + turn * TURN_S)
        pressed.append(own.pressed)

    assert pressed == [True, True, False]
    assert not own._noted
    assert not own._before
    assert door.waiting == 0  # silent for three seconds
    assert door.stack.next_deadline() == float("inf")
    assert door.syn(30000, 8.0) == ""


def test_pressure_ends_when_those_put_off_were_real() -> None:
    """A burst of a thousand programs that start at once: all come again, so there is no flood."""
    door = Door()
    served: set[int] = set()
    for now in (1.0, 2.0, 3.0):
        for port in set(range(20000, 20100)) - served:
            door.syn(port, now)
        served |= {flow.source[1] for flow in door.stack._table.own.flows.values()}
        door.decide(80, now + 0.5)
    assert len(served) == 100

    door.stack.handle_timeout(1.0 + TURN_S)
    assert not door.stack._table.own.pressed


def test_what_is_noted_is_bounded() -> None:
    """However fast they come: a turn ends when its notes are full, and two turns are kept."""
    door = Door()
    own = door.stack._table.own
    door.flood(2000, 1.0)
    for index in range(TURN_NOTES - len(own._noted) - 1000):
        own._noted[index.to_bytes(12, "big")] = 1.0
    for step in range(30):
        door.flood(100, 1.0 + step / 1000)
        assert len(own._noted) <= TURN_NOTES
    assert len(own._before) == TURN_NOTES
    assert own.pressed


def test_a_flood_by_hand_does_not_take_the_places_of_programs() -> None:
    """This host's kernel leaves checksums to the device; who brings his own under our address is a stranger."""
    door = Door()
    door.flood(1000, 1.0, verified=False)

    assert [door.syn(port, 1.1) for port in range(20000, 20040)] == [""] * 40
    assert door.stack._table.others.pressed
    assert not door.stack._table.own.pressed


def test_without_offload_nobody_vouches_and_nobody_is_a_stranger_for_that() -> None:
    """Then the kernel writes checksums itself."""
    stack = Stack(tuned(offload=False), b"k" * 32)
    stack.set_served({ENDPOINT: frozenset((443,))})
    stack.set_sources(frozenset((APP,)), [])
    stack.handle_packet(bytes(build_tcp(APP, ENDPOINT, 1, 443, seq=1, flags=SYN)), 0, False, 1.0)

    (flow,) = stack.take_requests()
    assert flow.local


def test_a_flood_of_guests_does_not_press_this_host() -> None:
    """Each kind has its own pressure."""
    door = Door()
    for index in range(2000):
        door.syn(index + 1, 1.0, source=struct.pack("!I", 0xAC100001 + index))

    assert [door.syn(port, 1.1) for port in range(20000, 20020)] == [""] * 20
    assert door.syn(30000, 1.2, source=GUEST) == "first_try"
    assert door.syn(30000, 2.2, source=GUEST) == "source_limit"  # the few places of strangers are taken
    for flow in list(door.stack._table.others.flows.values()):
        door.stack.refuse(flow, 2.3)
    assert door.syn(30000, 3.2, source=GUEST) == ""


def test_strangers_who_press_are_let_in_slowly() -> None:
    """As patient as a kernel, and each of them would be dialled at once: a hundred a second are."""
    door = Door(undecided=6000)
    door.flood(4100, 1.0, verified=False)
    others = door.stack._table.others
    assert others.pressed
    for flow in list(others.flows.values()):
        door.stack.refuse(flow, 1.0)
    for port in range(20000, 21000):
        door.syn(port, 1.5, verified=False)
    before = door.stack.opened
    for step in range(100):
        now = 2.5 + step / 100
        for port in range(20000, 21000, 10):
            door.syn(port + step % 10, now, verified=False)
        for flow in list(others.flows.values()):
            door.stack.refuse(flow, now)

    assert 100 <= door.stack.opened - before <= 110


def test_a_port_in_time_wait_is_kept_until_it_is_let_in() -> None:
    """The new connection's numbers must lie above the old one's, though the first try was turned away."""
    door = Door()
    stack = door.stack
    assert door.syn(30000, 1.0, seq=100) == ""
    (flow,) = stack.take_requests()
    stack.refuse(flow, 1.0)
    last = flow.snd_nxt = flow.iss + 1_000_000_000  # as after a gigabyte within a second
    stack._table.hold(flow.key, TimeWait(flow, 1.0))
    assert stack.time_wait_count == 1
    door.flood(1000, 1.1)

    assert door.syn(30000, 1.2, seq=5000) == "first_try"
    assert stack.time_wait_count == 1
    assert door.syn(30000, 2.2, seq=5000) == ""
    new = stack.flows[flow.key]
    assert isinstance(new, Flow)
    assert 0 < (new.iss - last) & 0xFFFFFFFF < 0x30000
    assert stack.time_wait_count == 0


def test_names_differ_where_anything_does() -> None:
    """Addresses, ports and number; of either version."""
    key = APP + ENDPOINT + b"\0\1\1\xbb"

    assert name_of(key, 1) == name_of(key, 1 + 2**32)
    assert name_of(key, 1) != name_of(key, 2)
    assert len({len(name_of(bytes(length), 0)) for length in (12, 36)}) == 2


def test_a_table_without_places_for_others() -> None:
    """`limits.undecided = 1` is allowed."""
    table = FlowTable(1)

    assert table.others.judge(b"name", GUEST, False, 1.0) == "first_try"
    assert table.others.judge(b"name", GUEST, False, 2.0) == "source_limit"
    assert table.own.judge(b"name", APP, False, 1.0) == ""
