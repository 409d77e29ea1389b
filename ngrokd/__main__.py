"""`python -m ngrokd` is `ngrokd`."""

from __future__ import annotations

from ngrokd.cli import main

if __name__ == "__main__":
    main()
