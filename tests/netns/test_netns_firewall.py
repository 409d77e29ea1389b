"""The rules of docs/troubleshooting.md, against firewalls that drop everything they do not know."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence

import pytest

from tests.netns.stage import Stage
from tests.netns.support import ROOT, Namespace

pytestmark = pytest.mark.netns

PAGE = (ROOT / "docs/troubleshooting.md").read_text()
CLOSED = {
    "nft": (
        "nft add table inet filter",
        "nft add chain inet filter output { type filter hook output priority 0; policy drop; }",
        "nft add chain inet filter input { type filter hook input priority 0; policy drop; }",
        "nft add rule inet filter output oif lo accept",
        "nft add rule inet filter input iif lo accept",
    ),
    "iptables": (
        "iptables -A OUTPUT -o lo -j ACCEPT",
        "iptables -A INPUT -i lo -j ACCEPT",
        "iptables -P OUTPUT DROP",
        "iptables -P INPUT DROP",
    ),
}


@pytest.fixture
def play(netns: Callable[[], Namespace]) -> Iterator[Stage]:
    play = Stage(netns(), "--demo")
    yield play
    play.close()


def rules_of(tool: str) -> list[str]:
    """The lines of the page that begin with this tool."""
    blocks = re.findall(r"^```\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.split()[0] == tool]


def run(play: Stage, lines: Sequence[str]) -> None:
    for line in lines:
        # Braces and semicolons are nft's own here, and the quotes of a name are the shell's to take away.
        play.ns.run(["nft", line[4:]] if line.startswith("nft ") else line.split())


def fetch(play: Stage, within_s: str = "10") -> int:
    """curl's exit code; 28 says that time ran out."""
    command = ["curl", "-4", "-sS", "-o", "/dev/null", "--max-time", within_s, "http://hello.demo/"]
    return int(play.ns.run(command, check=False).returncode)


@pytest.mark.parametrize("tool", ["nft", "iptables"])
def test_the_rules_of_the_page_let_programs_through(play: Stage, tool: str) -> None:
    """Behind a policy that drops; both are needed, and a new start of the daemon needs none of them again."""
    if shutil.which(tool) is None:
        if os.environ.get("CI") == "true" and tool == "nft":
            pytest.fail("nft is missing (apt-get install nftables)")
        pytest.skip(f"{tool} is missing")
    rules = rules_of(tool)
    assert len(rules) == 2
    play.start()

    run(play, CLOSED[tool])
    closed = fetch(play, "1")
    run(play, rules[:1])
    half_open = fetch(play, "1")
    run(play, rules[1:])
    opened = fetch(play)
    play.stop()
    play.start()
    again = fetch(play)

    assert (closed, half_open) == (28, 28)
    assert (opened, again) == (0, 0)
