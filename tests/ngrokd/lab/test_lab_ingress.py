"""The binding ingress in miniature, asked by a TLS client over transports in memory."""

from __future__ import annotations

import hashlib
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
import trio
import trio.testing
from trio.abc import HalfCloseableStream
from trio.testing import MockClock

from ngrokd.errors import StreamTruncated
from ngrokd.lab import backends
from ngrokd.lab.ca import Identity, Validity, load_identity, shared_authority
from ngrokd.lab.ingress import Ingress, Toxics
from ngrokd.lab.link import Line
from ngrokd.relay.tls import TlsAlert, TlsSession, TlsStream, TlsTrioStream
from ngrokd.relay.transport import Transport, memory_transport_pair

HOST = "ingress.lab.test"
NOW = 1_790_000_000.0
SERVERS = shared_authority("servers")
CLIENTS = shared_authority("clients")
VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]


def request(host: str, port: int) -> bytes:
    """A request frame, by hand: two fields, one varint of at most three bytes."""
    name = host.encode()
    number = port
    varint = bytearray()
    while number > 127:
        varint.append(number & 127 | 128)
        number >>= 7
    varint.append(number)
    body = b"\x0a" + bytes([len(name)]) + name + b"\x10" + bytes(varint)
    return len(body).to_bytes(2, "little") + body


@dataclass
class World:
    ingress: Ingress
    dial: Callable[[], Transport]
    client: Identity

    async def connect(self) -> TlsTrioStream:
        """A verified TLS connection, before the header."""
        context = ssl.create_default_context(cadata=SERVERS.root_pem.decode())
        load_identity(context, self.client)
        return await self.connect_with(context)

    async def connect_with(self, context: ssl.SSLContext, session: ssl.SSLSession | None = None) -> TlsTrioStream:
        transport = self.dial()
        stream = TlsStream(transport, TlsSession(context, server_hostname=HOST, session=session))
        try:
            await stream.handshake()
        except BaseException:
            transport.close()
            raise
        return TlsTrioStream(stream)

    async def open(self, host: str = "echo.demo", port: int = 5432) -> tuple[TlsTrioStream, bytes]:
        """Connect, ask, and return the stream with what follows an answer of success."""
        stream = await self.connect()
        await stream.send_all(request(host, port))
        answer, surplus = await read_answer(stream)
        assert answer == f"\x0a\x09ep_{host[:4]}_1".encode() + b"\x12\x03tcp"
        return stream, surplus

    async def ended(self) -> str:
        """How the last connection ended, once it has."""
        with trio.fail_after(60):
            await self.ingress.connections[-1].over.wait()
        return self.ingress.connections[-1].ended


async def read_answer(stream: TlsTrioStream) -> tuple[bytes, bytes]:
    """The body of the answer, and what came behind it."""
    data = b""
    while len(data) < 2 or len(data) < 2 + int.from_bytes(data[:2], "little"):
        more = await stream.receive_some()
        assert more, f"the ingress ended after {data!r}"
        data += more
    end = 2 + int.from_bytes(data[:2], "little")
    return data[2:end], data[end:]


async def read_all(stream: TlsTrioStream) -> bytes:
    data = bytearray()
    while chunk := await stream.receive_some():
        data += chunk
    return bytes(data)


@asynccontextmanager
async def opened(*, simulated_time: bool = True, now: float = NOW) -> AsyncIterator[World]:
    ingress = Ingress(CLIENTS, SERVERS.issue([HOST]), wall=lambda: now, simulated_time=simulated_time)
    behind: dict[str, backends.Backend] = {
        "echo.demo": backends.Echo(),
        "bann.demo": backends.SpeaksFirst(),
        "anse.demo": backends.AnswersAfterEof(),
        "clos.demo": backends.ClosesFirst(b"bye\n"),
        "sour.demo": backends.Source(1_000_000),
    }
    for host, backend in behind.items():
        ingress.add_route(host, 5432, backend, endpoint_id=f"ep_{host[:4]}_1", proto="tcp")
    client = CLIENTS.client("k8sop_1", not_before=NOW - 60, not_after=NOW + 3600)
    async with trio.open_nursery() as nursery:

        def dial() -> Transport:
            near, far = memory_transport_pair()
            nursery.start_soon(ingress.serve, far)
            return near

        yield World(ingress, dial, client)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("version", VERSIONS)
async def test_both_versions_of_tls_carry_a_flow(version: ssl.TLSVersion) -> None:
    """The header, bytes both ways, half-close both ways, and a record of all of it."""
    async with opened() as world:
        world.ingress.set_tls(version, version)
        stream, _ = await world.open()

        async def send() -> None:
            await stream.send_all(b"x" * 300_000)
            await stream.send_eof()

        async with trio.open_nursery() as nursery:  # an echo stops listening to whom does not listen to it
            nursery.start_soon(send)
            assert await read_all(stream) == b"x" * 300_000
        await stream.aclose()
        assert await world.ended() == "done"

        record = world.ingress.connections[-1]
        assert record.tls_version == {VERSIONS[0]: "TLSv1.2", VERSIONS[1]: "TLSv1.3"}[version]
        assert record.server_name == HOST
        assert record.client_serial != 0
        assert record.request is not None
        assert (record.request.host, record.request.port, record.request.fields) == ("echo.demo", 5432, (1, 2))
        assert record.from_client == record.to_client == 300_000
        assert record.after_handshake == 300_000 + len(request("echo.demo", 5432))


async def test_the_header_may_come_in_any_pieces() -> None:
    """Go sends length and body in records of their own; the client's first bytes may follow in the same record."""
    whole = request("echo.demo", 5432) + b"early"
    async with opened() as world:
        for cut in range(1, len(whole)):
            stream = await world.connect()
            await stream.send_all(whole[:cut])
            await stream.send_all(whole[cut:])
            await stream.send_eof()
            _, surplus = await read_answer(stream)
            assert surplus + await read_all(stream) == b"early"
            await stream.aclose()


async def test_an_unknown_endpoint_is_refused_with_ngroks_code() -> None:
    """And the stream ends cleanly behind the refusal."""
    async with opened() as world:
        stream = await world.connect()
        await stream.send_all(request("nobody.demo", 80))
        answer, _ = await read_answer(stream)
        assert answer.startswith(b"\x1a\x0dERR_NGROK_706\x22")
        assert await read_all(stream) == b""
        await stream.aclose()
        assert await world.ended() == "refused: ERR_NGROK_706"


async def test_a_client_without_certificate_is_told_so_at_its_first_read() -> None:
    """TLS 1.3: the client's handshake is over before the server has seen what is missing."""
    async with opened() as world:
        stream = await world.connect_with(ssl.create_default_context(cadata=SERVERS.root_pem.decode()))
        with pytest.raises(trio.BrokenResourceError) as caught:
            await stream.receive_some()
        assert isinstance(caught.value.__cause__, TlsAlert)
        assert caught.value.__cause__.alert == "certificate_required"
        await trio.aclose_forcefully(stream)
        assert world.ingress.handshake_count == 0


async def test_a_client_of_another_ca_is_refused() -> None:
    """Only operators of this lab's control plane."""
    async with opened() as world:
        world.client = shared_authority("foreign").client("k8sop_1", not_before=NOW - 60, not_after=NOW + 3600)
        stream = await world.connect()
        with pytest.raises(trio.BrokenResourceError) as caught:
            await stream.receive_some()
        assert isinstance(caught.value.__cause__, TlsAlert)
        await trio.aclose_forcefully(stream)


@pytest.mark.parametrize("now", [NOW - 3600, NOW + 7200])
async def test_client_certificates_age_by_the_injected_clock(now: float) -> None:
    """A simulated day must be able to outlive a certificate."""
    async with opened(now=now) as world:
        stream = await world.connect()
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()
        await trio.aclose_forcefully(stream)
        assert await world.ended() == "client certificate: not valid now"


async def test_a_rejected_serial_is_cut() -> None:
    """An operator that was revoked: the connection ends where the header should be."""
    async with opened() as world:
        stream, _ = await world.open()
        await stream.aclose()
        world.ingress.rejected.add(world.ingress.connections[-1].client_serial)
        stream = await world.connect()
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()
        await trio.aclose_forcefully(stream)


@pytest.mark.parametrize(
    ("identity", "reason"),
    [
        (shared_authority("foreign").issue([HOST]), "unable to get local issuer"),
        (SERVERS.issue(["other.test"]), "Hostname mismatch"),
        (SERVERS.issue([HOST], validity=Validity.EXPIRED), "expired"),
        (SERVERS.issue([HOST], present_intermediate=False), "unable to get local issuer"),
    ],
)
async def test_what_a_distrustful_client_says_is_counted(identity: Identity, reason: str) -> None:
    """Not one byte after the handshake, and the ingress knows."""
    async with opened() as world:
        world.ingress.set_identity(identity)
        with pytest.raises(ssl.SSLCertVerificationError, match=reason):
            await world.connect()
        assert (await world.ended()).startswith("TLS handshake: ")
        assert world.ingress.after_handshake == world.ingress.handshake_count == 0


@pytest.mark.parametrize("version", VERSIONS)
async def test_sessions_are_resumed_unless_forgotten(version: ssl.TLSVersion) -> None:
    """With the client's certificate known from the session."""
    async with opened() as world:
        world.ingress.set_tls(version, version)
        context = ssl.create_default_context(cadata=SERVERS.root_pem.decode())
        load_identity(context, world.client)

        async def exchange(session: ssl.SSLSession | None) -> ssl.SSLSession | None:
            stream = await world.connect_with(context, session)
            await stream.send_all(request("echo.demo", 5432))
            await read_answer(stream)  # TLS 1.3 tickets come with it
            new = stream.stream.ssl_object.session
            await stream.aclose()
            return new

        session = await exchange(None)
        await exchange(session)
        world.ingress.resumption = False
        await exchange(session)

        first, second, third = world.ingress.connections
        assert [first.resumed, second.resumed, third.resumed] == [False, True, False]
        assert second.client_serial == first.client_serial != 0


@pytest.mark.parametrize("version", VERSIONS)
async def test_back_ends_end_their_side_as_they_like(version: ssl.TLSVersion) -> None:
    """Server first, answer after the end, and a server that stops sending long before it stops reading."""
    async with opened() as world:
        world.ingress.set_tls(version, version)
        stream, banner = await world.open("bann.demo")
        banner = banner or await stream.receive_some()
        assert banner == backends.BANNER
        await stream.aclose()

        stream, _ = await world.open("anse.demo")
        await stream.send_all(b"a" * 70_000)
        await stream.send_eof()
        assert await read_all(stream) == f"{hashlib.sha256(b'a' * 70_000).hexdigest()} 70000\n".encode()
        await stream.aclose()

        stream, early = await world.open("clos.demo")
        assert early + await read_all(stream) == b"bye\n"
        await stream.send_all(b"b" * 70_000)
        await stream.send_eof()
        backend = world.ingress.routes["clos.demo", 5432].backend
        assert isinstance(backend, backends.ClosesFirst)
        tally = (await backend.wait_tallies(1))[0]
        assert (tally.length, tally.ended) == (70_000, "eof")
        await stream.aclose()


async def test_header_and_first_bytes_can_share_a_record() -> None:
    """A client that reads the header into a buffer must keep what follows."""
    async with opened() as world:
        world.ingress.toxics = Toxics(coalesce=True)
        _, surplus = await world.open("bann.demo")
        assert surplus == backends.BANNER
        _, surplus = await world.open("echo.demo")  # which would wait for us for ever
        assert surplus == b""


async def test_bytes_come_one_by_one(autojump_clock: trio.testing.MockClock) -> None:
    """Each in a record of its own, header and all, with a pause between them."""
    async with opened() as world:
        world.ingress.toxics = Toxics(header_slice=1, slice=1, drip_s=1)
        stream = await world.connect()
        await stream.send_all(request("bann.demo", 5432))
        pieces: list[bytes] = []
        started = trio.current_time()
        while len(b"".join(pieces)) < 2 + 16 + len(backends.BANNER):
            pieces.append(await stream.receive_some())
        assert {len(piece) for piece in pieces} == {1}
        assert trio.current_time() - started == pytest.approx(2 + 16 + len(backends.BANNER) - 1)
        await trio.aclose_forcefully(stream)


async def test_a_refusal_carries_code_message_and_notices() -> None:
    """For the next connection only; the one after it is served."""
    async with opened() as world:
        world.ingress.script.append(Toxics(error_code="ERR_NGROK_3200", error_message="offline", notices=("n1", "n2")))
        stream = await world.connect()
        await stream.send_all(request("echo.demo", 5432))
        answer, _ = await read_answer(stream)
        assert answer == b"\x1a\x0eERR_NGROK_3200\x22\x07offline\x2a\x04\x0a\x02n1\x2a\x04\x0a\x02n2"
        await stream.aclose()
        await world.open()


async def test_toxics_of_a_route_leave_the_others_alone() -> None:
    """One endpoint is offline."""
    async with opened() as world:
        world.ingress.routes["bann.demo", 5432].toxics = Toxics(error_code="ERR_NGROK_3200")
        await world.open("echo.demo")
        stream = await world.connect()
        await stream.send_all(request("bann.demo", 5432))
        assert (await read_answer(stream))[0] == b"\x1a\x0eERR_NGROK_3200"
        await trio.aclose_forcefully(stream)


@pytest.mark.parametrize(
    ("toxics", "error"),
    [
        (Toxics(accept="close"), "closed by the other side during"),
        (Toxics(accept="reset"), "broke during"),
        (Toxics(accept="alert"), "HANDSHAKE_FAILURE"),
        (Toxics(accept="alert", alert=48), "UNKNOWN_CA"),
        (Toxics(accept="garbage"), "WRONG_VERSION_NUMBER|HTTP"),
    ],
)
async def test_the_door_can_be_shut(toxics: Toxics, error: str) -> None:
    """Before the handshake, in five ways."""
    async with opened() as world:
        world.ingress.toxics = toxics
        with pytest.raises((ssl.SSLError, StreamTruncated), match=error):
            await world.connect()
        assert await world.ended() == f"before TLS: {toxics.accept}"


@pytest.mark.parametrize(
    ("answer", "received"),
    [
        ("close", b""),
        ("truncate", bytes.fromhex("14000a0c65705f")),
        ("garbage", b"\x14\x00" + b"\xff" * 20),
        ("cut", None),
        ("reset", None),
    ],
)
async def test_the_answer_can_be_wrong(answer: str, received: bytes | None) -> None:
    """None: the stream breaks before it."""
    async with opened() as world:
        world.ingress.toxics = Toxics(answer=answer)  # type: ignore[arg-type]  # the cases above are of its kind
        stream = await world.connect()
        await stream.send_all(request("echo.demo", 5432))
        if received is None:
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some()
            await trio.aclose_forcefully(stream)
        else:
            assert await read_all(stream) == received
            await stream.aclose()
        assert await world.ended() == f"instead of the header: {answer}"


async def test_the_largest_answer_is_one_that_says_so() -> None:
    """65535 bytes of body, well formed: a client's own limit must stop it."""
    async with opened() as world:
        world.ingress.toxics = Toxics(answer="oversize")
        stream = await world.connect()
        await stream.send_all(request("echo.demo", 5432))
        answer, _ = await read_answer(stream)
        assert len(answer) == 65535
        await stream.aclose()


@pytest.mark.parametrize("toxics", [Toxics(accept="hang"), Toxics(answer="hang"), Toxics(after_bytes=0, then="hang")])
async def test_hanging_ends_when_the_client_goes(toxics: Toxics, autojump_clock: trio.testing.MockClock) -> None:
    """A client without a deadline would wait for ever; the lab does not."""
    async with opened() as world:
        world.ingress.toxics = toxics
        with trio.move_on_after(100) as scope:
            stream = await world.connect()
            await stream.send_all(request("bann.demo", 5432))
            while await stream.receive_some():
                pass
        assert scope.cancelled_caught
        assert world.ingress.connections[-1].ended == ""
        world.ingress.drop_connections()
        assert await world.ended() == "dropped"


@pytest.mark.parametrize("then", ["reset", "cut", "alert"])
@pytest.mark.parametrize("version", VERSIONS)
async def test_a_stream_breaks_after_exactly_so_many_bytes(then: str, version: ssl.TLSVersion) -> None:
    """None of them is a clean end, whatever it looks like on TCP."""
    async with opened() as world:
        world.ingress.set_tls(version, version)
        world.ingress.toxics = Toxics(after_bytes=1000, then=then)  # type: ignore[arg-type]  # as above
        stream, data = await world.open("sour.demo")
        with pytest.raises(trio.BrokenResourceError):  # noqa: PT012 - it breaks at some byte of this loop
            while chunk := await stream.receive_some():
                data += chunk
        expected = b"".join(bytes(piece) for piece in backends.sample(1000))
        assert data == expected if then != "reset" else expected.startswith(data)
        await trio.aclose_forcefully(stream)
        assert await world.ended() == f"after 1000 bytes: {then}"


async def test_a_stream_can_be_closed_early_and_cleanly() -> None:
    """close_notify after so many bytes: an end like any other."""
    async with opened() as world:
        world.ingress.toxics = Toxics(after_bytes=1000, then="close")
        stream, data = await world.open("sour.demo")
        assert len(data + await read_all(stream)) == 1000
        await stream.aclose()


async def test_a_line_has_latency_and_bandwidth(autojump_clock: trio.testing.MockClock) -> None:
    """A round trip for the handshake, one for the header; a million bytes at 100 kB/s are ten seconds."""
    async with opened() as world:
        world.ingress.toxics = Toxics(line=Line(latency_up_s=0.1, latency_down_s=0.3, bandwidth_down=100_000))
        started = trio.current_time()
        stream, data = await world.open("sour.demo")
        assert trio.current_time() - started == pytest.approx(0.8, abs=0.2)
        started = trio.current_time()
        assert len(data + await read_all(stream)) == 1_000_000
        assert trio.current_time() - started == pytest.approx(10.3, abs=0.8)
        await stream.send_eof()
        await stream.aclose()
        assert await world.ended() == "done"


async def test_an_outage_refuses_and_lets_live_flows_be() -> None:
    """The listener is gone, the connections are not."""
    async with opened() as world, trio.open_nursery() as nursery:
        dial = world.ingress.dialer(nursery)
        stream, _ = await world.open()
        world.ingress.set_down(True)
        with pytest.raises(ConnectionRefusedError):
            await dial("203.0.113.1", 443)
        await stream.send_all(b"still here")
        assert await stream.receive_some() == b"still here"
        await stream.aclose()


async def test_a_client_that_resets_is_no_error() -> None:
    """It is noted, and the next one is served."""
    async with opened() as world:
        stream, _ = await world.open()
        stream.stream.abort()
        assert "broke" in await world.ended()
        await world.open()


async def test_the_last_bytes_arrive_while_the_back_end_waits_for_more() -> None:
    """Keep-alive: an answer that fills every buffer must not end in the middle because its server reads again."""
    async with opened() as world:
        world.ingress.add_route("webs.demo", 5432, backends.Http(), endpoint_id="ep_webs_1", proto="tcp")
        stream, _ = await world.open("webs.demo")
        for _ in range(3):
            await stream.send_all(b"GET /bytes/1000000 HTTP/1.1\r\nHost: webs.demo\r\n\r\n")
            received = b""
            with trio.fail_after(20):
                while received.count(b"\r\n\r\n") == 0 or len(received.partition(b"\r\n\r\n")[2]) < 1_000_000:
                    received += await stream.receive_some()
        await stream.aclose()


class BothWays:
    """Waits for the client's bytes in one task while another one sends, and never ends."""

    async def serve(self, stream: HalfCloseableStream) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.receive_some)
            await trio.testing.wait_all_tasks_blocked()
            await stream.send_all(b"x" * 1_000_000)
            await trio.sleep_forever()


async def test_nothing_stays_behind_while_another_task_receives(autojump_clock: MockClock) -> None:
    """Neither does the last of what a full socket did not take, though nobody sends after it."""
    async with opened() as world:
        world.ingress.add_route("both.demo", 5432, BothWays(), endpoint_id="ep_both_1", proto="tcp")
        stream, received = await world.open("both.demo")
        with trio.fail_after(60):
            while len(received) < 1_000_000:
                await trio.sleep(0.01)
                received += await stream.receive_some()

    assert received == b"x" * 1_000_000
