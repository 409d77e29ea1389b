"""What fuzzing has found outside the packet path: each of these failed first."""

from __future__ import annotations

import pytest

from ngrokd.config import parse
from ngrokd.errors import ConfigError


@pytest.mark.parametrize("key", ["api.poll_interval", "limits.buffer", "net.mtu"])
def test_integer_of_thousands_of_digits_is_a_mistake_with_its_line(key: str) -> None:
    """In hexadecimal it is valid TOML; the guess what was meant wrote it in decimal, which Python refuses."""
    section, _, name = key.partition(".")

    with pytest.raises(ConfigError, match=f"^config.toml:2: {key}: expected .*, got an integer that is too big$"):
        parse(f"[{section}]\n{name} = 0x{'f' * 5000}\n", "config.toml", {})
