"""Whom we take for the ingress: anchors, pinned fingerprints, and the TLS contexts made from them.

ngrok's ingress has a certificate of a private CA that we know by its SHA-256 fingerprint only. So verification may
fail at first although the ingress is the real one. Then its certificate chain is looked at in a connection of its own,
and if a certificate in it has a pinned fingerprint, that certificate is tried as one more anchor: the next handshake
verifies chain, dates and host name against it. That the pinned certificate was presented proves nothing, anybody can
present it; that the chain verifies against it does.

There is no way to switch verification off. The context for looking (`probe_context`) is used for nothing but the
handshake, carries no client certificate, and its connection is closed as soon as the chain has been seen.
"""

from __future__ import annotations

import binascii
import contextlib
import hashlib
import os
import re
import ssl
import sys
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ngrokd.endpoints import printable
from ngrokd.errors import RelayError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from ngrokd.endpoints import Credentials

# CPython's own choice for TLS 1.2. Level 2 wants 112 bits: RSA of 2048 bits, no SHA-1. Set here because distributions
# may build Python with other defaults.
_CIPHERS: Final = "@SECLEVEL=2:ECDH+AESGCM:ECDH+CHACHA20:ECDH+AES:DHE+AES:!aNULL:!eNULL:!aDSS:!SHA1:!AESCCM"
_PEM: Final = re.compile(rb"-----BEGIN CERTIFICATE-----(.*?)-----END CERTIFICATE-----", re.DOTALL)
_NOT_HEX: Final = re.compile(r"[^0-9a-f]")


class BadCredentials(RelayError):  # noqa: N818 - a verdict on what was given
    """A client certificate and key that OpenSSL cannot use."""

    reason = "bad_credentials"


class Trust:
    """The anchors, pinned fingerprints and client certificate, as contexts that are made when first needed.

    The same context is returned until something changes, so its identity tells what a handshake was verified against.
    """

    def __init__(self) -> None:
        self._system = True
        self._anchors: tuple[bytes, ...] = ()
        self._fingerprints: frozenset[str] = frozenset()
        self._found: tuple[bytes, ...] = ()
        self._credentials: Credentials | None = None
        self._context: ssl.SSLContext | None = None

    def set_anchors(self, system: bool, pem: bytes, fingerprints: Iterable[str]) -> int:
        """Trust the system's roots (if `system`), the certificates in `pem`, and nothing else by itself.

        `pem` may be several files one after the other; text around certificates, and certificates that cannot be read,
        are skipped. Any certificate may be an anchor, an intermediate one too.

        Args:
            system: whether to add OpenSSL's default roots.
            pem: certificates.
            fingerprints: SHA-256, hexadecimal with or without colons, of CAs the ingress may present by itself. What
                was found by one that is not among them any more is forgotten.

        Returns: how many certificates of `pem` are used.
        """
        self._system = system
        self._anchors = tuple(_readable_certificates(pem))
        self._fingerprints = frozenset(_NOT_HEX.sub("", each.lower()) for each in fingerprints)
        self._found = tuple(each for each in self._found if fingerprint(each) in self._fingerprints)
        self._context = None
        return len(self._anchors)

    def set_credentials(self, credentials: Credentials) -> None:
        """Present this client certificate from now on. Raises BadCredentials; then the one before stays."""
        _load_credentials(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), credentials)
        self._credentials = credentials
        self._context = None

    @property
    def has_credentials(self) -> bool:
        """There is a client certificate."""
        return self._credentials is not None

    def context(self) -> ssl.SSLContext:
        """Return the context for connections to the ingress."""
        if self._context is None:
            self._context = self._make_context(self._found)
        return self._context

    def context_with(self, anchor: bytes) -> ssl.SSLContext:
        """Make a context that also trusts `anchor` (DER); see `keep`."""
        return self._make_context((*self._found, anchor))

    def probe_context(self) -> ssl.SSLContext:
        """Make a context that verifies nothing and presents nothing, to see a chain with."""
        context = _bare_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context

    def pinned(self, chain: Iterable[bytes]) -> bytes | None:
        """Return the first certificate (DER) of `chain` that has a pinned fingerprint."""
        return next((each for each in chain if fingerprint(each) in self._fingerprints), None)

    def keep(self, anchor: bytes) -> bool:
        """Trust `anchor` from now on: a chain has been verified against it. False when it was known or is not pinned.

        The second can happen when the pins were changed while the handshake was going on.
        """
        if anchor in self._found or fingerprint(anchor) not in self._fingerprints:
            return False
        self._found = (*self._found, anchor)
        self._context = None
        return True

    def _make_context(self, found: Sequence[bytes]) -> ssl.SSLContext:
        context = _bare_context()
        if self._system:
            context.load_default_certs(ssl.Purpose.SERVER_AUTH)
        for each in (*self._anchors, *found):
            context.load_verify_locations(cadata=each)
        if self._credentials is not None:
            _load_credentials(context, self._credentials)
        return context


def _bare_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # verifies chain and host name
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # an intermediate may be an anchor, as in Go
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT  # ngrok's private CA was not made for it
    context.hostname_checks_common_name = False  # RFC 6125 6.4.4: a name in the CN alone is no name
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_ciphers(_CIPHERS)
    return context


def fingerprint(certificate: bytes) -> str:
    """Return the SHA-256 of a certificate (DER) in lower case hexadecimal without colons."""
    return hashlib.sha256(certificate).hexdigest()


def pinned_certificates(pem: bytes, fingerprints: Iterable[str]) -> bytes:
    """Those certificates of `pem` that have one of these fingerprints (as in `Trust.set_anchors`), and nothing else."""
    wanted = frozenset(_NOT_HEX.sub("", each.lower()) for each in fingerprints)
    found = (each for each in _readable_certificates(pem) if fingerprint(each) in wanted)
    return b"".join(ssl.DER_cert_to_PEM_cert(each).encode() for each in found)


def _readable_certificates(pem: bytes) -> Iterator[bytes]:
    trial = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for match in _PEM.finditer(pem):
        with contextlib.suppress(binascii.Error, ValueError, ssl.SSLError):
            der = binascii.a2b_base64(match[1])
            trial.load_verify_locations(cadata=der)
            yield der


def _load_credentials(context: ssl.SSLContext, credentials: Credentials) -> None:
    """Load certificate and key, which OpenSSL takes from a path only, without the key touching a disk."""
    pem = credentials.certificate_pem.rstrip() + b"\n" + credentials.key_pem
    try:
        if sys.platform == "linux":
            descriptor = os.memfd_create("ngrokd-credentials", os.MFD_CLOEXEC)
            try:
                _write_all(descriptor, pem)
                context.load_cert_chain(f"/proc/self/fd/{descriptor}", password=_no_password)
            finally:
                os.close(descriptor)
        else:
            with tempfile.NamedTemporaryFile(prefix="ngrokd-") as file:  # 0600, gone when left
                file.write(pem)
                file.flush()
                context.load_cert_chain(file.name, password=_no_password)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        if isinstance(error, ssl.SSLError):  # OpenSSL's PEM reader gives no reason, whatever is wrong
            reason = (error.reason or "one of them cannot be read").lower().replace("_", " ")
        else:
            reason = printable(str(error))
        raise BadCredentials(
            f"the client certificate and its key cannot be used: {reason}",
            remedy="get a new certificate with: ngrokd refresh-cert --force",
        ) from error


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _no_password() -> bytes:
    """Answer for an encrypted key; without this OpenSSL would ask on the terminal."""
    return b""


# -- looking at what was presented


@dataclass(frozen=True, slots=True)
class Presented:
    """A certificate as the other side sent it, nothing in it verified. The texts are printable."""

    der: bytes
    subject: str
    issuer: str

    def __str__(self) -> str:
        return f'subject "{self.subject}", issuer "{self.issuer}", SHA-256 {fingerprint(self.der)}'


def presented_chain(tls: ssl.SSLObject) -> list[Presented]:
    """Return the certificates that the other side has sent, leaf first, as they came; [] when none has come yet.

    OpenSSL 3.0 forgets them when verification fails, so `tls` must be one that does not verify.
    """
    if sys.version_info >= (3, 13):
        chain = tls.get_unverified_chain()
    else:
        # The method exists since 3.10 and was made public in 3.13; it returns objects there, None when there is none.
        import _ssl

        objects = tls._sslobj.get_unverified_chain() or ()  # type: ignore[attr-defined]
        chain = [each.public_bytes(_ssl.ENCODING_DER) for each in objects]
    return [Presented(der, *_names(der)) for der in chain or ()]


def describe(chain: Sequence[Presented]) -> str:
    """Say what a chain consists of, for a person who must decide whether to trust it."""
    if not chain:
        return "no certificate"
    return "; then ".join(str(each) for each in chain[:4]) + ("; and more" if len(chain) > 4 else "")


_ATTRIBUTES: Final = {
    b"\x55\x04\x03": "CN",
    b"\x55\x04\x06": "C",
    b"\x55\x04\x07": "L",
    b"\x55\x04\x08": "ST",
    b"\x55\x04\x0a": "O",
    b"\x55\x04\x0b": "OU",
}
_TEXT_ENCODINGS: Final = {0x1E: "utf-16-be", 0x1C: "utf-32-be"}  # BMPString, UniversalString; others are ASCII or UTF-8


def _names(certificate: bytes) -> tuple[str, str]:
    """Read subject and issuer (RFC 5280 4.1); "?" where the bytes are not what they should be."""
    try:
        _, outer, _ = _element(certificate, 0)
        _, body, _ = _element(outer, 0)
        position = 0
        tag, _, after = _element(body, 0)
        if tag == 0xA0:  # the version, absent in version 1
            position = after
        _, _, position = _element(body, position)  # serial number
        _, _, position = _element(body, position)  # signature algorithm
        _, issuer, position = _element(body, position)
        _, _, position = _element(body, position)  # validity
        _, subject, _ = _element(body, position)
        return _name(subject), _name(issuer)
    except ValueError:
        return "?", "?"


def _name(name: bytes) -> str:
    parts = []
    position = 0
    while position < len(name):
        _, attributes, position = _element(name, position)
        _, pair, _ = _element(attributes, 0)
        _, identifier, after = _element(pair, 0)
        tag, value, _ = _element(pair, after)
        text = value.decode(_TEXT_ENCODINGS.get(tag, "utf-8"), "replace")
        parts.append(f"{_ATTRIBUTES.get(identifier, identifier.hex())}={text}")
    return printable(", ".join(parts))


def _element(data: bytes, position: int) -> tuple[int, bytes, int]:
    """Read one DER element: tag, content, position behind it. Raises ValueError."""
    if position + 2 > len(data):
        raise ValueError("truncated")
    tag, size = data[position], data[position + 1]
    position += 2
    if size >= 0x80:
        count = size & 0x7F
        if not 0 < count <= 4 or position + count > len(data):
            raise ValueError("bad length")
        size = int.from_bytes(data[position : position + count], "big")
        position += count
    if position + size > len(data):
        raise ValueError("truncated")
    return tag, data[position : position + size], position + size


__all__ = ["BadCredentials", "Presented", "Trust", "describe", "fingerprint", "pinned_certificates", "presented_chain"]
