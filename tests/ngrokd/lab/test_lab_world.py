"""The lab as a whole: on real sockets, in memory, and as a program of its own."""

from __future__ import annotations

import json
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli
import trio
import trio.testing

from ngrokd.http1 import HttpConnection
from ngrokd.lab import backends
from ngrokd.lab.ca import load_identity
from ngrokd.lab.control_plane import DEFAULT_KEY
from ngrokd.lab.world import DEMO_ENDPOINTS, Lab, open_lab, open_memory_lab
from ngrokd.relay.tls import TlsSession, TlsStream, TlsTrioStream
from ngrokd.relay.transport import Transport, connect_tcp

HEADERS = (("authorization", f"Bearer {DEFAULT_KEY}"), ("ngrok-version", "2"))
ECHO_7 = bytes.fromhex("0d000a096563686f2e64656d6f1007")  # echo.demo, 7


def client_context(lab: Lab) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=lab.servers.root_pem.decode())
    load_identity(context, lab.clients.client("k8sop_1", not_before=0, not_after=4_000_000_000))
    return context


async def echo_once(lab: Lab, transport: Transport, host: str) -> None:
    stream = TlsStream(transport, TlsSession(client_context(lab), server_hostname=host))
    await stream.handshake()
    client = TlsTrioStream(stream)
    await client.send_all(ECHO_7 + b"hello")
    await client.send_eof()
    received = b""
    while data := await client.receive_some():
        received += data
    assert received.endswith(b"hello")
    await client.aclose()


async def test_the_lab_lives_on_real_sockets() -> None:
    """API and ingress, verified by the names that the configuration gives; outages are refused connections."""
    async with open_lab() as lab:
        lab.add_demo_endpoints()
        api_port = int(lab.api_url.rpartition(":")[2])
        ingress_port = int(lab.ingress_address.rpartition(":")[2])
        context = ssl.create_default_context(cadata=lab.servers.root_pem.decode())

        async def ask() -> int:
            stream = await trio.open_ssl_over_tcp_stream(
                "127.0.0.1", api_port, https_compatible=True, ssl_context=context
            )
            connection = HttpConnection(stream, "127.0.0.1")
            status = (await connection.request("GET", "/kubernetes_operators", HEADERS)).status
            await connection.aclose()
            return status

        assert await ask() == 200
        await echo_once(lab, await connect_tcp("127.0.0.1", ingress_port), "127.0.0.1")

        lab.set_api_down(True)
        lab.set_ingress_down(True)
        for port in (api_port, ingress_port):
            with pytest.raises(ConnectionRefusedError):
                await connect_tcp("127.0.0.1", port)
        lab.set_api_down(False)
        lab.set_ingress_down(False)
        assert await ask() == 200
        await echo_once(lab, await connect_tcp("127.0.0.1", ingress_port), "127.0.0.1")


async def test_the_lab_lives_in_memory_under_a_simulated_clock(autojump_clock: trio.testing.MockClock) -> None:
    """No socket, no thread: a day is a moment."""
    wall = 1_790_000_000.0
    async with open_memory_lab(wall=lambda: wall + trio.current_time()) as lab:
        lab.add_demo_endpoints()
        assert lab.dial is not None
        await echo_once(lab, await lab.dial("198.51.100.7", 443), "198.51.100.7")
        await trio.sleep(86_400)
        await echo_once(lab, await lab.dial("198.51.100.7", 443), "198.51.100.7")

    assert lab.ingress.connection_count == 2


async def test_an_endpoint_is_bound_and_unbound_in_one_step() -> None:
    """In the API's list and at the ingress."""
    async with open_memory_lab(wall=lambda: 0.0) as lab:
        lab.add_endpoint("https://Web.Demo", "http")
        lab.add_endpoint("tcp://db.demo:5432", backends.Sink(), fields={"description": "a database"})

        assert set(lab.ingress.routes) == {("web.demo", 443), ("db.demo", 5432)}
        assert isinstance(lab.backend("db.demo", 5432), backends.Sink)
        assert lab.remove_endpoint("tcp://db.demo:5432") == 1
        assert set(lab.ingress.routes) == {("web.demo", 443)}
        assert len(lab.plane.endpoints) == 1
        with pytest.raises(ValueError, match="names no host and port"):
            lab.add_endpoint("tcp://db.demo", "echo")


async def test_the_configuration_is_toml_that_trusts_the_lab(tmp_path: Path) -> None:
    """Key in a private file, CA beside it, sections on top where asked for."""
    async with open_memory_lab(wall=lambda: 0.0) as lab:
        directory = tmp_path / 'a "quoted" place'
        path = lab.write_config(
            directory,
            trust="fingerprint",
            settings={"net": {"interface": "lab0", "offload": False}, "api": {"poll_interval": "5s"}},
        )

    config = tomli.loads(path.read_text())
    assert config["api"] == {
        "url": "https://api.lab.test",
        "key": DEFAULT_KEY,
        "ca_file": str(directory / "lab-ca.pem"),
        "poll_interval": "5s",
    }
    assert config["ingress"] == {
        "address": "198.51.100.7:443",
        "ca_fingerprints": [lab.servers.intermediate_fingerprint],
    }
    assert config["net"] == {"interface": "lab0", "offload": False}
    assert path.stat().st_mode & 0o777 == 0o600
    assert (directory / "state").stat().st_mode & 0o777 == 0o700
    assert (directory / "lab-ca.pem").read_bytes() == lab.servers.root_pem


class Program:
    """`python -m ngrokd.lab`, spoken to line by line."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ngrokd.lab", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        self.hello = self._read()

    def say(self, line: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        answer = json.loads(self.process.stdout.readline())
        assert isinstance(answer, dict)
        return answer


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    program = Program(
        "--demo", "--directory", str(tmp_path), "--set", 'net.interface="lab0"', "--endpoint", "tcp://x.demo:1=discard"
    )
    with program.process:
        yield program
        program.process.communicate("quit\n", timeout=20)
    assert program.process.returncode == 0


def test_the_program_says_where_it_is_and_takes_commands(program: Program, tmp_path: Path) -> None:
    """What network namespace tests drive: everything by JSON lines."""
    assert program.hello["config"] == str(tmp_path / "config.toml")
    assert tomli.loads((tmp_path / "config.toml").read_text())["net"] == {"interface": "lab0"}
    host, _, port = program.hello["ingress_address"].rpartition(":")
    assert program.say("state")["endpoints"] == len(DEMO_ENDPOINTS) + 1
    assert program.say("add tcp://db.prod:5432 echo")["ok"]
    assert program.say("remove tcp://x.demo:1") == {"ok": True, "removed": 1}
    assert program.say("ingress down") == {"ok": True}
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)))
    assert program.say("ingress up") == {"ok": True}
    socket.create_connection((host, int(port))).close()
    assert not program.say("nonsense")["ok"]
