"""Names of ours that also resolve publicly: served all the same, and flagged, later and in the background.

Whoever takes over a name that exists elsewhere should know it. Nothing waits for the answer: a name server may be slow,
absent or wrong, and none of that is a reason to hold a name back.

The question is asked for `name.`, with the dot of a fully qualified name. The hosts file's line says `name`, and glibc
compares the two as text, so its own answer does not get in the way; where a resolver daemon strips the dot, the answer
is our own address and tells nothing, which is harmless.

With 65,000 names this takes hours, and on purpose: for each question the whole hosts file is read, by us, before a name
server is asked. Whatever a question takes, it is followed by a pause many times as long.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from ipaddress import IPv4Network, IPv6Network, ip_address
from typing import Final

import trio

from ngrokd.discovery import Discovery
from ngrokd.names.reconcile import SHADOWS_PUBLIC

ASK_TIMEOUT_S: Final = 5.0
# One name at a time, and a pause after each: 65,000 of them must not be felt by anybody, the name server included.
PAUSE_S: Final = 0.05
PAUSE_TIMES: Final = 50  # what the question took: 2 % of a core at most
# What was found is published this often: a new snapshot for each name would be too much.
PUBLISH_S: Final = 10.0
# A name server that does not answer is left alone this long.
SILENCE_S: Final = 60.0
IDLE_S: Final = 30.0


async def flag_public_names(
    discovery: Discovery,
    resolve: Callable[[str, int], Awaitable[tuple[str, ...]]],
    *subnets: IPv4Network | IPv6Network,
) -> None:
    """Ask for each name once after it appears, for ever."""
    asked: set[str] = set()
    found: set[str] = set()
    while True:
        services = discovery.known.desired.services
        asked &= discovery.known.desired.names()
        publish_at = trio.current_time() + PUBLISH_S
        for service in services:
            name = service.endpoint.host
            if name in asked:
                continue
            if discovery.known.desired.services is not services:
                break
            started = trio.current_time()
            public = await _is_public(name, resolve, subnets)
            if public is None:
                await trio.sleep(SILENCE_S)
                continue
            asked.add(name)
            if public:
                found.add(name)
            if found and trio.current_time() >= publish_at:
                _publish(discovery, found)
                publish_at = trio.current_time() + PUBLISH_S
            await trio.sleep(max(PAUSE_S, PAUSE_TIMES * (trio.current_time() - started)))
        if found:
            _publish(discovery, found)
        if discovery.known.desired.services is services:
            await trio.sleep(IDLE_S)


async def _is_public(
    name: str,
    resolve: Callable[[str, int], Awaitable[tuple[str, ...]]],
    subnets: Collection[IPv4Network | IPv6Network],
) -> bool | None:
    """Whether the name has an address that is not ours; None when nobody answers."""
    with trio.move_on_after(ASK_TIMEOUT_S):
        try:
            found = [ip_address(address) for address in await resolve(f"{name}.", 0)]
            return any(not any(address in subnet for subnet in subnets) for address in found)
        except (OSError, ValueError):
            return False  # it does not exist, or what came is no address
    return None


def _publish(discovery: Discovery, found: set[str]) -> None:
    desired = discovery.known.desired
    discovery.known.desired = desired.with_flags({**desired.flags, **dict.fromkeys(found, (SHADOWS_PUBLIC,))})
    found.clear()
