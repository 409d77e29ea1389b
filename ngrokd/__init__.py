"""ngrokd: ngrok's kubernetes-bound endpoints, by name, for every program on this machine."""

from __future__ import annotations

from typing import Final

# A constant, not importlib.metadata: that costs every command some milliseconds. A test compares it with pyproject.
__version__: Final = "0.1.0"
