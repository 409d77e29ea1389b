"""Whom the doctor examines: a configuration on this machine, and what is learned about it on the way."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ngrokd import ask
from ngrokd.config import Settings
from ngrokd.endpoints import Credentials, Endpoint
from ngrokd.errors import NgrokdError, NotRunningError, PermissionMissingError


@dataclass(slots=True)
class Patient:
    """One examination. Checks read what earlier ones have found, and add to it.

    Attributes:
        settings: the configuration.
        environ: the environment, where keys and proxies may be named.
        wall: the wall clock, Unix seconds.
        is_root: what is forbidden to others is not forbidden to us.
        status: what the daemon says of itself; None where none answers.
        daemon_problem: why it does not answer although it is there, or "".
        daemon_hidden: one is there, and this user may not ask it.
        operator_id, credentials: from the state directory.
        ingress_endpoint: HOST:PORT as the API told it, "" where it has not.
        endpoints: those bound to the operator; None where nobody knows.
        api_works: the API answered.
    """

    settings: Settings
    environ: Mapping[str, str]
    wall: Callable[[], float] = time.time
    is_root: bool = field(default_factory=lambda: os.geteuid() == 0)
    status: dict[str, Any] | None = None
    daemon_problem: str = ""
    daemon_hidden: bool = False
    operator_id: str = ""
    credentials: Credentials | None = None
    ingress_endpoint: str = ""
    endpoints: list[Endpoint] | None = None
    api_works: bool = False

    def ask_daemon(self) -> None:
        """See whether a daemon answers at the control socket."""
        try:
            data = ask.ask(self.settings.control.socket, "status").data
        except NotRunningError:
            return
        except PermissionMissingError:
            self.daemon_hidden = True
            return
        except NgrokdError as error:
            self.daemon_problem = str(error)
            return
        self.status = data if isinstance(data, dict) else {}

    @property
    def pid(self) -> int:
        """The daemon's process, 0 where it is not known."""
        pid = (self.status or {}).get("pid")
        return pid if isinstance(pid, int) else 0
