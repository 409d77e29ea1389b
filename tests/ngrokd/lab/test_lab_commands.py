"""The lab's command language: what each line turns."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from ngrokd.lab import backends
from ngrokd.lab.backends import Tally
from ngrokd.lab.commands import HELP, Commands
from ngrokd.lab.control_plane import Fault
from ngrokd.lab.ingress import Toxics
from ngrokd.lab.link import Line
from ngrokd.lab.world import Lab, open_memory_lab


@pytest.fixture
async def lab() -> AsyncIterator[Lab]:
    async with open_memory_lab(wall=lambda: 0.0) as lab:
        lab.add_demo_endpoints()
        yield lab


async def test_every_command_of_the_help_exists(lab: Lab) -> None:
    """And none is kept secret."""
    described = {line.split()[0] for line in HELP.splitlines() if line[0] != " "}

    answer = Commands(lab).execute("no-such-command")

    known = str(answer["error"]).partition("there are: ")[2].split()
    assert described - {"quit"} == set(known) - {"help"}
    assert Commands(lab).execute("")["help"] == HELP


async def test_many_endpoints_are_one_command(lab: Lab) -> None:
    """A whole subnet of them, with names as long as each other, so that they sort as they are counted."""
    commands = Commands(lab)

    answer = commands.execute("many 12 tcp://db-{}.prod:5432 echo")

    assert answer == {"ok": True, "endpoints": 7 + 12}
    assert lab.backend("db-00.prod", 5432) is lab.backend("db-11.prod", 5432)
    assert not commands.execute("many 12 tcp://db.prod:5432 echo")["ok"]
    assert not commands.execute("many twelve tcp://db-{}.prod:5432 echo")["ok"]


async def test_toxics_are_built_from_words(lab: Lab) -> None:
    """For all, for a route, for the next connection; and off again."""
    commands = Commands(lab)

    assert commands.execute("toxic after_bytes=10 then=cut latency_up_s=0.5")["ok"]
    assert commands.execute("toxic echo.demo:7 coalesce=on notices=a,b")["ok"]
    assert commands.execute("next answer=hang")["ok"]

    assert lab.ingress.toxics == Toxics(after_bytes=10, then="cut", line=Line(latency_up_s=0.5))
    assert lab.ingress.routes["echo.demo", 7].toxics == Toxics(coalesce=True, notices=("a", "b"))
    assert list(lab.ingress.script) == [Toxics(answer="hang")]
    assert commands.execute("toxic off")["ok"]
    assert commands.execute("toxic echo.demo:7 off")["ok"]
    assert lab.ingress.toxics == Toxics()
    assert lab.ingress.routes["echo.demo", 7].toxics is None


async def test_faults_are_built_from_words(lab: Lab) -> None:
    """With headers, and only for what matches."""
    commands = Commands(lab)

    assert commands.execute("fault status=429 code=ERR_NGROK_226 retry-after=3 method=GET path=bound")["ok"]

    assert lab.plane._fault_for("POST", "/kubernetes_operators") is None
    assert lab.plane._fault_for("GET", "/k/bound_endpoints") == Fault(
        status=429, code="ERR_NGROK_226", headers=(("retry-after", "3"),)
    )
    assert commands.execute("fault off")["ok"]
    assert lab.plane._fault_for("GET", "/k/bound_endpoints") is None


async def test_switches_turn_what_they_name(lab: Lab) -> None:
    """Each on and off."""
    commands = Commands(lab)
    for line in ("outage on", "ingress down", "resumption off", "key K", "lifetime 60", "page-size 3", "tls 1.2"):
        assert commands.execute(line) == {"ok": True}, line

    assert (lab.plane.down, lab.ingress.down, lab.ingress.resumption) == (True, True, False)
    assert (lab.plane.keys, lab.plane.certificate_lifetime_s, lab.plane.page_size) == ({"K"}, 60.0, 3)
    for what in ("foreign", "expired", "not-yet", "wrong-name", "no-intermediate", "good"):
        assert commands.execute(f"certificate {what}") == {"ok": True}


async def test_what_was_counted_can_be_asked_for(lab: Lab) -> None:
    """Tallies by place, connections and requests by number."""
    backend = lab.backend("closes.demo", 9001)
    assert isinstance(backend, backends.ClosesFirst)
    backend.tallies.append(Tally(3, "abc", "eof"))
    commands = Commands(lab)

    assert commands.execute("tallies closes.demo:9001")["tallies"] == [{"length": 3, "sha256": "abc", "ended": "eof"}]
    assert commands.execute("tallies echo.demo:7")["tallies"] == []
    assert commands.execute("connections 5")["connections"] == []
    assert commands.execute("requests")["requests"] == []
    assert commands.execute("state")["endpoints"] == 7
    assert commands.execute("forget")["forgotten"] == []


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("add tcp://x.demo:1 nonsense", "no back end 'nonsense'"),
        ("add x", "usage: add URL BACKEND"),
        ("toxic nowhere.demo:1 off", "nothing there"),
        ("toxic after_bytes=many", "invalid literal"),
        ("toxic colour=red", "no key 'colour'; there are: accept"),
        ("toxic then=explode", "then is one of: reset cut"),
        ("fault 503", "is not KEY=VALUE"),
        ("outage maybe", "usage: outage on|off"),
        ("certificate fake", "there are: good foreign"),
        ("tallies nowhere.demo:1", "nothing there"),
    ],
)
async def test_a_wrong_line_says_what_would_be_right(lab: Lab, line: str, part: str) -> None:
    """It changes nothing and ends nothing."""
    answer = Commands(lab).execute(line)

    assert answer["ok"] is False
    assert part in str(answer["error"])
