"""Nothing that only Linux has is needed to import the package as on a Mac."""

from __future__ import annotations

import json
import subprocess
import sys

# Linux's own: each is imported by whoever runs there, never by a module that is imported everywhere.
ONLY_LINUX = {"ngrokd.host.netlink"}

_SCRIPT = """
import importlib, json, pkgutil, sys

# Third parties and the standard library are of this machine; they find out about it while they are imported.
import asyncio, cryptography.x509, ctypes, h11, multiprocessing, platform, ssl, subprocess, trio

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "pyroute2":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
for name in ("listxattr", "getxattr", "setresuid", "setresgid", "getresuid", "getresgid", "pidfd_open", "eventfd"):
    delattr(__import__("os"), name)
for name in ("AF_NETLINK", "AF_PACKET", "SO_PEERCRED", "SO_BINDTODEVICE", "MSG_CMSG_CLOEXEC", "SOCK_CLOEXEC"):
    delattr(__import__("socket"), name)
delattr(__import__("errno"), "EBADFD")
delattr(__import__("select"), "epoll")
sys.platform = "darwin"

failed = {}
for root in ("tun", "ngrokd"):
    package = importlib.import_module(root)
    for module in pkgutil.walk_packages(package.__path__, root + ".", onerror=lambda name: None):
        if module.name.endswith("__main__"):
            continue
        try:
            importlib.import_module(module.name)
        except Exception as error:
            failed[module.name] = repr(error)
print(json.dumps({"failed": failed, "imported": list(sys.modules)}))
"""


def test_every_module_but_linux_s_own_imports_as_on_a_mac() -> None:
    done = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)

    assert set(told["failed"]) <= ONLY_LINUX, told["failed"]
    assert {"tun.kqueue", "tun.device.macos", "ngrokd.host.macos", "ngrokd.daemon.machine"} <= set(told["imported"])
