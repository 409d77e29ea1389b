"""A certificate authority to throw away: a root, an intermediate, and whatever certificate a test wants to be wrong.

Servers (the API, the ingress) get certificates that are valid for decades, so that OpenSSL, which knows only the
machine's clock, accepts them whatever time a test simulates. Client certificates carry the dates they are given: who
checks those against a simulated clock does it himself (see `ngrokd.lab.ingress`).

Keys are ECDSA P-256 because a simulated day makes thousands of handshakes.
"""

from __future__ import annotations

import ipaddress
import ssl
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from functools import cache
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_ALWAYS_FROM: Final = datetime(2020, 1, 1, tzinfo=UTC)
_ALWAYS_TO: Final = datetime(2099, 12, 31, tzinfo=UTC)
_EXPIRED_AT: Final = datetime(2021, 1, 1, tzinfo=UTC)
_NOT_BEFORE: Final = datetime(2099, 1, 1, tzinfo=UTC)


class BadCsr(Exception):  # noqa: N818 - a verdict on what a client sent
    """The signing request cannot be signed; the message says why, in words for the client."""


class Validity(Enum):
    """When a server's certificate is valid, seen from any reasonable clock."""

    ALWAYS = "always"
    EXPIRED = "expired"
    NOT_YET = "not yet"


@dataclass(frozen=True, slots=True)
class Identity:
    """A certificate with its key, as a server presents it.

    Attributes:
        certificate_pem: the leaf alone.
        chain_pem: what the server sends: the leaf, and the intermediate unless it was left out.
        key_pem: the private key, PKCS#8, not encrypted.
    """

    certificate_pem: bytes
    chain_pem: bytes
    key_pem: bytes

    def __repr__(self) -> str:
        return f"Identity({_subject(self.certificate_pem)})"


@dataclass(frozen=True, slots=True)
class Signed:
    """A client certificate as the control plane hands it out.

    Attributes:
        pem: the certificate.
        serial: its serial number, by which the ingress names clients.
        not_before: Unix seconds.
        not_after: Unix seconds.
    """

    pem: bytes
    serial: int
    not_before: int
    not_after: int


class Authority:
    """A root and one intermediate below it, which signs everything.

    Args:
        name: stands in the subjects, to tell authorities apart in error messages.
    """

    def __init__(self, name: str = "ngrokd lab") -> None:
        self.name = name
        self._root_key = ec.generate_private_key(ec.SECP256R1())
        self._key = ec.generate_private_key(ec.SECP256R1())
        root_name = _name(f"{name} Root CA")
        self._root = _authority_certificate(root_name, root_name, self._root_key, self._root_key, path_length=1)
        self._intermediate = _authority_certificate(
            _name(f"{name} Intermediate CA"), root_name, self._key, self._root_key, path_length=0
        )

    @property
    def root_pem(self) -> bytes:
        """The root's certificate."""
        return _pem(self._root)

    @property
    def intermediate_pem(self) -> bytes:
        """The intermediate's certificate: an anchor by itself for clients that accept partial chains."""
        return _pem(self._intermediate)

    @property
    def intermediate_fingerprint(self) -> str:
        """SHA-256 of the intermediate, as `CF:CE:8A:...`, for clients that know it by fingerprint only."""
        return self._intermediate.fingerprint(hashes.SHA256()).hex(":").upper()

    def issue(
        self, names: Sequence[str], *, validity: Validity = Validity.ALWAYS, present_intermediate: bool = True
    ) -> Identity:
        """Make a server's certificate for host names and IP addresses.

        Args:
            names: at least one; what parses as an IP address becomes one in the certificate.
            validity: decades, or one of two ways to be wrong.
            present_intermediate: False leaves the intermediate out of what the server sends.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        not_before, not_after = {
            Validity.ALWAYS: (_ALWAYS_FROM, _ALWAYS_TO),
            Validity.EXPIRED: (_ALWAYS_FROM, _EXPIRED_AT),
            Validity.NOT_YET: (_NOT_BEFORE, _ALWAYS_TO),
        }[validity]
        leaf = (
            x509.CertificateBuilder()
            .subject_name(_name(names[0]))
            .issuer_name(self._intermediate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(not_before)
            .not_valid_after(not_after)
            .add_extension(x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(_authority_key(self._key), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        pem = _pem(leaf)
        key_pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return Identity(pem, pem + self.intermediate_pem if present_intermediate else pem, key_pem)

    def sign_csr(self, csr_pem: str | bytes, *, subject: str, not_before: float, not_after: float) -> Signed:
        """Sign a client's request as ngrok does: its key is kept, its names are not.

        Args:
            csr_pem: the request; its CommonName must be empty.
            subject: the CommonName the certificate gets (the operator's id).
            not_before: Unix seconds; fractions are cut.
            not_after: Unix seconds; fractions are cut.

        Raises:
            BadCsr: not a signing request, a bad signature, or a CommonName.
        """
        if isinstance(csr_pem, str):
            csr_pem = csr_pem.encode()
        try:
            csr = x509.load_pem_x509_csr(csr_pem)
            signature_holds = csr.is_signature_valid
            public_key = csr.public_key()
        except (ValueError, InvalidSignature) as error:
            raise BadCsr(f"The CSR could not be parsed: {error}") from None
        if not signature_holds:
            raise BadCsr("The CSR's signature does not match its key.")
        if csr.subject.get_attributes_for_oid(NameOID.COMMON_NAME):
            raise BadCsr("The CSR must have an empty CommonName.")
        certificate = (
            x509.CertificateBuilder()
            .subject_name(_name(subject))
            .issuer_name(self._intermediate.subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(datetime.fromtimestamp(int(not_before), UTC))
            .not_valid_after(datetime.fromtimestamp(int(not_after), UTC))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
            .add_extension(_authority_key(self._key), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return Signed(_pem(certificate), certificate.serial_number, int(not_before), int(not_after))

    def client(self, subject: str, *, not_before: float, not_after: float) -> Identity:
        """A client's key and certificate ready for use, without going through a control plane."""
        key = ec.generate_private_key(ec.SECP384R1())
        csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA384())
        signed = self.sign_csr(
            csr.public_bytes(serialization.Encoding.PEM), subject=subject, not_before=not_before, not_after=not_after
        )
        key_pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
        )
        return Identity(signed.pem, signed.pem + self.intermediate_pem, key_pem)


@cache
def shared_authority(name: str) -> Authority:
    """One authority per name and process, for tests that open many labs and do not care whose it is."""
    return Authority(name)


def load_identity(context: ssl.SSLContext, identity: Identity) -> None:
    """Put a chain and its key into a context. OpenSSL reads only files, so they pass through a private one."""
    with tempfile.NamedTemporaryFile(prefix="ngrokd-lab-") as file:  # 0600, gone at the end of the block
        file.write(identity.chain_pem + identity.key_pem)
        file.flush()
        context.load_cert_chain(file.name)


def _name(common_name: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "ngrokd lab"),
            x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64]),  # 64: the upper bound of RFC 5280
        ]
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _authority_certificate(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    issuer_key: ec.EllipticCurvePrivateKey,
    *,
    path_length: int,
) -> x509.Certificate:
    usage = x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_ALWAYS_FROM)
        .not_valid_after(_ALWAYS_TO)
        .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(_authority_key(issuer_key), critical=False)
        .sign(issuer_key, hashes.SHA256())
    )


def _authority_key(key: ec.EllipticCurvePrivateKey) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _subject(pem: bytes) -> str:
    return x509.load_pem_x509_certificate(pem).subject.rfc4514_string()
