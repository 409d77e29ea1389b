"""The table of states: total where it must be, and equal to the page that shows it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tun.core import states
from tun.core.states import CLOSED, EVENT_MEANINGS, EVENT_NAMES, LISTEN, STATE_NAMES, TABLE, TIME_WAIT

PAGE = Path(__file__).parents[2] / "docs" / "tcp-states.md"


@given(st.sampled_from(range(len(STATE_NAMES))), st.sampled_from(range(len(EVENT_NAMES))))
def test_every_pair_gives_a_state_or_an_error(state: int, event: int) -> None:
    """All states times all events: a known state, or the one documented error."""
    if (state, event) in TABLE:
        assert 0 <= states.move(state, event) < len(STATE_NAMES)
    else:
        with pytest.raises(KeyError):
            states.move(state, event)


def test_every_state_is_reached_from_listen_and_ends() -> None:
    """No island, no trap: each state comes from a SYN, and each can end."""
    reached = {LISTEN}
    while True:
        more = {after for (state, _), after in TABLE.items() if state in reached} - reached
        if not more:
            break
        reached |= more
    assert reached == set(range(len(STATE_NAMES)))

    ending = {CLOSED}
    while True:
        more = {state for (state, _), after in TABLE.items() if after in ending} - ending
        if not more:
            break
        ending |= more
    assert ending == set(range(len(STATE_NAMES)))


def test_closed_is_the_end() -> None:
    """Nothing leaves it; a new connection is a new flow."""
    assert not [pair for pair in TABLE if pair[0] == CLOSED]


@pytest.mark.parametrize("event", [states.RECEIVE_RST, states.ABORT, states.TIMEOUT])
def test_open_connections_can_always_be_cut(event: int) -> None:
    """Reset, abort and timeout end every state between the handshake and TIME-WAIT."""
    for state in range(states.SYN_RECEIVED, TIME_WAIT):
        assert TABLE[state, event] == CLOSED


def test_names_are_complete() -> None:
    """One for each, in order."""
    assert len(set(STATE_NAMES)) == len(STATE_NAMES) == TIME_WAIT + 1
    assert len(set(EVENT_NAMES)) == len(EVENT_NAMES) == len(EVENT_MEANINGS) == states.TIMEOUT + 1
    assert {event for _, event in TABLE} == set(range(len(EVENT_NAMES)))


def test_page_shows_the_table() -> None:
    """docs/tcp-states.md is generated; it says how. What follows the table: test_rules.py."""
    assert PAGE.read_text(encoding="utf-8").startswith(states.render_markdown())
