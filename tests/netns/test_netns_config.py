"""The configuration on a real kernel: changed by the command line, by hand and by mistake, while the daemon runs."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.netns.stage import Stage
from tests.netns.support import Namespace

pytestmark = pytest.mark.netns

NOTICED_S = 15.0  # two looks are two seconds; the rest is for a busy machine


@pytest.fixture
def play(netns: Callable[[], Namespace]) -> Iterator[Stage]:
    stage = Stage(netns(), "--demo")
    try:
        stage.start()
        yield stage
    finally:
        stage.close()


def config_command(play: Stage, *words: str, check: bool = True) -> Any:
    return play.ngrokd("--config", play.lab.config, "config", *words, check=check)


def until(play: Stage, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The status, once it is so."""
    deadline = time.monotonic() + NOTICED_S
    while not condition(status := play.status()):
        assert time.monotonic() < deadline, status
        time.sleep(0.2)
    return status


def test_a_change_is_heeded_and_a_mistake_changes_nothing(play: Stage) -> None:
    """One line of the command line is all it takes; nobody sends a signal."""
    file = Path(play.lab.config)
    written = file.read_text()

    said = config_command(play, "set", "pool.max", "7")
    assert "a running daemon takes it over" in said.stderr
    until(play, lambda status: status["pool"]["max"] == 7)

    config_command(play, "set", "net.mtu", "1400")
    waiting = until(play, lambda status: bool(status["config"]["needs_restart"]))
    assert waiting["config"]["needs_restart"] == ["net.mtu"]
    assert re.search(r"After restart +net\.mtu\n", play.ngrokd("status").stdout)

    file.write_text(file.read_text() + "\n[pool]\nmax = 9\n")
    broken = until(play, lambda status: bool(status["config"]["problem"]))
    assert broken["state"] == "degraded"
    assert broken["config"]["invalid_since"] is not None
    assert broken["pool"]["max"] == 7
    refused = play.ngrokd("reload", check=False)
    assert refused.returncode == 78
    assert "this section stands above already" in refused.stderr
    assert "the configuration is invalid since" in play.ngrokd("status").stdout
    assert config_command(play, "validate", check=False).returncode == 78

    file.write_text(written)
    mended = play.ngrokd("reload")
    assert mended.stdout == "changed: pool.max\n"
    assert play.status()["config"]["problem"] == ""
    assert play.ngrokd("reload").stdout == "nothing has changed\n"


def test_files_of_the_folder_and_the_key_file_count(play: Stage) -> None:
    """What a tool drops there, and what a secrets manager writes."""
    folder = Path(play.lab.config).parent / "conf.d"
    folder.mkdir()
    key = play.directory / "api-key"
    shown = json.loads(config_command(play, "show", "--json", "--origin", "limits.flows").stdout)
    assert shown["data"]["origins"] == {"limits.flows": "default"}

    (folder / "10-limits.toml").write_text("[limits]\nflows = 321\n")
    until(play, lambda status: f"{folder}/10-limits.toml" in status["config"]["files"])
    shown = json.loads(config_command(play, "show", "--json", "limits.flows").stdout)
    assert shown["data"]["origins"] == {"limits.flows": f"{folder}/10-limits.toml:2"}

    key.write_text("no-such-key")
    (folder / "20-key.toml").write_text(f'[api]\nkey_file = "{key}"\n')
    until(play, lambda status: status["api"]["auth_failed"] is True)
    key.write_text(str(play.lab.facts["api_key"]))
    until(play, lambda status: status["api"]["auth_failed"] is False)
