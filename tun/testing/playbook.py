"""TCP tests as network engineers write them: a script in tcpdump's words, played against a real `Stack`.

    app > S  0:0(0)        win 64240 mss 1460 wscale 7      a packet from the app
    us  | request 10.107.0.2:443                            something the owner does, or must see
    us  | accept
    app < S. 0:0(0) ack 1  mss 1460 wscale 8                a packet that we must send now, and no other
    app > .  1:1(0) ack 1
    app > P. 1:6(5) ack 1  "hello"
    app < .  1:1(0) ack 6
    +31.0s                                                  time passes, and every deadline in it

Numbers count from the initial ones: the SYN of either side is 0, the first byte 1. A line that the app sends is
followed by whatever the stack answers; each answer needs its own `app <` line, in order, so silence is tested too: by
writing nothing. A time at the beginning or the end of a line (`+0.5s`) passes before the line; timers go off at their
exact moments on the way.

Flags: S F R P . (ACK) U. Fields of a packet, in any order after the range: `ack N`, `win N` (as on the wire), `mss N`,
`wscale N`, `sackOK`, `ts VALUE ecr ECHO`, `sack L:R L:R`, `gso N`, "payload" or nothing (then the payload is a pattern
by position). What an `app <` line does not name is not compared, except: flags, range, ack, sack and payload always are
(a payload not written is the pattern, which `write N` sends).

The owner does: `request A:P`, `accept`, `refuse`, `read "text"` or `read N`, `write N` or `write "text"`, `finish`,
`release`, `abort`, `full` / `free` (the device takes nothing / takes again), `serve PORT...`, `draining`, `new N` (what
follows is another connection from the same port, whose SYN has the number N). The owner sees: `flow STATE`,
`failure WORD`, `closed`, `open`, `finished`, `delivered`, `readable N`, `space N`, `drops REASON N`, `none` (that is:
no request).

The same script can be played over IPv6: then addresses are the IPv6 ones below, on a link whose MTU is larger by what
the headers are, so that every size stays what it is.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from tun.core.stack import Flow, Stack, StackSettings, initial_numbers
from tun.core.states import STATE_NAMES
from tun.seq import MASK, unwrap
from tun.wire import verdict
from tun.wire.checksum import complete, sum16
from tun.wire.icmpv6 import verify_icmpv6
from tun.wire.ipv4 import PROTOCOL_ICMP, PROTOCOL_TCP, Ipv4Header, parse_ipv4
from tun.wire.ipv6 import PROTOCOL_ICMPV6, Ipv6Header, parse_ipv6
from tun.wire.tcp import ACK, FIN, PSH, RST, SYN, URG, Segment, build_tcp, options, parse_tcp, verify_tcp

APP = b"\x0a\x6b\x00\x01"
ENDPOINT = b"\x0a\x6b\x00\x02"
APP6 = b"\xfd\x6b" + bytes(13) + b"\1"
ENDPOINT6 = b"\xfd\x6b" + bytes(13) + b"\2"

_SECRET = b"playbook" * 4

# Handshakes to begin with: plain, with SACK, and with timestamps and SACK (the app's first value is 1000).
OPEN = """
    app > S  0:0(0)        win 65535 mss 1460 wscale 7
    us  | request 10.107.0.2:443
    us  | accept
    app < S. 0:0(0) ack 1  win 65535 mss 1460 wscale 8
    app > .  1:1(0) ack 1  win 512
"""
OPEN_SACK = OPEN.replace("mss 1460", "mss 1460 sackOK")
OPEN_STAMPS = """
    app > S  0:0(0)        win 65535 mss 1460 sackOK ts 1000 ecr 0 wscale 7
    us  | request 10.107.0.2:443
    us  | accept
    app < S. 0:0(0) ack 1  win 65535 mss 1460 sackOK ecr 1000 wscale 8
    app > .  1:1(0) ack 1  win 512 ts 1000 ecr 1
"""
_LETTERS = (("S", SYN), ("F", FIN), ("R", RST), ("P", PSH), (".", ACK), ("U", URG))
_TIME = re.compile(r"(?:^|\s)\+(\d+(?:\.\d+)?)s(?=\s|$)")
_PACKET = re.compile(r"^app ([<>]) ([SFRPU.]+|none)\s+(-?\d+):(-?\d+)\((\d+)\)(.*)$")
_ICMP = re.compile(r"^app < icmp (.*)$")


def pattern(position: int, count: int) -> bytes:
    """The bytes [position, position + count) of the stream that scripts send where they write no text."""
    return bytes((index * 7 + (index >> 8) * 13) & 0xFF for index in range(position, position + count))


class ScriptError(AssertionError):
    """A line of a script that cannot be understood."""


class PlaybookMismatch(AssertionError):  # noqa: N818 - it says what happened
    """The stack did something else than the script says; the message is an aligned diff."""


class Playbook:
    """One app, one endpoint, one stack and a clock.

    Attributes:
        stack, flow, now: for tests that look deeper.
        app, endpoint: the two addresses.
        ip_header: the size of an IP header, bytes.
        packets: everything the stack has sent, complete, in order.
    """

    def __init__(
        self,
        *,
        settings: StackSettings | None = None,
        app_initial: int = 0,
        our_initial: int | None = None,
        app_port: int = 40000,
        port: int = 443,
        start: float = 100.0,
        verified: bool = True,
        version: int = 4,
    ) -> None:
        settings = settings or StackSettings()
        self.version = version
        self.app, self.endpoint = (APP, ENDPOINT) if version == 4 else (APP6, ENDPOINT6)
        self.ip_header = 20 if version == 4 else 40
        if version == 6:
            mtu = min(settings.mtu + 20, 65535)
            settings = replace(settings, mtu=mtu, gateway6=APP6, network6=0xFD6B << 112, mask6=0xFFFF << 112)
        self.stack = Stack(settings, _SECRET)
        self.stack.set_served({self.endpoint: frozenset((port,))})
        if our_initial is not None:
            # Our numbers follow the clock, so the clock starts where it gives the wanted one.
            key = self.app + self.endpoint + app_port.to_bytes(2, "big") + port.to_bytes(2, "big")
            ticks = (our_initial - initial_numbers(_SECRET, key, 0.0)[0]) & MASK
            start = (ticks + 0.5) / 250000.0
        self.now = start
        self.port = port
        self.app_port = app_port
        self.app_initial = app_initial
        self.flow: Flow | None = None
        self.requests: list[Flow] = []
        self.sent_by_owner = bytearray()
        self.pattern_sent = True
        self.full = False
        self.verified = verified
        self.packets: list[bytes] = []
        self._outputs: list[str] = []
        self._pending: dict[Flow, None] = {}
        self._header = Ipv4Header()
        self._header6 = Ipv6Header()
        self._segment = Segment()

    # -- the script ---------------------------------------------------------------------------------------------------

    def play(self, script: str) -> Playbook:
        """Play a script to its end.

        Raises: PlaybookMismatch with both scripts side by side.
        """
        expected: list[str] = []
        actual: list[str] = []
        for raw in script.strip().splitlines():
            line = raw.split("  #")[0].strip()
            if not line or line.startswith("#"):
                continue
            times = [float(text) for text in _TIME.findall(line)]
            line = _TIME.sub("", line).strip()
            self._pass(sum(times))
            if line.startswith("app <"):
                wanted = _normalise(line)
                expected.append(wanted)
                actual.append(self._next_output(wanted))
                continue
            self._leftover(expected, actual)
            if not line:
                continue
            shown = " ".join(line.split())
            expected.append(shown)
            if line.startswith("app >"):
                actual.append(shown)
                self._app_sends(line)
            elif line.startswith("us"):
                actual.append(self._owner(line, shown))
            else:
                raise ScriptError(f"what is {line!r}?")
            self._serve()
        self._leftover(expected, actual)
        if expected != actual:
            raise PlaybookMismatch(_diff(expected, actual))
        return self

    def _leftover(self, expected: list[str], actual: list[str]) -> None:
        """What was sent and not asked for."""
        for output in self._outputs:
            expected.append("")
            actual.append("app < " + output)
        self._outputs.clear()

    def _next_output(self, wanted: str) -> str:
        if not self._outputs:
            return ""
        return _matching(wanted, "app < " + self._outputs.pop(0))

    # -- time ---------------------------------------------------------------------------------------------------------

    def _pass(self, seconds: float) -> None:
        if seconds <= 0:
            return
        end = self.now + seconds
        while True:
            deadline = self.stack.next_deadline()
            if deadline > end + 1e-6:  # sums of decimal fractions
                break
            self.now = max(deadline, self.now)
            self.stack.handle_timeout(self.now)
            self._serve()
        self.now = max(end, self.now)

    # -- the app ------------------------------------------------------------------------------------------------------

    def _app_sends(self, line: str) -> None:
        match = _PACKET.match(line)
        if match is None:
            raise ScriptError(f"what packet is {line!r}?")
        _, letters, first, last, count, rest = match.groups()
        flags = 0
        for letter, flag in _LETTERS:
            if letter in letters and letters != "none":
                flags |= flag
        position, length = int(first), int(count)
        if int(last) - position != length:
            raise ScriptError(f"{first}:{last} is not {length} bytes")
        fields = _fields(rest)
        payload = fields.text if fields.text is not None else pattern(position, length)
        if len(payload) != length:
            raise ScriptError(f"the text is {len(payload)} bytes, the range {length}")
        ours = self._our_initial()
        packet = build_tcp(
            self.app,
            self.endpoint,
            self.app_port,
            self.port,
            seq=(self.app_initial + position) & MASK,
            ack=(ours + fields.ack) & MASK if fields.ack is not None else 0,
            flags=flags,
            window=fields.window if fields.window is not None else 65535,
            options=options(
                mss=fields.mss,
                window_scale=fields.wscale,
                sack_permitted=fields.sack_ok,
                timestamp=fields.timestamp,
                sacks=[((ours + left) & MASK, (ours + right) & MASK) for left, right in fields.sacks],
            ),
            payload=payload,
        )
        self.stack.handle_packet(bytes(packet), 0, self.verified, self.now)
        self._take_requests()

    def _our_initial(self) -> int:
        return self.flow.iss if self.flow is not None else 0

    def _take_requests(self) -> None:
        for flow in self.stack.take_requests():
            self.requests.append(flow)
            self.flow = flow
            self.sent_by_owner.clear()
            self.pattern_sent = True

    # -- the owner ----------------------------------------------------------------------------------------------------

    def _owner(self, line: str, shown: str) -> str:
        """Do what the line says; return the line as it is true."""
        words = line.split("|", 1)[1].split()
        verb, arguments = words[0], words[1:]
        rest = line.split(verb, 1)[1].strip()
        if verb == "serve":
            self.stack.set_served({self.endpoint: frozenset(int(word) for word in arguments)})
            return shown
        if verb == "draining":
            self.stack.set_draining(True)
            return shown
        if verb == "drops":
            return f"us | drops {arguments[0]} {self.stack.drops.get(arguments[0], 0)}"
        if verb == "full":
            self.full = True
            return shown
        if verb == "free":
            self.full = False
            return shown
        if verb == "new":
            self.flow = None
            self.app_initial = int(arguments[0]) if arguments else self.app_initial
            return shown
        if verb == "request":
            if not self.requests:
                return "us | (no request)"
            flow = self.requests.pop(0)
            address = ENDPOINT if flow.destination[0] == self.endpoint else flow.destination[0]
            return f"us | request {'.'.join(map(str, address))}:{flow.destination[1]}"
        if verb == "none":
            return "us | request" if self.requests else shown
        flow_or_none = self.flow
        if flow_or_none is None:
            raise ScriptError(f"no flow yet for {line!r}")
        return self._flow_command(flow_or_none, verb, arguments, rest, shown)

    def _flow_command(self, flow: Flow, verb: str, arguments: Sequence[str], rest: str, shown: str) -> str:
        now = self.now
        if verb == "accept":
            self.stack.accept(flow, now)
        elif verb == "refuse":
            self.stack.refuse(flow, now)
        elif verb == "read":
            wanted = _text(rest) if rest.startswith('"') else None
            count = len(wanted) if wanted is not None else int(arguments[0])
            waiting = b"".join(flow.readable_views())[:count]
            if wanted is not None and waiting != wanted:
                return f"us | read {waiting!r}"
            if wanted is None and (len(waiting) != count or waiting != pattern(self._read_at(flow), count)):
                return f"us | read {len(waiting)} of {flow.readable_bytes}: {waiting[:20]!r}"
            flow.consume(count, now)
        elif verb == "write":
            data = _text(rest) if rest.startswith('"') else pattern(1 + len(self.sent_by_owner), int(arguments[0]))
            taken = flow.write(memoryview(data), now)
            self.sent_by_owner += data[:taken]
            if taken != len(data):
                return f"us | write {taken}"
        elif verb == "finish":
            flow.finish(now)
        elif verb == "release":
            flow.release(now)
        elif verb == "abort":
            flow.abort(now)
        elif verb == "flow":
            return f"us | flow {STATE_NAMES[flow.state]}"
        elif verb == "failure":
            return f"us | failure {flow.failure or 'none'}"
        elif verb == "closed":
            return shown if flow.closed else "us | open"
        elif verb == "open":
            return "us | closed" if flow.closed else shown
        elif verb == "finished":
            return shown if flow.app_finished else "us | unfinished"
        elif verb == "readable":
            return f"us | readable {flow.readable_bytes}"
        elif verb == "space":
            return f"us | space {flow.send_space}"
        elif verb == "delivered":
            return shown if flow.all_acknowledged else "us | undelivered"
        else:
            raise ScriptError(f"what shall we {verb}?")
        self._pending[flow] = None
        return shown

    def _read_at(self, flow: Flow) -> int:
        """The position (from the SYN) of the first byte that waits."""
        return flow.bytes_from_app - flow.readable_bytes + 1

    # -- the stack's output -------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        """One round of the shell: flush what is touched, write the replies."""
        self._take_requests()
        for flow in self.stack.take_touched():
            self._pending[flow] = None
        for flow in list(self._pending):
            if self.stack.flush(flow, self._write, self.now):
                del self._pending[flow]
        for packet in self.stack.take_replies():
            self._record(bytes(packet), 0)
        for flow in self.stack.take_touched():  # what a flush itself has ended
            self._pending[flow] = None

    def _write(self, header: bytearray | memoryview, views: Sequence[bytes | memoryview], gso_size: int) -> bool:
        if self.full:
            return False
        copy = bytearray(header)
        pieces = [bytes(view) for view in views]
        complete(copy, self.ip_header, self.ip_header + 16, pieces)
        self._record(bytes(copy) + b"".join(pieces), gso_size)
        return True

    def _record(self, packet: bytes, gso_size: int) -> None:
        self.packets.append(packet)
        segment = self._segment
        start, protocol, source, destination = self._open(packet)
        if protocol in (PROTOCOL_ICMP, PROTOCOL_ICMPV6):
            if protocol == PROTOCOL_ICMP:
                good = sum16(packet[20:]) == 0xFFFF
            else:
                good = verify_icmpv6(packet, 40, len(packet), source, destination)
            if not good:
                raise AssertionError("a bad ICMP checksum")
            self._outputs.append(f"icmp {packet[start]}/{packet[start + 1]}")
            return
        if protocol != PROTOCOL_TCP or parse_tcp(packet, start, len(packet), segment) != verdict.OK:
            raise AssertionError(f"not a TCP segment: {packet[:40].hex()}")
        if not verify_tcp(packet, start, len(packet), source, destination):
            raise AssertionError("a bad TCP checksum")
        self._outputs.append(self._describe(packet, segment, gso_size))

    def _open(self, packet: bytes) -> tuple[int, int, bytes, bytes]:
        """Where the transport header is, which one, and between whom. Raises AssertionError about the IP header."""
        if self.version == 4:
            header = self._header
            if parse_ipv4(packet, 0, header) != verdict.OK or header.total_length != len(packet):
                raise AssertionError(f"a bad IPv4 header: {packet[:40].hex()}")
            return 20, header.protocol, header.source, header.destination
        header6 = self._header6
        if parse_ipv6(packet, 0, header6) != verdict.OK or header6.total_length != len(packet):
            raise AssertionError(f"a bad IPv6 header: {packet[:60].hex()}")
        return 40, packet[6], header6.source, header6.destination

    def _describe(self, packet: bytes, segment: Segment, gso_size: int) -> str:
        flow = self.flow
        near = flow.snd_nxt if flow is not None else 0
        stateless = segment.flags & RST and not segment.flags & ACK
        seq = unwrap(segment.seq, near) - self._our_initial()
        if segment.flags == RST | ACK and segment.seq == 0:
            seq = 0  # the form for "no connection"
        elif stateless and flow is None:
            seq = segment.seq
        length = segment.data_end - segment.data_start
        letters = "".join(letter for letter, flag in _LETTERS if segment.flags & flag) or "none"
        parts = [f"{letters} {seq}:{seq + length}({length})"]
        if segment.flags & ACK:
            near_ack = flow.rcv_nxt if flow is not None else self.app_initial
            parts.append(f"ack {unwrap(segment.ack, near_ack) - self.app_initial}")
        parts.append(f"win {segment.window}")
        if segment.mss >= 0:
            parts.append(f"mss {segment.mss}")
        if segment.window_scale >= 0:
            parts.append(f"wscale {segment.window_scale}")
        if segment.sack_permitted:
            parts.append("sackOK")
        if segment.has_timestamp:
            parts.append(f"ecr {segment.ts_echo}")
        if segment.sack_count:
            base = flow.rcv_nxt if flow is not None else 0
            blocks = [
                f"{unwrap(segment.sacks[2 * index], base) - self.app_initial}:"
                f"{unwrap(segment.sacks[2 * index + 1], base) - self.app_initial}"
                for index in range(segment.sack_count)
            ]
            parts.append("sack " + " ".join(blocks))
        if gso_size:
            parts.append(f"gso {gso_size}")
        payload = packet[segment.data_start : segment.data_end]
        if payload:
            given = bytes(self.sent_by_owner[seq - 1 : seq - 1 + length])
            if payload != given:
                parts.append(f"WRONG {payload[:40]!r}")
            elif given != pattern(seq, length):
                parts.append('"' + payload.decode("latin-1") + '"')
        return " ".join(parts)


class _Fields:
    """The fields behind a packet's range."""

    def __init__(self) -> None:
        self.ack: int | None = None
        self.window: int | None = None
        self.mss = -1
        self.wscale = -1
        self.sack_ok = False
        self.timestamp: tuple[int, int] | None = None
        self.sacks: list[tuple[int, int]] = []
        self.gso = 0
        self.text: bytes | None = None


def _text(rest: str) -> bytes:
    return rest[rest.index('"') + 1 : rest.rindex('"')].encode("latin-1")


def _fields(rest: str) -> _Fields:
    fields = _Fields()
    if '"' in rest:
        fields.text = _text(rest)
        rest = rest[: rest.index('"')]
    words = rest.split()
    readers: dict[str, Callable[[str], None]] = {
        "ack": lambda word: setattr(fields, "ack", int(word)),
        "win": lambda word: setattr(fields, "window", int(word)),
        "mss": lambda word: setattr(fields, "mss", int(word)),
        "wscale": lambda word: setattr(fields, "wscale", int(word)),
        "gso": lambda word: setattr(fields, "gso", int(word)),
        "ts": lambda word: setattr(fields, "timestamp", (int(word), 0)),
        "ecr": lambda word: setattr(fields, "timestamp", (fields.timestamp[0] if fields.timestamp else 0, int(word))),
    }
    index = 0
    while index < len(words):
        word = words[index]
        index += 1
        if word == "sackOK":
            fields.sack_ok = True
        elif word == "sack":
            while index < len(words) and ":" in words[index]:
                left, right = words[index].split(":")
                fields.sacks.append((int(left), int(right)))
                index += 1
        elif word in readers:
            readers[word](words[index])
            index += 1
        else:
            raise ScriptError(f"what field is {word!r}?")
    return fields


def _normalise(line: str) -> str:
    return " ".join(line.split())


def _matching(wanted: str, actual: str) -> str:
    """`wanted` itself where it agrees with `actual`, so that fields it does not name do not show as differences."""
    if wanted == actual:
        return wanted
    want, got = _PACKET.match(wanted), _PACKET.match(actual)
    if want is None or got is None or want.group(2, 3, 4, 5) != got.group(2, 3, 4, 5):
        return actual
    try:
        asked, found = _fields(want.group(6)), _fields(got.group(6))
    except ScriptError:
        return actual
    same = asked.ack == found.ack and asked.sacks == found.sacks
    same = same and (asked.text is None or asked.text == found.text) and (asked.text is not None or found.text is None)
    for name in ("window", "mss", "wscale", "gso"):
        value = getattr(asked, name)
        if value is not None and value not in (-1, 0, getattr(found, name)):
            same = False
    if asked.window == 0 and found.window != 0:
        same = False
    if asked.sack_ok and not found.sack_ok:
        same = False
    if asked.timestamp is not None and (found.timestamp is None or asked.timestamp[1] != found.timestamp[1]):
        same = False
    return wanted if same else actual


def _diff(expected: Sequence[str], actual: Sequence[str]) -> str:
    lines = ["the stack did something else (- expected, + actual):", ""]
    lines += [line for line in difflib.ndiff(list(expected), list(actual)) if not line.startswith("?") and line.strip()]
    return "\n".join(lines)


def tuned(**changes: bool | float) -> StackSettings:
    """Settings with some values changed."""
    return replace(StackSettings(), **changes)  # type: ignore[arg-type]  # names and types are the caller's care


def play(script: str, *, begin: str = "", **keywords: Any) -> Playbook:
    """Play a script against a fresh stack.

    Args:
        begin: a handshake to play first, such as OPEN.
        keywords: for `Playbook`.
    """
    book = Playbook(**keywords)
    if begin:
        book.play(begin)
    return book.play(script)


Play = Callable[..., Playbook]
