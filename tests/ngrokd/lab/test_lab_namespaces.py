"""The private corner, made for real in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.netns.support import ROOT, require_namespaces

INSIDE = """
import os, socket, sys
from pathlib import Path
from ngrokd.lab.namespaces import isolate

before = os.readlink("/proc/self/ns/net"), os.readlink("/proc/self/ns/mnt")
isolate(Path(sys.argv[1]))
assert os.readlink("/proc/self/ns/net") != before[0]
assert os.readlink("/proc/self/ns/mnt") != before[1]
assert [name for _, name in socket.if_nameindex()] == ["lo"]
server = socket.create_server(("127.0.0.1", 0))
socket.create_connection(server.getsockname()).close()
with open("/etc/hosts", "a") as hosts:
    hosts.write("127.0.0.9 only-inside.demo\\n")
print(socket.getaddrinfo("only-inside.demo", 80, type=socket.SOCK_STREAM)[0][4])
try:
    socket.getaddrinfo("nowhere.demo", 80)
except socket.gaierror:
    print("nobody else is asked")
"""

REFUSED = """
import sys
from pathlib import Path
from ngrokd.errors import PermissionMissingError
from ngrokd.lab.namespaces import isolate

try:
    isolate(Path(sys.argv[1]))
except PermissionMissingError as error:
    print(error, "|", error.remedy)
"""


def python(text: str, directory: Path, *prefix: str) -> str:
    command = [*prefix, sys.executable, "-c", text, str(directory)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.netns
def test_inside_names_and_network_are_private(tmp_path: Path) -> None:
    """What is written to the hosts file is resolved inside, and never seen outside."""
    require_namespaces()
    hosts = Path("/etc/hosts").read_bytes()

    printed = python(INSIDE, tmp_path)

    assert printed.splitlines() == ["('127.0.0.9', 80)", "nobody else is asked"]
    assert Path("/etc/hosts").read_bytes() == hosts
    assert (tmp_path / "hosts").read_bytes() == hosts + b"127.0.0.9 only-inside.demo\n"


@pytest.mark.netns
def test_without_the_right_it_says_which_and_what_to_do(tmp_path: Path) -> None:
    """Not "permission denied": the capability, and a command."""
    require_namespaces()

    printed = python(REFUSED, tmp_path, "setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin")

    assert "CAP_SYS_ADMIN is missing" in printed
    assert "sudo ngrokd demo --isolated" in printed
