"""Each fault is found by its own check, and the remedy says what to do. The other side is a real one, in miniature.

What needs a kernel of its own (routes, read-only mounts, a missing TUN) is in tests/netns.
"""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from ngrokd.cloud.api import NgrokApi, api_ssl_context
from ngrokd.cloud.identity import IdentityStore, credentials_of, new_key_and_csr
from ngrokd.config import parse
from ngrokd.doctor.examination import examine
from ngrokd.doctor.findings import Finding
from ngrokd.doctor.patient import Patient
from ngrokd.host.claims import claim_interface
from ngrokd.lab.control_plane import DEFAULT_KEY, Fault
from ngrokd.lab.ingress import Toxics
from ngrokd.lab.world import Lab, open_lab

INTERFACE = "ngrokd-ill"


@dataclass
class Case:
    """A machine that is well: registered, with a certificate, two endpoints and a hosts file."""

    lab: Lab
    directory: Path
    operator_id: str
    environ: dict[str, str] = field(default_factory=dict)

    async def examine(self, *, ahead_s: float = 0.0, text: str = "") -> dict[str, list[Finding]]:
        """What the doctor finds, by check. `text` goes to the end of the configuration."""
        settings = parse(configuration(self.lab, self.directory, text), str(self.directory / "config.toml"), {})
        patient = Patient(settings, self.environ, wall=lambda: time.time() + ahead_s)
        found: dict[str, list[Finding]] = {}
        async for finding in examine(patient):
            found.setdefault(finding.check, []).append(finding)
        return found


def configuration(lab: Lab, directory: Path, text: str = "") -> str:
    settings: dict[str, dict[str, object]] = {
        "net": {"interface": INTERFACE, "subnet": "10.231.0.0/16"},
        "hosts": {"path": str(directory / "hosts")},
        "http": {"listen": ""},
        "limits": {"flows": 100},
        "ingress": {"connect_timeout": "2s"},
    }
    return f"{lab.config(directory, settings=settings)}\n{text}"


async def open_case(lab: Lab, directory: Path) -> Case:
    lab.add_endpoint("http://hello.ill", "http")
    lab.add_endpoint("tcp://echo.ill:7", "echo")
    lab.write_config(directory)
    (directory / "hosts").write_text("127.0.0.1 localhost\n")
    api = NgrokApi(
        url=lab.api_url,
        key=DEFAULT_KEY,
        connect=trio.open_tcp_stream,
        ssl_context=api_ssl_context((directory / "lab-ca.pem").read_bytes()),
    )
    key_pem, csr_pem = new_key_and_csr()
    operator = await api.register(csr_pem)
    IdentityStore(str(directory / "state")).save(operator.id, credentials_of(key_pem, operator.certificate_pem))
    return Case(lab, directory, operator.id)


def only(found: dict[str, list[Finding]], *but: str) -> dict[str, str]:
    """What failed, by check, without what the machine of the tests may lack."""
    machines = {"rights", "tun", "file-limit", "routes", "firewall", *but}
    return {
        check: one.summary
        for check, all_ in found.items()
        for one in all_
        if one.level == "fail" and check not in machines
    }


async def test_a_machine_that_is_well(tmp_path: Path) -> None:
    """Nothing fails, and each phase of the way to the ingress is timed."""
    async with open_lab() as lab:
        case = await open_case(lab, tmp_path)

        found = await case.examine()

    assert only(found) == {}
    assert found["ingress"][0].level == "ok"
    assert set(found["ingress"][0].facts) == {"dns_ms", "tcp_ms", "tls_ms", "header_ms"}
    assert "opens" in found["ingress"][0].summary
    assert found["clock"][0].level == "ok"
    assert found["endpoints"][0].facts == {"count": 2}
    assert lab.ingress.connection_count == 2


async def test_a_wrong_key(tmp_path: Path) -> None:
    """ngrok's code in plain words."""
    async with open_lab() as lab:
        case = await open_case(lab, tmp_path)
        lab.plane.keys = {"another"}

        found = await case.examine()

    refused = next(one for one in found["api-key"] if one.level == "fail")
    assert "revoked" in refused.summary
    assert "ERR_NGROK_203" in refused.summary
    assert "ngrokd set-api-key" in refused.remedy
    assert DEFAULT_KEY not in str(found)


@pytest.mark.parametrize(
    ("code", "status", "words", "remedy"),
    [
        ("ERR_NGROK_19002", 400, "kubernetes bindings are not enabled", "support"),
        ("ERR_NGROK_4012", 403, "plan", "billing"),
        ("ERR_NGROK_226", 429, "too many questions", "poll_interval"),
    ],
)
async def test_what_ngrok_refuses_in_plain_words(
    tmp_path: Path, code: str, status: int, words: str, remedy: str
) -> None:
    """Whoever reads it need not know ngrok's numbers."""
    async with open_lab() as lab:
        case = await open_case(lab, tmp_path)
        lab.plane.set_fault(Fault(status=status, code=code))

        found = await case.examine()

    failures = [one for check in ("api", "api-key") for one in found.get(check, []) if one.level == "fail"]
    assert words in failures[0].summary
    assert code in failures[0].summary
    assert remedy in failures[0].remedy


async def test_the_api_is_down(tmp_path: Path) -> None:
    """A proxy that is set in the environment is named as what ngrokd does not use."""
    async with open_lab() as lab:
        case = await open_case(lab, tmp_path)
        case.environ["HTTPS_PROXY"] = "http://proxy.example:3128"
        lab.set_api_down(True)

        found = await case.examine()

    assert "refused" in found["api"][0].summary
    assert "directly" in found["api"][0].remedy
    assert found["proxy"][0].level == "warn"
    assert found["ingress"][0].level == "ok", "the ingress can be judged all the same"


async def test_a_captive_portal_answers_instead_of_ngrok(tmp_path: Path) -> None:
    """A redirect, or somebody else's certificate, whose issuer is named."""
    async with open_lab() as lab:
        case = await open_case(lab, tmp_path)
        lab.plane.set_fault(Fault.redirect("http://portal.example/login"))
        redirected = await case.examine()
        lab.plane.set_fault(None)
        (tmp_path / "lab-ca.pem").write_bytes(lab.clients.root_pem)
        foreign = await case.examine()

    assert "portal" in redirected["api"][0].remedy
    assert "portal.example" in redirected["api"][0].summary
    assert foreign["api"][0].level == "fail"
    assert "issuer" in foreign["api"][0].summary
    assert "api.ca_file" in foreign["api"][0].remedy


async def test_the_ingress_shows_a_wrong_ca(tmp_path: Path) -> None:
    """It is named, and how to trust it if it is yours."""
    async with open_lab() as lab:
        case = await open_case(lab, tmp_path)
        lab.present("foreign")

        found = await case.examine()

    assert only(found) == {"ingress": found["ingress"][0].summary}
    assert "not trusted" in found["ingress"][0].summary
    assert "ingress.ca_file" in found["ingress"][0].remedy


async def test_an_expired_certificate(tmp_path: Path) -> None:
    """Ours; and how long ago."""
    async with open_lab() as lab:
        lab.plane.certificate_lifetime_s = 1.0  # of which the backdating takes all
        case = await open_case(lab, tmp_path)

        found = await case.examine(ahead_s=10.0)

    assert "expired" in found["certificate"][0].summary
    assert "refresh-cert --force" in found["certificate"][0].remedy


async def test_a_key_and_a_certificate_that_do_not_belong_together(tmp_path: Path) -> None:
    """As after a restore of half a backup. Looking repairs nothing."""
    async with open_lab() as lab:
        case = await open_case(lab, tmp_path)
        other, _ = new_key_and_csr()
        (tmp_path / "state" / "tls.key").write_bytes(other)

        found = await case.examine()

    assert "another key" in found["certificate"][0].summary
    assert "refresh-cert" in found["certificate"][0].remedy
    assert (tmp_path / "state" / "tls.key").read_bytes() == other


@pytest.mark.parametrize(("ahead_s", "words"), [(86400.0, "24.0 hours ahead of"), (-86400.0, "24.0 hours behind")])
async def test_a_clock_that_is_off_by_a_day(tmp_path: Path, ahead_s: float, words: str) -> None:
    """Before somebody looks for what is wrong with the certificates."""
    async with open_lab() as lab:
        case = await open_case(lab, tmp_path)

        found = await case.examine(ahead_s=ahead_s)

    assert words in found["clock"][0].summary
    assert "timedatectl" in found["clock"][0].remedy
    if ahead_s < 0:
        assert "clock is wrong" in found["certificate"][0].summary


async def test_the_ingress_is_closed(tmp_path: Path) -> None:
    """Nobody listens."""
    async with open_lab() as lab:
        case = await open_case(lab, tmp_path)
        lab.set_ingress_down(True)

        found = await case.examine()

    assert only(found) == {"ingress": found["ingress"][0].summary}
    assert "refused" in found["ingress"][0].summary
    assert "port 443" in found["ingress"][0].remedy


async def test_the_ingress_says_nothing(tmp_path: Path) -> None:
    """A firewall that drops: the phase in which time ran out is named."""
    async with open_lab() as lab:
        case = await open_case(lab, tmp_path)
        lab.ingress.toxics = Toxics(accept="hang")

        found = await case.examine()

    assert "while doing the TLS handshake" in found["ingress"][0].summary


async def test_the_header_is_refused(tmp_path: Path) -> None:
    """TLS is fine; it is the endpoint."""
    async with open_lab() as lab:
        case = await open_case(lab, tmp_path)
        lab.ingress.toxics = Toxics(error_code="ERR_NGROK_3200", error_message="offline")

        found = await case.examine()

    assert found["ingress"][0].level == "ok"
    assert only(found) == {"header": found["header"][0].summary}
    assert "ERR_NGROK_3200" in found["header"][0].summary
    assert "is its service connected" in found["header"][0].remedy


async def test_the_operator_was_revoked(tmp_path: Path) -> None:
    """Deleted at ngrok."""
    async with open_lab() as lab:
        case = await open_case(lab, tmp_path)
        lab.plane.forget_operator(case.operator_id)

        found = await case.examine()

    assert case.operator_id in found["operator"][0].summary
    assert "registers another" in found["operator"][0].remedy


async def test_selectors_that_match_nothing(tmp_path: Path) -> None:
    """Not an error, but hardly what was meant; the ingress is tried as far as that goes."""
    async with open_lab() as lab:
        case = await open_case(lab, tmp_path)
        lab.remove_endpoint("http://hello.ill")
        lab.remove_endpoint("tcp://echo.ill:7")

        found = await case.examine()

    assert found["endpoints"][0].level == "warn"
    assert "selectors (true)" in found["endpoints"][0].summary
    assert "api.selectors" in found["endpoints"][0].remedy
    assert "header was not tried" in found["ingress"][0].summary


async def test_a_name_that_stands_in_the_hosts_file_already(tmp_path: Path) -> None:
    """Named with its line. In our own section it would be no conflict."""
    async with open_lab() as lab:
        case = await open_case(lab, tmp_path)
        section = f"# BEGIN ngrokd managed section ({INTERFACE})\n10.231.0.2\techo.ill\n"
        end = f"# END ngrokd managed section ({INTERFACE})\n"
        (tmp_path / "hosts").write_text(f"# hello.ill\n{section}{end}192.0.2.1 other HELLO.ill # mine\n")

        found = await case.examine()

    assert [one.summary.split(": ")[0] for one in found["names"]] == [f"{tmp_path}/hosts:5"]
    assert "remove hello.ill from line 5" in found["names"][0].remedy


async def test_a_section_that_lost_its_end(tmp_path: Path) -> None:
    """Somebody edited it."""
    async with open_lab() as lab:
        case = await open_case(lab, tmp_path)
        (tmp_path / "hosts").write_text("127.0.0.1 localhost\n# BEGIN ngrokd managed section\n10.107.0.2\tx.y\n")

        found = await case.examine()

    assert found["hosts"][0].level == "warn"
    assert "no END line" in found["hosts"][0].summary


async def test_a_second_instance(tmp_path: Path) -> None:
    """Who holds the interface is named."""
    async with open_lab() as lab:
        case = await open_case(lab, tmp_path)
        with closing(claim_interface(INTERFACE)):
            found = await case.examine()

    assert f"interface {INTERFACE} belongs to another ngrokd" in found["instance"][0].summary
    assert "net.interface" in found["instance"][0].remedy


async def test_a_state_directory_that_strangers_can_write(tmp_path: Path) -> None:
    """The command that sets it right is the remedy."""
    async with open_lab() as lab:
        case = await open_case(lab, tmp_path)
        (tmp_path / "state").chmod(0o777)

        found = await case.examine()

    assert found["state"][0].level == "fail"
    assert "chmod go-w" in found["state"][0].remedy


async def test_no_key_at_all(tmp_path: Path) -> None:
    """The API is reached all the same, and nothing else is asked there."""
    async with open_lab() as lab:
        await open_case(lab, tmp_path)
        asked = lab.plane.request_count
        text = configuration(lab, tmp_path).replace(DEFAULT_KEY, "")
        patient = Patient(parse(text, "config.toml", {}), {})

        found = [finding async for finding in examine(patient)]

    assert [one.check for one in found if one.level == "fail" and one.check.startswith("api")] == ["api-key"]
    assert lab.plane.request_count == asked + 1
