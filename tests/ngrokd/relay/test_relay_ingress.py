"""Opening streams: who is believed, what is sent before, how long it may take, and what is left when it fails."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import ssl
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from ngrokd.endpoints import Credentials
from ngrokd.errors import BindingRefused, IngressUnreachable, IngressUntrusted, RelayError, StreamTruncated
from ngrokd.relay.binding import BadBindingHeader
from ngrokd.relay.ingress import Ingress
from ngrokd.relay.tls import TlsSession, TlsStream
from ngrokd.relay.transport import SocketTransport, Transport, memory_transport_pair

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from tests.ngrokd.relay.conftest import Authority, Issued

HOST = "ingress.example"
REQUEST = bytes.fromhex("0c000a0764622e70726f6410b82a")
OK = bytes.fromhex("0f000a0765705f32616263120468747470")
NO = bytes.fromhex("21001a0d4552525f4e47524f4b5f37303622106e6f207375636820656e64706f696e74")


@dataclass
class Server:
    """The other side of one connection: records what was said to it, byte by byte."""

    transport: Transport
    plaintext: bytearray = field(default_factory=bytearray)
    outcome: str = ""


@dataclass
class Lab:
    """An ingress under test, and everything that answers its dials, over memory."""

    authority: Authority
    nursery: trio.Nursery
    ingress: Ingress = field(init=False)
    context: ssl.SSLContext = field(init=False)
    servers: list[Server] = field(default_factory=list)
    ours: list[Transport] = field(default_factory=list)
    dialled: list[tuple[str, float]] = field(default_factory=list)
    found: list[bytes] = field(default_factory=list)
    answer: bytes = OK
    behave: Callable[[Server], Awaitable[None]] | None = None
    dial_hook: Callable[[str], Awaitable[None]] | None = None

    def __post_init__(self) -> None:
        self.context = self.authority.server_context(client_required=True)
        self.ingress = self.make_ingress()

    def make_ingress(
        self, *, connect_timeout_s: float = 10.0, dials: int = 64, refused_networks: tuple[str, ...] = ()
    ) -> Ingress:
        self.ingress = Ingress(
            self.dial,
            connect_timeout_s=connect_timeout_s,
            dials=dials,
            refused_networks=refused_networks,
            on_ca_found=self.found.append,
        )
        self.ingress.set_addresses(HOST, 443, ["203.0.113.7"])
        self.ingress.set_anchors(False, self.authority.root.pem)
        self.ingress.set_credentials(Credentials(self.authority.client.key_pem, self.authority.client.pem))
        return self.ingress

    async def dial(self, address: str, port: int) -> Transport:
        assert port == 443
        self.dialled.append((address, trio.current_time()))
        await trio.lowlevel.checkpoint()
        if self.dial_hook is not None:
            await self.dial_hook(address)
        ours, theirs = memory_transport_pair()
        self.ours.append(ours)
        server = Server(theirs)
        self.servers.append(server)
        self.nursery.start_soon(self.serve, server)
        return ours

    async def serve(self, server: Server) -> None:
        try:
            await (self.behave or self.answer_header)(server)
        except (ssl.SSLError, StreamTruncated) as error:
            server.outcome = getattr(error, "reason", "") or str(error)
            server.transport.close()

    async def handshake(self, server: Server) -> TlsStream:
        stream = TlsStream(server.transport, TlsSession(self.context, server_side=True))
        await stream.handshake()
        server.outcome = "handshake"
        return stream

    async def answer_header(self, server: Server) -> None:
        stream = await self.handshake(server)
        while len(server.plaintext) < len(REQUEST):
            view = await stream.receive_view()
            if not view:
                return
            server.plaintext += view
        stream.send_nowait([self.answer])
        await stream.drain()
        while view := await stream.receive_view():
            server.plaintext += view
        await stream.aclose()

    async def open(self) -> TlsStream:
        return (await self.ingress.open("db.prod", 5432)).stream

    @property
    def plaintext(self) -> bytes:
        """Every application byte that any server was sent."""
        return b"".join(bytes(server.plaintext) for server in self.servers)

    def left_open(self) -> int:
        """How many of our ends are still open."""
        count = 0
        for transport in self.ours:
            try:
                transport.send_nowait(b"")
            except OSError as error:
                count += error.errno != errno.EBADF
            else:
                count += 1
        return count


@pytest.fixture
async def lab(authority: Authority) -> AsyncIterator[Lab]:
    async with trio.open_nursery() as nursery:
        yield Lab(authority, nursery)
        nursery.cancel_scope.cancel()


def servers_for(lab: Lab, leaf: Issued, *chain: Issued) -> ssl.SSLContext:
    return lab.authority.server_context(leaf, chain=chain, client_required=True)


# -- the good case


async def test_a_stream_to_an_endpoint_is_opened(lab: Lab) -> None:
    """Client certificate presented, SNI and name verified, header byte for byte, answer told."""
    names: list[str | None] = []
    lab.context.sni_callback = lambda tls, name, context: names.append(name)

    opened = await lab.ingress.open("DB.prod", 5432)

    assert (opened.endpoint_id, opened.proto, opened.notices) == ("ep_2abc", "http", ())
    assert lab.servers[0].plaintext == REQUEST
    assert names == [HOST]
    assert opened.stream.ssl_object.version() == "TLSv1.3"
    assert opened.stream.ssl_object.selected_alpn_protocol() is None
    assert (lab.ingress.dialing, lab.ingress.waiting) == (0, 0)
    opened.stream.abort()


@pytest.mark.parametrize("piece", [1, 2, 3])
async def test_the_answer_may_come_in_pieces_and_with_bytes_of_the_application(lab: Lab, piece: int) -> None:
    """A server that speaks first may do so in the packet of the header; those bytes are received first."""

    async def drips(server: Server) -> None:
        stream = await lab.handshake(server)
        data = OK + b"220 ready"
        for start in range(0, len(data), piece):
            stream.send_nowait([data[start : start + piece]])
            await trio.testing.wait_all_tasks_blocked()
        await stream.send_eof()

    lab.behave = drips
    stream = await lab.open()
    received = bytearray()
    while view := await stream.receive_view():
        received += view

    assert received == b"220 ready"
    stream.abort()


async def test_notices_are_told_and_printable(lab: Lab) -> None:
    lab.answer = bytes.fromhex("10000a0165") + b"\x2a\x0b\x0a\x09hi\x1b[31m\r\n" + b""
    lab.answer = len(lab.answer[2:]).to_bytes(2, "little") + lab.answer[2:]
    opened = await lab.ingress.open("db.prod", 5432)

    assert opened.notices == ("hi\\x1b[31m\\r\\n",)
    opened.stream.abort()


# -- refusals of the ingress


async def test_a_refusal_is_told_with_its_code(lab: Lab) -> None:
    lab.answer = NO
    with pytest.raises(BindingRefused, match=r"refused db.prod:5432: ERR_NGROK_706: no such endpoint") as caught:
        await lab.open()

    assert caught.value.code == "ERR_NGROK_706"
    assert lab.left_open() == 0


async def test_what_a_refusal_says_is_made_printable(lab: Lab) -> None:
    """It ends up in logs and on terminals."""
    body = b"\x1a\x04\x1b[2J\x22\x03a\nb"
    lab.answer = len(body).to_bytes(2, "little") + body
    with pytest.raises(BindingRefused) as caught:
        await lab.open()

    assert caught.value.code == "\\x1b[2J"
    assert str(caught.value).isprintable()


async def test_garbage_is_not_an_answer(lab: Lab) -> None:
    lab.answer = b"HTTP/1.1 400 Bad Request\r\n"
    with pytest.raises(BadBindingHeader, match="claims 21576 bytes"):
        await lab.open()
    assert lab.left_open() == 0


async def ends_silently(lab: Lab, server: Server) -> None:
    stream = await lab.handshake(server)
    await stream.receive_view()
    await stream.aclose()


async def cuts_silently(lab: Lab, server: Server) -> None:
    stream = await lab.handshake(server)
    await stream.receive_view()
    server.transport.shutdown_write()


async def resets_silently(lab: Lab, server: Server) -> None:
    stream = await lab.handshake(server)
    await stream.receive_view()
    stream.abort()


@pytest.mark.parametrize("behave", [ends_silently, cuts_silently, resets_silently])
async def test_silence_instead_of_an_answer_hints_at_the_certificate(
    lab: Lab, behave: Callable[[Lab, Server], Awaitable[None]]
) -> None:
    """That is how muxes treat a certificate that another one has signed."""
    lab.behave = lambda server: behave(lab, server)
    with pytest.raises(BindingRefused, match="probably rejected our client certificate") as caught:
        await lab.open()

    assert "refresh-cert" in caught.value.remedy
    assert lab.left_open() == 0


async def test_an_answer_that_is_cut_is_not_about_certificates(lab: Lab) -> None:
    async def cuts(server: Server) -> None:
        stream = await lab.handshake(server)
        await stream.receive_view()
        stream.send_nowait([OK[:7]])
        server.transport.shutdown_write()

    lab.behave = cuts
    with pytest.raises(IngressUnreachable, match="within its binding header"):
        await lab.open()


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])
async def test_a_rejected_client_certificate_is_called_that(lab: Lab, version: ssl.TLSVersion) -> None:
    """TLS 1.2 says it within the handshake, TLS 1.3 at the first read after it."""
    lab.context = lab.authority.server_context(version=version, client_required=True)
    stranger = lab.authority.issue("stranger", client=True)
    lab.ingress.set_credentials(Credentials(stranger.key_pem, stranger.pem))

    with pytest.raises(BindingRefused, match=r"rejected our client certificate") as caught:
        await lab.open()

    assert "unknown ca" in str(caught.value)
    assert lab.plaintext == b""
    assert lab.left_open() == 0


# -- who is not believed


def bad_certificates(authority: Authority) -> dict[str, tuple[ssl.SSLContext, str]]:
    """Ways of not being the ingress, each with the words of its refusal; two more need no certificate."""
    issue = authority.issue
    intermediate = authority.intermediate
    stranger = issue("Another CA", ca=True)
    weak = rsa.generate_private_key(65537, 1024)

    def context(leaf: Issued, *chain: Issued) -> ssl.SSLContext:
        return authority.server_context(leaf, chain=chain or [intermediate])

    return {
        "expired": (context(issue(HOST, by=intermediate, names=[HOST], days=(-20, -1))), "expired"),
        "not yet valid": (context(issue(HOST, by=intermediate, names=[HOST], days=(1, 20))), "not yet valid"),
        "wrong name": (context(issue("x", by=intermediate, names=["other.example"])), "not valid for"),
        "self-signed": (context(issue(HOST, names=[HOST])), "self-signed|self signed"),
        "wrong CA": (context(issue(HOST, by=stranger, names=[HOST]), stranger), "self-signed|self signed"),
        "wrong use": (
            context(issue(HOST, by=intermediate, names=[HOST], eku=ExtendedKeyUsageOID.CLIENT_AUTH)),
            "purpose",
        ),
        "weak key": (weak_context(authority, weak), "too weak"),
        "chain missing": (authority.server_context(chain=[]), "unable to get local issuer"),
        "name in CN only": (context(issue(HOST, by=intermediate)), "not valid for"),
        "wildcard mismatch": (context(issue("x", by=intermediate, names=["*.ingress.example"])), "not valid for"),
    }


def weak_context(authority: Authority, key: rsa.RSAPrivateKey) -> ssl.SSLContext:
    leaf = authority.issue(HOST, by=authority.intermediate, names=[HOST], key=key)
    return authority.server_context(leaf, weak=True)


BAD = [
    "expired",
    "not yet valid",
    "wrong name",
    "self-signed",
    "wrong CA",
    "wrong use",
    "weak key",
    "chain missing",
    "name in CN only",
    "wildcard mismatch",
]


@pytest.mark.parametrize("case", BAD)
async def test_a_bad_certificate_is_refused_before_anything_is_sent(lab: Lab, case: str) -> None:
    """Distinct reasons, and not one byte behind the handshake, with or without a pinned fingerprint in the chain."""
    lab.context, says = bad_certificates(lab.authority)[case]
    with pytest.raises(IngressUntrusted, match=says) as caught:
        await lab.open()

    assert 'it presented subject "CN=' in str(caught.value)
    assert "ingress.ca_file" in caught.value.remedy
    assert lab.plaintext == b""
    assert lab.left_open() == 0
    assert "handshake" not in {server.outcome for server in lab.servers}


async def test_old_tls_is_refused(lab: Lab) -> None:
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        lab.context = lab.authority.server_context(version=ssl.TLSVersion.TLSv1_1)
    lab.context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.raises(IngressUntrusted, match="does not speak the TLS") as caught:
        await lab.open()
    assert "unsupported protocol" in str(caught.value) or "version" in str(caught.value)
    assert lab.plaintext == b""


async def test_plaintext_is_refused(lab: Lab) -> None:
    async def speaks_http(server: Server) -> None:
        server.transport.send_nowait(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    lab.behave = speaks_http
    with pytest.raises(IngressUntrusted, match=r"does not speak the TLS.*wrong version number"):
        await lab.open()
    assert lab.left_open() == 0


async def test_there_is_no_trust_by_default_in_what_nobody_gave(lab: Lab) -> None:
    """The private CA is no system root."""
    lab.ingress.set_anchors(True, b"")
    with pytest.raises(IngressUntrusted, match=r"self-signed|self signed|unable to get"):
        await lab.open()


# -- the CA that is known by its fingerprint


def pinned(issued: Issued) -> str:
    return ":".join(re.findall("..", issued.fingerprint.upper()))


async def test_an_intermediate_may_be_the_anchor(lab: Lab) -> None:
    """ngrok's CA is an intermediate; its root is published nowhere."""
    assert lab.ingress.set_anchors(False, lab.authority.intermediate.pem) == 1

    (await lab.open()).abort()

    assert len(lab.dialled) == 1


async def test_a_presented_ca_with_a_pinned_fingerprint_is_verified_against(lab: Lab) -> None:
    """Found once, reported once; afterwards dials go straight."""
    lab.ingress.set_anchors(False, b"", [pinned(lab.authority.intermediate)])

    (await lab.open()).abort()

    assert len(lab.dialled) == 3  # failed, looked, verified
    assert lab.found == [lab.authority.intermediate.pem]
    assert [server.outcome == "handshake" for server in lab.servers] == [False, False, True]

    (await lab.open()).abort()

    assert len(lab.dialled) == 4
    assert len(lab.found) == 1


async def test_what_was_found_serves_other_credentials_too(lab: Lab) -> None:
    lab.ingress.set_anchors(False, b"", [pinned(lab.authority.intermediate)])
    (await lab.open()).abort()
    renewed = lab.authority.issue("operator", by=lab.authority.root, client=True)
    lab.ingress.set_credentials(Credentials(renewed.key_pem, renewed.pem))

    (await lab.open()).abort()

    assert len(lab.dialled) == 4


async def test_a_pin_that_is_taken_back_counts_no_more(lab: Lab) -> None:
    lab.ingress.set_anchors(False, b"", [pinned(lab.authority.intermediate)])
    (await lab.open()).abort()
    lab.ingress.set_anchors(False, b"", [])

    with pytest.raises(IngressUntrusted):
        await lab.open()


async def test_a_pinned_ca_that_vouches_for_another_leaf_proves_nothing(lab: Lab) -> None:
    """Anybody can present ngrok's public certificate behind his own."""
    thief = lab.authority.issue("Intermediate CA", ca=True)
    leaf = lab.authority.issue(HOST, by=thief, names=[HOST])
    lab.context = servers_for(lab, leaf, lab.authority.intermediate)
    lab.ingress.set_anchors(False, b"", [pinned(lab.authority.intermediate)])

    with pytest.raises(IngressUntrusted):
        await lab.open()

    assert lab.found == []
    assert lab.plaintext == b""


async def test_a_pinned_ca_that_has_expired_is_refused(lab: Lab) -> None:
    old = lab.authority.issue("Old CA", by=lab.authority.root, ca=True, days=(-20, -1))
    lab.context = servers_for(lab, lab.authority.issue(HOST, by=old, names=[HOST]), old)
    lab.ingress.set_anchors(False, b"", [pinned(old)])

    with pytest.raises(IngressUntrusted, match="expired"):
        await lab.open()

    assert lab.found == []


async def test_under_a_pinned_ca_the_name_is_still_checked(lab: Lab) -> None:
    lab.context = servers_for(
        lab,
        lab.authority.issue("x", by=lab.authority.intermediate, names=["other.example"]),
        lab.authority.intermediate,
    )
    lab.ingress.set_anchors(False, b"", [pinned(lab.authority.intermediate)])

    with pytest.raises(IngressUntrusted, match=r"not valid for 'ingress.example'"):
        await lab.open()
    assert lab.found == []


async def test_a_hundred_flows_look_once(lab: Lab, autojump_clock: trio.testing.MockClock) -> None:
    """A failure answers for the flows that come within a second, so that nothing is hammered."""
    lab.ingress.set_anchors(False, b"", ["00" * 32])
    outcomes: list[str] = []

    async def opens() -> None:
        with pytest.raises(IngressUntrusted):
            await lab.open()
        outcomes.append("refused")

    async with trio.open_nursery() as nursery:
        for _ in range(100):
            nursery.start_soon(opens)
    assert len(outcomes) == 100
    assert len(lab.dialled) <= 64 + 1
    dialled = len(lab.dialled)

    await opens()
    assert len(lab.dialled) == dialled

    await trio.sleep(1.01)
    await opens()
    assert len(lab.dialled) == dialled + 2


async def test_flows_that_fail_together_find_the_ca_together(lab: Lab) -> None:
    lab.ingress.set_anchors(False, b"", [pinned(lab.authority.intermediate)])
    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(lab.open)

    assert len(lab.found) == 1
    assert len(lab.dialled) == 20 + 1 + 20


async def test_new_anchors_are_believed_at_once(lab: Lab) -> None:
    """Whoever has just corrected the configuration does not want to hear the old answer."""
    lab.ingress.set_anchors(False, b"")
    with pytest.raises(IngressUntrusted):
        await lab.open()
    lab.ingress.set_anchors(False, lab.authority.root.pem)

    (await lab.open()).abort()


# -- connecting


async def test_addresses_are_tried_in_order_at_once_when_one_fails(lab: Lab) -> None:
    async def refuses(address: str) -> None:
        if address != "203.0.113.9":
            raise ConnectionRefusedError(111, "Connection refused")

    lab.dial_hook = refuses
    lab.ingress.set_addresses(HOST, 443, ["203.0.113.7", "203.0.113.8", "203.0.113.9"])

    (await lab.open()).abort()
    assert [address for address, _ in lab.dialled] == ["203.0.113.7", "203.0.113.8", "203.0.113.9"]

    (await lab.open()).abort()
    assert len(lab.dialled) == 4  # who answered last is asked first


async def test_a_slow_address_is_overtaken(lab: Lab, autojump_clock: trio.testing.MockClock) -> None:
    """A quarter of a second each, and the slow dial is given up when another one has won."""
    given_up: list[str] = []

    async def hangs(address: str) -> None:
        if address != "203.0.113.9":
            try:
                await trio.sleep_forever()
            finally:
                given_up.append(address)

    lab.dial_hook = hangs
    lab.ingress.set_addresses(HOST, 443, ["203.0.113.7", "203.0.113.8", "203.0.113.9"])
    begun = trio.current_time()

    (await lab.open()).abort()

    assert [round(when - begun, 3) for _, when in lab.dialled] == [0, 0.25, 0.5]
    assert sorted(given_up) == ["203.0.113.7", "203.0.113.8"]


async def test_two_that_answer_at_once_leave_one_connection(lab: Lab, autojump_clock: trio.testing.MockClock) -> None:
    async def answers_late(address: str) -> None:
        with trio.CancelScope(shield=True):  # like a connect that completes as it is cancelled
            await trio.sleep(0.5 if address == "203.0.113.7" else 0.25)

    lab.dial_hook = answers_late
    lab.ingress.set_addresses(HOST, 443, ["203.0.113.7", "203.0.113.8"])

    stream = await lab.open()

    assert len(lab.ours) == 2
    assert lab.left_open() == 1
    stream.abort()


async def test_an_address_that_changes_during_a_dial_changes_the_next_one(lab: Lab) -> None:
    """Name, port and addresses belong together: the old ones are verified as what they were."""

    async def moves(address: str) -> None:
        if address == "203.0.113.7":
            lab.ingress.set_addresses("other.example", 443, ["203.0.113.8"])

    lab.dial_hook = moves

    (await lab.open()).abort()
    with pytest.raises(IngressUntrusted, match=r"other\.example:443 is not trusted"):
        await lab.open()


async def test_when_all_fail_each_reason_is_told(lab: Lab, autojump_clock: trio.testing.MockClock) -> None:
    async def fails(address: str) -> None:
        raise OSError(113, f"No route to {address[-1]}")

    lab.dial_hook = fails
    lab.ingress.set_addresses(HOST, 443, ["203.0.113.7", "203.0.113.8"])

    with pytest.raises(IngressUnreachable, match=r"203.0.113.7: No route to 7, 203.0.113.8: No route to 8"):
        await lab.open()


@pytest.mark.parametrize(
    "address",
    ["10.107.0.9", "0.0.0.0", "0.1.2.3", "224.0.0.1", "255.255.255.255", "::", "ff02::1", "::ffff:10.107.0.9"],
)
async def test_our_own_networks_are_never_dialled(lab: Lab, address: str) -> None:
    """A connection to our own subnet would come back as a flow, which would dial again."""
    ingress = lab.make_ingress(refused_networks=("10.107.0.0/16",))
    ingress.set_addresses(HOST, 443, [address])
    with pytest.raises(IngressUnreachable, match="never dialled"):
        await lab.open()

    ingress.set_addresses(HOST, 443, [address, "127.0.0.1"])
    (await lab.open()).abort()
    assert [dialled for dialled, _ in lab.dialled] == ["127.0.0.1"]


async def test_what_is_missing_is_named(lab: Lab) -> None:
    ingress = Ingress(lab.dial)
    with pytest.raises(IngressUnreachable, match="no client certificate yet"):
        await ingress.open("db.prod", 5432)
    ingress.set_credentials(Credentials(lab.authority.client.key_pem, lab.authority.client.pem))
    with pytest.raises(IngressUnreachable, match="no address of the ingress"):
        await ingress.open("db.prod", 5432)


async def test_bad_credentials_are_refused_and_the_old_ones_stay(lab: Lab) -> None:
    other = lab.authority.issue("operator", client=True)
    with pytest.raises(RelayError, match="cannot be used: key values mismatch"):
        lab.ingress.set_credentials(Credentials(other.key_pem, lab.authority.client.pem))

    (await lab.open()).abort()


async def test_new_credentials_are_for_new_streams(lab: Lab) -> None:
    """A renewal touches nothing that lives."""
    presented: list[str] = []

    async def names_the_client(server: Server) -> None:
        stream = await lab.handshake(server)
        certificate = stream.ssl_object.getpeercert()
        assert certificate is not None
        presented.append(str(certificate["subject"][0][0][1]))
        stream.send_nowait([OK])
        while view := await stream.receive_view():
            stream.send_nowait([view])

    lab.behave = names_the_client
    old = await lab.open()
    renewed = lab.authority.issue("renewed", by=lab.authority.root, client=True)
    lab.ingress.set_credentials(Credentials(renewed.key_pem, renewed.pem))
    new = await lab.open()

    assert presented == ["operator", "renewed"]
    for stream in (old, new):
        stream.send_nowait([b"alive"])
        echoed = b""
        while len(echoed) < len(REQUEST) + 5:
            echoed += await stream.receive_view()
        assert echoed == REQUEST + b"alive"
    old.abort()
    new.abort()


# -- time


async def never_connects(address: str) -> None:
    await trio.sleep_forever()


async def connects_slowly(address: str) -> None:
    await trio.sleep(4)


async def hangs_at_once(lab: Lab, server: Server) -> None:
    await trio.sleep_forever()


async def hangs_after_handshake(lab: Lab, server: Server) -> None:
    await lab.handshake(server)
    await trio.sleep_forever()


async def drips_its_header(lab: Lab, server: Server) -> None:
    stream = await lab.handshake(server)
    for byte in OK:
        await trio.sleep(1)
        stream.send_nowait([bytes([byte])])
    await trio.sleep_forever()


@pytest.mark.parametrize(
    ("behave", "phase"),
    [
        (None, "connecting"),
        (hangs_at_once, "doing the TLS handshake"),
        (hangs_after_handshake, "waiting for the answer to the binding header"),
        (drips_its_header, "waiting for the answer to the binding header"),
    ],
)
async def test_one_deadline_covers_every_phase(
    lab: Lab,
    autojump_clock: trio.testing.MockClock,
    behave: Callable[[Lab, Server], Awaitable[None]] | None,
    phase: str,
) -> None:
    """Ten seconds in all, and the message says what it waited for."""
    if behave is None:
        lab.dial_hook = never_connects
    else:
        lab.behave = lambda server: behave(lab, server)
    begun = trio.current_time()

    with pytest.raises(IngressUnreachable, match=f"timed out after 10 s while {phase}"):
        await lab.open()

    assert trio.current_time() - begun == pytest.approx(10)
    assert lab.left_open() == 0
    assert lab.ingress.dialing == 0


async def test_dials_in_flight_are_bounded_and_served_in_order(
    lab: Lab, autojump_clock: trio.testing.MockClock
) -> None:
    """Waiting for a slot counts; who came first is dialled first."""
    ingress = lab.make_ingress(dials=2)
    lab.dial_hook = connects_slowly
    done: list[tuple[int, str]] = []

    async def opens(number: int) -> None:
        try:
            (await ingress.open("db.prod", 5432)).stream.abort()
            done.append((number, f"{trio.current_time() - begun:.0f}"))
        except IngressUnreachable as error:
            done.append((number, re.findall(r"while (.*)", str(error))[0]))

    begun = trio.current_time()
    async with trio.open_nursery() as nursery:
        for number in range(8):
            nursery.start_soon(opens, number)
            await trio.testing.wait_all_tasks_blocked()
        assert (ingress.dialing, ingress.waiting) == (2, 6)

    in_time = [(0, "4"), (1, "4"), (2, "8"), (3, "8")]
    assert sorted(done[:4]) == in_time
    assert sorted(done[4:]) == [
        (4, "connecting"),
        (5, "connecting"),
        (6, "waiting for one of the dials in flight to finish"),
        (7, "waiting for one of the dials in flight to finish"),
    ]


class Stop(trio.abc.Instrument):
    """Cancels a scope at the n-th time that a task goes to sleep in it."""

    def __init__(self, scope: trio.CancelScope, task: trio.lowlevel.Task, steps: float) -> None:
        self.scope = scope
        self.task = task
        self.steps = steps
        self.seen = 0

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self.task:
            self.seen += 1
            if self.seen == self.steps:
                self.scope.cancel()


@pytest.mark.parametrize("pin", [False, True], ids=["known", "pinned"])
async def test_cancelled_at_any_checkpoint_nothing_is_left(lab: Lab, pin: bool) -> None:
    """The app may give up whenever it likes."""

    async def run(steps: float) -> int:
        if pin:
            lab.make_ingress().set_anchors(False, b"", [pinned(lab.authority.intermediate)])
        else:
            lab.make_ingress()
        with trio.CancelScope() as scope:
            stop = Stop(scope, trio.lowlevel.current_task(), steps)
            trio.lowlevel.add_instrument(stop)
            try:
                (await lab.open()).abort()
            finally:
                trio.lowlevel.remove_instrument(stop)
        assert lab.left_open() == 0
        assert lab.ingress.dialing == 0
        return stop.seen

    total = await run(math.inf)
    assert total > 3
    for steps in range(1, total):
        await run(steps)


async def test_real_sockets_are_not_left_either(authority: Authority) -> None:
    """The same over loopback: descriptors counted."""
    context = authority.server_context(client_required=True)

    async def serve(accepted: trio.SocketStream) -> None:
        stream = TlsStream(
            SocketTransport(accepted.socket._sock.dup()),  # type: ignore[attr-defined]
            TlsSession(context, server_side=True),
        )
        try:
            await stream.handshake()
            await stream.receive_view()
            stream.send_nowait([OK])
            await stream.receive_view()
        except (ssl.SSLError, StreamTruncated, trio.ClosedResourceError):
            pass
        finally:
            stream.abort()

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(
            trio.serve_tcp,
            serve,
            0,
        )
        port = listeners[0].socket.getsockname()[1]
        ingress = Ingress()
        ingress.set_addresses(HOST, port, ["127.0.0.1"])
        ingress.set_anchors(False, authority.root.pem)
        ingress.set_credentials(Credentials(authority.client.key_pem, authority.client.pem))
        opened = await ingress.open("db.prod", 5432)
        opened.stream.abort()
        await trio.testing.wait_all_tasks_blocked(0.05)
        before = len(os.listdir("/dev/fd"))
        for delay in (0.0, 0.0005, 0.001, 0.0015, 0.002, 0.003, 0.005):
            with trio.move_on_after(delay):
                opened = await ingress.open("db.prod", 5432)
                opened.stream.abort()
        with contextlib.suppress(AssertionError):
            await trio.testing.wait_all_tasks_blocked(0.05)
        assert len(os.listdir("/dev/fd")) == before
        nursery.cancel_scope.cancel()


def test_p256_is_not_assumed(authority: Authority) -> None:
    """Operators have P-384 keys; both load."""
    key = ec.generate_private_key(ec.SECP384R1())
    issued = authority.issue("operator", client=True, key=key)
    Ingress().set_credentials(Credentials(issued.key_pem, issued.pem))
