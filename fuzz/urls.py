"""URLs and host names as the API gives them, against a second reading of the rules that uses no patterns.

Accepted and refused are the same, scheme, host and port are the same; a name judged twice is judged once; reasons are
printable and short; `printable` makes any text fit for a terminal, and twice is once.
"""

# ruff: noqa: PT017 - what an error says is one of the invariants

from __future__ import annotations

from typing import Final

from ngrokd.endpoints import BadEndpoint, check_hostname, parse_endpoint, parse_url, printable, shown_url

CORPUS: Final = "urls"
MAX_LEN: Final = 400
TOKENS: Final = (
    b"http://", b"https://", b"tcp://", b"tls://", b":443", b":0", b":65536", b".local", b"localhost", b"xn--",
    b"0x7f", b"..", b"*.", b"@", b"[::1]", b"%2e", b"\xe2\x80\xae", b"\xc4\xb0", b"_", b"ip6-", b".arpa", b"?",
    b"#", b"/",
)  # fmt: skip

LETTERS: Final = "abcdefghijklmnopqrstuvwxyz"
DIGITS: Final = "0123456789"
OWN: Final = (
    "localhost", "localhost4", "localhost6", "localhost.localdomain", "localhost4.localdomain4",
    "localhost6.localdomain6", "broadcasthost", "local", "arpa",
)  # fmt: skip


def run_one(data: bytes) -> None:
    """One text, as UTF-8 with lone surrogates or as latin-1."""
    text = data[1:].decode("utf-8", "surrogateescape") if data[:1] < b"\x80" else data[1:].decode("latin-1")
    limit = 3 + (data[0] if data else 0)
    check_printable(text, limit)
    check_name(text)
    check_url(text)
    host = text.lower().removesuffix(".")
    if model_name(text):
        for shape in ("https://{}", "tcp://{}:{}", "HTTP://{}/", "tls://{}:{}/"):
            url = shape.format(text, limit)
            scheme, name, _ = parse_url(url)
            assert scheme == shape.partition(":")[0].lower()
            assert name == host
    try:
        endpoint = parse_endpoint({"id": "ep_1", "url": text, "name": text, "description": text, "proto": None})
    except BadEndpoint as error:
        assert str(error).isprintable()
    else:
        assert (endpoint.scheme, endpoint.host, endpoint.port) == model_url(text)
        assert endpoint.name.isprintable()
        assert endpoint.description.isprintable()


def check_printable(text: str, limit: int) -> None:
    shown = printable(text, limit)
    assert shown.isprintable()
    assert len(shown) <= limit
    assert printable(shown, limit) == shown
    if text.isprintable() and len(text) <= limit:
        assert shown == text


def check_name(text: str) -> None:
    try:
        name = check_hostname(text)
    except BadEndpoint as error:
        reason = str(error)
        assert reason.isprintable()
        assert len(reason) < 400
        assert reason.isascii()
        assert not model_name(text), f"refused: {reason}"
        return
    assert model_name(text), f"accepted: {name!r}"
    assert name == text.lower().removesuffix(".")
    assert check_hostname(name) == name
    assert check_hostname(name.upper()) == name


def check_url(text: str) -> None:
    expected = model_url(text)
    try:
        found = parse_url(text)
    except BadEndpoint as error:
        reason = str(error)
        assert reason.isprintable()
        assert len(reason) < 400
        assert expected is None, f"refused: {reason}"
        head, colon, rest = text.partition("://")
        authority = rest.partition("/")[0].partition("?")[0].partition("#")[0]
        if colon and "@" in authority:
            secret = authority.rpartition("@")[0]
            shown = shown_url(text)
            assert shown.startswith(f"{head}://***@{authority[len(secret) + 1 :]}"), "the user info is shown"
        return
    assert found == expected


def model_name(text: str) -> bool:
    """May this name stand in the hosts file?"""
    if not text.isascii():
        return False
    name = "".join(chr(ord(char) + 32) if "A" <= char <= "Z" else char for char in text)
    if name[-1:] == ".":
        name = name[:-1]
    if not 1 <= len(name) <= 253:
        return False
    labels = name.split(".")
    for index, label in enumerate(labels):
        last = index == len(labels) - 1
        inner = LETTERS + DIGITS + "-" + ("" if last else "_")
        edge = inner.replace("-", "")
        if not 1 <= len(label) <= 63 or any(char not in inner for char in label):
            return False
        if label[0] not in edge or label[-1] not in edge:
            return False
    last_label = labels[-1]
    if all(char in DIGITS for char in last_label):
        return False
    if last_label[:2] == "0x" and all(char in DIGITS + "abcdef" for char in last_label[2:]):
        return False
    if name in OWN or name[:4] == "ip6-":
        return False
    return labels[-1] not in ("localhost", "local", "arpa")


def model_url(text: str) -> tuple[str, str, int] | None:
    """Scheme, host and port, or None."""
    if len(text) > 2048 or any(not "!" <= char <= "~" for char in text):
        return None
    scheme, colon, rest = text.partition("://")
    scheme = scheme.lower()
    if not colon or scheme not in ("http", "https", "tcp", "tls"):
        return None
    if rest[-1:] == "/":
        rest = rest[:-1]
    host, colon, port = rest.partition(":")
    if not model_name(host):
        return None
    host = host.lower().removesuffix(".")
    if not colon:
        default = {"http": 80, "https": 443, "tls": 443}.get(scheme)
        return None if default is None else (scheme, host, default)
    if not port or any(char not in DIGITS for char in port) or port[0] == "0" or len(port) > 5 or int(port) > 65535:
        return None
    return scheme, host, int(port)


if __name__ == "__main__":
    from fuzz.driver import main

    main(__file__)
