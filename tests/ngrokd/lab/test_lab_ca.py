"""The throw-away CA, judged by OpenSSL."""

from __future__ import annotations

import contextlib
import ssl

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from ngrokd.lab.ca import Authority, BadCsr, Identity, Validity, load_identity, shared_authority

HOST = "api.lab.test"


def handshake(identity: Identity, anchors: bytes, *, host: str = HOST, partial: bool = False) -> None:
    """A TLS handshake in memory, both ends; raises what the client's verification says."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    load_identity(server, identity)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.load_verify_locations(cadata=anchors.decode())
    if partial:
        client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    near = client.wrap_bio(to_client, to_server, server_hostname=host)
    far = server.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(3):
        for end in (near, far):
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
    assert near.version() == "TLSv1.3"


def csr_pem(*names: x509.NameAttribute[str]) -> bytes:
    key = ec.generate_private_key(ec.SECP384R1())
    csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(names)).sign(key, hashes.SHA384())
    return csr.public_bytes(serialization.Encoding.PEM)


def test_a_good_server_is_accepted_from_the_root() -> None:
    """The chain that is sent closes the gap to the root."""
    ca = Authority()
    handshake(ca.issue([HOST]), ca.root_pem)


def test_the_intermediate_alone_is_an_anchor_for_partial_chains() -> None:
    """ngrok hands out an intermediate as its trust anchor."""
    ca = Authority()
    handshake(ca.issue([HOST], present_intermediate=False), ca.intermediate_pem, partial=True)


def test_an_ip_address_is_a_name_too() -> None:
    """The lab on loopback is dialled by address."""
    ca = Authority()
    handshake(ca.issue(["127.0.0.1"]), ca.root_pem, host="127.0.0.1")


def test_every_wrong_certificate_is_wrong_in_its_own_way() -> None:
    """Each variant must fail for the reason it is named after, or it proves nothing."""
    ca, foreign = Authority(), Authority("foreign")
    cases = [
        (foreign.issue([HOST]), "self-signed certificate in certificate chain|unable to get local issuer"),
        (ca.issue(["other.test"]), "Hostname mismatch"),
        (ca.issue([HOST], validity=Validity.EXPIRED), "certificate has expired"),
        (ca.issue([HOST], validity=Validity.NOT_YET), "not yet valid"),
        (ca.issue([HOST], present_intermediate=False), "unable to get local issuer"),
    ]
    for identity, reason in cases:
        with pytest.raises(ssl.SSLCertVerificationError, match=reason):
            handshake(identity, ca.root_pem)


def test_a_client_gets_the_dates_and_the_key_it_asked_for() -> None:
    """The CSR's key is certified, with the wall clock's dates."""
    csr = csr_pem(x509.NameAttribute(NameOID.ORGANIZATION_NAME, "ngrok-forward-proxy"))

    signed = Authority().sign_csr(csr, subject="k8sop_1", not_before=1_700_000_000.9, not_after=1_700_003_600.0)

    certificate = x509.load_pem_x509_certificate(signed.pem)
    assert certificate.not_valid_before_utc.timestamp() == signed.not_before == 1_700_000_000
    assert certificate.not_valid_after_utc.timestamp() == signed.not_after == 1_700_003_600
    assert certificate.public_key() == x509.load_pem_x509_csr(csr).public_key()
    assert certificate.serial_number == signed.serial


def test_a_common_name_is_refused() -> None:
    """ngrok signs only requests without one."""
    csr = csr_pem(x509.NameAttribute(NameOID.COMMON_NAME, "me"))

    with pytest.raises(BadCsr, match="empty CommonName"):
        Authority().sign_csr(csr, subject="k8sop_1", not_before=0, not_after=1)


def test_what_is_no_csr_is_refused() -> None:
    """One error for all kinds of garbage, tampered signatures included."""
    tampered = csr_pem().decode().splitlines()
    tampered[-2] = tampered[-2][::-1]
    empty = "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n"
    for garbage in ("", "x", empty, "\n".join(tampered)):
        with pytest.raises(BadCsr):
            Authority().sign_csr(garbage, subject="k8sop_1", not_before=0, not_after=1)


def test_the_fingerprint_is_the_intermediates() -> None:
    """Clients that know ngrok's CA by fingerprint compare this."""
    ca = shared_authority("fingerprints")

    digest = x509.load_pem_x509_certificate(ca.intermediate_pem).fingerprint(hashes.SHA256())

    assert ca.intermediate_fingerprint.replace(":", "").lower() == digest.hex()
    assert shared_authority("fingerprints") is ca
