"""A throw-away certification authority (root, intermediate, leaf; P-256) and the contexts made from it."""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey

HOST = "ingress.example"
DAY = datetime.timedelta(days=1)


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
        now = datetime.datetime.now(datetime.timezone.utc)
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
    ) -> ssl.SSLContext:
        """Make a server's context; `chain` is what is sent behind the leaf (the intermediate, unless given)."""
        leaf = leaf or self.leaf
        chain = [self.intermediate] if chain is None else chain
        path = self.directory / f"{x509.random_serial_number():x}.pem"
        path.write_bytes(leaf.key_pem + leaf.pem + b"".join(each.pem for each in chain))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
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
