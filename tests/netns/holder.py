"""The process that a private namespace lives in. Run by support.py under `unshare --net --mount`, never by hand.

It furnishes the namespaces, says "ready", and waits for the end of its standard input, which comes when the test run
is done with it or dies, by whatever signal. Then it kills every process that is in the network namespace and ends; with
the last process the kernel takes the namespaces away, and links, routes, mounts and files in them go too. So nothing
can be left behind, and nothing outside is ever touched.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time

HOSTS = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"
# Nobody listens there, so a question fails at once instead of waiting for a network that does not exist.
RESOLVER = "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n"
# What an installed daemon of this machine's owner keeps there is none of the tests' business.
HIDDEN = ("/etc/ngrokd", "/etc/ssl/certs/ngrok")


def main() -> None:
    if os.readlink("/proc/self/ns/net") == os.readlink(f"/proc/{os.getppid()}/ns/net"):
        sys.exit("not in a network namespace of its own")
    furnish()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.buffer.read()
    empty_namespace()


def furnish() -> None:
    run("ip", "link", "set", "lo", "up")
    run("mount", "-t", "sysfs", "sysfs", "/sys")  # /sys/class/net shows the namespace that mounted it
    run("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run")
    make_private("/etc")
    for path in HIDDEN:
        shutil.rmtree(path, ignore_errors=True)
    write("/etc/hosts", HOSTS)
    with contextlib.suppress(FileNotFoundError):
        os.unlink("/etc/resolv.conf")  # often a link to a file of the real resolver
    write("/etc/resolv.conf", RESOLVER)


def make_private(path: str) -> None:
    """Put a layer over the directory: everything stays visible, every change stays in here."""
    layer = "/run/.layers" + path
    for part in ("upper", "work"):
        os.makedirs(f"{layer}/{part}")
    options = f"lowerdir={path},upperdir={layer}/upper,workdir={layer}/work"
    if subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", path], capture_output=True).returncode:
        # No overlay in an overlay here: a copy does the same, slower.
        run("cp", "-a", f"{path}/.", f"{layer}/upper")
        run("mount", "--bind", f"{layer}/upper", path)


def empty_namespace() -> None:
    own = os.readlink("/proc/self/ns/net")
    give_up = time.monotonic() + 5
    while time.monotonic() < give_up:
        others = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if is_in(pid, own)]
        if not others:
            return
        for pid in others:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)


def is_in(pid: int, namespace: str) -> bool:
    if pid == os.getpid():
        return False
    try:
        return os.readlink(f"/proc/{pid}/ns/net") == namespace
    except OSError:
        return False  # gone meanwhile, or a zombie, which has no namespace any more


def write(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def run(*arguments: str) -> None:
    result = subprocess.run(arguments, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(arguments)}: {result.stderr.strip()}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["private"]:
        make_private(sys.argv[2])
    else:
        main()
