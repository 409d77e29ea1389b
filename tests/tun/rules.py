"""The rules that our TCP/IP follows, and the tests that prove them.

A test names what it proves: `@pytest.mark.rule(31, 32)` for rules of this file, `@pytest.mark.bug("lwIP 49533")` for
a mistake that another stack has paid for, `@pytest.mark.scenario("tcp_paws_mechanism")` for a scenario of gVisor's
conformance suite packetimpact. This module reads the marks from the sources and makes the page docs/tcp-states.md:

    python -m tests.tun.rules > docs/tcp-states.md

A rule, bug or scenario without a test, a mark for something unknown and a stale page are failures (test_rules.py).
Rules are numbered for ever: a new one goes to the end.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tun.core import states

ROOT: Final = Path(__file__).resolve().parents[2]
PAGE: Final = ROOT / "docs" / "tcp-states.md"
_TESTED_IN: Final = ("tests/tun", "tests/netns", "tests/property", "tests/replay")


@dataclass(frozen=True, slots=True)
class Rule:
    """One thing that we do, in one sentence.

    Attributes:
        about: the part of the stack.
        sources: where it is written; "" for a choice of ours.
    """

    about: str
    statement: str
    sources: str


_R = Rule

RULES: Final[Mapping[int, Rule]] = {
    1: _R(
        "IP",
        "A packet that is short, lies about its lengths or fails its header checksum is dropped without a word; "
        "where the device vouches for a transport checksum it is not looked at again.",
        "RFC 1122 3.2.1",
    ),
    2: _R("IP", "What lies behind the IP length is padding and never data.", "RFC 791 3.1"),
    3: _R(
        "IP",
        "Sources that are no host's, or are ours, get nothing; multicast and strangers' addresses get nothing; "
        "an address of our subnet that nobody has is unreachable at once.",
        "RFC 1122 3.2.1.3",
    ),
    4: _R(
        "IP",
        "A protocol we do not speak is answered: ICMP 3/2, over IPv6 a parameter problem.",
        "RFC 1122 3.2.2.1, 4443 3.4",
    ),
    5: _R(
        "IP",
        "IP options are walked in bounds and ignored, but source routes are refused; IPv6 has at most eight headers, "
        "and what is unknown is treated as it asks; answers carry none.",
        "RFC 1122 3.2.1.8, 8200 4.2",
    ),
    6: _R(
        "IP",
        "Fragments are put together for echo requests alone, in bounded memory and time; an overlap kills its "
        "datagram; all other fragments are dropped.",
        "RFC 791 3.2, 5722",
    ),
    7: _R("IP", "Any time to live will do: we are where the packet was going.", "RFC 1122 3.2.1.7"),
    8: _R("IP", "What we send has DF, identification 0 and a time to live of 64.", "RFC 6864 4"),
    9: _R(
        "ICMP",
        "An echo request to an address of ours comes back unchanged up to the largest size; a damaged one does not.",
        "RFC 1122 3.2.2.6",
    ),
    10: _R(
        "ICMP",
        "UDP that nobody serves is answered with port unreachable, quoting what fits into 576 bytes, or 1280.",
        "RFC 1122 4.1.3.1, 1812 4.3.2.3, 4443 3.1",
    ),
    11: _R(
        "ICMP",
        "No error about an error, about a later fragment, about what was for many or came from nobody; errors "
        "and echo replies have limits of their own.",
        "RFC 1122 3.2.2",
    ),
    12: _R(
        "ICMP",
        "Too big is believed about bytes on the way, never below 536 (IPv6 1280), never upwards; every other error "
        "is soft, source quench is nothing.",
        "RFC 5927 4.1, 6633, 9293 3.9.2.2",
    ),
    13: _R("ICMP", "A packet larger than our MTU is taken as it is.", "RFC 1191 3"),
    14: _R(
        "segment",
        "A TCP header must fit and its checksum must be right, else the segment is dropped and counted, "
        "never answered.",
        "RFC 9293 3.1",
    ),
    15: _R(
        "segment",
        "Options are read in bounds; a bad length ends the options and not the segment; what belongs to a SYN "
        "means nothing elsewhere.",
        "RFC 9293 3.1, 3.2",
    ),
    16: _R("segment", "Reserved and ECN bits change nothing, and are never answered in kind.", "RFC 9293 3.1"),
    17: _R(
        "segment",
        "In a connection nothing counts without ACK; SYN with FIN is dropped; SYN with RST is a RST.",
        "RFC 9293 3.10.7.4",
    ),
    18: _R(
        "no connection",
        "A closed port answers SYN, FIN and data with the RST that is believed, an ACK with a RST of its "
        "number, a RST not at all.",
        "RFC 9293 3.10.7.1",
    ),
    19: _R(
        "no connection",
        "A served port opens on SYN, answers ACK with RST and is silent to all else.",
        "RFC 9293 3.10.7.2",
    ),
    20: _R(
        "no connection",
        "RSTs for strays are limited; a RST that a SYN waits for has a limit that no ordinary client meets.",
        "",
    ),
    21: _R(
        "no connection",
        "What is being removed, and all of us while draining, refuses new connections and keeps the old.",
        "RFC 9293 3.10.7.1",
    ),
    22: _R(
        "handshake",
        "No MSS means the default, 0 is none, small ones count as 48; we send no more than both links take, "
        "less our options.",
        "RFC 9293 3.7.1, 6691",
    ),
    23: _R(
        "handshake", "Windows are scaled only where both offered it, by 14 at most, and never in a SYN.", "RFC 7323 2"
    ),
    24: _R(
        "handshake",
        "SACK and timestamps are agreed to when offered; then every segment but RST is stamped, a missing "
        "stamp is forgiven, and each flow's clock has an offset.",
        "RFC 2018 2, 7323 3.2, 5.4",
    ),
    25: _R(
        "handshake",
        "Initial numbers follow a clock and a keyed hash of the four addresses and ports; after TIME-WAIT the "
        "next lies above the last.",
        "RFC 6528 3",
    ),
    26: _R("handshake", "Data in a SYN is left to be sent again; fast open is not spoken.", "RFC 9293 3.10.7.2"),
    27: _R(
        "handshake",
        "Until the request is decided nothing is said: the same SYN is one request, another number is a new "
        "one, RST or silence cancels it.",
        "RFC 9293 3.10.7.4",
    ),
    28: _R(
        "handshake",
        "SYN-ACK is resent four times and for a repeated SYN; its ACK must be exact, and may bring data and "
        "FIN; a RST must be exact.",
        "RFC 9293 3.10.7.4, 5961 3.2",
    ),
    29: _R(
        "handshake",
        "We never connect, so a SYN-ACK is a stray without a flow and a challenge within one.",
        "RFC 9293 3.10.7.4",
    ),
    30: _R(
        "arrival",
        "A stamp older than the last is answered and dropped, RST excepted, for 24 days; the stamp to echo is "
        "that of the left edge.",
        "RFC 7323 4.3, 5.3, 5.5",
    ),
    31: _R(
        "arrival",
        "A segment must touch the window as it was promised; what lies beyond is cut; a bare FIN is taken at a "
        "closed window; empty ones outside are answered twice a second, data always.",
        "RFC 9293 3.10.7.4",
    ),
    32: _R(
        "arrival",
        "A RST counts at the very next number; in the window it is challenged, elsewhere it is nothing.",
        "RFC 5961 3.2",
    ),
    33: _R("arrival", "A SYN in a connection is challenged, wherever it lies, and changes nothing.", "RFC 5961 4.2"),
    34: _R(
        "arrival", "Challenges are limited for each flow by itself, so that no flow tells of another.", "RFC 5961 7"
    ),
    35: _R(
        "arrival",
        "An ACK of what was not sent is answered and dropped; an old one is no ACK, but its data and FIN count "
        "while it is less than a window old.",
        "RFC 5961 5.2",
    ),
    36: _R(
        "arrival",
        "The newer segment's window counts; one that was taken back stops new bytes and loses none.",
        "RFC 9293 3.8.6, 3.10.7.4",
    ),
    37: _R("arrival", "Urgent bytes are ordinary bytes; the pointer is never followed.", "RFC 6093"),
    38: _R(
        "receive",
        "Bytes come in order, each once; an old segment is acknowledged at once, and reported twice.",
        "RFC 9293 3.10.7.4, 2883 4",
    ),
    39: _R(
        "receive",
        "Bytes beyond a gap wait in at most 64 ranges and three quarters of the buffer, the lowest ones; those "
        "that came first stay.",
        "RFC 9293 3.10.7.4",
    ),
    40: _R("receive", "A FIN counts when all before it is here; nothing follows it.", "RFC 9293 3.10.7.4"),
    41: _R(
        "receive",
        "SACK names the newest range first, three beside a stamp and four without, duplicates before all.",
        "RFC 2018 4, 2883 4",
    ),
    42: _R(
        "receive",
        "One ACK answers a batch, at once unless the flow converses: then it waits 20 ms for the answer. "
        "A keepalive is answered and is no duplicate.",
        "RFC 9293 3.8.6.3",
    ),
    43: _R(
        "receive",
        "The window is the free buffer; its edge never goes back, moves by useful steps, and opens unasked when "
        "it was closed.",
        "RFC 9293 3.8.6",
    ),
    44: _R(
        "receive",
        "A probe of our closed window is answered with the window of now, and its ACK counts.",
        "RFC 9293 3.8.6.1",
    ),
    45: _R(
        "send",
        "Whole segments as large as the device takes, PSH on the last; what exceeds the window is split; silly "
        "windows are not filled; small writes go at once.",
        "RFC 9293 3.8.6.2.1",
    ),
    46: _R(
        "send",
        "A closed window is probed from 250 ms on, doubling to 60 s, as long as somebody answers; a FIN does not "
        "wait for it, and a congestion window does not hold the probe.",
        "RFC 9293 3.8.6.1",
    ),
    47: _R(
        "send",
        "The timer follows the round trip, 250 ms to 60 s, doubles, restarts with progress, measures nothing "
        "resent, and gives up after 100 s.",
        "RFC 6298, 9293 3.8.3",
    ),
    48: _R(
        "send",
        "Three duplicates or SACK say what was lost: that is resent, once; window updates and keepalives are no "
        "duplicates; blocks that cannot be are ignored.",
        "RFC 5681 3.2, 6582, 6675",
    ),
    49: _R(
        "send",
        "Slow start and avoidance by bytes acknowledged; one segment after a timeout; idling costs nothing.",
        "RFC 5681 3.1, 3465",
    ),
    50: _R(
        "send",
        "FIN follows all data and is resent like data; the state says so as soon as it is asked for.",
        "RFC 9293 3.10.4",
    ),
    51: _R("send", "An idle flow is asked after 300 s, and again every 30 s, nine times.", "RFC 9293 3.8.4"),
    52: _R("close", "The app's FIN is acknowledged at once and ends its direction; ours goes on.", "RFC 9293 3.6"),
    53: _R("close", "Our FIN ends our direction; the app's goes on.", "RFC 9293 3.6"),
    54: _R("close", "Who closes second has no TIME-WAIT: the exact ACK of our FIN ends LAST-ACK.", "RFC 9293 3.10.7.4"),
    55: _R("close", "After our FIN was acknowledged data is still taken and acknowledged.", "RFC 9293 3.10.7.4"),
    56: _R("close", "Both FINs at once: CLOSING, and TIME-WAIT with the ACK.", "RFC 9293 3.6"),
    57: _R("close", "A FIN that acknowledges ours leads to TIME-WAIT at once.", "RFC 9293 3.10.7.4"),
    58: _R("close", "FIN-WAIT-2 lasts as long as its owner stays, and 60 s longer.", ""),
    59: _R("close", "Data that nobody will read is answered by RST.", "RFC 1122 4.2.2.13"),
    60: _R("close", "Leaving with unread bytes is a RST and not a FIN; a duplicate is not unread.", "RFC 2525 2.17"),
    61: _R("TIME-WAIT", "The last ACK once more is no news and gets no answer.", "RFC 9293 3.10.7.4"),
    62: _R("TIME-WAIT", "A FIN or data once more is acknowledged, and the time begins anew.", "RFC 9293 3.10.7.4"),
    63: _R("TIME-WAIT", "A RST changes nothing and is not answered.", "RFC 1337 3"),
    64: _R("TIME-WAIT", "A newer SYN, by number or by stamp, opens a connection at once.", "RFC 9293 3.6.1, 6191"),
    65: _R("TIME-WAIT", "Any other SYN is challenged.", "RFC 5961 4.2, 6191"),
    66: _R("TIME-WAIT", "Ten seconds, at most 16,384 records, without buffers.", ""),
    67: _R(
        "close",
        "Ends may cross, repeat, come with data or get lost: each connection ends, with all its bytes.",
        "RFC 9293 3.6",
    ),
    68: _R(
        "device",
        "When the device goes, flows wait for another one; told to end, all end at once.",
        "",
    ),
}


@dataclass(frozen=True, slots=True)
class Deviation:
    """Where we do something else than an RFC asks, knowingly."""

    rules: tuple[int, ...]
    what: str
    reason: str


DEVIATIONS: Final = (
    Deviation(
        (6,),
        "Only echo requests are reassembled (RFC 1122 3.3.2 asks for every datagram).",
        "The kernel on the other side of the link sets DF on TCP and sends UDP only to ports that refuse it. A general "
        "reassembler would be attack surface without a user.",
    ),
    Deviation(
        (37,),
        "The urgent pointer is ignored (RFC 9293 3.8.5 keeps the mechanism).",
        "RFC 6093 advises against its use, the streams behind us cannot carry it, and in-line bytes lose nothing.",
    ),
    Deviation(
        (45, 47, 49),
        "The first congestion window is 256 KiB, the least timeout 250 ms, a doubled one is cut to four times after "
        "progress, and there is no Nagle (RFC 5681, 6298, 6928, 9293 3.7.4).",
        "The link is a queue in this machine with a round trip of microseconds: what the small values protect does not "
        "exist. Writes are records of TLS already. A window that somebody narrows still ends in slow start.",
    ),
    Deviation(
        (66,),
        "TIME-WAIT lasts 10 s (RFC 9293 3.6.1: two MSL, minutes).",
        "No segment can live longer in one queue of this machine, and apps come back to the same port within seconds.",
    ),
    Deviation(
        (68,),
        "Flows outlive their device when the owner puts another in its place (a link that goes usually resets them).",
        "An interface that somebody deleted is made anew within a second; what was lost with it is resent.",
    ),
)

# What other stacks got wrong: each mistake in our words, under the name that it has there.
BUGS: Final[Mapping[str, str]] = {
    "smoltcp 25d4f7c5": "SACK ranges overflowed near the largest number",
    "smoltcp 43697943": "an MSS of 0, or of a few bytes, stopped or multiplied segments",
    "smoltcp 16100ffb": "options were not taken off the MSS",
    "smoltcp 9d532a7b": "answers to old data were limited, or data outside the window got none",
    "smoltcp 816a4f96": "a duplicate ACK disturbed LAST-ACK",
    "smoltcp f56ed8b4": "bytes beyond the window were taken",
    "smoltcp bde1a1ee": "the FIN of a segment that overlapped was lost",
    "smoltcp 284a2c97": "a FIN at a closed window was refused for ever",
    "smoltcp 6acc2b47": "segments that overlapped on the left were refused",
    "smoltcp cce9ae77": "window updates counted as duplicate ACKs",
    "smoltcp ddc495ba": "a closed window was never probed",
    "smoltcp 521e722b": "the congestion window held back probes",
    "smoltcp b38faa58": "the FIN was not resent in CLOSING",
    "smoltcp f09883d4": "an ACK of the first sending was refused after a resending",
    "smoltcp 9b9f60b5": "the timer did not back off",
    "smoltcp 13774ff2": "the timer did not restart with progress",
    "smoltcp a25c9f2f": "the timer stopped though bytes were on the way",
    "smoltcp 0d304bc4": "a delayed ACK was put off again and again",
    "smoltcp fe179c91": "the window update waited for other news",
    "smoltcp c573e9b3": "a RST to a listener was not ignored",
    "smoltcp f95b0bf6": "an ACK one too low in SYN-RECEIVED moved the state or underflowed",
    "smoltcp 78fb02ac": "the largest initial number overflowed",
    "smoltcp e798dfdd": "a window that shrank underflowed",
    "smoltcp 24f94d24": "any ACK ended LAST-ACK",
    "smoltcp 2219af77": "closing at the same time went wrong",
    "smoltcp 2080152b": "data was sent beyond the peer's window",
    "smoltcp 65e58931": "data in FIN-WAIT-2 was not acknowledged",
    "smoltcp 52e087e4": "initial numbers could be guessed",
    "smoltcp eae48052": "an invalid packet ended a connection",
    "smoltcp f6a73807": "challenges had no limit",
    "smoltcp f3a64e08": "the congestion window held back the fast retransmission",
    "gVisor bcb259a28": "a FIN behind a full window left the state at ESTABLISHED for ever",
    "gVisor 91a283f8f": "an empty probe was not answered",
    "gVisor 7ea2dcbae": "window updates were silly",
    "gVisor 3aa77e9f0": "options larger than the MSS made payloads negative",
    "gVisor 03f17c7d9": "data and FIN on the last ACK of the handshake were lost",
    "gVisor 45835a60f": "the RST in SYN-RECEIVED had the wrong number",
    "gVisor 484ef1208": "any RST in the window was believed",
    "gVisor 77dc0f5bc": "a RST to a listener was answered",
    "gVisor 1727a24b2": "a reset in the middle met freed buffers",
    "gVisor f3de211bb": "recovery did not look at the peer's window",
    "lwIP 48170": "a RST could be forged",
    "lwIP 50837": "a window that closed with bytes queued started no timer",
    "lwIP 49533": "a window smaller than the next segment started no timer",
    "lwIP 51937": "a passive close with unacknowledged data leaked the connection",
    "lwIP 36210": "a keepalive got no ACK",
    "lwIP 37969": "a SYN without options was too short for it",
    "lwIP 39898": "a timer came due for ever at the same moment",
    "lwIP 47485": "closing failed when memory was short",
    "lwIP 45559": "scaling cut the window off",
    "lwIP 9989": "bytes out of order had no bound",
    "lwIP tcp_kill_prio": "when memory was short nobody gave way",
    "Tailscale 04d24cdbd": "the end of one direction ended both",
    "Tailscale 7429e8912": "a repeated SYN leaked a count",
    "Tailscale c5abbcd4b": "attempts that were given up were dialled on without end",
    "Tailscale ca39c4e15": "TIME-WAIT kept buffers",
    "Tailscale 8e42510a7": "a second way out did not know of segments that the device cuts",
    "Tailscale 31cdbd68b": "a buffer was too small for the largest packets",
    "Tailscale b0e63cbeb": "dead flows piled up without keepalive",
    "wireguard-go 052af4a": "a wrong mask took fragments for whole packets",
    "passt keepalive": "keepalives counted as duplicate ACKs",
    "gvisor-tap-vsock 7dd9c904": "a request that failed was never completed and kept its place",
    "zephyr 90086": "a refusal with the wrong number let Linux hang",
}

# gVisor's packetimpact, as far as the passive side of a stack can show it.
SCENARIOS: Final[Mapping[str, str]] = {
    "icmpv6_param_problem": "an unknown next header is told where it stands",
    "ipv6_fragment_icmp_error": "an echo whose fragments do not all come is told",
    "ipv6_unknown_options_action": "unknown options are skipped, dropped or told of, as they ask",
    "fin_wait2_timeout": "FIN-WAIT-2 ends 60 s after its owner left, and only then",
    "ipv4_fragment_reassembly": "fragments in order, out of order, doubled, contained and overlapping",
    "ipv4_id_uniqueness": "a resent segment needs no new identification, since it cannot be fragmented",
    "tcp_acceptable_ack_syn_rcvd": "ACKs of the SYN-ACK around the right number",
    "tcp_connect_icmp_error": "errors of all codes about a connection do not end it",
    "tcp_cork_mss": "bytes are sent in whole segments and a rest",
    "tcp_fin_retransmission": "a FIN that is not acknowledged comes again",
    "tcp_handshake_window_size": "windows in the handshake are counted unscaled",
    "tcp_linger": "leaving gracefully, with unread bytes, and at once",
    "tcp_listen_backlog": "SYNs beyond the limit are dropped until there is room",
    "tcp_noaccept_close_rst": "an end before the decision is a refusal",
    "tcp_outside_the_window": "all kinds of segments at and beyond the right edge",
    "tcp_ack_otw_seq_in_closing": "the same in CLOSING",
    "tcp_paws_mechanism": "older stamps are acknowledged and dropped",
    "tcp_rcv_buf_space": "what is not read fills the buffer and closes the window",
    "tcp_retransmits": "timeouts double",
    "tcp_send_window_sizes_piggyback": "windows one byte less than a segment, equal, one more",
    "tcp_synrcvd_reset": "after a RST in SYN-RECEIVED an ACK gets RST",
    "tcp_timewait_reset": "a RST in TIME-WAIT",
    "tcp_unacc_seq_ack": "unacceptable numbers and ACKs in all states of closing",
    "tcp_user_timeout": "silence ends a connection with bytes on the way",
    "tcp_window_shrink": "a window that was taken back",
    "tcp_zero_receive_window": "payloads of any size end in a window of 0",
    "tcp_zero_to_nonzero_window_update": "reading opens the window unasked",
    "tcp_zero_window_probe": "no probe without data, at the last byte, and recovery when the window opens",
    "tcp_zero_window_probe_retransmit": "gaps between probes double",
    "tcp_zero_window_probe_usertimeout": "probes that nobody answers end the connection",
}

# What has been looked at and cannot happen to us, and why.
NOT_OURS: Final[Mapping[str, str]] = {
    "gVisor 368fc605d (a RST while switching to SYN cookies), tcp_syncookie": "there are no SYN cookies: what is "
    "scarce is dials, and these are bounded (ADR 2)",
    "gVisor 5f8c66e26 (CUBIC shrank the window), tcp_rack": "congestion control is NewReno; loss is told by "
    "duplicates, SACK and time",
    "wireguard-go aad7fca (packets with IP options were joined)": "the kernel joins segments, we never do",
    "Tailscale 2f27319ba (a data race where packets were joined)": "one loop does all of it",
    "tcp_queue_send_recv_in_syn_sent, simultaneous open": "we never connect",
    "icmpv4_socket, icmpv6_socket, udp_*": "sockets of a kernel; what we answer to echo and UDP is in rules 9 to 11",
}


@dataclass(frozen=True, slots=True)
class Marked:
    """A test and what it says to prove."""

    module: str
    name: str
    rules: tuple[int, ...]
    bugs: tuple[str, ...]
    scenarios: tuple[str, ...]


def marked_tests() -> Iterator[Marked]:
    """All tests with marks of ours, read from the sources: nothing is imported, and no test need run."""
    for folder in _TESTED_IN:
        for path in sorted((ROOT / folder).glob("test_*.py")):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                    found: dict[str, list[object]] = {"rule": [], "bug": [], "scenario": []}
                    for mark in node.decorator_list:
                        if isinstance(mark, ast.Call) and isinstance(mark.func, ast.Attribute):
                            found.get(mark.func.attr, []).extend(ast.literal_eval(a) for a in _arguments(mark))
                    rules = tuple(value for value in found["rule"] if isinstance(value, int))
                    bugs = tuple(str(value) for value in found["bug"])
                    scenarios = tuple(str(value) for value in found["scenario"])
                    if rules or bugs or scenarios:
                        yield Marked(path.stem, node.name, rules, bugs, scenarios)


def _arguments(mark: ast.Call) -> list[ast.expr]:
    return mark.args if isinstance(mark.func, ast.Attribute) and mark.func.attr in ("rule", "bug", "scenario") else []


def _cell(tests: list[Marked]) -> str:
    """Tests grouped by their files."""
    modules: dict[str, list[str]] = {}
    for test in tests:
        modules.setdefault(test.module.removeprefix("test_"), []).append(test.name.removeprefix("test_"))
    return "; ".join(f"**{module}**: {', '.join(f'`{name}`' for name in names)}" for module, names in modules.items())


def render_page() -> str:
    """The page docs/tcp-states.md, complete."""
    tests = list(marked_tests())
    lines = [
        states.render_markdown().rstrip("\n"),
        "",
        "# The rules, and the tests that prove them",
        "",
        "A test is named by its file and its name, both without `test_`.",
        "",
        "| rule | about | what we do | source | tests |",
        "|---|---|---|---|---|",
    ]
    for number, rule in RULES.items():
        proofs = _cell([test for test in tests if number in test.rules])
        lines.append(f"| {number} | {rule.about} | {rule.statement} | {rule.sources or 'ours'} | {proofs} |")
    lines += ["", "# Deviations", "", "| rule | where we differ | why |", "|---|---|---|"]
    lines += [f"| {', '.join(map(str, d.rules))} | {d.what} | {d.reason} |" for d in DEVIATIONS]
    lines += ["", "# What other stacks paid for", "", "| where | what was wrong | tests |", "|---|---|---|"]
    lines += [f"| {key} | {what} | {_cell([t for t in tests if key in t.bugs])} |" for key, what in BUGS.items()]
    lines += ["", "# Scenarios of packetimpact", "", "| scenario | what happens | tests |", "|---|---|---|"]
    for key, what in SCENARIOS.items():
        lines.append(f"| {key} | {what} | {_cell([t for t in tests if key in t.scenarios])} |")
    lines += ["", "# What cannot happen to us", "", "| mistake or scenario | why |", "|---|---|"]
    lines += [f"| {key} | {why} |" for key, why in NOT_OURS.items()]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.stdout.write(render_page())
