"""Record captures of real kernels and real programs talking through our stack.

    python -m tests.replay.record --list
    python -m tests.replay.record curl-download redis        (root; needs the programs of the scenario)
    python -m tests.replay.record --all

Each scenario gets a private network namespace with a TUN device; the stack runs here, programs run inside. What they
say is written to `captures/NAME.pcapng`; `python -m tests.replay.golden NAME` then tells what a fresh stack answers to
it. Scenarios are in `scenarios.py`.
"""

from __future__ import annotations

import argparse
import os
import sys
from ipaddress import ip_address
from pathlib import Path
from random import Random
from typing import Final

import trio

from tests.netns.support import missing_for_namespaces, open_namespace
from tests.replay.scenarios import ENDPOINT, ENDPOINT6, SCENARIOS, Scenario, Stage
from tun.core.stack import Stack, StackSettings
from tun.device.base import Device
from tun.device.linux import open_tun
from tun.network import Network
from tun.pcap import Capture, CaptureLimits, RecordingDevice
from tun.testing.memory import NO_FAULTS, FaultyDevice

CAPTURES: Final = Path(__file__).with_name("captures")
# A capture that belongs to a repository is small; a scenario that says more should say less.
MAX_BYTES: Final = 900_000
SCENARIO_TIMEOUT_S: Final = 60.0


async def record(scenario: Scenario, path: Path) -> Capture:
    """Play a scenario between real programs and write what passed the device to `path`.

    Raises: whatever went wrong; nothing is left at `path` then.
    """
    temporary = path.with_suffix(".tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        with open_namespace() as ns:
            tun = ns.call(open_tun, "tun0", offload=scenario.offload)
            try:
                ns.run(["ip", "link", "set", "tun0", "addrgenmode", "none"])
                ns.run(["ip", "addr", "add", "10.107.0.1/32", "dev", "tun0"])
                ns.run(["ip", "link", "set", "tun0", "up", "mtu", "1500", "txqueuelen", "5000"])
                ns.run(["ip", "route", "add", "10.107.0.0/16", "dev", "tun0"])
                if scenario.ipv6:
                    ns.run(["ip", "addr", "add", "fd6b::1/128", "dev", "tun0", "nodad"])
                    ns.run(["ip", "route", "add", "fd6b::/64", "dev", "tun0"])
                capture = await _play(scenario, Stage(ns, ipv6=scenario.ipv6), tun, fd)
            finally:
                tun.close()
        if capture.ended != "closed" or capture.dropped:
            raise RuntimeError(f"{scenario.name}: the capture ended early ({capture!r}, at most {MAX_BYTES} bytes)")
        temporary.replace(path)
    finally:
        os.close(fd)
        temporary.unlink(missing_ok=True)
    return capture


async def _play(scenario: Scenario, stage: Stage, tun: Device, fd: int) -> Capture:
    capture = Capture(fd, limits=CaptureLimits(max_bytes=MAX_BYTES), application="ngrokd tests.replay.record")
    device = tun
    if scenario.faults != NO_FAULTS:
        device = FaultyDevice(tun, Random(1), reading=scenario.faults, writing=scenario.faults, split=True)
    settings = StackSettings(
        offload=scenario.offload,
        gateway6=ip_address("fd6b::1").packed,
        network6=int(ip_address("fd6b::")),
        mask6=((1 << 64) - 1) << 64,
    )
    stack = Stack(settings, os.urandom(32))
    stack.set_served({ip_address(address).packed: frozenset(scenario.ports) for address in (ENDPOINT, ENDPOINT6)})
    with trio.fail_after(SCENARIO_TIMEOUT_S):
        async with trio.open_nursery() as nursery:
            network = Network(RecordingDevice(device, capture), stack, stage.serve)
            stage.nursery = nursery
            await nursery.start(network.run)
            await scenario.run(stage)
            await trio.sleep(scenario.linger_s)
            nursery.cancel_scope.cancel()
    capture.close()
    return capture


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.replay.record", description="record captures for replays")
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--all", action="store_true", help="every scenario")
    parser.add_argument("--list", action="store_true", help="name the scenarios and the programs they need")
    parser.add_argument("--directory", type=Path, default=CAPTURES, help="where captures go (%(default)s)")
    options = parser.parse_args(arguments)
    if options.list:
        for scenario in SCENARIOS.values():
            sys.stdout.write(f"{scenario.name:16} {scenario.why} [{', '.join(scenario.programs) or 'no programs'}]\n")
        return 0
    names = list(SCENARIOS) if options.all else options.names
    if unknown := [name for name in names if name not in SCENARIOS]:
        parser.error(f"no scenario is called {unknown[0]}; --list names them")
    if not names:
        parser.error("which one? --list names them")
    if reason := missing_for_namespaces():
        sys.stderr.write(f"cannot record: {reason}\n")
        return 77
    code = 0
    for name in names:
        scenario = SCENARIOS[name]
        if missing := scenario.missing_programs():
            sys.stderr.write(f"{name}: not recorded, {', '.join(missing)} missing\n")
            code = 1
            continue
        path = options.directory / f"{name}.pcapng"
        capture = trio.run(record, scenario, path)
        sys.stdout.write(f"{path}: {capture.recorded} packets, {capture.written} bytes\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
