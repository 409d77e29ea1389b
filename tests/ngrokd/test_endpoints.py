"""The shared words: what is served, what is refused, and that nothing foreign reaches a terminal raw."""

from __future__ import annotations

import copy
import json
import math
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngrokd.endpoints import (
    BadEndpoint,
    Credentials,
    Endpoint,
    Secret,
    check_hostname,
    parse_endpoint,
    parse_url,
    printable,
    shown_url,
)

HOSTILE: list[dict[str, Any]] = json.loads((Path(__file__).parent / "hostile_endpoints.json").read_bytes())

# The grammar once more, in other words than the module's.
LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?")


def is_fit(host: str) -> bool:
    labels = host.split(".")
    return (
        0 < len(host) <= 253
        and all(LABEL.fullmatch(label) and len(label) <= 63 for label in labels)
        and "_" not in labels[-1]
        and not labels[-1].isdigit()
        and not re.fullmatch(r"0x[0-9a-f]*", labels[-1])
    )


def judged(obj: object) -> Endpoint | str:
    try:
        return parse_endpoint(obj)
    except BadEndpoint as error:
        return str(error)


def test_the_corpus_is_large() -> None:
    assert len(HOSTILE) >= 300


@pytest.mark.parametrize("case", HOSTILE, ids=[f"{i}-{case['why']}" for i, case in enumerate(HOSTILE)])
def test_hostile_endpoints_are_refused_with_a_printable_reason(case: dict[str, Any]) -> None:
    """Each object of the corpus is refused, for the reason that fits it, and the reason itself does no harm."""
    with pytest.raises(BadEndpoint) as caught:
        parse_endpoint(case["object"])

    assert case["reason"] in str(caught.value)
    assert str(caught.value).isprintable()
    assert str(caught.value).isascii()
    assert len(str(caught.value)) <= 250


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://my-api.prod", ("http", "my-api.prod", 80)),
        ("https://my-api.prod", ("https", "my-api.prod", 443)),
        ("tls://my-api.prod", ("tls", "my-api.prod", 443)),
        ("tcp://db.prod:5432", ("tcp", "db.prod", 5432)),
        ("http://my-api.prod/", ("http", "my-api.prod", 80)),
        ("http://my-api.prod:8080/", ("http", "my-api.prod", 8080)),
        ("HTTP://My-API.Prod", ("http", "my-api.prod", 80)),
        ("http://my-api.prod.", ("http", "my-api.prod", 80)),
        ("http://my-api.prod.:81", ("http", "my-api.prod", 81)),
        ("tcp://db.prod:1", ("tcp", "db.prod", 1)),
        ("tcp://db.prod:65535", ("tcp", "db.prod", 65535)),
        ("http://single", ("http", "single", 80)),
        ("http://_grpc._tcp.api.prod", ("http", "_grpc._tcp.api.prod", 80)),
        ("http://xn--mnchen-3ya.de", ("http", "xn--mnchen-3ya.de", 80)),
        ("http://1.2.3.example", ("http", "1.2.3.example", 80)),
        ("http://7.7a", ("http", "7.7a", 80)),
        ("http://notlocalhost", ("http", "notlocalhost", 80)),
        ("http://localhost.prod", ("http", "localhost.prod", 80)),
        ("http://my-api.ngrok.app:443", ("http", "my-api.ngrok.app", 443)),
        ("http://" + "x" * 63 + ".prod", ("http", "x" * 63 + ".prod", 80)),
        ("http://" + "a." * 126 + "b", ("http", "a." * 126 + "b", 80)),
        ("http://" + "a." * 126 + "b.", ("http", "a." * 126 + "b", 80)),
    ],
)
def test_urls_are_read(url: str, expected: tuple[str, str, int]) -> None:
    assert parse_url(url) == expected


def test_an_endpoint_as_the_api_sends_it() -> None:
    """Unknown fields are ignored, null is absent."""
    obj = {
        "id": "ep_2abc",
        "url": "https://My-Api.Prod/",
        "public_url": "https://other.prod",
        "proto": "HTTPS",
        "name": None,
        "description": "the\nAPI",
        "metadata": {"x": [1]},
        "bindings": ["kubernetes"],
    }

    assert parse_endpoint(obj) == Endpoint(
        id="ep_2abc",
        url="https://My-Api.Prod/",
        scheme="https",
        host="my-api.prod",
        port=443,
        proto="https",
        name="",
        description="the\\nAPI",
    )


@pytest.mark.parametrize("url", [None, ""])
def test_the_deprecated_url_is_read_where_there_is_no_other(url: object) -> None:
    endpoint = parse_endpoint({"id": "ep_1", "url": url, "public_url": "tcp://db.prod:5432"})

    assert (endpoint.url, endpoint.proto) == ("tcp://db.prod:5432", "tcp")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
urls = st.one_of(
    st.text(),
    st.builds(
        "{}://{}{}{}".format,
        st.sampled_from(["http", "https", "tcp", "tls", "HTTP", "ws", ""]),
        st.text(alphabet="ab1-_.X*é\n%@[]", max_size=12),
        st.one_of(st.just(""), st.integers(-1, 70000).map(":{}".format)),
        st.sampled_from(["", "/", "/x", "?", "#"]),
    ),
)


@given(st.fixed_dictionaries({}, optional=dict.fromkeys(("id", "url", "public_url", "proto"), urls | json_values)))
def test_whatever_comes_is_an_endpoint_or_a_reason(obj: dict[str, object]) -> None:
    """The parser has one error, and what it lets through obeys the grammar."""
    endpoint = judged(obj)
    if isinstance(endpoint, str):
        assert endpoint.isprintable()
    else:
        assert is_fit(endpoint.host)
        assert 1 <= endpoint.port <= 65535
        assert f"{endpoint.id}{endpoint.url}{endpoint.proto}".isprintable()
        assert parse_endpoint({"id": endpoint.id, "url": endpoint.url, "proto": endpoint.proto}) == endpoint


@given(json_values)
def test_any_json_value_is_judged(value: object) -> None:
    verdict = judged(value)

    assert not isinstance(verdict, str) or verdict.isprintable()


@given(st.text(alphabet="ab-_.0x*9Zé", max_size=70))
def test_names_are_fit_or_refused(text: str) -> None:
    try:
        name = check_hostname(text)
    except BadEndpoint:
        assert not is_fit(text.removesuffix(".").lower())
    else:
        assert is_fit(name)
        assert check_hostname(name) == name


@given(st.text(), st.integers(3, 60))
def test_printable_text_is_printable_and_short(text: str, limit: int) -> None:
    shown = printable(text, limit)

    assert shown.isprintable()
    assert len(shown) <= limit
    assert printable(shown, limit) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text, né 日本", "plain text, né 日本"),
        ("a\r\nb", "a\\r\\nb"),
        ("\x1b[2J", "\\x1b[2J"),
        ("\u202eabc\u2028", "\\u202eabc\\u2028"),
        ("a\\nb", "a\\nb"),
        ("\x9b31m\x00", "\\x9b31m\\x00"),
        ("\ud800", "\\ud800"),
        ("x" * 200, "x" * 200),
        ("x" * 201, "x" * 197 + "..."),
        ("\n" * 101, "\\n" * 98 + "\\..."),
    ],
)
def test_what_printable_shows(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_a_huge_text_is_not_looked_at_as_a_whole() -> None:
    """64 MiB of a hostile field must not cost seconds; the limit bounds the work."""
    assert printable("\n" * (64 * 2**20), 10) == "\\n\\n\\n\\..."


def test_passwords_in_urls_are_not_shown() -> None:
    assert shown_url("http://user:secret@a.prod/x") == "http://***@a.prod/x"
    with pytest.raises(BadEndpoint) as caught:
        parse_url("http://user:secret\n@a.prod")
    assert "secret" not in str(caught.value)


def test_a_secret_shows_itself_to_nobody_but_reveal() -> None:
    """Logs, tracebacks and answers go through repr, str and format; all of them must stay silent."""
    secret = Secret("ak_canary")

    assert {repr(secret), str(secret), f"{secret}", f"{secret:>3}", f"{secret!r}", repr([secret])} == {"***", "[***]"}
    assert secret.reveal() == "ak_canary"
    assert secret == Secret("ak_canary")
    assert secret != Secret("other")
    assert secret != "ak_canary"
    assert secret
    assert not Secret("")
    assert len({secret, Secret("ak_canary")}) == 1
    assert copy.deepcopy(secret) is copy.copy(secret) is secret
    with pytest.raises(TypeError):
        pickle.dumps(secret)


def test_credentials_do_not_show_the_key() -> None:
    credentials = Credentials(b"-----BEGIN EC PRIVATE KEY-----canary", b"-----BEGIN CERTIFICATE-----")

    assert "canary" not in repr(credentials)
    assert credentials.not_after == math.inf


def test_endpoints_travel() -> None:
    """Worker processes get them as messages."""
    endpoint = parse_endpoint({"id": "ep_1", "url": "http://a.prod"})

    assert pickle.loads(pickle.dumps(endpoint)) == endpoint
