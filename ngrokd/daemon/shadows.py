"""Names of ours that also resolve publicly: served all the same, and flagged, later and in the background.

Whoever takes over a name that exists elsewhere should know it. Nothing waits for the answer: a name server may be slow,
absent or wrong, and none of that is a reason to hold a name back.

The question is asked for `name.`, with the dot of a fully qualified name. The hosts file's line says `name`, and glibc
compares the two as text, so its own answer does not get in the way; where a resolver daemon strips the dot, the answer
is our own address and tells nothing, which is harmless.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from ipaddress import IPv4Network, ip_address
from typing import Final

import trio

from ngrokd.discovery import Discovery
from ngrokd.names.reconcile import SHADOWS_PUBLIC

ASK_TIMEOUT_S: Final = 5.0
# One name at a time, and a pause after each: 65,000 of them must not be felt by anybody, the name server included.
PAUSE_S: Final = 0.05
# A name server that does not answer is left alone this long.
SILENCE_S: Final = 60.0
IDLE_S: Final = 30.0


async def flag_public_names(
    discovery: Discovery, resolve: Callable[[str, int], Awaitable[tuple[str, ...]]], subnet: IPv4Network
) -> None:
    """Ask for each name once after it appears, for ever."""
    asked: set[str] = set()
    while True:
        names = discovery.known.desired.names()
        asked &= names
        name = min(names - asked, default="")
        if not name:
            await trio.sleep(IDLE_S)
            continue
        public: bool | None = None
        with trio.move_on_after(ASK_TIMEOUT_S):
            try:
                public = any(ip_address(address) not in subnet for address in await resolve(f"{name}.", 0))
            except (OSError, ValueError):
                public = False  # it does not exist, or what came is no address
        if public is None:
            await trio.sleep(SILENCE_S)
            continue
        asked.add(name)
        if public:
            desired = discovery.known.desired
            discovery.known.desired = desired.with_flags({**desired.flags, name: (SHADOWS_PUBLIC,)})
        await trio.sleep(PAUSE_S)
