"""Anchors, credentials and presented chains."""

from __future__ import annotations

import os
import ssl
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from ngrokd.endpoints import Credentials
from ngrokd.relay.tls import TlsSession
from ngrokd.relay.trust import BadCredentials, Presented, Trust, _names, describe, fingerprint, presented_chain

if TYPE_CHECKING:
    from tests.ngrokd.relay.conftest import Authority

HOST = "ingress.example"


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])
@pytest.mark.parametrize("client_required", [False, True])
def test_the_chain_is_seen_without_more_than_a_client_hello(
    authority: Authority, version: ssl.TLSVersion, client_required: bool
) -> None:
    """As sent, leaf first, before our half of the handshake has left, whatever the server wants of us."""
    client = TlsSession(Trust().probe_context(), server_hostname=HOST)
    context = authority.server_context(version=version, client_required=client_required)
    server = TlsSession(context, server_side=True)
    assert presented_chain(client.object) == []
    assert not client.handshake_step()
    hello = client.take()
    server.feed(hello)
    server.handshake_step()
    client.feed(server.take())
    client.handshake_step()

    chain = presented_chain(client.object)

    assert [each.der for each in chain] == [authority.leaf.der, authority.intermediate.der]
    assert (chain[0].subject, chain[0].issuer) == ("CN=ingress.example", "CN=Intermediate CA")
    assert len(hello) < 1024


def test_names_are_read_as_cryptography_reads_them(authority: Authority) -> None:
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.COUNTRY_NAME, "US"),
            x509.NameAttribute(NameOID.STATE_OR_PROVINCE_NAME, "California"),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "ngrok Inc"),
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, "prod"),
            x509.NameAttribute(NameOID.LOCALITY_NAME, "ü\x1b[2J"),
            x509.NameAttribute(NameOID.EMAIL_ADDRESS, "a@b"),
            x509.NameAttribute(NameOID.COMMON_NAME, "Root CA"),
        ]
    )
    request = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(x509.Name([]))
        .public_key(authority.root.key.public_key())
        .serial_number(1)
        .not_valid_before(authority.root.certificate.not_valid_before_utc)
        .not_valid_after(authority.root.certificate.not_valid_after_utc)
    )
    der = request.sign(authority.root.key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)

    assert _names(der) == (
        "C=US, ST=California, O=ngrok Inc, OU=prod, L=ü\\x1b[2J, 2a864886f70d010901=a@b, CN=Root CA",
        "",
    )


@given(st.binary(max_size=200))
def test_any_bytes_have_names_or_question_marks(data: bytes) -> None:
    """Whoever answers may send anything that OpenSSL takes for a certificate."""
    subject, issuer = _names(data)
    assert subject.isprintable()
    assert issuer.isprintable()


@given(st.data())
def test_a_damaged_certificate_does_not_break_the_message(authority: Authority, data: st.DataObject) -> None:
    der = bytearray(authority.leaf.der)
    for _ in range(data.draw(st.integers(1, 5))):
        der[data.draw(st.integers(0, len(der) - 1))] = data.draw(st.integers(0, 255))

    assert all(name.isprintable() for name in _names(bytes(der)))


def test_a_long_chain_is_not_told_to_its_end() -> None:
    assert describe([]) == "no certificate"
    chain = [Presented(b"", str(number), "x") for number in range(9)]

    assert describe(chain).count("subject") == 4
    assert describe(chain).endswith("; and more")


def test_anchors_may_be_many_files_with_anything_between(authority: Authority) -> None:
    """What is not a certificate is skipped, as Go does: one bad file must not take the others with it."""
    broken = authority.leaf.pem.replace(b"MII", b"AAA", 1)
    text = b"# caf\xe9\n" + authority.root.pem + b"\r\njunk\n" + broken + authority.leaf.key_pem
    text += authority.intermediate.pem.replace(b"\n", b"\r\n") + b"-----BEGIN CERTIFICATE-----\nnot base64!\n"

    assert Trust().set_anchors(False, text, []) == 2


def test_a_context_is_made_once_and_again_when_something_changed(authority: Authority) -> None:
    """Its identity says what a handshake was verified against."""
    trust = Trust()
    trust.set_anchors(False, authority.root.pem, [authority.intermediate.fingerprint])
    first = trust.context()
    assert trust.context() is first

    trust.set_credentials(Credentials(authority.client.key_pem, authority.client.pem))
    second = trust.context()
    assert second is not first

    assert trust.keep(authority.intermediate.der)
    assert not trust.keep(authority.intermediate.der)
    assert not trust.keep(authority.leaf.der), "not pinned"
    third = trust.context()
    assert third is not second
    assert authority.intermediate.der in third.get_ca_certs(binary_form=True)


def test_contexts_verify_and_cannot_be_told_not_to(authority: Authority) -> None:
    trust = Trust()
    trust.set_anchors(False, authority.root.pem, [])
    for context in (trust.context(), trust.context_with(authority.intermediate.der)):
        assert context.verify_mode == ssl.CERT_REQUIRED
        assert context.check_hostname
        assert context.minimum_version == ssl.TLSVersion.TLSv1_2
        assert context.verify_flags & ssl.VERIFY_X509_PARTIAL_CHAIN
        assert not context.verify_flags & ssl.VERIFY_X509_STRICT
        assert not context.hostname_checks_common_name


def test_fingerprints_are_taken_with_and_without_colons(authority: Authority) -> None:
    digits = fingerprint(authority.root.der)
    for form in (digits, digits.upper(), ":".join(digits[i : i + 2] for i in range(0, 64, 2)), f" {digits} "):
        trust = Trust()
        trust.set_anchors(False, b"", [form])
        assert trust.pinned([authority.leaf.der, authority.root.der]) == authority.root.der


def test_credentials_leave_no_descriptor_and_no_file(
    authority: Authority, tmp_path: os.PathLike[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key must not be found on a disk afterwards."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    before = os.listdir("/dev/fd")

    Trust().set_credentials(Credentials(authority.client.key_pem, authority.client.pem))

    assert os.listdir("/dev/fd") == before
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("case", ["empty", "garbage", "encrypted", "no key", "mismatch"])
def test_unusable_credentials_say_why_and_ask_nobody(authority: Authority, case: str) -> None:
    """OpenSSL would ask for a password on the terminal, and the daemon would stand still."""
    client = authority.client
    encrypted = client.key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )
    key, certificate = {
        "empty": (b"", b""),
        "garbage": (b"x", b"y\x00z"),
        "encrypted": (encrypted, client.pem),
        "no key": (b"", client.pem),
        "mismatch": (authority.root.key_pem, client.pem),
    }[case]

    with pytest.raises(BadCredentials, match=r"cannot be used: \w+") as caught:
        Trust().set_credentials(Credentials(key, certificate))
    assert "refresh-cert" in caught.value.remedy
