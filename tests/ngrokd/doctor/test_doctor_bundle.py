"""An archive for a bug report holds what helps, and no secret, wherever one had got to."""

from __future__ import annotations

import gzip
import json
import tarfile
from pathlib import Path

import pytest

from ngrokd.config import parse
from ngrokd.doctor.bundle import HIDDEN, Redactor, secrets_of, write_bundle
from ngrokd.doctor.findings import fail
from ngrokd.doctor.patient import Patient
from ngrokd.errors import StateError

PEM = """\
-----BEGIN EC PRIVATE KEY-----
MIGkAgEBBDDsecretsecretsecretsecretsecret
AAAAsecondline+/==
-----END EC PRIVATE KEY-----
"""
SECRETS = {
    "api.key": "2abcINCONFIG_111111111111",
    "stored": "2abcSTORED_222222222222",
    "file": "2abcFILE_333333333333",
    "env": "2abcENV_444444444444",
    "env-file": "2abcENVFILE_555555555555",
    "credential": "2abcCREDENTIAL_6666666",
    "go": "2abcGO_777777777777",
}


@pytest.fixture
def patient(tmp_path: Path) -> Patient:
    """Every place in which a key may be, and a status in which all have turned up."""
    for name in ("state", "credentials"):
        (tmp_path / name).mkdir(mode=0o700)
    (tmp_path / "state/api_key").write_text(SECRETS["stored"] + "\n")
    (tmp_path / "state/tls.key").write_text(PEM)
    (tmp_path / "state/config.yml").write_text(f'api:\n  key: "{SECRETS["go"]}"\n')
    (tmp_path / "key-file").write_text(SECRETS["file"])
    (tmp_path / "env-file").write_text(SECRETS["env-file"])
    (tmp_path / "credentials/api_key").write_text(SECRETS["credential"])
    (tmp_path / "hosts").write_text(
        "192.0.2.1 private.example\n# BEGIN ngrokd managed section\n10.107.0.2\tmy.api\n# END ngrokd managed section\n"
    )
    text = f"""
        [api]
        key = "{SECRETS["api.key"]}"
        key_file = "{tmp_path}/key-file"
        [state]
        directory = "{tmp_path}/state"
        [control]
        socket = "{tmp_path}/none.sock"
        [hosts]
        path = "{tmp_path}/hosts"
    """
    environ = {
        "NGROK_API_KEY": SECRETS["env"],
        "NGROKD_API_KEY_FILE": f"{tmp_path}/env-file",
        "CREDENTIALS_DIRECTORY": f"{tmp_path}/credentials",
    }
    patient = Patient(parse(text, str(tmp_path / "config.toml"), {}), environ)
    patient.status = {"state": "degraded", "said": [*SECRETS.values(), PEM], "header": "Authorization: Bearer zzz12345"}
    return patient


def members(path: Path) -> dict[str, str]:
    found = {}
    with tarfile.open(path) as archive:
        for member in archive:
            file = archive.extractfile(member)
            assert file is not None
            found[member.name.removeprefix("ngrokd-report/")] = file.read().decode()
    return found


def test_no_secret_is_in_the_archive(patient: Patient, tmp_path: Path) -> None:
    """Searched in all of its bytes, for every secret and each line of the private key."""
    assert set(SECRETS.values()) <= {secret.strip() for secret in secrets_of(patient.settings, patient.environ)}
    path = tmp_path / "report.tar.gz"
    finding = fail("api-key", f"ngrok refuses {SECRETS['stored']}", "ask https://user:pa55word@example.org/")

    write_bundle(str(path), patient, [finding])

    everything = gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
    for secret in (*SECRETS.values(), *PEM.splitlines()[1:-1], "zzz12345", "pa55word", "private.example"):
        assert secret not in everything, secret
    assert HIDDEN in everything
    assert path.stat().st_mode & 0o777 == 0o600


def test_what_helps_is_in_it(patient: Patient, tmp_path: Path) -> None:
    """The findings, the configuration without its secrets, the plan, our names, this machine."""
    path = tmp_path / "report.tar.gz"

    names = write_bundle(str(path), patient, [fail("x", "something is wrong", "mend it")])

    held = members(path)
    assert set(held) == set(names)
    assert json.loads(held["doctor.json"])[0]["summary"] == "something is wrong"
    assert json.loads(held["config.json"])["values"]["api"]["key"] == "***"
    assert "ip route add 10.107.0.0/16 dev ngrokd0" in held["plan.txt"]
    assert "10.107.0.2\tmy.api" in held["hosts.txt"]
    assert "tls.key" in held["state.txt"], "that it is there, and its mode"
    assert json.loads(held["versions.json"])["ngrokd"]


def test_an_archive_that_cannot_be_written_says_so(patient: Patient, tmp_path: Path) -> None:
    """And none is left half."""
    with pytest.raises(StateError, match="missing"):
        write_bundle(str(tmp_path / "missing" / "report.tar.gz"), patient, [])


def test_short_secrets_do_not_cut_words_apart() -> None:
    """A key of one letter is no key."""
    assert Redactor(["a", "", "\n"]).clean("a status") == "a status"
    assert Redactor(["abc+def/123"]).clean('{"x": "abc+def/123"}') == f'{{"x": "{HIDDEN}"}}'
    assert Redactor(['quo"te"d-secret']).clean(json.dumps('quo"te"d-secret')) == f'"{HIDDEN}"'


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("api_key = 'abcdefgh'", "api_key = '"),
        ("authtoken: 2abcdefghij", "authtoken: "),
        ('{"password": "hunter22"}', '{"password": "'),
        ("NGROKD_API_KEY_FILE=/etc/ngrokd/key", "/etc/ngrokd/key"),
        ("https://me:secret99@proxy:3128/", "@proxy:3128/"),
    ],
)
def test_what_looks_like_a_secret_is_one(text: str, kept: str) -> None:
    """Of other programs, in the journal or in a unit; a path to one is none."""
    cleaned = Redactor([]).clean(text)

    assert kept in cleaned
    assert not any(secret in cleaned for secret in ("abcdefgh", "2abcdefghij", "hunter22", "secret99"))
