"""`ngrokd ping`: does the name lead to the daemon, and the daemon to the endpoint; how long does each part take.

ICMP goes from here: the daemon's own stack answers it, so it tells of this machine only. The rest is timed by the
daemon, with a connection of its own: TCP and TLS to the ingress, and the binding header that names the endpoint.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import click

from ngrokd.cli.columns import milliseconds_text, rows_of, table_of
from ngrokd.cli.context import Context, command
from ngrokd.cli.offers import endpoint_names
from ngrokd.cli.output import clean, paint, print_lines
from ngrokd.errors import Exit

ICMP_WAIT_S: Final = 1.0
PROBE_WAIT_S: Final = 120.0  # the daemon gives up after ingress.connect_timeout
ECHO: Final = 8
ECHO_REPLY: Final = 0


@dataclass(frozen=True, slots=True)
class Echo:
    """One ICMP echo. `ms` is None when there was none; `problem` says why."""

    ms: float | None
    problem: str = ""
    tried: bool = True


@command("ping")
@click.argument("name", metavar="NAME", shell_complete=endpoint_names)
@click.option("-n", "--count", metavar="N", type=click.IntRange(min=1), default=1, show_default=True, help="So often.")
@click.option(
    "-i", "--interval", type=click.FloatRange(min=0.2), default=1.0, show_default=True, help="Seconds between."
)
def ping(context: Context, name: str, count: int, interval: float) -> int:
    """Go the way of a connection to the endpoint NAME, and time each part of it. Exit 1 when it is not reached.

    NAME is a host name, HOST:PORT or URL as "ngrokd list" shows it.
    """
    rounds = []
    for number in range(count):
        if number:
            time.sleep(interval)
        data = table_of(context.ask("probe", f"endpoint={name}", timeout_s=PROBE_WAIT_S).data)
        echo = send_echo(str(data.get("address", "")))
        rounds.append({**data, "icmp_ms": echo.ms, "icmp_problem": echo.problem})
        if not context.as_json:
            print_lines(_lines(data, echo))
    if context.as_json:
        context.print_document(rounds if count > 1 else rounds[0])
    return Exit.OK if all(each.get("ok") is True for each in rounds) else Exit.NO


def _lines(data: Mapping[str, Any], echo: Echo) -> list[str]:
    address = clean(data.get("address", ""))
    rows: list[tuple[str, str, str]] = []
    if echo.ms is not None:
        rows.append(("icmp", milliseconds_text(echo.ms), f"{address}, answered on this machine"))
    else:
        rows.append(("icmp", "-", echo.problem))
    details = {
        "connect": clean(data.get("ingress", "")),
        "tls": clean(data.get("tls", "")),
        "header": ", ".join(clean(data[word]) for word in ("endpoint_id", "proto") if data.get(word)),
    }
    phases = rows_of(data.get("phases"))
    for phase in phases:
        word = clean(phase.get("name", ""))
        rows.append((word, milliseconds_text(phase.get("ms")), details.get(word, "")))
    total = sum(phase["ms"] for phase in phases if isinstance(phase.get("ms"), (int, float)))
    size = max(len(took) for _, took, _ in rows)
    shown = [f"  {word.ljust(8)} {took.rjust(size)}  {detail}".rstrip() for word, took, detail in rows]
    head = f"{clean(data.get('endpoint', ''))} ({address}): "
    if data.get("ok") is True:
        return [f"{head}{paint('reached', 'green')} in {milliseconds_text(total)}", *shown]
    lines = [f"{head}{paint('not reached', 'red')}", *shown, f"  {clean(data.get('problem', ''))}"]
    return lines + ([f"  hint: {clean(data['remedy'])}"] if data.get("remedy") else [])


def send_echo(address: str, *, wait_s: float = ICMP_WAIT_S) -> Echo:
    """Send one ICMP echo and wait for its answer.

    Linux lets some groups do this without rights (net.ipv4.ping_group_range, icmp(7)), macOS everybody; otherwise it
    takes a raw socket, which is root's.
    """
    number = os.getpid() & 0xFFFF
    for kind in (socket.SOCK_DGRAM, socket.SOCK_RAW):
        try:
            with socket.socket(socket.AF_INET, kind, socket.IPPROTO_ICMP) as link:
                return _exchange(link, address, number, wait_s)
        except PermissionError:
            continue
        except OSError as error:
            return Echo(None, f"{address}: {error.strerror or error}")
    return Echo(None, "not tried: takes root, or a group in net.ipv4.ping_group_range", tried=False)


def _exchange(link: socket.socket, address: str, number: int, wait_s: float) -> Echo:
    payload = os.urandom(16)
    link.connect((address, 0))
    begun = time.perf_counter()
    link.send(echo_request(number, 1, payload))
    while (left := begun + wait_s - time.perf_counter()) > 0:
        link.settimeout(left)
        try:
            answer = link.recv(2048)
        except TimeoutError:
            break
        if answer[:1] and answer[0] >> 4 == 4:  # a raw socket gives the IP header too, and macOS always
            answer = answer[(answer[0] & 15) * 4 :]
        if answer[:1] == bytes((ECHO_REPLY,)) and answer[8:] == payload:
            return Echo(round((time.perf_counter() - begun) * 1000, 3))
    return Echo(None, f"{address}: no answer within {wait_s:g} s")


def echo_request(number: int, sequence: int, payload: bytes) -> bytes:
    """An ICMP echo request (RFC 792)."""
    packet = struct.pack(">BBHHH", ECHO, 0, 0, number, sequence) + payload
    total = sum(struct.unpack(f">{len(packet) // 2}H", packet))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return packet[:2] + struct.pack(">H", ~total & 0xFFFF) + packet[4:]
