"""`ngrokd status`, `list` and `health`: what only asks.

The data of these commands is the Go daemon's, with more members; any of ours may be missing, because the daemon that
answers may be older, newer, or the Go one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import click

from ngrokd.cli.columns import Column, fit
from ngrokd.cli.context import Context, command
from ngrokd.cli.output import ago, clean, fields, paint, print_lines, since, table, terminal_width, wall_time
from ngrokd.errors import Exit, NotRunningError

_STATES: Final = {  # state of the daemon -> how it reads, and its colour
    "starting": ("is starting", "yellow"),
    "waiting_for_key": ("is running and waits for an API key", "yellow"),
    "ready": ("is running", "green"),
    "degraded": ("is running, with problems", "yellow"),
    "paused": ("is paused: it refuses new connections", "yellow"),
    "stopping": ("is stopping", "yellow"),
}
MAX_SKIPPED_SHOWN: Final = 20


@command("status")
def status(context: Context) -> int:
    """Show how the daemon is: registration, certificate, interface, endpoints. Exit 3 when it is not running."""
    try:
        data = _table(context.ask("status").data)
    except NotRunningError as error:
        return _show_stopped(context, error)
    if context.as_json:
        context.print_document({"state": "ready" if data.get("registered") else "waiting_for_key", **data})
        return Exit.OK
    width = terminal_width()
    print_lines([_headline(data), "", *fields(_facts(data), width), *_skipped(data, width), *_problems(data)])
    return Exit.OK


def _show_stopped(context: Context, error: NotRunningError) -> int:
    socket = context.socket_path()
    if context.as_json:
        context.print_document({"state": "stopped", "registered": False, "endpoint_count": 0, "socket": socket})
    else:
        lines = [f"ngrokd is {paint('stopped', 'red')} (nobody answers at {clean(socket)})"]
        print_lines([*lines, f"  hint: {error.remedy}"])
    return Exit.NOT_RUNNING


def _table(data: object) -> dict[str, Any]:  # Any: another program's JSON; each use looks first
    return data if isinstance(data, dict) else {}


def _list(data: object) -> list[Any]:  # Any: as above
    return data if isinstance(data, list) else []


def _headline(data: Mapping[str, Any]) -> str:
    otherwise = "ready" if data.get("registered", True) else "waiting_for_key"  # the Go daemon tells no state
    reads, colour = _STATES.get(str(data.get("state", otherwise)), ("is running", "green"))
    details = []
    if isinstance(data.get("pid"), int):
        details.append(f"pid {data['pid']}")
    if isinstance(data.get("uptime_s"), (int, float)):
        details.append(f"up {ago(data['uptime_s'])}")
    if data.get("compiled") is True:
        details.append("compiled core")
    name = f"ngrokd {clean(data['version'])}" if isinstance(data.get("version"), str) else "ngrokd"
    return f"{name} {paint(reads, colour)}" + (f" ({', '.join(details)})" if details else "")


def _facts(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    api, hosts = _table(data.get("api")), _table(data.get("hosts"))
    operator = data.get("operator_id") or ""
    registered = f"yes, as {operator}" if operator else "yes"
    answered = since(api.get("polled_at"))
    subnets = "".join(f", {data[key]}" for key in ("subnet", "subnet6") if data.get(key))
    no_ipv6 = _table(data.get("network")).get("ipv6_problem")
    unnamed = " (off)" if hosts.get("enabled") is False else ""
    return [
        ("Registered", registered if data.get("registered") else "no"),
        ("API", f"{api.get('url', '')}{f', answered {answered}' if answered else ''}"),
        ("API key", str(api.get("key_source") or "")),
        ("Certificate", _validity(_table(data.get("certificate")).get("not_after"))),
        ("Ingress", str(data.get("ingress_endpoint") or "")),
        ("Interface", f"{data.get('interface') or ''}{subnets}"),
        ("IPv6", f"not now: {no_ipv6}" if no_ipv6 else ""),
        ("Hosts file", f"{hosts.get('path') or ''}{unnamed}"),
        ("Configuration", _configuration(_table(data.get("config")))),
        ("After restart", ", ".join(map(str, _list(_table(data.get("config")).get("needs_restart"))))),
        ("Endpoints", _count(data)),
        ("Connections", _connections(data)),
        ("Workers", _workers(data)),
    ]


def _workers(data: Mapping[str, Any]) -> str:
    """The processes that carry connections, where the daemon does not do it itself."""
    workers = [worker for worker in _list(data.get("workers")) if isinstance(worker, dict)]
    running = [str(worker.get("pid")) for worker in workers if worker.get("state") == "running"]
    if not workers:
        return ""
    count = len(workers) if len(running) == len(workers) else f"{len(running)} of {len(workers)} run"
    restarts = sum(worker["restarts"] for worker in workers if isinstance(worker.get("restarts"), int))
    return f"{count} (pid {', '.join(running)})" + (
        "" if not restarts else ", replaced once" if restarts == 1 else f", replaced {restarts} times"
    )


def _validity(not_after: object) -> str:
    expires = wall_time(not_after)
    if expires is None:
        return ""
    date = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(expires))
    left = expires - time.time()
    return f"valid until {date} ({ago(left)} left)" if left > 0 else f"expired on {date}"


def _configuration(config: Mapping[str, Any]) -> str:
    names = [str(name) for name in _list(config.get("files"))] or (["defaults"] if config else [])
    return names[0] + (f", and {len(names) - 1} more in conf.d" if len(names) > 1 else "") if names else ""


def _count(data: Mapping[str, Any]) -> str:
    skipped = _list(data.get("skipped"))
    return str(data.get("endpoint_count", 0)) + (f", and {len(skipped)} skipped" if skipped else "")


def _connections(data: Mapping[str, Any]) -> str:
    if not isinstance(data.get("flows"), int):
        return ""
    ready = _table(data.get("pool")).get("ready")
    return str(data["flows"]) + (f", and {ready} to the ingress kept ready" if isinstance(ready, int) and ready else "")


def _skipped(data: Mapping[str, Any], width: int | None) -> list[str]:
    """The endpoints that cannot be served, and why."""
    skipped = [entry for entry in _list(data.get("skipped")) if isinstance(entry, dict)]
    if not skipped:
        return []
    rows = [(str(entry.get("url") or entry.get("id", "")), str(entry.get("reason", ""))) for entry in skipped]
    lines = table(("SKIPPED", "REASON"), rows[:MAX_SKIPPED_SHOWN], None if width is None else width - 2)
    if len(rows) > MAX_SKIPPED_SHOWN:
        lines.append(f"... and {len(rows) - MAX_SKIPPED_SHOWN} more")
    return ["", *(f"  {line}" for line in lines)]


def _problems(data: Mapping[str, Any]) -> list[str]:
    """What is wrong, a line each, with what to do about it where that is known."""
    lines = [""]
    for problem, remedy in _found_problems(data):
        lines.append(f"  {paint('problem:', 'yellow')} {clean(problem)}")
        lines += [f"    hint: {clean(remedy)}"] if remedy else []
    return lines if len(lines) > 1 else []


def _found_problems(data: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    api = _table(data.get("api"))
    if api.get("key_problem"):
        yield f"no API key: {api['key_problem']}", ""
    elif data.get("state") == "waiting_for_key":
        yield "no API key", "sudo ngrokd set-api-key"
    if api.get("problem"):
        yield str(api["problem"]), str(api.get("remedy") or "")
    if api.get("selectors_problem"):
        yield str(api["selectors_problem"]), "mend api.selectors"
    config = _table(data.get("config"))
    if config.get("problem"):
        first = str(config["problem"]).partition("\n")[0]
        when = f"{config.get('invalid_since')} ({since(config.get('invalid_since'))})"
        yield f"the configuration is invalid since {when}: {first}", "ngrokd config validate"
    for part in ("certificate", "ingress", "hosts", "state_directory", "network"):
        problem = _table(data.get(part)).get("problem")
        if problem:
            yield str(problem), str(_table(data.get(part)).get("remedy") or "")
    nameless = _list(data.get("without_address"))
    if nameless:
        yield f"the subnet is full: {len(nameless)} names have no address", "set net.subnet to a larger network"
    if data.get("from_last_known"):
        yield "the endpoints are those known before the start: ngrok has not answered yet", ""


@command("list")
def list_endpoints(context: Context) -> None:
    """List the endpoints: the URL to use, its address on this machine, and how connections to it go.

    State: online (the last dial was good), degraded (it failed, so often in a row), unknown (nobody has tried).
    """
    data = context.ask("list").data
    endpoints = [entry for entry in data if isinstance(entry, dict)] if isinstance(data, list) else []
    endpoints.sort(key=lambda entry: (str(entry.get("hostname", "")), str(entry.get("port", "")).rjust(5)))
    if context.as_json:
        context.print_document(endpoints)
        return
    if not endpoints:
        click.echo('no endpoints are served; "ngrokd status" says why', err=True)
        return
    heading, *lines = fit(_LIST, [_list_cells(entry) for entry in endpoints], terminal_width())
    print_lines([paint(heading, "dim"), *lines])


_LIST: Final = (
    Column("URL", least=20),
    Column("ADDRESS"),
    Column("STATE", worth=4),
    Column("LAST DIAL", worth=2),
    Column("FLOWS", right=True, worth=1),
    Column("NOTE", least=12, worth=3),
)


def _list_cells(entry: Mapping[str, Any]) -> Sequence[str]:
    failures = entry.get("consecutive_failures")
    state = str(entry.get("state") or "")
    if isinstance(failures, int) and failures:
        state += f", {failures} failed"
    flows = entry.get("flows")
    return (
        str(entry.get("url", "")),
        _address(entry),
        state,
        since(entry.get("last_dial_at")) or ("never" if state else ""),
        str(flows) if isinstance(flows, int) else "",
        _note(entry),
    )


def _address(entry: Mapping[str, Any]) -> str:
    host = str(entry.get("ip", ""))
    return f"[{host}]:{entry.get('port', '')}" if ":" in host else f"{host}:{entry.get('port', '')}"


def _note(entry: Mapping[str, Any]) -> str:
    notes = [str(flag) for flag in _list(entry.get("flags"))]
    if not entry.get("local_listener", True):
        notes.insert(0, "not served")
    return ", ".join([*notes, str(entry["problem"])] if entry.get("problem") else notes)


@command("health")
@click.option("--ready", "check_ready", is_flag=True, help="Check readiness: all conditions hold.")
def health(context: Context, check_ready: bool) -> int:
    """Check whether the daemon carries packets: exit 0 when it does, 1 when not, 3 when it is not running.

    Ready is more: device, routes and names stand, a handshake with the ingress was verified, and new connections are
    taken. Fit for a container's health check; it needs no HTTP.
    """
    data = _table(context.ask("health").data)
    if context.as_json:
        context.print_document(data)
    else:
        endpoints = _table(data.get("endpoints"))
        pairs = [
            ("Healthy", f"{_yes(data.get('healthy'))} ({len(endpoints)} endpoint{'' if len(endpoints) == 1 else 's'})"),
            ("Ready", _yes(data.get("ready"))),
            *((f"  {name}", _condition(each)) for name, each in _table(data.get("conditions")).items()),
            ("Uptime", str(data.get("uptime", ""))),
        ]
        print_lines(fields(pairs, terminal_width(), indent=""))
    return Exit.OK if data.get("ready" if check_ready else "healthy") is True else Exit.NO


def _condition(condition: object) -> str:
    each = _table(condition)
    return "yes" if each.get("ok") is True else f"no: {each.get('message') or 'not yet'}"


def _yes(value: object) -> str:
    return "yes" if value is True else "no"
