"""Where a worker process begins: `python -I .../__main__.py INDEX SOCKET [UID GID]`, started by `process.spawn`.

It is run as a file, because with -I the interpreter looks only where it is installed, and the daemon may run from
elsewhere: its places come in a variable.
"""

from __future__ import annotations

import os
import sys

sys.path[:] = os.environ.pop("NGROKD_MODULES", os.pathsep.join(sys.path)).split(os.pathsep)

from ngrokd.workers.worker import main  # noqa: E402 - it is found there

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
