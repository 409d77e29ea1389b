"""Who we are to ngrok: an operator's id, and the key and certificate that open the ingress.

Three files hold it, the Go daemon's files, byte for byte in its form: `operator_id` (no newline), `tls.key` (0600),
`tls.crt` (0644). Two of them belong together, and no file system renames two files at once, so the order of a save
carries the safety:

    tls.key.new, tls.crt.new      complete and on the disk
    operator_id                   replaced
    tls.csr                       removed: the Go daemon renews with the request it kept, which is the old key's
    tls.key.new -> tls.key        )  between these two, key and certificate
    tls.crt.new -> tls.crt        )  do not match

Killed anywhere, `load` finds a pair that matches among the four files, finishes the renames where the new pair is the
one to have, and throws away what is left over. The id is replaced between writing and renaming: before it, an
unfinished registration leaves at worst a new pair with an id that ngrok has forgotten, which is registered again;
after it, the new pair is always there to finish with.

What is missing or broken never stops the daemon. It decides the next step (`next_step`): no id means registering
again, whatever else is there; an id without a usable pair means asking the same operator for another certificate,
because registering would leave an orphan at ngrok.

`cryptography` costs 50 ms and 9 MB to import; only the functions that look into keys and certificates do.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final

from ngrokd import files
from ngrokd.endpoints import Credentials, printable
from ngrokd.errors import NgrokdError, StateError

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes

OPERATOR_ID: Final = "operator_id"
KEY: Final = "tls.key"
CERTIFICATE: Final = "tls.crt"
GO_REQUEST: Final = "tls.csr"  # made anew from the key by the Go daemon when it is missing
NEW: Final = ".new"

_KEY_MODE: Final = 0o600
_OPEN_MODE: Final = 0o644  # the Go daemon's mode of tls.crt and operator_id
_ID_LIMIT: Final = 1024  # bytes of the file
_PEM_LIMIT: Final = 64 * 1024  # bytes; a P-384 key has 300, a chain of three RSA certificates 6,000
_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")  # it goes into a file and into URLs
_ORGANIZATION: Final = "ngrokd"


class BadPair(NgrokdError):  # noqa: N818 - a verdict on what was read or received
    """A key and a certificate that cannot be used together; the message says what is wrong with which."""


class Step(Enum):
    """What is to be done next about our identity."""

    REGISTER = "register"  # POST: a new operator, a new key
    RENEW = "renew"  # PATCH: the same operator, a new key
    USE = "use"


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do, and why, in a sentence for the log.

    Attributes:
        usable: the stored pair opens the ingress meanwhile, as far as we can tell.
    """

    step: Step
    reason: str
    usable: bool


@dataclass(frozen=True, slots=True)
class StoredIdentity:
    """What the state directory holds.

    Attributes:
        operator_id: "" when there is none, or none that can be one.
        credentials: None when there is no key and certificate that match.
        notes: what was found wrong, repaired or thrown away; each a line for the log.
    """

    operator_id: str = ""
    credentials: Credentials | None = None
    notes: tuple[str, ...] = ()


def next_step(stored: StoredIdentity, now_wall: float, *, force: bool = False) -> Decision:
    """Decide what our identity needs. Pure.

    Args:
        stored: from `IdentityStore.load`, or with what was obtained since.
        now_wall: Unix seconds.
        force: a new certificate is wanted although the old one is good (`ngrokd refresh-cert --force`).
    """
    pair = stored.credentials
    if not stored.operator_id:
        if pair is None:
            return Decision(Step.REGISTER, "this machine has no operator yet: registering one", usable=False)
        return Decision(
            Step.REGISTER,
            "there is a certificate, but the id of its operator is missing: registering a new operator",
            usable=pair.not_after > now_wall,
        )
    if pair is None:
        return Decision(
            Step.RENEW,
            f"operator {stored.operator_id} has no usable certificate here: asking for one with a new key",
            usable=False,
        )
    left_s = pair.not_after - now_wall
    if needs_renewal(pair.not_before, pair.not_after, now_wall, force=force):
        if left_s <= 0:
            reason = f"the certificate of operator {stored.operator_id} has expired: renewing it"
        elif force:
            reason = f"the certificate of operator {stored.operator_id} is renewed because that was asked for"
        else:
            reason = f"the certificate of operator {stored.operator_id} has {_days(left_s)} left: renewing it"
        return Decision(Step.RENEW, reason, usable=left_s > 0)
    return Decision(Step.USE, f"the certificate has {_days(left_s)} left", usable=True)


def needs_renewal(not_before: float, not_after: float, now_wall: float, *, force: bool = False) -> bool:
    """Whether a third of the certificate's life, or less, is left (or it is asked for).

    A certificate that is not valid yet is not renewed: our clock is wrong, and another would look the same.
    """
    return force or now_wall >= renewal_at(not_before, not_after)


def renewal_at(not_before: float, not_after: float) -> float:
    """When two thirds of the certificate's life are over, Unix seconds."""
    return not_after - (not_after - not_before) / 3


def new_key_and_csr() -> tuple[bytes, bytes]:
    """Make a key and the request for its certificate: both PEM, as the Go daemon makes them.

    P-384, SEC1 ("EC PRIVATE KEY"); the subject is an organization only, because ngrok refuses a CommonName.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, _ORGANIZATION)])
    csr = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA384())
    key_pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )
    return key_pem, csr.public_bytes(serialization.Encoding.PEM)


def credentials_of(key_pem: bytes, certificate_pem: bytes) -> Credentials:
    """Join a key with its certificate, dates included.

    Raises:
        BadPair: either is unreadable, or they do not belong together. The key is never quoted.
    """
    certificate = _load_certificate(certificate_pem)
    if _public_bytes(_load_public_key(key_pem)) != _public_bytes(_public_key_of(certificate)):
        raise BadPair("the certificate belongs to another key")
    not_before, not_after = _dates(certificate)
    return Credentials(key_pem, certificate_pem, not_before, not_after)


def pair_matches(key_pem: bytes, certificate_pem: bytes) -> bool:
    """Whether the certificate is readable and was issued for this key."""
    with suppress(BadPair):
        credentials_of(key_pem, certificate_pem)
        return True
    return False


def certificate_dates(certificate_pem: bytes) -> tuple[float, float]:
    """When the (first) certificate's validity begins and ends, Unix seconds.

    Raises:
        BadPair: it is unreadable.
    """
    return _dates(_load_certificate(certificate_pem))


def is_operator_id(text: str) -> bool:
    """Whether this can be an operator's id: it becomes a file's content and part of URLs."""
    return _ID.fullmatch(text) is not None


class IdentityStore:
    """The identity on the disk. Invariant: at every moment, a `load` finds a matching pair if there ever was one.

    Calls block (they wait for the disk, some milliseconds); they are few. One process at a time: the caller holds the
    state directory's lock.

    Args:
        directory: the state directory.
        ops: the system calls, replaced by tests.
    """

    def __init__(self, directory: str, *, ops: files.Ops = files.SYSTEM) -> None:
        self._directory = directory
        self._ops = ops

    def load(self) -> StoredIdentity:
        """Read what there is, and repair what a killed run left.

        Modes that are too wide are tightened. Nothing here is fatal: what cannot be read counts as missing, with a
        note that says why.

        Raises:
            StateError: the directory is one that strangers could write to.
        """
        try:
            self._ops.stat(self._directory)
        except FileNotFoundError:
            return StoredIdentity()
        except OSError as error:
            return StoredIdentity(notes=(f"cannot look into {self._directory}: {error.strerror}",))
        files.check_private_directory(self._directory, ops=self._ops)
        notes: list[str] = []
        files.remove_stale(self._directory, _NAMES, ops=self._ops)
        return StoredIdentity(self._load_operator_id(notes), self._load_pair(notes), tuple(notes))

    def check_writable(self) -> None:
        """Prove that an identity could be saved, making the directory (0700) where it is missing.

        Asked before ngrok is: an operator whose certificate cannot be kept would be an orphan.

        Raises:
            StateError: it could not, and why.
        """
        files.ensure_private_directory(self._directory, ops=self._ops)
        files.check_writable(self._directory, ops=self._ops)

    def save(self, operator_id: str, credentials: Credentials) -> None:
        """Make this our identity.

        Raises:
            StateError: it is not on the disk for certain. A later `load` finds the old identity or the new one.
        """
        assert is_operator_id(operator_id)
        files.ensure_private_directory(self._directory, ops=self._ops)
        # Leftovers go first: half of an old save beside half of this one would be a pair to puzzle over.
        self._remove_new()
        files.atomic_write(self._path(KEY + NEW), credentials.key_pem, _KEY_MODE, ops=self._ops)
        files.atomic_write(self._path(CERTIFICATE + NEW), credentials.certificate_pem, _OPEN_MODE, ops=self._ops)
        if self._read(OPERATOR_ID, _ID_LIMIT, []) != operator_id.encode():
            files.atomic_write(self._path(OPERATOR_ID), operator_id.encode(), _OPEN_MODE, ops=self._ops)
        self._rename_new((KEY, CERTIFICATE))

    def _load_operator_id(self, notes: list[str]) -> str:
        raw = self._read(OPERATOR_ID, _ID_LIMIT, notes)
        if raw is None:
            return ""
        self._tighten(OPERATOR_ID, _OPEN_MODE, notes)
        text = raw.decode("utf-8", "replace").strip()
        if is_operator_id(text):
            return text
        if text:
            notes.append(f"{self._path(OPERATOR_ID)} holds no operator id but {printable(text, 60)!r}: it is ignored")
        else:
            notes.append(f"{self._path(OPERATOR_ID)} is empty")
        return ""

    def _load_pair(self, notes: list[str]) -> Credentials | None:
        key = self._read_key(KEY, notes)
        certificate = self._read_certificate(CERTIFICATE, notes)
        key_new = self._read_key(KEY + NEW, notes)
        certificate_new = self._read_certificate(CERTIFICATE + NEW, notes)
        current = _pair(key, certificate)
        if key_new is None and certificate_new is None:
            if current is None and (key is not None or certificate is not None):
                notes.append(f"{self._path(KEY)} and {self._path(CERTIFICATE)}: {_what_is_wrong(key, certificate)}")
            return current

        new = _pair(key_new, certificate_new)
        # The Go daemon may have renewed in place since: then its pair is the younger one, and ours is litter.
        if new is not None and (current is None or new.not_before >= current.not_before):
            return self._finish(new, (KEY, CERTIFICATE), notes)
        if current is not None:
            self._drop_new(notes)
            return current
        if (half := _pair(key, certificate_new)) is not None:
            return self._finish(half, (CERTIFICATE,), notes)
        if (half := _pair(key_new, certificate)) is not None:
            return self._finish(half, (KEY,), notes)
        notes.append(f"no key in {self._directory} matches a certificate there")
        return None

    def _finish(self, pair: Credentials, names: tuple[str, ...], notes: list[str]) -> Credentials:
        """Do the renames an interrupted save did not. The pair is good even where that fails."""
        try:
            self._rename_new(names)
        except StateError as error:
            notes.append(f"the saving of a key and certificate was interrupted; they are used, but {error}")
            return pair
        notes.append(f"the saving of a key and certificate was interrupted; finished it in {self._directory}")
        with suppress(StateError):
            self._remove_new()
        return pair

    def _drop_new(self, notes: list[str]) -> None:
        with suppress(StateError):
            self._remove_new()
            notes.append(f"removed an unfinished key or certificate from {self._directory}; the current pair is whole")

    def _remove_new(self) -> None:
        for name in (CERTIFICATE, KEY):
            files.remove(self._path(name + NEW), ops=self._ops)

    def _rename_new(self, names: Iterable[str]) -> None:
        try:
            files.remove(self._path(GO_REQUEST), ops=self._ops)
            dir_fd = self._ops.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
            try:
                for name in names:
                    self._ops.rename(name + NEW, name, dir_fd=dir_fd)
                files.sync_directory(dir_fd, ops=self._ops)
            finally:
                files.close_quietly(dir_fd, ops=self._ops)
        except OSError as error:
            raise StateError(
                f"cannot put the new key and certificate in place in {self._directory}: {error.strerror or error}",
                remedy=f"make {self._directory} writable",
            ) from error

    def _read_key(self, name: str, notes: list[str]) -> bytes | None:
        if self._tighten(name, _KEY_MODE, notes):
            notes.append(
                f"{self._path(name)} could be read or changed by others; if somebody may have,"
                " make a new one with: ngrokd refresh-cert --force"
            )
        try:
            return files.read_secret(self._path(name), _PEM_LIMIT, follow=True, ops=self._ops)
        except FileNotFoundError:
            return None
        except StateError as error:
            notes.append(f"{error}: it is not used")
            return None

    def _read_certificate(self, name: str, notes: list[str]) -> bytes | None:
        self._tighten(name, _OPEN_MODE, notes)
        return self._read(name, _PEM_LIMIT, notes)

    def _read(self, name: str, limit: int, notes: list[str]) -> bytes | None:
        try:
            return files.read_limited(self._path(name), limit, ops=self._ops)
        except FileNotFoundError:
            return None
        except StateError as error:
            notes.append(f"{error}: it counts as missing")
            return None

    def _tighten(self, name: str, widest: int, notes: list[str]) -> bool:
        """Take away permissions beyond `widest`. Returns whether there were any."""
        path = self._path(name)
        try:
            fd = self._ops.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError:
            return False  # whoever reads it next says why
        mode = 0
        try:
            status = self._ops.fstat(fd)
            mode = stat.S_IMODE(status.st_mode)
            if not stat.S_ISREG(status.st_mode) or not mode & ~widest & 0o7077:
                return False
            self._ops.fchmod(fd, mode & widest)
            notes.append(f"{path} had mode {mode:04o}; it has {mode & widest:04o} now")
        except OSError as error:
            notes.append(f"{path} is too open (mode {mode:04o}), and that cannot be changed: {error.strerror}")
        finally:
            files.close_quietly(fd, ops=self._ops)
        return True

    def _path(self, name: str) -> str:
        return os.path.join(self._directory, name)


_NAMES: Final = (OPERATOR_ID, KEY, CERTIFICATE, KEY + NEW, CERTIFICATE + NEW)


def _pair(key_pem: bytes | None, certificate_pem: bytes | None) -> Credentials | None:
    if key_pem is None or certificate_pem is None:
        return None
    try:
        return credentials_of(key_pem, certificate_pem)
    except BadPair:
        return None


def _what_is_wrong(key_pem: bytes | None, certificate_pem: bytes | None) -> str:
    if key_pem is None:
        return "there is no usable key"
    if certificate_pem is None:
        return "there is no certificate"
    try:
        credentials_of(key_pem, certificate_pem)
    except BadPair as error:
        return str(error)
    return ""


def _days(seconds: float) -> str:
    return f"{seconds / 86400:.0f} days" if seconds >= 2 * 86400 else f"{seconds / 3600:.0f} hours"


# Everything below looks into keys and certificates, and is the only part that imports cryptography.


def _load_certificate(pem: bytes) -> x509.Certificate:
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        return x509.load_pem_x509_certificates(pem)[0]
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion) as error:
        raise BadPair("the certificate is not readable") from error


def _load_public_key(key_pem: bytes) -> PublicKeyTypes:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization

    try:
        return serialization.load_pem_private_key(key_pem, password=None).public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm):
        # Whatever the parser says, it may quote; nothing of a private key goes on.
        raise BadPair("the key is not readable (or encrypted)") from None


def _public_key_of(certificate: x509.Certificate) -> PublicKeyTypes:
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        return certificate.public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise BadPair("the certificate holds a key of an unknown kind") from error


def _public_bytes(key: PublicKeyTypes) -> bytes:
    from cryptography.hazmat.primitives import serialization

    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _dates(certificate: x509.Certificate) -> tuple[float, float]:
    try:
        return certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp()
    except (ValueError, OverflowError) as error:
        raise BadPair("the dates of the certificate make no sense") from error
