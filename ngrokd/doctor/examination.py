"""The order of the checks: what a later one needs, an earlier one finds out; this machine first, the network after."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Final

import trio

from ngrokd.doctor import firewall, machine, ngrok
from ngrokd.doctor.findings import Finding
from ngrokd.doctor.patient import Patient

_HERE: Final[tuple[Callable[[Patient], Iterator[Finding]], ...]] = (
    machine.daemon,
    machine.go_daemon,
    machine.rights,
    machine.file_limit,
    machine.network,
    machine.other_daemons,
    machine.leftovers,
    firewall.firewall,
    machine.state,
    ngrok.identity,
    ngrok.api_key,
)


async def examine(patient: Patient) -> AsyncGenerator[Finding, None]:
    """Look at everything, one thing after the other, telling each as it is found."""
    await trio.to_thread.run_sync(patient.ask_daemon)
    for check in _HERE:
        for finding in await trio.to_thread.run_sync(_all, check, patient):
            yield finding
    async for finding in ngrok.api(patient):
        yield finding
    async for finding in ngrok.ingress(patient):
        yield finding
    for finding in await trio.to_thread.run_sync(_all, machine.hosts_file, patient):
        yield finding
    async for finding in ngrok.names(patient):
        yield finding


def _all(check: Callable[[Patient], Iterator[Finding]], patient: Patient) -> list[Finding]:
    return list(check(patient))
