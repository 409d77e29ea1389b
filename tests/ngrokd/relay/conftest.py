"""A throw-away certification authority (root, intermediate, leaf; P-256) and the contexts made from it."""

from __future__ import annotations

import datetime as dt
import hashlib
import ipaddress
import socket
import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tun.poller import Poller

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey

HOST = "ingress.example"
DAY = dt.timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate with its key."""

    certificate: x509.Certificate
    key: PrivateKey

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.DER)

    @property
    def fingerprint(self) -> str:
        """SHA-256, as in the configuration."""
        return hashlib.sha256(self.der).hexdigest()

    @property
    def key_pem(self) -> bytes:
        return self.key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.TraditionalOpenSSL,
            serialization.NoEncryption(),
        )


class Authority:
    """Issues what a test asks for, good or bad."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.root = self.issue("Root CA", ca=True)
        self.intermediate = self.issue("Intermediate CA", by=self.root, ca=True)
        self.leaf = self.issue(HOST, by=self.intermediate, names=[HOST])
        self.client = self.issue("operator", by=self.root, client=True)
        self.client_root = self.root

    def issue(
        self,
        name: str,
        *,
        by: Issued | None = None,
        ca: bool = False,
        names: Sequence[str] = (),
        client: bool = False,
        days: tuple[float, float] = (-1, 30),
        key: PrivateKey | None = None,
        eku: x509.ObjectIdentifier | None = None,
    ) -> Issued:
        """Make a certificate valid from days[0] to days[1], counted from now; `by` None signs itself."""
        key = key or ec.generate_private_key(ec.SECP256R1())
        now = dt.datetime.now(dt.UTC)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(by.certificate.subject if by else subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + days[0] * DAY)
            .not_valid_after(now + days[1] * DAY)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if names:
            alternatives: list[x509.GeneralName] = []
            for each in names:
                try:
                    alternatives.append(x509.IPAddress(ipaddress.ip_address(each)))
                except ValueError:
                    alternatives.append(x509.DNSName(each))
            builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        if not ca:
            usage = eku or (ExtendedKeyUsageOID.CLIENT_AUTH if client else ExtendedKeyUsageOID.SERVER_AUTH)
            builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        return Issued(builder.sign(by.key if by else key, hashes.SHA256()), key)

    def server_context(
        self,
        leaf: Issued | None = None,
        *,
        chain: Sequence[Issued] | None = None,
        version: ssl.TLSVersion | None = None,
        client_required: bool = False,
        weak: bool = False,
    ) -> ssl.SSLContext:
        """Make a server's context; `chain` is what is sent behind the leaf (the intermediate, unless given)."""
        leaf = leaf or self.leaf
        chain = [self.intermediate] if chain is None else chain
        path = self.directory / f"{x509.random_serial_number():x}.pem"
        path.write_bytes(leaf.key_pem + leaf.pem + b"".join(each.pem for each in chain))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        if weak:
            context.set_ciphers("ALL:@SECLEVEL=0")
        context.load_cert_chain(path)
        if version is not None:
            context.minimum_version = context.maximum_version = version
        if client_required:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(cadata=self.client_root.pem.decode())
        return context

    def client_context(self, *, anchors: Sequence[Issued] | None = None) -> ssl.SSLContext:
        """Make a client's context that trusts the root, unless told otherwise."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        for anchor in [self.root] if anchors is None else anchors:
            context.load_verify_locations(cadata=anchor.pem.decode())
        return context


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


class FakeFlow:
    """An app's connection as the relay sees it, with both windows bounded, and the app at the other end of it.

    The methods named `app_*` are the app: it writes (and is held back by what the sink does not take), ends, resets,
    reads when it likes.
    """

    def __init__(self, *, receive_buffer: int = 64 * 1024, send_buffer: int = 64 * 1024) -> None:
        self.failure = ""
        self.ending = ""  # "", "closed" or "aborted"
        self._sink: Callable[[Sequence[memoryview]], int] | None = None
        self.refused = False
        self._from_app = bytearray()
        self._receive_buffer = receive_buffer
        self._app_eof = False
        self._to_app: list[memoryview] = []
        self._copies: list[bytes] = []  # of what was given when it was given: it must not change while we hold it
        self._send_buffer = send_buffer
        self.rationed = False
        self._waiting_for_app = 0  # bytes sent and not read by the app
        self._our_eof = False
        self._changed = trio.Event()
        self.app_received = bytearray()
        self.bytes_from_app = 0
        self.bytes_to_app = 0
        self.eof_order: list[str] = []
        self._on_change: Callable[[], object] | None = None
        self._short = False

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def _check(self) -> None:
        if self.failure:
            raise trio.BrokenResourceError(f"the flow is over: {self.failure}")
        assert self.ending == "", "used after its end"

    # the relay's side

    def attach(
        self, sink: Callable[[Sequence[memoryview]], int] | None, on_change: Callable[[], object] | None = None
    ) -> None:
        self._sink = sink
        self._on_change = on_change
        self.refused = False
        if sink is not None:
            self.offer()

    def _tell(self) -> None:
        if self._on_change is not None:
            self._on_change()

    def offer(self) -> None:
        self.refused = False
        if self._sink is not None and not self.failure and self._from_app:
            data = bytes(self._from_app)
            middle = len(data) // 2
            views = [memoryview(data)[:middle], memoryview(data)[middle:]]
            taken = self._sink([view for view in views if view])
            assert 0 <= taken <= len(data)
            del self._from_app[:taken]
            self.bytes_from_app += taken
            self.refused = taken < len(data)
        self._notify()
        if self.refused or self.failure or self.ended:
            self._tell()

    @property
    def ended(self) -> bool:
        return self._app_eof and not self._from_app

    @property
    def has_room(self) -> bool:
        return self._waiting_for_app < self._send_buffer

    def send_nowait(self, data: memoryview, /) -> int:
        self._check()
        assert not self._our_eof, "bytes behind our FIN"
        taken = min(len(data), self._send_buffer - self._waiting_for_app)
        if taken:
            self._to_app.append(data[:taken])
            self._copies.append(bytes(data[:taken]))
            self._waiting_for_app += taken
            self.bytes_to_app += taken
            self._notify()
        self._short = taken < len(data)
        return taken

    @property
    def send_space(self) -> int:
        return self._send_buffer - self._waiting_for_app

    def want_room(self) -> None:
        self._short = True

    def send_eof_nowait(self) -> None:
        self._check()
        if not self._our_eof:
            self._our_eof = True
            self.eof_order.append("to app")
            self._notify()

    async def wait_delivered(self) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self.failure and self._waiting_for_app:
            await self._changed.wait()

    def abort(self) -> None:
        if not self.failure and not self.ending:
            self.ending = "aborted"
            self.failure = "aborted"
            self._to_app.clear()
            self._notify()

    async def aclose(self) -> None:
        if not self.ending and not self.failure:
            self.ending = "closed"
            self._notify()
        await trio.lowlevel.checkpoint()

    # the app's side

    async def app_send(self, data: bytes) -> None:
        """Write everything, as far and as fast as the window allows."""
        await trio.lowlevel.checkpoint()
        while data:
            if self.failure:
                raise ConnectionResetError(self.failure)
            room = self._receive_buffer - len(self._from_app)
            if room:
                self._from_app += data[:room]
                data = data[room:]
                if not self.refused:  # as in a packet batch
                    self.offer()
                self._notify()
            else:
                await self._changed.wait()

    async def app_send_eof(self) -> None:
        await trio.lowlevel.checkpoint()
        self._app_eof = True
        self.eof_order.append("from app")
        self._notify()
        if self.ended:
            self._tell()

    def app_reset(self) -> None:
        self.failure = "reset"
        self._notify()
        self._tell()

    def app_read_nowait(self) -> bytes:
        """Acknowledge and read all that waits."""
        data = b"".join(self._to_app)
        assert data == b"".join(self._copies), "a view changed after it was given to the flow"
        self._to_app.clear()
        self._copies.clear()
        self._waiting_for_app = 0
        self.app_received += data
        self._notify()
        if self._short:
            self._short = False
            self._tell()
        return data

    async def app_read(self) -> bytes:
        """Read: b"" at FIN. Raises ConnectionResetError."""
        await trio.lowlevel.checkpoint()
        while True:
            if self._to_app:
                return self.app_read_nowait()
            if self.failure:
                raise ConnectionResetError(self.failure)
            if self._our_eof:
                return b""
            await self._changed.wait()

    async def app_read_all(self) -> bytes:
        """Read until FIN."""
        while await self.app_read():
            pass
        return bytes(self.app_received)


@pytest.fixture
def poller() -> Iterator[Poller]:
    """Not running: transports in memory need none."""
    poller = Poller()
    yield poller
    poller.close()


class FakeRequest:
    """A SYN that remembers its one decision."""

    def __init__(self, destination: tuple[str, int] = ("10.107.0.2", 80), flow: FakeFlow | None = None) -> None:
        self.source = ("10.107.0.1", 40000)
        self.destination = destination
        self.flow = flow or FakeFlow()
        self.decisions: list[str] = []

    def accept(self) -> FakeFlow:
        self.decisions.append("accepted")
        return self.flow

    def refuse(self) -> None:
        self.decisions.append("refused")


@pytest.fixture
def make_flow() -> type[FakeFlow]:
    return FakeFlow


@pytest.fixture
def make_request() -> type[FakeRequest]:
    return FakeRequest


@pytest.fixture
def socket_pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two connected TCP sockets on loopback."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        two, _ = listener.accept()
    with one, two:
        yield one, two
