"""Accepting clients on a listening socket, for as long as it takes."""

from __future__ import annotations

import errno
import logging
from typing import Final

import trio

log = logging.getLogger(__name__)

# What goes by: no descriptor or no memory is left for the moment, or the client left while it waited.
_PASSING: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ECONNABORTED})
_PAUSE_S: Final = 0.1  # trio.serve_listeners waits as long for descriptors to come back


async def accept(listener: trio.socket.SocketType, what: str) -> trio.socket.SocketType:
    """Accept the next client, whatever passing trouble there is; `what` names the listener in the log.

    Raises OSError when the listener itself is no good any more. Cancelled, it has accepted nobody.
    """
    while True:
        try:
            connection, _ = await listener.accept()
        except OSError as error:
            if error.errno not in _PASSING:
                raise
            log.warning("%s: cannot accept a client: %s", what, error.strerror)
            await trio.sleep(_PAUSE_S)
        else:
            return connection
