"""What fuzzing has found outside the packet path: each of these failed first."""

from __future__ import annotations

import pytest
from trio.testing import memory_stream_pair

from ngrokd.config import parse
from ngrokd.errors import ConfigError
from ngrokd.http1 import Request, Response, ServerLimits, serve_connection


@pytest.mark.parametrize("key", ["api.poll_interval", "limits.buffer", "net.mtu"])
def test_integer_of_thousands_of_digits_is_a_mistake_with_its_line(key: str) -> None:
    """In hexadecimal it is valid TOML; the guess what was meant wrote it in decimal, which Python refuses."""
    section, _, name = key.partition(".")

    with pytest.raises(ConfigError, match=f"^config.toml:2: {key}: expected .*, got an integer that is too big$"):
        parse(f"[{section}]\n{name} = 0x{'f' * 5000}\n", "config.toml", {})


@pytest.mark.parametrize(
    ("headers", "status"), [(b"Content-Length: 1000", b"413"), (b"x: " + b"y" * 900, b"431"), (b"", b"505")]
)
async def test_a_refused_head_request_gets_no_body(headers: bytes, status: bytes) -> None:
    """Neither may it have one (RFC 9110 9.3.2), nor could it: the refusal ended in a traceback instead."""

    async def nobody(asked: Request) -> Response:
        raise AssertionError(f"{asked} was to be refused")

    ours, theirs = memory_stream_pair()
    version = b"1.2" if status == b"505" else b"1.1"
    await ours.send_all(b"HEAD / HTTP/%s\r\nHost: a\r\n%s\r\n\r\n" % (version, headers or b"x: y"))
    await ours.send_eof()

    await serve_connection(theirs, nobody, ServerLimits(header_bytes=500, body_bytes=10))

    answer = b"".join([bytes(part) async for part in ours])
    assert answer.startswith(b"HTTP/1.1 " + status)
    assert answer.endswith(b"\r\n\r\n")
