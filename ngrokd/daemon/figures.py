"""The page at `/metrics`: what the daemon counts, under the names and units that Prometheus' conventions ask for.

`families` is pure: everything comes in a `Situation`. All families are there from the start, whatever has happened, so
that conf/grafana-dashboard.json and conf/alerts.yml can be held to it. Labels have a bounded set of values: words of
this program, and for endpoints the first hundred that were used (`ngrokd.daemon.traffic`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ngrokd.metrics import DIAL_BOUNDS_S, Distribution, Family, by, one, unflatten


@dataclass(frozen=True, slots=True)
class ProcessFigures:
    """What the kernel says of this process. -1: not to be had here."""

    cpu_s: float = 0.0
    resident_bytes: int = -1
    open_files: int = -1
    most_files: int = -1


@dataclass(frozen=True, slots=True)
class Situation:
    """All that the page shows. Times are wall clock, Unix seconds; 0: never.

    Attributes:
        version, python: of this program.
        started_at: when it began.
        conditions: name -> whether it holds; readiness is all of them.
        paused: new flows are refused.
        endpoints: state -> how many.
        skipped, without_address: endpoints that are not served.
        counters: the data plane's, see `DataPlane.counters`.
        pool_target: connections that are to be kept ready.
        by_endpoint: opened and failed flows.
        polls: result -> how many.
        polled_at: when the last one succeeded.
        certificate_expires_at: of the client certificate.
        loop_delay: of the event loop.
        restarts: part -> how often it was made anew.
        control, web: what became of requests.
        log_lost, log_suppressed: lines that nobody read in time, that repeated too fast.
        process: see ProcessFigures.
    """

    version: str
    python: str
    started_at: float
    conditions: Mapping[str, bool]
    paused: bool
    endpoints: Mapping[str, int]
    skipped: int
    without_address: int
    counters: Mapping[str, int]
    pool_target: int
    by_endpoint: Mapping[str, tuple[int, int]]
    polls: Mapping[str, int]
    polled_at: float
    certificate_expires_at: float
    loop_delay: Distribution
    restarts: Mapping[str, int]
    control: Mapping[str, int] = field(default_factory=dict)
    web: Mapping[str, int] = field(default_factory=dict)
    log_lost: int = 0
    log_suppressed: int = 0
    process: ProcessFigures = field(default_factory=ProcessFigures)


def families(now: Situation) -> Iterator[Family]:
    """Every metric, in the order of the page."""
    yield from _daemon(now)
    yield from _endpoints(now)
    yield from _flows(now)
    yield from _ingress(now)
    yield from _packets(now.counters)
    yield from _control_plane(now)
    yield from _process(now.process, now.started_at)


def _daemon(now: Situation) -> Iterator[Family]:
    build = {"version": now.version, "python": now.python}
    yield one("ngrokd_up", "gauge", "1 while the daemon answers.", 1)
    yield Family("ngrokd_build_info", "gauge", "What runs here.", [(build, 1)])
    conditions = {name: int(holds) for name, holds in now.conditions.items()}
    yield by("ngrokd_condition", "gauge", "1 where a condition of readiness holds.", "condition", conditions)
    yield one("ngrokd_ready", "gauge", "1 when all conditions of readiness hold.", int(all(now.conditions.values())))
    yield one("ngrokd_paused", "gauge", "1 while new connections are refused on demand.", int(now.paused))
    help_text = "By how much the event loop was late, sampled every 5 s."
    yield one("ngrokd_event_loop_delay_seconds", "histogram", help_text, now.loop_delay)
    help_text = "Parts that were made anew while the daemon ran."
    yield by("ngrokd_part_restarts_total", "counter", help_text, "part", now.restarts)
    yield one("ngrokd_log_lines_lost_total", "counter", "Lines of the log that nobody read in time.", now.log_lost)
    help_text = "Lines of the log that repeated too fast."
    yield one("ngrokd_log_lines_suppressed_total", "counter", help_text, now.log_suppressed)
    yield from _requests("control", "at the control socket", now.control)
    yield from _requests("http", "over HTTP", now.web)


def _requests(name: str, where: str, counts: Mapping[str, int]) -> Iterator[Family]:
    yield one(f"ngrokd_{name}_requests_total", "counter", f"Requests {where}.", counts.get("requests", 0))
    rejected = {reason: count for reason, count in counts.items() if reason != "requests"}
    help_text = f"Requests {where} that were not carried out, or failed."
    yield by(f"ngrokd_{name}_rejections_total", "counter", help_text, "reason", rejected)


def _endpoints(now: Situation) -> Iterator[Family]:
    help_text = "Endpoints served, by how the last connection to them went."
    yield by("ngrokd_endpoints", "gauge", help_text, "state", now.endpoints)
    yield one("ngrokd_endpoints_skipped", "gauge", "Endpoints that ngrok lists and that are not served.", now.skipped)
    help_text = "Names without an address, because the subnet is full."
    yield one("ngrokd_endpoints_without_address", "gauge", help_text, now.without_address)
    opened = {name: counts[0] for name, counts in now.by_endpoint.items()}
    failed = {name: counts[1] for name, counts in now.by_endpoint.items()}
    help_text = "Flows accepted, for the first 100 endpoints used; all others are one."
    yield by("ngrokd_endpoint_flows_opened_total", "counter", help_text, "endpoint", opened)
    help_text = "Flows refused or cut, for the same endpoints."
    yield by("ngrokd_endpoint_flows_failed_total", "counter", help_text, "endpoint", failed)


def _flows(now: Situation) -> Iterator[Family]:
    numbers = now.counters
    states = {"established": "relay.active", "dialing": "relay.dialing", "waiting": "relay.waiting"}
    states |= {"half_open": "stack.half_open_count", "time_wait": "stack.time_wait_count"}
    gauges = {state: numbers.get(name, 0) for state, name in states.items()}
    yield by("ngrokd_flows", "gauge", "TCP connections of apps, by state.", "state", gauges)
    yield _counter("ngrokd_flow_requests_total", "Connections that apps asked for.", numbers, "relay.requests")
    yield _counter("ngrokd_flows_opened_total", "Connections that were accepted.", numbers, "relay.accepted")
    results = {name: numbers.get(f"relay.{name}", 0) for name in ("completed", "cut", "app_gone", "ended")}
    yield by("ngrokd_flows_closed_total", "counter", "Accepted connections that are over.", "result", results)
    unopened = {name: numbers.get(f"relay.{name}", 0) for name in ("refused", "cancelled")}
    yield by("ngrokd_flows_unopened_total", "counter", "Connections that were not accepted.", "result", unopened)
    reasons = _after(numbers, "relay.reason.")
    yield by("ngrokd_flow_failures_total", "counter", "Connections refused or cut.", "reason", reasons)
    yield _counter("ngrokd_flow_bugs_total", "Connections that a defect of ours ended.", numbers, "relay.bugs")
    carried = {way: numbers.get(f"relay.bytes_{way}", 0) for way in ("from_app", "to_app")}
    yield by("ngrokd_flow_bytes_total", "counter", "Payload bytes carried.", "direction", carried)
    yield _gauge("ngrokd_buffered_bytes", "Payload bytes in buffers.", numbers, "stack.buffered_bytes")


def _ingress(now: Situation) -> Iterator[Family]:
    numbers = now.counters
    results = {"ok": numbers.get("pool.dials", 0)}
    reasons = ("ingress_unreachable", "ingress_untrusted", "binding_refused")
    results |= {reason: numbers.get(f"pool.failed_{reason}", 0) for reason in reasons}
    yield by("ngrokd_dials_total", "counter", "TLS connections made to the ingress.", "result", results)
    yield _counter("ngrokd_dials_resumed_total", "Of those, with a resumed session.", numbers, "pool.resumed")
    dials = unflatten(numbers, "pool.dial_seconds", DIAL_BOUNDS_S)
    yield one("ngrokd_dial_duration_seconds", "histogram", "TCP and TLS to the ingress.", dials)
    upgrades = unflatten(numbers, "pool.upgrade_seconds", DIAL_BOUNDS_S)
    yield one("ngrokd_upgrade_duration_seconds", "histogram", "The binding header and its answer.", upgrades)
    kept = {state: numbers.get(f"pool.{state}", 0) for state in ("ready", "making")}
    yield by("ngrokd_pool_connections", "gauge", "Connections kept ready, and being made.", "state", kept)
    yield one("ngrokd_pool_target", "gauge", "Connections that are to be kept ready now.", now.pool_target)
    served = {"hit": "pool.hits", "adopted": "pool.adopted", "miss": "pool.misses"}
    requests = {result: numbers.get(name, 0) for result, name in served.items()}
    yield by("ngrokd_pool_requests_total", "counter", "Who asked for a ready connection.", "result", requests)
    unused = {reason: numbers.get(f"pool.{reason}", 0) for reason in ("dead", "aged", "surplus")}
    help_text = "Ready connections that nobody used."
    yield by("ngrokd_pool_discarded_total", "counter", help_text, "reason", unused)
    help_text = "Connections that were silent or gone when they were needed, and replaced."
    yield _counter("ngrokd_pool_replaced_total", help_text, numbers, "pool.replaced")


def _packets(numbers: Mapping[str, int]) -> Iterator[Family]:
    yield _counter("ngrokd_packets_received_total", "Packets read from the device.", numbers, "stack.packets")
    yield _counter("ngrokd_packet_batches_total", "Wakes of the pump that read them.", numbers, "batches")
    help_text = "Packets that the stack did not take, by reason."
    yield by("ngrokd_packets_dropped_total", "counter", help_text, "reason", _after(numbers, "drops."))
    help_text = "Packets that the device did not take, by reason."
    yield by("ngrokd_device_drops_total", "counter", help_text, "reason", _after(numbers, "device."))
    yield _counter("ngrokd_tcp_retransmits_total", "Segments sent again.", numbers, "stack.retransmits")
    yield _counter("ngrokd_tcp_resets_received_total", "Resets by apps.", numbers, "stack.resets_received")
    help_text = "Connections whose app stopped answering."
    yield _counter("ngrokd_tcp_timeouts_total", help_text, numbers, "stack.timeouts")


def _control_plane(now: Situation) -> Iterator[Family]:
    yield by("ngrokd_api_polls_total", "counter", "Rounds of asking ngrok's API.", "result", now.polls)
    help_text = "When the API last answered; 0: never."
    yield one("ngrokd_api_last_success_timestamp_seconds", "gauge", help_text, now.polled_at)
    help_text = "When the client certificate ends; 0: there is none."
    yield one("ngrokd_certificate_expiry_timestamp_seconds", "gauge", help_text, _finite(now.certificate_expires_at))


def _process(process: ProcessFigures, started_at: float) -> Iterator[Family]:
    """The names that client libraries of Prometheus agree on."""
    yield one("process_start_time_seconds", "gauge", "When the process began.", started_at)
    yield one("process_cpu_seconds_total", "counter", "User and system time.", process.cpu_s)
    for name, text, value in (
        ("process_resident_memory_bytes", "Resident memory.", process.resident_bytes),
        ("process_open_fds", "Open files and sockets.", process.open_files),
        ("process_max_fds", "How many there may be.", process.most_files),
    ):
        if value >= 0:
            yield one(name, "gauge", text, value)


def _counter(name: str, text: str, numbers: Mapping[str, int], key: str) -> Family:
    return one(name, "counter", text, numbers.get(key, 0))


def _gauge(name: str, text: str, numbers: Mapping[str, int], key: str) -> Family:
    return one(name, "gauge", text, numbers.get(key, 0))


def _after(numbers: Mapping[str, int], prefix: str) -> dict[str, int]:
    return {name.removeprefix(prefix): count for name, count in sorted(numbers.items()) if name.startswith(prefix)}


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0
