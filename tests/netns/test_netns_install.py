"""`sudo make install`, and what README says comes after it, word for word.

The installation is a real one, with /opt, /usr/local, /etc and /run private. Inside there is no network, so packages
come from `.venv/wheels`, which `make` fills when it makes the virtual environment; pip compares them with the hashes
of the lock files all the same. sudo removes variables, so it is told to keep the three that say so to pip.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.netns.stage import LabProcess
from tests.netns.support import ROOT, Namespace, Running, open_namespace, require_namespaces

WHEELS = Path(sys.prefix) / "wheels"
PIP = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(WHEELS), "PIP_NO_CACHE_DIR": "1"}
README = (ROOT / "README.md").read_text()
NOBODY = ("setpriv", "--reuid", "nobody", "--regid", "nogroup", "--clear-groups", "--")
INSTALL_S = 90.0  # about 8 on an idle machine, most of it pip


def missing() -> str:
    """Why nothing can be installed here, "" when it can."""
    tools = [tool for tool in ("sudo", "make", "setpriv") if shutil.which(tool) is None]
    if tools:
        return f"these tools are missing: {', '.join(tools)}"
    return "" if WHEELS.is_dir() else f"{WHEELS} is missing; `make test` makes it"


@pytest.fixture(scope="module")
def installed() -> Iterator[Namespace]:
    """A private machine with ngrokd installed on it, by somebody whose files nobody else may read."""
    require_namespaces()
    if reason := missing():
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    with open_namespace() as ns:
        ns.private("/opt")
        ns.private("/usr/local")
        ns.write_file("/etc/hosts", ns.read_file("/etc/hosts") + f"127.0.1.1\t{socket.gethostname()}\n")
        ns.write_file("/etc/sudoers.d/pip", f'Defaults env_keep += "{" ".join(PIP)}"\n')
        command = "sudo make install"
        assert command in commands_of("Install")
        ns.run(["sh", "-c", f"umask 077; {command} {python_of(ns)}"], timeout=INSTALL_S, env=PIP)
        yield ns


def python_of(ns: Namespace) -> str:
    """Nothing where sudo finds the Python that the wheels are for, as it does nearly always."""
    version = "import sys; print(*sys.version_info[:2])"
    found = ns.run(["sudo", "python3", "-c", version], check=False).stdout.split()
    same = found == [str(part) for part in sys.version_info[:2]]
    return "" if same else f"PYTHON={Path(sys.base_prefix) / 'bin/python3'}"


def commands_of(section: str) -> list[str]:
    """The commands that README shows in a section, without their comments."""
    text = README.split(f"\n## {section}\n", 1)[1].split("\n## ", 1)[0]
    return [line.split("  #")[0].strip() for line in re.findall(r"^    (\S.*)$", text, re.MULTILINE)]


def sudo(ns: Namespace, command: str, **options: Any) -> str:
    """Run a command line of README, which is one with sudo, and return what it printed."""
    words = command.split()
    assert words[0] == "sudo"
    return ns.run(words, **options).stdout


def stop(daemon: Running) -> None:
    """As ^C does: sudo hands the signal on."""
    daemon.terminate()
    assert daemon.wait(timeout=10) == 0


def lab(ns: Namespace, directory: Path, *options: str) -> tuple[LabProcess, str]:
    """An ngrok, and the sections of a configuration that make a daemon use it, without a key."""
    nothing = ("api.key", "state.directory", "control.socket")
    process = LabProcess(ns, directory, *options, *(f"--set={key}=null" for key in nothing))
    text = Path(process.config).read_text()
    return process, "".join(re.findall(r"^\[(?:api|ingress)\]\n(?:[^\[]+\n)?", text, re.MULTILINE))


def test_the_installation_is_roots_alone_and_everybodys_to_read(installed: Namespace) -> None:
    """Whoever can write there is root the next time the daemon starts; and users have to be able to run the client."""
    writable = ["find", "/opt/ngrokd", "!", "-type", "l", "-perm", "/022"]
    foreign = ["find", "/opt/ngrokd", "(", "!", "-uid", "0", "-o", "!", "-gid", "0", ")"]
    unreadable = ["find", "/opt/ngrokd", "!", "-type", "l", "!", "-perm", "-444"]

    for search in (writable, foreign, unreadable):
        assert installed.run(search).stdout == ""

    assert installed.run(["ls", "/opt/ngrokd"]).stdout.split() == ["ngrokd.schema.json", "ngrokd.toml", "venv"]
    assert installed.run(["sh", "-c", "ls /opt/ngrokd/venv/bin | grep pip"], check=False).stdout == ""


def test_what_is_installed_is_what_the_locks_say(installed: Namespace) -> None:
    """Nothing more, and the tree it came from is not needed any longer."""
    source = (
        "import importlib.metadata as m, json, ngrokd, tun\n"
        "print(json.dumps([ngrokd.__file__, tun.__file__, {d.name.lower(): d.version for d in m.distributions()}]))"
    )

    ngrokd, tun, packages = json.loads(installed.run(["/opt/ngrokd/venv/bin/python", "-c", source], cwd="/").stdout)

    lock = (ROOT / "requirements/runtime.lock").read_text()
    pins = re.findall(r"^([a-z0-9_.-]+)==([^ ;\\]+) (;?).*\\$", lock, re.MULTILINE)
    assert ngrokd.startswith("/opt/ngrokd/")
    assert tun.startswith("/opt/ngrokd/")
    assert packages.pop("ngrokd")
    assert packages.items() <= {(name, version) for name, version, _ in pins}
    assert packages.keys() >= {name for name, _, condition in pins if not condition}


@pytest.mark.parametrize("command", ["ngrokd", "ngrokctl"])
def test_everybody_finds_both_commands(installed: Namespace, command: str) -> None:
    """Root through sudo's own path, users through theirs."""
    assert installed.run(["sudo", command, "version"]).stdout.startswith("ngrokd version ")
    assert installed.run([*NOBODY, command, "version"], cwd="/").stdout.startswith("ngrokd version ")
    assert installed.run([*NOBODY, command, "status"], cwd="/", check=False).returncode == 3


def test_readme_leads_from_nothing_to_a_name_that_works(installed: Namespace, tmp_path: Path) -> None:
    """Each command of its section "Install", as it stands there; the configuration only says where ngrok is."""
    ngrok, config = lab(installed, tmp_path / "lab", "--demo")
    installed.run(["mkdir", "-p", "-m", "700", "/etc/ngrokd"])
    installed.write_file("/etc/ngrokd/config.toml", config)
    _, run, set_key, show = commands_of("Install")
    daemon = installed.start(run.split())
    daemon.expect("no API key yet", stream="stderr")

    said = sudo(installed, set_key, input=f"{ngrok.facts['api_key']}\n")

    assert said == "API key set successfully\n"
    daemon.expect(r"^\[ready\] ngrokd .* endpoints=7 ", timeout=10)
    assert re.search(r"^http://hello\.demo +10\.107\.0\.\d+:80\b", sudo(installed, show), re.MULTILINE)
    assert "lab" in installed.run([*NOBODY, "curl", "-sS", "--max-time", "10", "http://hello.demo/"]).stdout
    stop(daemon)
    assert "demo" not in installed.read_file("/etc/hosts")
    installed.run(["rm", "-r", "/etc/ngrokd"])


def test_two_daemons_side_by_side_as_readme_shows_them(installed: Namespace, tmp_path: Path) -> None:
    """Each has its own interface, subnet, state, socket and port, and serves its own account's endpoints."""
    shown = re.findall(r"^```toml\n# (/\S+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert [re.findall(r'^(?:interface|subnet) = "(.*)"$', text, re.MULTILINE) for _, text in shown] == [
        ["ngrokd1", "10.107.0.0/16"],
        ["ngrokd2", "10.108.0.0/16"],
    ]
    start = re.search(r"`(sudo ngrokd run --config /etc/ngrokd1\.toml)`", README)
    show = re.search(r"`(sudo ngrokd --config /etc/ngrokd1\.toml list)`", README)
    assert start
    assert show
    daemons: list[Running] = []

    for number, (path, text) in enumerate(shown, 1):
        ngrok, config = lab(installed, tmp_path / f"{number}", f"--endpoint=http://hello.n{number}=http")
        installed.write_file(path, f"{text}{config.replace('[api]', f'[api]{chr(10)}key = {quoted(ngrok)}')}")
        daemons.append(installed.start(start[1].replace("ngrokd1", f"ngrokd{number}").split()))
        daemons[-1].expect(rf"^\[ready\] .* tun=ngrokd{number} .* endpoints=1 ", timeout=10)

    for number in (1, 2):
        rows = sudo(installed, show[1].replace("ngrokd1", f"ngrokd{number}")).splitlines()[1:]
        assert [row.split()[:2] for row in rows] == [[f"http://hello.n{number}", f"10.{106 + number}.0.2:80"]]
        curl = ["curl", "-sS", "--max-time", "10", f"http://hello.n{number}/"]
        assert "lab" in installed.run(curl).stdout
        ready = f"http://127.0.0.1:{8080 + number}/ready"
        installed.run(["curl", "-sSf", "--retry", "9", "--retry-delay", "1", "--max-time", "10", ready])
    stop(daemons[0])
    assert "lab" in installed.run(["curl", "-sS", "--max-time", "10", "http://hello.n2/"]).stdout
    stop(daemons[1])
    assert "hello" not in installed.read_file("/etc/hosts")


def quoted(ngrok: LabProcess) -> str:
    """The key of a lab as TOML."""
    return json.dumps(ngrok.facts["api_key"])


def tree(ns: Namespace, *paths: str) -> Sequence[str]:
    """Everything that is in some directories."""
    return ns.run(["find", *paths]).stdout.splitlines()


def test_uninstall_leaves_the_state_and_nothing_else(installed: Namespace) -> None:
    """The state is who this machine is at ngrok; all else can be made again."""
    kept = "/opt/kept"
    installed.run(["mkdir", "-p", "/etc/ngrokd"])
    installed.write_file("/etc/ngrokd/operator_id", "k8sop_1")
    installed.run(["cp", "-a", "/opt/ngrokd", kept])
    before = set(tree(installed, "/usr/local", "/etc"))
    try:
        said = sudo(installed, "sudo make uninstall")

        assert "/etc/ngrokd" in said
        assert [path for path in tree(installed, "/opt") if path.startswith("/opt/ngrokd")] == []
        assert before - set(tree(installed, "/usr/local", "/etc")) == {
            "/usr/local/bin/ngrokd",
            "/usr/local/bin/ngrokctl",
        }
        assert installed.read_file("/etc/ngrokd/operator_id") == "k8sop_1"
        assert sudo(installed, "sudo make uninstall") == said  # once more does no harm
    finally:
        installed.run(["rm", "-rf", "/opt/ngrokd", "/etc/ngrokd"])
        installed.run(["mv", kept, "/opt/ngrokd"])
        for name in ("ngrokd", "ngrokctl"):
            installed.run(["ln", "-sfn", f"/opt/ngrokd/venv/bin/{name}", f"/usr/local/bin/{name}"])


def test_a_daemon_is_not_uninstalled_while_it_runs(installed: Namespace) -> None:
    """Without its files it could not undo what it did to the machine."""
    installed.write_file("/run/idle.toml", '[state]\ndirectory = "/run/idle"\n[http]\nlisten = ""\n')
    daemon = installed.start(["sudo", "ngrokd", "run", "--config", "/run/idle.toml"])
    daemon.expect("no API key yet", stream="stderr")

    refused = installed.run(["sudo", "make", "uninstall"], check=False)

    assert refused.returncode != 0
    assert "stop ngrokd first" in refused.stderr
    assert installed.run(["ngrokd", "--config", "/run/idle.toml", "status"]).stdout
    stop(daemon)


def test_another_program_of_that_name_is_not_overwritten(installed: Namespace) -> None:
    """Where the Go daemon is installed, there is a way back to it until its owner removes it."""
    installed.run(["mkdir", "-p", "/run/bin"])
    installed.write_file("/run/bin/ngrokd", "the Go daemon")
    arguments = ["make", "BINDIR=/run/bin", "PREFIX=/run/opt"]

    refused = installed.run([*arguments, "install"], check=False)
    installed.run([*arguments, "uninstall"])

    assert refused.returncode != 0
    assert "/run/bin/ngrokd is somebody else's" in refused.stderr
    assert installed.read_file("/run/bin/ngrokd") == "the Go daemon"
    assert "opt" not in installed.run(["ls", "/run"]).stdout.split()


@pytest.mark.parametrize("target", ["install", "uninstall"])
def test_a_user_is_told_to_use_sudo(installed: Namespace, target: str) -> None:
    """Before anything is tried."""
    makefile = installed.read_file(ROOT / "Makefile")

    refused = installed.run([*NOBODY, "make", "-f", "-", target], cwd="/", input=makefile, check=False)

    assert refused.returncode != 0
    assert f"run it as root: sudo make {target}" in refused.stderr


def test_the_script_leaves_nothing_when_it_is_told_so(installed: Namespace) -> None:
    """Not the service, not what a killed daemon left, not the state; and what it did not make stays."""
    paths = ("/opt", "/usr/local", "/etc", "/run")
    installed.run(["cp", "-a", "/opt/ngrokd", "/opt/kept"])
    before = set(tree(installed, *paths))
    network = installed.run(["ip", "route", "show", "table", "all"]).stdout
    try:
        said = installed.run(["sudo", "ngrokd", "service", "install"]).stdout
        daemon = installed.start(["/opt/ngrokd/venv/bin/ngrokd", "run"])
        daemon.expect("no API key yet", stream="stderr")
        busy = installed.run(["sudo", "./install.sh", "uninstall"], check=False)
        daemon.kill()
        daemon.wait(timeout=5)
        assert "unreachable 10.107.0.0/16" in installed.run(["ip", "route"]).stdout

        installed.run(["sudo", "./install.sh", "uninstall", "--purge"])

        assert "ngrokd.service" in said
        assert busy.returncode == 73
        assert f"process {daemon.pid}" in busy.stderr
        left = set(tree(installed, *paths))
        assert {path for path in left - before if not path.startswith("/run/.layers/")} == set()
        gone = {path for path in before - left if not path.startswith(("/opt/ngrokd", "/run/.layers/"))}
        assert gone <= {
            "/usr/local/bin/ngrokd",
            "/usr/local/bin/ngrokctl",
            "/etc/ngrokd",
        }
        assert installed.run(["ip", "route", "show", "table", "all"]).stdout == network
    finally:
        installed.run(["rm", "-rf", "/opt/ngrokd", "/etc/ngrokd"])
        installed.run(["mv", "/opt/kept", "/opt/ngrokd"])
        for name in ("ngrokd", "ngrokctl"):
            installed.run(["ln", "-sfn", f"/opt/ngrokd/venv/bin/{name}", f"/usr/local/bin/{name}"])
