"""The lab as a whole: certificates, API, ingress and back ends, wired to each other and ready for a daemon.

`open_lab` listens on real sockets; `open_memory_lab` gives a `connect` and a `dial` instead, whose streams never leave
the process, so that a daemon under a simulated clock lives through a day in seconds. In both, one call binds an
endpoint and puts a back end behind it, and one call writes the configuration that makes a daemon trust this lab.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final, Literal, Self
from urllib.parse import urlsplit

import trio
from trio.abc import Stream

from ngrokd.lab.backends import Backend, make_backend
from ngrokd.lab.ca import Authority, Identity, Validity
from ngrokd.lab.control_plane import DEFAULT_KEY, ControlPlane
from ngrokd.lab.ingress import Ingress
from ngrokd.relay.transport import SocketTransport, Transport

Trust = Literal["ca_file", "fingerprint", "nothing"]
Settings = Mapping[str, Mapping[str, object]]
Presented = Literal["good", "foreign", "expired", "not-yet", "wrong-name", "no-intermediate"]

DEFAULT_PORTS: Final = {"http": 80, "https": 443}
# What `ngrokd demo` and the tests find: URL, back end, and what it is good for.
DEMO_ENDPOINTS: Final = (
    ("http://hello.demo", "http", "a web service: /, /bytes/N, POST /hash"),
    ("tcp://echo.demo:7", "echo", "sends back what it gets"),
    ("tcp://banner.demo:25", "speaks-first", "greets before the client has said a word"),
    ("tcp://answer.demo:9000", "answers-after-eof", "answers when the client has ended its side"),
    ("tcp://closes.demo:9001", "closes-first", "ends its side first and goes on reading"),
    ("tcp://sink.demo:9", "sink", "takes everything"),
    ("tcp://source.demo:19", "source:100000000", "sends 100 MB"),
)


class Lab:
    """Everything on the other side of a daemon.

    Attributes:
        servers: signs what the API and the ingress present.
        clients: signs what operators present.
        plane: the API.
        ingress: the ingress.
        api_url: what a daemon calls.
        ingress_address: `HOST:PORT` that a daemon dials; the API says it too.
        connect: in memory only: streams to the API.
        dial: in memory only: transports to the ingress.
    """

    def __init__(
        self,
        *,
        wall: Callable[[], float],
        simulated_time: bool,
        api_host: str,
        ingress_host: str,
        api_door: _Door | None = None,
        ingress_door: _Door | None = None,
    ) -> None:
        self.servers = Authority("ngrokd lab servers")
        self.clients = Authority("ngrokd lab clients")
        self._api_door = api_door
        self._ingress_door = ingress_door
        self._ingress_host = ingress_host
        api_port = 443 if api_door is None else api_door.port
        ingress_port = 443 if ingress_door is None else ingress_door.port
        self.api_url = f"https://{_bracketed(api_host)}{'' if api_port == 443 else f':{api_port}'}"
        self.ingress_address = f"{_bracketed(ingress_host)}:{ingress_port}"
        self.plane = ControlPlane(
            self.clients,
            wall=wall,
            identity=self.servers.issue([api_host]),
            ingress_endpoint=self.ingress_address,
        )
        self.ingress = Ingress(self.clients, self.identity("good"), wall=wall, simulated_time=simulated_time)
        self.connect: Callable[[str, int], Awaitable[Stream]] | None = None
        self.dial: Callable[[str, int], Awaitable[Transport]] | None = None

    # -- endpoints ---------------------------------------------------------------------------------------------

    def add_endpoint(self, url: str, backend: Backend | str, fields: Mapping[str, object] | None = None) -> str:
        """Bind an endpoint and put a back end behind it. Returns its id.

        Args:
            url: `http://name`, `https://name`, `tcp://name:port`, `tls://name:port`.
            backend: a back end, or the name of one (see `ngrokd.lab.backends.make_backend`).
            fields: more of the API's object.

        Raises:
            ValueError: no host or port in the URL, or no such back end.
        """
        host, port, scheme = _parts(url)
        if isinstance(backend, str):
            backend = make_backend(backend)
        endpoint_id = self.plane.add_endpoint(url, fields=fields)
        self.ingress.add_route(host, port, backend, endpoint_id=endpoint_id, proto=scheme)
        return endpoint_id

    def add_demo_endpoints(self) -> None:
        """Bind DEMO_ENDPOINTS."""
        for url, backend, _ in DEMO_ENDPOINTS:
            self.add_endpoint(url, backend)

    def remove_endpoint(self, url: str) -> int:
        """Unbind all endpoints with this URL, and take away what is behind; live flows go on. Returns how many went."""
        host, port, _ = _parts(url)
        self.ingress.routes.pop((host, port), None)
        return self.plane.remove_endpoint(url)

    def backend(self, host: str, port: int) -> Backend:
        """What stands behind a host and port. Raises KeyError."""
        return self.ingress.routes[host, port].backend

    # -- misfortune --------------------------------------------------------------------------------------------

    def set_api_down(self, down: bool) -> None:
        """Refuse connections to the API and end those there are; or be there again."""
        if self._api_door is not None:
            self._api_door.set_open(not down)
        self.plane.set_down(down)

    def set_ingress_down(self, down: bool) -> None:
        """Refuse new connections to the ingress; those there are go on."""
        if self._ingress_door is not None:
            self._ingress_door.set_open(not down)
        self.ingress.set_down(down)

    def identity(self, what: Presented) -> Identity:
        """A new certificate for the ingress, good or wrong in one way."""
        host = self._ingress_host
        if what == "foreign":
            return Authority("somebody else").issue([host])
        if what == "wrong-name":
            return self.servers.issue(["wrong-name.lab.test"])
        if what == "expired":
            return self.servers.issue([host], validity=Validity.EXPIRED)
        if what == "not-yet":
            return self.servers.issue([host], validity=Validity.NOT_YET)
        return self.servers.issue([host], present_intermediate=what != "no-intermediate")

    def present(self, what: Presented) -> None:
        """Let the ingress show such a certificate from the next connection on."""
        self.ingress.set_identity(self.identity(what))

    # -- for the daemon ----------------------------------------------------------------------------------------

    def config(self, directory: Path, *, trust: Trust = "ca_file", settings: Settings | None = None) -> str:
        """The TOML text that makes a daemon use this lab; state, socket and CA file lie in `directory`.

        Args:
            directory: need not exist yet; see `write_config`.
            trust: how the daemon shall come to trust the ingress.
            settings: section to key to value, on top and last; a value of None takes a key away.
        """
        sections: dict[str, dict[str, object]] = {
            "api": {
                "url": self.api_url,
                "key": DEFAULT_KEY,
                "ca_file": str(directory / "lab-ca.pem"),
                "poll_interval": "1s",
            },
            "ingress": {"address": self.ingress_address},
            "state": {"directory": str(directory / "state")},
            "control": {"socket": str(directory / "ngrokd.sock")},
        }
        if trust == "ca_file":
            sections["ingress"]["ca_file"] = str(directory / "lab-ca.pem")
        elif trust == "fingerprint":
            sections["ingress"]["ca_fingerprints"] = [self.servers.intermediate_fingerprint]
        for section, values in (settings or {}).items():
            sections.setdefault(section, {}).update(values)
        return "\n".join(_toml_section(name, values) for name, values in sections.items())

    def write_config(self, directory: Path, *, trust: Trust = "ca_file", settings: Settings | None = None) -> Path:
        """Write the configuration and the CA file into `directory`, which is made private. Returns config.toml."""
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        (directory / "state").mkdir(mode=0o700, exist_ok=True)
        (directory / "lab-ca.pem").write_bytes(self.servers.root_pem)
        path = directory / "config.toml"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(self.config(directory, trust=trust, settings=settings))
        return path


@asynccontextmanager
async def open_lab(*, host: str = "127.0.0.1", wall: Callable[[], float] = time.time) -> AsyncIterator[Lab]:
    """A lab on two TCP ports of `host`, which the kernel chooses. At the end every connection is reset.

    Args:
        host: a numeric address of this machine, named in the certificates.
        wall: dates certificates; the machine's clock checks them.
    """
    with _Door(host) as api_door, _Door(host) as ingress_door:
        lab = Lab(
            wall=wall,
            simulated_time=False,
            api_host=host,
            ingress_host=host,
            api_door=api_door,
            ingress_door=ingress_door,
        )

        async def serve_api(sock: socket.socket) -> None:
            await lab.plane.serve(trio.SocketStream(trio.socket.from_stdlib_socket(sock)))

        async def serve_ingress(sock: socket.socket) -> None:
            await lab.ingress.serve(SocketTransport(sock))

        async with trio.open_nursery() as nursery:  # a child's error is a bug of the lab, and ends it
            nursery.start_soon(api_door.run, serve_api)
            nursery.start_soon(ingress_door.run, serve_ingress)
            yield lab
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def open_memory_lab(
    *,
    wall: Callable[[], float],
    api_host: str = "api.lab.test",
    ingress_host: str = "198.51.100.7",
    simulated_time: bool = True,
) -> AsyncIterator[Lab]:
    """A lab without sockets: use its `connect` and `dial`. No thread, no file, no wait outside of Trio's clock.

    Args:
        wall: the wall clock that dates client certificates, and checks them.
        api_host: the API's name; `connect` takes any.
        ingress_host: an address by default, so that nobody need resolve a name.
        simulated_time: `wall` is not the machine's clock.
    """
    lab = Lab(wall=wall, simulated_time=simulated_time, api_host=api_host, ingress_host=ingress_host)
    async with trio.open_nursery() as nursery:
        lab.connect = lab.plane.connector(nursery)
        lab.dial = lab.ingress.dialer(nursery)
        yield lab
        nursery.cancel_scope.cancel()


class _Door:
    """A listening socket that can be shut and opened again at the same port."""

    def __init__(self, host: str) -> None:
        self.host = host
        self.port = 0
        self._socket: socket.socket | None = None
        self._opened = trio.Event()
        self.set_open(True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.set_open(False)

    def set_open(self, wanted: bool) -> None:
        if wanted and self._socket is None:
            family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
            listener = socket.socket(family, socket.SOCK_STREAM)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setblocking(False)
            listener.bind((self.host, self.port))
            listener.listen(4096)
            self.port = listener.getsockname()[1]
            self._socket = listener
            self._opened.set()
        elif not wanted and self._socket is not None:
            listener, self._socket = self._socket, None
            self._opened = trio.Event()
            with suppress(RuntimeError):  # outside of Trio nobody can be waiting for it
                trio.lowlevel.notify_closing(listener)
            listener.close()

    async def run(self, serve: Callable[[socket.socket], Awaitable[None]]) -> None:
        """Serve each connection in a task of its own."""
        async with trio.open_nursery() as nursery:
            while True:
                await self._opened.wait()
                listener = self._socket
                assert listener is not None
                with suppress(trio.ClosedResourceError):
                    await trio.lowlevel.wait_readable(listener)
                    await self._accept(listener, serve, nursery)

    async def _accept(
        self, listener: socket.socket, serve: Callable[[socket.socket], Awaitable[None]], nursery: trio.Nursery
    ) -> None:
        while listener is self._socket:
            try:
                sock, _ = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                    await trio.sleep(0.1)  # the backlog holds them until there is room again
                return
            nursery.start_soon(serve, sock)


def _parts(url: str) -> tuple[str, int, str]:
    parts = urlsplit(url)
    port = parts.port or DEFAULT_PORTS.get(parts.scheme)
    if not parts.hostname or not port:
        raise ValueError(f"{url!r} names no host and port; write for example tcp://name.demo:5432")
    return parts.hostname, port, parts.scheme


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _toml_section(name: str, values: Mapping[str, object]) -> str:
    lines = [f"{key} = {_toml(value)}\n" for key, value in values.items() if value is not None]
    return f"[{name}]\n" + "".join(lines)


def _toml(value: Any) -> str:  # Any: checked here
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))} = {_toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(_toml(inner) for inner in value) + "]"
    if isinstance(value, Path):
        value = str(value)
    return json.dumps(value)  # strings, numbers and booleans are written alike


__all__ = [
    "Lab",
    "open_lab",
    "open_memory_lab",
    "DEMO_ENDPOINTS",
    "Presented",
    "Trust",
    "Settings",
]
