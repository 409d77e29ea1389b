"""Health checks over HTTP: the Go daemon's bodies and codes, and who is not answered."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Mapping
from datetime import datetime

import pytest
import trio
import trio.testing

from ngrokd import http1
from ngrokd.errors import Exit, PermissionMissingError, TakenError
from ngrokd.ops.answers import json_pieces
from ngrokd.ops.peers import port_owner
from ngrokd.ops.web import (
    CONNECTIONS,
    NEVER,
    Condition,
    EndpointHealth,
    Health,
    HttpListener,
    ListenError,
    WebServer,
    format_go_duration,
    format_time,
    host_allowed,
    status_document,
)

STARTED = 1_763_632_800.0  # 2025-11-20T10:00:00Z
ENDPOINTS = {
    "ep_1": EndpointHealth("my-api.prod", "10.107.0.2:80", "http://my-api.prod", True, 2, 7, STARTED + 60.9, 1),
    "ep_2": EndpointHealth("db.prod", "10.107.0.3:5432", "tcp://db.prod:5432", active=False),
}


async def page() -> str:
    await trio.lowlevel.checkpoint()
    return "ngrokd_up 1\n"


def server(
    *,
    endpoints: Mapping[str, EndpointHealth] = ENDPOINTS,
    ready: bool = True,
    healthy: bool = True,
    host: str = "127.0.0.1",
) -> WebServer:
    tun = Condition("tun", healthy, "" if healthy else "the interface is gone", vital=True)
    names = Condition("names", ready, "" if ready else "waiting")
    health = Health((tun, names), STARTED, 8130.9)

    return WebServer(host, lambda: health, lambda: endpoints.items(), page, strict=True)


async def get(web: WebServer, path: str, *, method: str = "GET", host: str = "127.0.0.1:8081") -> http1.Response:
    """One request over a stream in memory."""
    ours, theirs = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(web.serve_stream, theirs)
        response = await http1.request(ours, host, method, path)
        await ours.aclose()
    return response


@pytest.mark.parametrize(
    ("path", "good", "bad"),
    [
        ("/health", (200, b"healthy\n"), (503, b"unhealthy\n")),
        ("/healthz", (200, b"healthy\n"), (503, b"unhealthy\n")),
        ("/ready", (200, b"ready\n"), (503, b"not ready\n")),
        ("/readyz", (200, b"ready\n"), (503, b"not ready\n")),
    ],
)
async def test_probes_get_the_go_daemons_answers(path: str, good: tuple[int, bytes], bad: tuple[int, bytes]) -> None:
    """Healthy means that packets are carried, ready that connections are likely to work."""
    up = await get(server(), path)
    down = await get(server(healthy=False, ready=False), path)

    assert ((up.status, up.body), (down.status, down.body)) == (good, bad)


async def test_a_daemon_without_endpoints_is_healthy() -> None:
    """An account that has none is no fault, and a restart would not mend it."""
    web = server(endpoints={})

    assert ((await get(web, "/ready")).status, (await get(web, "/health")).status) == (200, 200)


async def test_what_is_missing_for_readiness_is_no_reason_for_a_restart() -> None:
    """Names that wait for the API are not mended by one; a device that is gone may be."""
    assert [(await get(server(ready=False), path)).status for path in ("/ready", "/health")] == [503, 200]
    assert [(await get(server(healthy=False), path)).status for path in ("/ready", "/health")] == [503, 503]


async def test_prometheus_gets_its_page() -> None:
    response = await get(server(), "/metrics")

    assert (response.status, response.body) == (200, b"ngrokd_up 1\n")
    assert response.header("content-type") == "text/plain; version=0.0.4; charset=utf-8"
    assert (await get(server(), "/metrics", host="evil.example")).status == 421


async def test_status_has_the_go_daemons_shape() -> None:
    """Exactly its fields, its duration format, and its zero time for "never"."""
    response = await get(server(), "/status?x=1")

    assert response.status == 200
    assert response.header("content-type") == "application/json"
    assert json.loads(response.body) == {
        "healthy": True,
        "ready": True,
        "uptime": "2h15m30s",
        "endpoints": {
            "ep_1": {
                "name": "my-api.prod",
                "local_address": "10.107.0.2:80",
                "target_uri": "http://my-api.prod",
                "active": True,
                "connections": 2,
                "total_connections": 7,
                "last_activity": "2025-11-20T10:01:00Z",
                "errors": 1,
            },
            "ep_2": {
                "name": "db.prod",
                "local_address": "10.107.0.3:5432",
                "target_uri": "tcp://db.prod:5432",
                "active": False,
                "connections": 0,
                "total_connections": 0,
                "last_activity": "0001-01-01T00:00:00Z",
                "errors": 0,
            },
        },
        "start_time": "2025-11-20T10:00:00Z",
        "conditions": {"tun": {"ok": True, "message": ""}, "names": {"ok": True, "message": ""}},
    }


async def test_status_is_200_when_nothing_is_well() -> None:
    """It describes; /health and /ready judge."""
    response = await get(server(endpoints={}, ready=False, healthy=False), "/status")

    assert response.status == 200
    assert json.loads(response.body)["endpoints"] == {}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (-1, "0s"), (59.9, "59s"), (60, "1m0s"), (3600, "1h0m0s"), (8130, "2h15m30s"), (90061, "25h1m1s")],
)
def test_durations_read_as_go_writes_them(seconds: float, text: str) -> None:
    """Hours are the largest unit."""
    assert format_go_duration(seconds) == text


def test_times_are_rfc_3339() -> None:
    """In UTC, and parsed by those who parsed the Go daemon's."""
    assert format_time(STARTED) == "2025-11-20T10:00:00Z"
    assert datetime.fromisoformat(format_time(STARTED)).timestamp() == STARTED
    assert format_time(None) == NEVER


async def test_other_paths_and_methods_are_refused() -> None:
    """HEAD is GET without its body."""
    assert (await get(server(), "/elsewhere")).status == 404
    assert (await get(server(), "/health", method="POST")).status == 405
    assert (await get(server(), "/health", method="HEAD")).status == 200


@pytest.mark.parametrize(
    ("header", "listen", "allowed"),
    [
        ("127.0.0.1:8081", "127.0.0.1", True),
        ("127.9.9.9", "127.0.0.1", True),
        ("localhost:8081", "127.0.0.1", True),
        ("LOCALHOST.", "127.0.0.1", True),
        ("api.localhost", "127.0.0.1", True),
        ("[::1]:8081", "127.0.0.1", True),
        (None, "127.0.0.1", True),
        ("10.0.0.5:8081", "10.0.0.5", True),
        ("10.0.0.6:8081", "10.0.0.5", False),
        ("10.0.0.6:8081", "0.0.0.0", True),
        ("[2001:db8::1]", "::", True),
        ("evil.example", "0.0.0.0", False),
        ("evil.example:8081", "127.0.0.1", False),
        ("localhost.evil.example", "127.0.0.1", False),
        ("127.0.0.1.evil.example", "127.0.0.1", False),
        ("", "127.0.0.1", False),
        ("a b", "127.0.0.1", False),
        ("user@localhost", "127.0.0.1", False),
        ("127.0.0.1:99999", "127.0.0.1", False),
    ],
)
def test_only_requests_meant_for_us_are_answered(header: str | None, listen: str, allowed: bool) -> None:
    """A page in a browser here can reach us under a name of its own; it cannot choose the Host header."""
    assert host_allowed(header, listen) is allowed


async def test_a_rebound_name_is_told_that_it_is_misdirected() -> None:
    """421, and no word about the endpoints."""
    web = server()

    response = await get(web, "/status", host="evil.example")

    assert response.status == 421
    assert b"prod" not in response.body
    assert web.counters["misdirected"] == 1


async def test_a_bug_in_an_answer_ends_its_connection_only(caplog: pytest.LogCaptureFixture) -> None:
    """The probe sees 500, the log the reason, and the daemon goes on."""
    web = WebServer("127.0.0.1", lambda: Health((), 0.0, 1 // 0), dict, page)

    response = await get(web, "/health")

    assert response.status == 500
    assert "ZeroDivisionError" in caplog.text


# Listening


async def test_it_answers_through_a_real_port_that_was_free() -> None:
    """Port 0 is any; the one it became can be asked for."""
    with HttpListener("localhost:0") as listener:
        async with trio.open_nursery() as nursery:
            await nursery.start(server().serve, listener)
            stream = await trio.open_tcp_stream("127.0.0.1", listener.port)

            response = await http1.request(stream, f"localhost:{listener.port}", "GET", "/ready")

            await stream.aclose()
            nursery.cancel_scope.cancel()

    assert response.body == b"ready\n"


async def test_clients_above_the_limit_are_turned_away() -> None:
    """Sixty-four that hold on to their connection cost no more than that."""
    web = server()
    with HttpListener("127.0.0.1:0") as listener:
        async with trio.open_nursery() as nursery:
            await nursery.start(web.serve, listener)
            streams = [await trio.open_tcp_stream("127.0.0.1", listener.port) for _ in range(CONNECTIONS + 1)]

            with trio.fail_after(5):
                ended = await streams[-1].receive_some(1)

            for stream in streams:
                await stream.aclose()
            nursery.cancel_scope.cancel()

    assert ended == b""
    assert web.counters["turned_away"] == 1


def test_a_taken_port_names_its_owner() -> None:
    """The first question is always: who has it?"""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]

        with pytest.raises(TakenError, match=f"127.0.0.1:{port}, belongs to process {os.getpid()} ") as caught:
            HttpListener(f"127.0.0.1:{port}")

        assert re.fullmatch(rf"process {os.getpid()} \(.+\)", port_owner(port))
    assert caught.value.exit_code is Exit.CANNOT_CREATE
    assert port_owner(port) == ""


def test_an_address_that_is_not_ours_is_an_error() -> None:
    """192.0.2.0/24 is nobody's."""
    with pytest.raises(ListenError, match=r"cannot listen on 192\.0\.2\.1:80"):
        HttpListener("192.0.2.1:80")


def test_a_port_that_needs_a_right_is_a_permission_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit 77 and not 73: another port, or another user, helps."""

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", refuse)

    with pytest.raises(PermissionMissingError):
        HttpListener("127.0.0.1:80")


def test_the_document_of_many_endpoints_keeps_their_order() -> None:
    """As the daemon lists them, so that two answers can be compared."""
    many = [(f"ep_{number}", EndpointHealth(f"n{number}", "", "")) for number in (3, 1, 2)]

    document = json.loads(b"".join(json_pieces(status_document(Health((), 0.0, 0.0), many))))

    assert list(document["endpoints"]) == ["ep_3", "ep_1", "ep_2"]


def test_two_endpoints_with_one_id_do_not_spoil_the_document() -> None:
    """Ids are the API's; a member given twice is no sound JSON."""
    twice = [("ep_1", EndpointHealth("first", "", "")), ("ep_1", EndpointHealth("second", "", ""))]

    document = b"".join(json_pieces(status_document(Health((), 0.0, 0.0), twice)))

    assert document.count(b'"ep_1"') == 1
    assert b"first" in document
