"""Stands in for the Go ngrokd: what it listens on, what it answers, and what it leaves when it is told to stop.

It writes its section of the hosts file when it starts, as its first poll would, and never takes it away.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
from pathlib import Path

SOCKET = "/var/run/ngrokd.sock"
STATE = Path("/etc/ngrokd")


def main() -> None:
    if os.path.exists(SOCKET):
        os.unlink(SOCKET)
    addresses = json.loads((STATE / "ip_mappings.json").read_text())
    hosts = Path("/etc/hosts")
    if "# BEGIN ngrokd managed section" not in hosts.read_text():
        lines = "".join(f"{address}\t{name}\n" for name, address in addresses.items())
        with hosts.open("a") as file:
            file.write(f"\n# BEGIN ngrokd managed section\n{lines}# END ngrokd managed section\n")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(SOCKET)
    listener.listen()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    answers = {
        "status": {
            "registered": True,
            "operator_id": (STATE / "operator_id").read_text(),
            "endpoint_count": len(addresses),
            "ingress_endpoint": "kubernetes-binding-ingress.ngrok.io:443",
        }
    }
    while True:
        connection, _ = listener.accept()
        with connection:
            try:
                command = json.loads(connection.recv(65536) or b"{}").get("command", "")
            except ValueError:
                continue
            answer = (
                {"success": True, "data": answers[command]} if command in answers else {"success": False, "error": "x"}
            )
            with contextlib.suppress(OSError):  # who only knocked is gone
                connection.sendall(json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    main()
