"""The states of a connection, as a table (RFC 9293 3.3.2, passive side).

The machine changes its state in one place only, by looking up (state, event) here. A pair that is not in the table is
a bug of ours: the lookup raises. What the RFC calls LISTEN is a served port, not a connection; it is a row here so that
the table reads from the first SYN on.

One state is ours: SYN_PENDING. The SYN has come, nothing has been answered, and the owner is finding out whether the
connection can be carried. So an app sees an honest refusal, and an accept that holds.

`FIN` events carry the RFC's meaning: RECEIVE_FIN is a FIN in order (everything before it has arrived); SEND_FIN is our
owner's end, counted when it is queued, not when it is sent: a FIN stuck behind a full window must not look established.
"""

from __future__ import annotations

from typing import Final

# States. Synchronized ones (RFC 9293 3.3.2) are those from ESTABLISHED on; order is used in comparisons.
CLOSED: Final = 0
LISTEN: Final = 1
SYN_PENDING: Final = 2
SYN_RECEIVED: Final = 3
ESTABLISHED: Final = 4
FIN_WAIT_1: Final = 5
FIN_WAIT_2: Final = 6
CLOSE_WAIT: Final = 7
CLOSING: Final = 8
LAST_ACK: Final = 9
TIME_WAIT: Final = 10

STATE_NAMES: Final = (
    "CLOSED",
    "LISTEN",
    "SYN_PENDING",
    "SYN_RECEIVED",
    "ESTABLISHED",
    "FIN_WAIT_1",
    "FIN_WAIT_2",
    "CLOSE_WAIT",
    "CLOSING",
    "LAST_ACK",
    "TIME_WAIT",
)

# Events.
RECEIVE_SYN: Final = 0
ACCEPT: Final = 1
REFUSE: Final = 2
CANCEL: Final = 3
RECEIVE_ACK_OF_SYN: Final = 4
SEND_FIN: Final = 5
RECEIVE_FIN: Final = 6
RECEIVE_ACK_OF_FIN: Final = 7
RECEIVE_RST: Final = 8
ABORT: Final = 9
TIMEOUT: Final = 10

EVENT_NAMES: Final = (
    "RECEIVE_SYN",
    "ACCEPT",
    "REFUSE",
    "CANCEL",
    "RECEIVE_ACK_OF_SYN",
    "SEND_FIN",
    "RECEIVE_FIN",
    "RECEIVE_ACK_OF_FIN",
    "RECEIVE_RST",
    "ABORT",
    "TIMEOUT",
)

EVENT_MEANINGS: Final = (
    "a SYN to a served port, or in TIME_WAIT one that is newer than the old connection",
    "the owner takes the request: SYN-ACK",
    "the owner declines the request: RST",
    "the app gave up: RST, a SYN with another number, or no SYN any more",
    "our SYN is acknowledged",
    "the owner has nothing more to say: FIN after all data (queued, not yet sent)",
    "the app's FIN, everything before it received",
    "our FIN is acknowledged",
    "a RST with exactly the expected number",
    "RST from us: the owner gives up, data came for nobody, or memory is short",
    "no answer for too long, or the time of the state is over",
)

TABLE: Final[dict[tuple[int, int], int]] = {
    (LISTEN, RECEIVE_SYN): SYN_PENDING,
    (SYN_PENDING, ACCEPT): SYN_RECEIVED,
    (SYN_PENDING, REFUSE): CLOSED,
    (SYN_PENDING, CANCEL): CLOSED,
    (SYN_PENDING, ABORT): CLOSED,
    (SYN_RECEIVED, RECEIVE_ACK_OF_SYN): ESTABLISHED,
    (SYN_RECEIVED, RECEIVE_RST): CLOSED,
    (SYN_RECEIVED, ABORT): CLOSED,
    (SYN_RECEIVED, TIMEOUT): CLOSED,
    (ESTABLISHED, SEND_FIN): FIN_WAIT_1,
    (ESTABLISHED, RECEIVE_FIN): CLOSE_WAIT,
    (ESTABLISHED, RECEIVE_RST): CLOSED,
    (ESTABLISHED, ABORT): CLOSED,
    (ESTABLISHED, TIMEOUT): CLOSED,
    (FIN_WAIT_1, RECEIVE_FIN): CLOSING,
    (FIN_WAIT_1, RECEIVE_ACK_OF_FIN): FIN_WAIT_2,
    (FIN_WAIT_1, RECEIVE_RST): CLOSED,
    (FIN_WAIT_1, ABORT): CLOSED,
    (FIN_WAIT_1, TIMEOUT): CLOSED,
    (FIN_WAIT_2, RECEIVE_FIN): TIME_WAIT,
    (FIN_WAIT_2, RECEIVE_RST): CLOSED,
    (FIN_WAIT_2, ABORT): CLOSED,
    (FIN_WAIT_2, TIMEOUT): CLOSED,
    (CLOSE_WAIT, SEND_FIN): LAST_ACK,
    (CLOSE_WAIT, RECEIVE_RST): CLOSED,
    (CLOSE_WAIT, ABORT): CLOSED,
    (CLOSE_WAIT, TIMEOUT): CLOSED,
    (CLOSING, RECEIVE_ACK_OF_FIN): TIME_WAIT,
    (CLOSING, RECEIVE_RST): CLOSED,
    (CLOSING, ABORT): CLOSED,
    (CLOSING, TIMEOUT): CLOSED,
    (LAST_ACK, RECEIVE_ACK_OF_FIN): CLOSED,
    (LAST_ACK, RECEIVE_RST): CLOSED,
    (LAST_ACK, ABORT): CLOSED,
    (LAST_ACK, TIMEOUT): CLOSED,
    (TIME_WAIT, RECEIVE_SYN): SYN_PENDING,
    (TIME_WAIT, TIMEOUT): CLOSED,
}


def move(state: int, event: int) -> int:
    """The state after `event`.

    Raises: KeyError for a pair that cannot happen; that is a bug of the caller, never of the network.
    """
    return TABLE[state, event]


def render_markdown() -> str:
    """The first part of the page docs/tcp-states.md: the table as a diagram and as rows. A test keeps it fresh."""
    lines = [
        "# The states of a connection",
        "",
        "Generated from `tun/core/states.py` and from what the tests say to prove, do not edit:",
        "`python -m tests.tun.rules > docs/tcp-states.md`",
        "",
        "We are always the passive side of RFC 9293 3.3.2: apps connect to us. `SYN_PENDING` is ours: the SYN has come",
        "and nothing is answered until somebody decided whether the connection can be carried. `LISTEN` is a served",
        "port.",
        "",
        "```mermaid",
        "stateDiagram-v2",
        "    [*] --> LISTEN",
    ]
    arrows: dict[tuple[int, int], list[str]] = {}
    for (state, event), after in TABLE.items():
        arrows.setdefault((state, after), []).append(EVENT_NAMES[event])
    for (state, after), events in arrows.items():
        lines.append(f"    {STATE_NAMES[state]} --> {STATE_NAMES[after]}: {', '.join(events)}")
    lines += ["    CLOSED --> [*]", "```", "", "| state | event | next state |", "|---|---|---|"]
    for (state, event), after in TABLE.items():
        lines.append(f"| {STATE_NAMES[state]} | {EVENT_NAMES[event]} | {STATE_NAMES[after]} |")
    lines += ["", "| event | meaning |", "|---|---|"]
    lines += [f"| {name} | {meaning} |" for name, meaning in zip(EVENT_NAMES, EVENT_MEANINGS, strict=True)]
    lines += ["", "A pair that is not listed cannot happen; the machine raises if it does.", ""]
    return "\n".join(lines)
