"""Standard streams that are closed."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest

STATUS = [sys.executable, "-m", "ngrokd", "--socket", "/nonexistent/ngrokd.sock", "status"]


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", "<&- >&- 2>&-"])
def test_closed_standard_streams_change_no_exit_code(closed: str) -> None:
    """A service manager may start a program so, and the first socket must not become its stdout."""
    line = f"{shlex.join(STATUS)} {closed}"

    assert subprocess.run(["sh", "-c", line], check=False).returncode == 3
