from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from ngrokd import files
from ngrokd.cloud.identity import (
    BadPair,
    IdentityStore,
    Step,
    StoredIdentity,
    certificate_dates,
    credentials_of,
    is_operator_id,
    needs_renewal,
    new_key_and_csr,
    next_step,
    pair_matches,
    renewal_at,
)
from ngrokd.endpoints import Credentials
from ngrokd.errors import StateError

DAY = 86400.0
JANUARY = datetime(2026, 1, 1, tzinfo=UTC).timestamp()
_CA_KEY = ec.generate_private_key(ec.SECP256R1())


def issue(csr_pem: bytes, not_before: float = JANUARY, lifetime_s: float = 90 * DAY) -> bytes:
    """What ngrok does with a request."""
    csr = x509.load_pem_x509_csr(csr_pem)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "k8sop_1")]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "throw-away")]))
        .public_key(csr.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.fromtimestamp(not_before, UTC))
        .not_valid_after(datetime.fromtimestamp(not_before + lifetime_s, UTC))
        .sign(_CA_KEY, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM)


def new_pair(not_before: float = JANUARY) -> Credentials:
    key_pem, csr_pem = new_key_and_csr()
    return credentials_of(key_pem, issue(csr_pem, not_before))


OLD = new_pair(JANUARY)
NEW = new_pair(JANUARY + 60 * DAY)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state directory as strict as the store wants it."""
    directory = tmp_path / "state"
    directory.mkdir(mode=0o700)
    return directory


def put(directory: Path, name: str, data: bytes, mode: int = 0o600) -> None:
    path = directory / name
    path.write_bytes(data)
    path.chmod(mode)


def put_pair(directory: Path, pair: Credentials, suffix: str = "") -> None:
    put(directory, "tls.key" + suffix, pair.key_pem, 0o600)
    put(directory, "tls.crt" + suffix, pair.certificate_pem, 0o644)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# Keys, requests and certificates.


def test_request_is_what_ngrok_signs() -> None:
    """P-384, SEC1, SHA-384, an organization and no CommonName: ngrok refuses requests with one."""
    key_pem, csr_pem = new_key_and_csr()

    key = serialization.load_pem_private_key(key_pem, None)
    csr = x509.load_pem_x509_csr(csr_pem)
    assert key_pem.startswith(b"-----BEGIN EC PRIVATE KEY-----\n")
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert key.curve.name == "secp384r1"
    assert csr.is_signature_valid
    assert isinstance(csr.signature_hash_algorithm, hashes.SHA384)
    assert [(part.oid, part.value) for part in csr.subject] == [(NameOID.ORGANIZATION_NAME, "ngrokd")]
    assert not list(csr.extensions)
    assert csr.public_key() == key.public_key()


def test_each_request_has_a_key_of_its_own() -> None:
    """A renewed certificate comes with a new key."""
    assert new_key_and_csr()[0] != new_key_and_csr()[0]


def test_pair_matches_only_its_own() -> None:
    """OpenSSL would only say so when the first flow needs it."""
    assert pair_matches(OLD.key_pem, OLD.certificate_pem)
    assert not pair_matches(OLD.key_pem, NEW.certificate_pem)
    assert not pair_matches(b"", OLD.certificate_pem)
    assert not pair_matches(OLD.key_pem, b"")


def test_first_certificate_of_a_chain_counts() -> None:
    """The leaf comes first (RFC 8446 4.4.2), and is the one that must fit the key."""
    assert pair_matches(OLD.key_pem, OLD.certificate_pem + NEW.certificate_pem)
    assert not pair_matches(OLD.key_pem, NEW.certificate_pem + OLD.certificate_pem)


def test_dates_come_from_the_certificate() -> None:
    """Not from what the API says about it."""
    assert certificate_dates(OLD.certificate_pem) == (JANUARY, JANUARY + 90 * DAY)
    assert (OLD.not_before, OLD.not_after) == (JANUARY, JANUARY + 90 * DAY)


def _rsa_key() -> bytes:
    key = rsa.generate_private_key(65537, 2048)
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )


def _encrypted_key() -> bytes:
    return ec.generate_private_key(ec.SECP384R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"x")
    )


@pytest.mark.parametrize(
    "key_pem",
    [
        b"",
        b"\x00" * 100,
        b"-----BEGIN EC PRIVATE KEY-----\n",
        b"-----BEGIN EC PRIVATE KEY-----\nAAAA\n-----END EC PRIVATE KEY-----\n",
        OLD.key_pem[:-60],
        OLD.key_pem.replace(b"M", b"N"),
        OLD.key_pem.replace(b"EC PRIVATE", b"OPENSSH PRIVATE"),
        OLD.certificate_pem,
        _encrypted_key(),
        _rsa_key(),
    ],
)
def test_unusable_key_is_one_error_that_quotes_nothing(key_pem: bytes) -> None:
    """Whatever is in tls.key, none of it reaches a log."""
    with pytest.raises(BadPair) as caught:
        credentials_of(key_pem, OLD.certificate_pem)

    assert str(caught.value).isprintable()
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    "certificate_pem",
    [
        b"",
        b"\xff" * 100,
        b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        OLD.certificate_pem[:-60],
        OLD.certificate_pem.replace(b"A", b"B"),
        OLD.key_pem,
    ],
)
def test_unusable_certificate_is_one_error(certificate_pem: bytes) -> None:
    """It is read from the disk and from the network; neither is trusted to be whole."""
    with pytest.raises(BadPair):
        credentials_of(OLD.key_pem, certificate_pem)
    with pytest.raises(BadPair):
        certificate_dates(certificate_pem)


# When to renew, and what to do next.


def test_renewal_is_due_when_a_third_is_left() -> None:
    """Thirty of ninety days: time enough for a long weekend without the API."""
    before, after = JANUARY, JANUARY + 90 * DAY

    assert renewal_at(before, after) == JANUARY + 60 * DAY
    assert not needs_renewal(before, after, JANUARY + 60 * DAY - 1)
    assert needs_renewal(before, after, JANUARY + 60 * DAY)
    assert needs_renewal(before, after, JANUARY + 1000 * DAY)
    assert needs_renewal(before, after, JANUARY + DAY, force=True)


def test_certificate_of_the_future_is_not_renewed() -> None:
    """A machine without a battery wakes up in 1970; another certificate would look just as wrong."""
    assert not needs_renewal(JANUARY, JANUARY + 90 * DAY, 0.0)


@pytest.mark.parametrize(
    ("stored", "day", "step", "usable"),
    [
        (StoredIdentity(), 1, Step.REGISTER, False),
        (StoredIdentity("", OLD), 1, Step.REGISTER, True),
        (StoredIdentity("", OLD), 91, Step.REGISTER, False),
        (StoredIdentity("k8sop_1", None), 1, Step.RENEW, False),
        (StoredIdentity("k8sop_1", OLD), 1, Step.USE, True),
        (StoredIdentity("k8sop_1", OLD), 59, Step.USE, True),
        (StoredIdentity("k8sop_1", OLD), 60, Step.RENEW, True),
        (StoredIdentity("k8sop_1", OLD), 90, Step.RENEW, False),
        (StoredIdentity("k8sop_1", OLD), 900, Step.RENEW, False),
    ],
)
def test_next_step(stored: StoredIdentity, day: float, step: Step, usable: bool) -> None:
    """No id: register, whatever else is there. An id without a pair: renew, or ngrok keeps an orphan."""
    decision = next_step(stored, JANUARY + day * DAY)

    assert (decision.step, decision.usable) == (step, usable)
    assert decision.reason


def test_forced_renewal_leaves_the_old_certificate_in_use() -> None:
    """Asked for, not needed: flows go on with the one there is."""
    decision = next_step(StoredIdentity("k8sop_1", OLD), JANUARY + DAY, force=True)

    assert decision.step is Step.RENEW
    assert decision.usable
    assert next_step(StoredIdentity(), JANUARY, force=True).step is Step.REGISTER


def test_reason_names_the_operator_and_the_time_left() -> None:
    """It is the log line."""
    assert "k8sop_1" in next_step(StoredIdentity("k8sop_1", OLD), JANUARY + 61 * DAY).reason
    assert "29 days" in next_step(StoredIdentity("k8sop_1", OLD), JANUARY + 61 * DAY).reason
    assert "12 hours" in next_step(StoredIdentity("k8sop_1", OLD), JANUARY + 89.5 * DAY).reason
    assert "expired" in next_step(StoredIdentity("k8sop_1", OLD), JANUARY + 91 * DAY).reason


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("k8sop_2abcDEF-9", True),
        ("x", True),
        ("", False),
        ("a/b", False),
        ("..", False),
        (".hidden", False),
        ("-flag", False),
        ("a b", False),
        ("a\n", False),
        ("é", False),
        ("a" * 129, False),
    ],
)
def test_operator_id_is_a_word(text: str, good: bool) -> None:
    """It comes from the network and becomes a file and a part of URLs."""
    assert is_operator_id(text) is good


# The store.


def test_saved_identity_is_the_go_daemons(state: Path) -> None:
    """Same names, same content, same modes: switching back needs nothing."""
    IdentityStore(str(state)).save("k8sop_1", OLD)

    assert (state / "operator_id").read_bytes() == b"k8sop_1"
    assert (state / "tls.key").read_bytes() == OLD.key_pem
    assert (state / "tls.crt").read_bytes() == OLD.certificate_pem
    assert {path.name: mode_of(path) for path in state.iterdir()} == {
        "operator_id": 0o644,
        "tls.key": 0o600,
        "tls.crt": 0o644,
    }


def test_saved_identity_is_loaded(state: Path) -> None:
    """Dates included, and with nothing to remark."""
    store = IdentityStore(str(state))
    store.save("k8sop_1", OLD)

    assert store.load() == StoredIdentity("k8sop_1", OLD, ())


def test_renewed_identity_replaces_the_old(state: Path) -> None:
    """Nothing of the old pair, and nothing unfinished, stays."""
    store = IdentityStore(str(state))
    store.save("k8sop_1", OLD)
    store.save("k8sop_1", NEW)

    assert store.load() == StoredIdentity("k8sop_1", NEW, ())
    assert sorted(path.name for path in state.iterdir()) == ["operator_id", "tls.crt", "tls.key"]


def test_go_daemons_stored_request_goes_with_its_key(state: Path) -> None:
    """It renews with the request it kept; the old key's would bring a certificate that fits no key of ours."""
    put(state, "tls.csr", new_key_and_csr()[1])

    IdentityStore(str(state)).save("k8sop_1", OLD)

    assert not (state / "tls.csr").exists()


def test_missing_directory_is_an_empty_identity(tmp_path: Path) -> None:
    """Loading changes nothing; only the intention to save makes the directory."""
    store = IdentityStore(str(tmp_path / "state"))

    assert store.load() == StoredIdentity()
    assert not (tmp_path / "state").exists()

    store.check_writable()

    assert mode_of(tmp_path / "state") == 0o700
    assert list((tmp_path / "state").iterdir()) == []


def test_directory_of_strangers_is_refused(state: Path) -> None:
    """Whoever can replace tls.crt decides who we are."""
    state.chmod(0o777)
    store = IdentityStore(str(state))

    with pytest.raises(StateError):
        store.load()
    with pytest.raises(StateError):
        store.check_writable()
    with pytest.raises(StateError):
        store.save("k8sop_1", OLD)


@pytest.mark.parametrize("content", [b"k8sop_1", b"k8sop_1\n", b"  k8sop_1\r\n\n"])
def test_blanks_around_the_operator_id_are_ignored(state: Path, content: bytes) -> None:
    """Editors add a newline; in a URL it would be %0A."""
    put(state, "operator_id", content)

    assert IdentityStore(str(state)).load().operator_id == "k8sop_1"


@pytest.mark.parametrize("content", [b"", b"\n", b"two words", b"../../etc", b"\xff\xfe", b"\x1b[31mred", b"a" * 2000])
def test_operator_id_that_cannot_be_one_counts_as_missing(state: Path, content: bytes) -> None:
    """An empty file came out of the Go daemon; it must lead to a new registration, with a line that says why."""
    put(state, "operator_id", content)
    put_pair(state, OLD)

    stored = IdentityStore(str(state)).load()

    assert stored.operator_id == ""
    assert stored.credentials == OLD
    assert len(stored.notes) == 1
    assert "operator_id" in stored.notes[0]
    assert stored.notes[0].isprintable()
    assert next_step(stored, JANUARY).step is Step.REGISTER


@pytest.mark.parametrize(
    ("break_it", "word"),
    [
        (lambda state: (state / "tls.crt").unlink(), "no certificate"),
        (lambda state: (state / "tls.key").unlink(), "no usable key"),
        (lambda state: put(state, "tls.crt", b"garbage"), "not readable"),
        (lambda state: put(state, "tls.key", b"garbage"), "not readable"),
        (lambda state: put(state, "tls.crt", NEW.certificate_pem), "another key"),
        (lambda state: put(state, "tls.crt", b"a" * 100_000), "longer than"),
    ],
)
def test_unusable_pair_leads_to_renewal_of_the_same_operator(
    state: Path, break_it: Callable[[Path], object], word: str
) -> None:
    """A second operator would be an orphan at ngrok; the first one can have another certificate."""
    IdentityStore(str(state)).save("k8sop_1", OLD)
    break_it(state)

    stored = IdentityStore(str(state)).load()

    assert stored.operator_id == "k8sop_1"
    assert stored.credentials is None
    assert word in " ".join(stored.notes)
    assert next_step(stored, JANUARY).step is Step.RENEW


def test_key_open_to_others_is_closed_and_reported(state: Path) -> None:
    """It goes on being used, since the flows must; whether it was read, only the owner can judge."""
    IdentityStore(str(state)).save("k8sop_1", OLD)
    (state / "tls.key").chmod(0o644)

    stored = IdentityStore(str(state)).load()

    assert stored.credentials == OLD
    assert mode_of(state / "tls.key") == 0o600
    assert any("mode 0644" in note for note in stored.notes)
    assert any("refresh-cert --force" in note for note in stored.notes)
    assert IdentityStore(str(state)).load().notes == ()


def test_certificate_that_others_could_write_is_closed(state: Path) -> None:
    """Reading it is anybody's right, writing it is not."""
    IdentityStore(str(state)).save("k8sop_1", OLD)
    (state / "tls.crt").chmod(0o666)
    (state / "operator_id").chmod(0o664)

    stored = IdentityStore(str(state)).load()

    assert stored.credentials == OLD
    assert mode_of(state / "tls.crt") == 0o644
    assert mode_of(state / "operator_id") == 0o644
    assert len(stored.notes) == 2


def test_stricter_modes_stay(state: Path) -> None:
    """An administrator who closed tls.crt knew why."""
    IdentityStore(str(state)).save("k8sop_1", OLD)
    (state / "tls.crt").chmod(0o600)
    (state / "tls.key").chmod(0o400)

    assert IdentityStore(str(state)).load() == StoredIdentity("k8sop_1", OLD, ())
    assert mode_of(state / "tls.key") == 0o400


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a file away")
def test_key_of_a_stranger_is_not_used(state: Path) -> None:
    """Its owner knows it, and can exchange it."""
    IdentityStore(str(state)).save("k8sop_1", OLD)
    os.chown(state / "tls.key", 12345, 12345)

    stored = IdentityStore(str(state)).load()

    assert stored.credentials is None
    assert "uid 12345" in " ".join(stored.notes)


# Crashes. The state is what a kill leaves between any two system calls.


class Killed(BaseException):
    """The process is gone."""


class MortalOps(files.Ops):
    """Real system calls, of which only the first `lives` that change something are carried out."""

    def __init__(self, lives: int) -> None:
        self.lives = lives
        self.changes = 0

    def _spend(self) -> None:
        if self.changes >= self.lives:
            raise Killed
        self.changes += 1

    def open(self, path: files.StrPath, flags: int, mode: int = 0o600, *, dir_fd: int | None = None) -> int:
        if flags & os.O_CREAT:
            self._spend()
        return super().open(path, flags, mode, dir_fd=dir_fd)

    def write(self, fd: int, data: bytes | memoryview) -> int:
        self._spend()
        return super().write(fd, data)

    def rename(self, source: str, target: str, *, dir_fd: int) -> None:
        self._spend()
        super().rename(source, target, dir_fd=dir_fd)

    def unlink(self, path: files.StrPath, *, dir_fd: int | None = None) -> None:
        self._spend()
        super().unlink(path, dir_fd=dir_fd)

    def fchmod(self, fd: int, mode: int) -> None:
        self._spend()
        super().fchmod(fd, mode)


def saves_until_killed(state: Path, before: StoredIdentity, operator_id: str, pair: Credentials) -> list[Path]:
    """Copies of the state directory as a kill leaves it, one for each moment of a save."""
    left = []
    for lives in range(100):
        directory = state / f"killed-after-{lives}"
        directory.mkdir(mode=0o700)
        if before.credentials is not None:
            IdentityStore(str(directory)).save(before.operator_id, before.credentials)
            put(directory, "tls.csr", b"the old key's")
        left.append(directory)
        try:
            IdentityStore(str(directory), ops=MortalOps(lives)).save(operator_id, pair)
        except Killed:
            continue
        return left
    raise AssertionError("a save does not take a hundred changes")


def test_save_killed_at_any_moment_leaves_a_matching_pair(state: Path) -> None:
    """Before: the old pair. After: the new one. Never half of each, and after one load nothing is left over."""
    before = StoredIdentity("k8sop_1", OLD)

    found = []
    for directory in saves_until_killed(state, before, "k8sop_1", NEW):
        stored = IdentityStore(str(directory)).load()
        found.append(stored.credentials)
        assert stored.operator_id == "k8sop_1"
        request = ["tls.csr"] if stored.credentials == OLD else []
        assert sorted(path.name for path in directory.iterdir()) == ["operator_id", "tls.crt", *request, "tls.key"]
        assert IdentityStore(str(directory)).load() == StoredIdentity("k8sop_1", stored.credentials)

    turned = found.index(NEW)
    assert len(found) > 6
    assert turned > 1
    assert found == [OLD] * turned + [NEW] * (len(found) - turned)


def test_renames_cut_in_two_are_finished(state: Path) -> None:
    """The one moment for which all of this exists: the new key beside the old certificate."""
    put(state, "operator_id", b"k8sop_1")
    put(state, "tls.key", NEW.key_pem)
    put(state, "tls.crt", OLD.certificate_pem)
    put(state, "tls.crt.new", NEW.certificate_pem)

    stored = IdentityStore(str(state)).load()

    assert stored.credentials == NEW
    assert (state / "tls.crt").read_bytes() == NEW.certificate_pem
    assert not (state / "tls.crt.new").exists()
    assert "interrupted" in " ".join(stored.notes)


def test_renames_that_reached_the_disk_in_the_other_order_are_finished(state: Path) -> None:
    """A power cut may keep the second rename and lose the first."""
    put(state, "tls.key", OLD.key_pem)
    put(state, "tls.crt", NEW.certificate_pem)
    put(state, "tls.key.new", NEW.key_pem)

    assert IdentityStore(str(state)).load().credentials == NEW
    assert (state / "tls.key").read_bytes() == NEW.key_pem


def test_first_save_killed_at_any_moment_never_loses_a_known_operator(state: Path) -> None:
    """Once the id is on the disk, its pair is there too; before, the machine registers again."""
    for directory in saves_until_killed(state, StoredIdentity(), "k8sop_1", NEW):
        stored = IdentityStore(str(directory)).load()

        if stored.operator_id:
            assert stored.credentials == NEW
            assert next_step(stored, NEW.not_before).step is Step.USE
        else:
            assert next_step(stored, NEW.not_before).step is Step.REGISTER


def test_new_operator_is_never_seen_with_the_old_ones_certificate(state: Path) -> None:
    """Registered again after ngrok forgot us: the old certificate would be refused by the ingress without a word."""
    for directory in saves_until_killed(state, StoredIdentity("k8sop_old", OLD), "k8sop_new", NEW):
        stored = IdentityStore(str(directory)).load()

        assert (stored.operator_id, stored.credentials) != ("k8sop_new", OLD)
        assert stored.credentials in (OLD, NEW)


def test_pair_that_is_younger_than_the_unfinished_one_stays(state: Path) -> None:
    """The Go daemon ran in between and renewed in place."""
    put(state, "operator_id", b"k8sop_1")
    put_pair(state, NEW)
    put_pair(state, OLD, ".new")

    stored = IdentityStore(str(state)).load()

    assert stored.credentials == NEW
    assert not (state / "tls.key.new").exists()
    assert not (state / "tls.crt.new").exists()


def test_half_written_leftovers_do_not_matter(state: Path) -> None:
    """A whole pair in place beats half a new one."""
    put(state, "operator_id", b"k8sop_1")
    put_pair(state, OLD)
    put(state, "tls.key.new", NEW.key_pem)

    stored = IdentityStore(str(state)).load()

    assert stored.credentials == OLD
    assert not (state / "tls.key.new").exists()


class ReadOnlyOps(files.Ops):
    """A file system that was remounted read-only."""

    def rename(self, source: str, target: str, *, dir_fd: int) -> None:
        raise OSError(30, "Read-only file system")

    def unlink(self, path: files.StrPath, *, dir_fd: int | None = None) -> None:
        raise OSError(30, "Read-only file system")

    def open(self, path: files.StrPath, flags: int, mode: int = 0o600, *, dir_fd: int | None = None) -> int:
        if flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR):
            raise OSError(30, "Read-only file system")
        return super().open(path, flags, mode, dir_fd=dir_fd)


def test_interrupted_save_is_usable_on_a_read_only_file_system(state: Path) -> None:
    """The pair is good wherever it lies; finishing can wait."""
    put(state, "operator_id", b"k8sop_1")
    put(state, "tls.key", NEW.key_pem)
    put(state, "tls.crt", OLD.certificate_pem)
    put(state, "tls.crt.new", NEW.certificate_pem)
    store = IdentityStore(str(state), ops=ReadOnlyOps())

    assert store.load().credentials == NEW
    with pytest.raises(StateError):
        store.check_writable()
    with pytest.raises(StateError):
        store.save("k8sop_1", OLD)


def test_importing_the_module_does_not_import_cryptography() -> None:
    """50 ms and 9 MB, for who does not look into a certificate."""
    code = "import sys, ngrokd.cloud.identity; sys.exit('cryptography' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
