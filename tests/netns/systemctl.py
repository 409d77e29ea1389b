"""Stands in for systemctl where systemd does not run: it keeps what that keeps, and really starts and ends programs.

Its world is /run/systemctl (units as last read, who is enabled, processes) and the units in /etc/systemd/system.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

UNITS = Path("/etc/systemd/system")
WORLD = Path("/run/systemctl")
STOP_S = 20.0


def values(unit: str, key: str) -> list[str]:
    text = (WORLD / "units" / unit).read_text()
    return [line.partition("=")[2] for line in text.splitlines() if line.startswith(f"{key}=")]


def pid_of(unit: str) -> int:
    try:
        pid = int((WORLD / f"{unit}.pid").read_text())
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, ValueError):
        return 0
    return 0 if state == "Z" else pid


def reload() -> None:
    (WORLD / "units").mkdir(parents=True, exist_ok=True)
    for old in (WORLD / "units").iterdir():
        old.unlink()
    for path in UNITS.glob("*.service"):
        if path.name.startswith("ngrokd"):
            (WORLD / "units" / path.name).write_text(path.read_text())


def start(unit: str) -> int:
    if pid_of(unit):
        return 0
    if not (WORLD / "units" / unit).exists():
        sys.stderr.write(f"Unit {unit} not found.\n")
        return 5
    environment = dict(os.environ) | dict(
        pair.split("=", 1) for pair in values(unit, "Environment") for pair in [pair.replace("%%", "%")]
    )
    for directory in values(unit, "RuntimeDirectory"):
        Path("/run", directory).mkdir(exist_ok=True)
    log = (WORLD / f"{unit}.log").open("ab")
    process = subprocess.Popen(
        shlex.split(values(unit, "ExecStart")[0]),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env=environment,
        start_new_session=True,
    )
    (WORLD / f"{unit}.pid").write_text(str(process.pid))
    time.sleep(0.1)
    return int(process.poll() is not None)


def stop(unit: str) -> int:
    pid = pid_of(unit)
    if pid:
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_S
        while pid_of(unit):
            if time.monotonic() > deadline:
                return 1
            time.sleep(0.02)
        for command in values(unit, "ExecStopPost"):
            subprocess.run(shlex.split(command), check=False, stdout=subprocess.DEVNULL)
    return 0


def main() -> int:
    (WORLD / "enabled").mkdir(parents=True, exist_ok=True)
    verb, *rest = sys.argv[1:]
    unit = rest[0] if rest else ""
    match verb:
        case "daemon-reload":
            reload()
        case "enable":
            if not (UNITS / unit).exists():
                return 1
            reload()
            (WORLD / "enabled" / unit).touch()
        case "disable":
            (WORLD / "enabled" / unit).unlink(missing_ok=True)
        case "start":
            return start(unit)
        case "stop":
            return stop(unit)
        case "restart":
            return stop(unit) or start(unit)
        case "show":
            pid = pid_of(unit)
            enabled = (WORLD / "enabled" / unit).exists()
            state = "enabled" if enabled else "disabled" if (UNITS / unit).exists() else ""
            active = "active" if pid else "inactive"
            sys.stdout.write(f"UnitFileState={state}\nActiveState={active}\nMainPID={pid}\n")
        case _:
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
