"""The lab on a command line: one line in, one JSON object out. `python -m ngrokd.lab` reads the lines from stdin.

Nothing here waits: each command turns something at once or answers from what is known, so the answer to a line is also
the moment from which it holds.
"""

from __future__ import annotations

import dataclasses
import ssl
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, TypeVar, cast, get_args

from ngrokd.errors import NgrokdError
from ngrokd.lab.backends import Tally, make_backend
from ngrokd.lab.control_plane import Fault
from ngrokd.lab.ingress import Accept, Answer, Connection, Then, Toxics
from ngrokd.lab.link import Line
from ngrokd.lab.world import Lab, Presented

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_Built = TypeVar("_Built", bound="DataclassInstance")
_Record = TypeVar("_Record")

HELP: Final = """\
add URL BACKEND             bind an endpoint: add tcp://db.prod:5432 echo
                            or a real server: add tcp://db.prod:5432 forward:127.0.0.1:5432
many COUNT URL BACKEND      bind so many, all with one back end: many 65000 http://svc-{}.prod http
remove URL                  unbind it
outage on|off               the API refuses connections
fault KEY=VALUE...|off      the API fails: status code message delay_s hang cut_after endless body raw method path
ingress up|down             the ingress refuses connections
toxic [HOST:PORT] KEY=VALUE...|off
                            the ingress misbehaves: accept alert answer delay_s error_code error_message notices
                            header_slice coalesce slice drip_s after_bytes then, and the line's latency_up_s
                            latency_down_s bandwidth_up bandwidth_down
next KEY=VALUE...           the same, for the next connection only
certificate WHAT            the ingress presents: good foreign expired not-yet wrong-name no-intermediate
tls 1.2|1.3|any             the versions that the ingress speaks
resumption on|off           whether the ingress remembers TLS sessions
drop                        reset every connection to the ingress
forget                      the API forgets all operators
key KEY                     the only API key that is accepted from now on
lifetime SECONDS            of client certificates signed from now on
page-size N                 of the API's lists
state                       counters
requests [N]                the last requests to the API
connections [N]             the last connections to the ingress
tallies HOST:PORT           what the back end there has counted
quit
"""


class BadCommand(NgrokdError):  # noqa: N818 - it names what was typed
    """The line is no command; the message says what would be."""


class Commands:
    """Executes lines on a lab."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._table: dict[str, Callable[[Sequence[str]], dict[str, object] | None]] = {
            "add": self._add,
            "many": self._many,
            "remove": self._remove,
            "outage": self._outage,
            "fault": self._fault,
            "ingress": self._ingress,
            "toxic": self._toxic,
            "next": self._next,
            "certificate": self._certificate,
            "tls": self._tls,
            "resumption": self._resumption,
            "drop": self._drop,
            "forget": self._forget,
            "key": self._key,
            "lifetime": self._lifetime,
            "page-size": self._page_size,
            "state": self._state,
            "requests": self._requests,
            "connections": self._connections,
            "tallies": self._tallies,
            "help": lambda _: {"help": HELP},
        }

    def execute(self, line: str) -> dict[str, object]:
        """Carry out one line. The answer has `ok`, and `error` where that is false; it can be written as JSON."""
        name, *words = line.split() or ["help"]
        try:
            if name not in self._table:
                raise BadCommand(f"no command {name!r}; there are: {' '.join(self._table)}")
            return {"ok": True, **(self._table[name](words) or {})}
        except (BadCommand, ValueError) as error:
            return {"ok": False, "error": str(error)}
        except KeyError as error:
            return {"ok": False, "error": f"nothing there: {error}"}

    def _add(self, words: Sequence[str]) -> dict[str, object]:
        url, backend = _exactly(words, "add URL BACKEND", 2)
        return {"id": self._lab.add_endpoint(url, backend)}

    def _many(self, words: Sequence[str]) -> dict[str, object]:
        count, url, kind = _exactly(words, "many COUNT URL BACKEND", 3)
        if "{}" not in url:
            raise BadCommand(f"{url!r} needs a {{}}, where the number goes")
        backend = make_backend(kind)
        width = len(str(int(count) - 1))
        for number in range(int(count)):
            self._lab.add_endpoint(url.replace("{}", f"{number:0{width}}"), backend)
        return {"endpoints": len(self._lab.plane.endpoints)}

    def _remove(self, words: Sequence[str]) -> dict[str, object]:
        (url,) = _exactly(words, "remove URL", 1)
        return {"removed": self._lab.remove_endpoint(url)}

    def _outage(self, words: Sequence[str]) -> None:
        self._lab.set_api_down(_switch(words, "outage on|off"))

    def _fault(self, words: Sequence[str]) -> None:
        if list(words) == ["off"]:
            self._lab.plane.set_fault(None)
            return
        values = _pairs(words)
        method, path = values.pop("method", ""), values.pop("path", "")
        headers = tuple((key, values.pop(key)) for key in ("retry-after", "location") if key in values)
        fault = _build(Fault, values)
        self._lab.plane.set_fault(dataclasses.replace(fault, headers=headers), method=method, path=path)

    def _ingress(self, words: Sequence[str]) -> None:
        self._lab.set_ingress_down(_switch(words, "ingress up|down", on="down", off="up"))

    def _toxic(self, words: Sequence[str]) -> None:
        if words and "=" not in words[0] and words[0] != "off":
            route = self._lab.ingress.routes[_host_and_port(words[0])]
            route.toxics = None if list(words[1:]) == ["off"] else _toxics(words[1:])
        else:
            self._lab.ingress.toxics = Toxics() if list(words) == ["off"] else _toxics(words)

    def _next(self, words: Sequence[str]) -> None:
        self._lab.ingress.script.append(_toxics(words))

    def _certificate(self, words: Sequence[str]) -> None:
        (what,) = _exactly(words, "certificate WHAT", 1)
        if what not in get_args(Presented):
            raise BadCommand(f"no certificate {what!r}; there are: {' '.join(get_args(Presented))}")
        self._lab.present(cast("Presented", what))

    def _tls(self, words: Sequence[str]) -> None:
        versions = {
            "1.2": (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_2),
            "1.3": (ssl.TLSVersion.TLSv1_3, ssl.TLSVersion.TLSv1_3),
            "any": (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3),
        }
        (version,) = _exactly(words, "tls 1.2|1.3|any", 1)
        self._lab.ingress.set_tls(*versions[version])

    def _resumption(self, words: Sequence[str]) -> None:
        self._lab.ingress.resumption = _switch(words, "resumption on|off")

    def _drop(self, _: Sequence[str]) -> None:
        self._lab.ingress.drop_connections()

    def _forget(self, _: Sequence[str]) -> dict[str, object]:
        forgotten = list(self._lab.plane.operators)
        for operator_id in forgotten:
            self._lab.plane.forget_operator(operator_id)
        return {"forgotten": forgotten}

    def _key(self, words: Sequence[str]) -> None:
        self._lab.plane.keys = set(_exactly(words, "key KEY", 1))

    def _lifetime(self, words: Sequence[str]) -> None:
        self._lab.plane.certificate_lifetime_s = float(_exactly(words, "lifetime SECONDS", 1)[0])

    def _page_size(self, words: Sequence[str]) -> None:
        self._lab.plane.page_size = int(_exactly(words, "page-size N", 1)[0])

    def _state(self, _: Sequence[str]) -> dict[str, object]:
        plane, ingress = self._lab.plane, self._lab.ingress
        return {
            "requests": plane.request_count,
            "operators": list(plane.operators),
            "certificates": sum(len(operator.certificates) for operator in plane.operators.values()),
            "endpoints": len(plane.endpoints),
            "connections": ingress.connection_count,
            "live": ingress.live_count,
            "handshakes": ingress.handshake_count,
            "after_handshake": ingress.after_handshake,
        }

    def _requests(self, words: Sequence[str]) -> dict[str, object]:
        shown = _last(self._lab.plane.requests, words)
        return {
            "requests": [
                {"method": seen.method, "target": seen.target, "key_sha256": seen.key_sha256, "at": seen.at}
                for seen in shown
            ]
        }

    def _connections(self, words: Sequence[str]) -> dict[str, object]:
        return {"connections": [_shown(record) for record in _last(self._lab.ingress.connections, words)]}

    def _tallies(self, words: Sequence[str]) -> dict[str, object]:
        (where,) = _exactly(words, "tallies HOST:PORT", 1)
        tallies: Sequence[Tally] = getattr(self._lab.backend(*_host_and_port(where)), "tallies", ())
        return {"tallies": [dataclasses.asdict(tally) for tally in tallies]}


def _toxics(words: Sequence[str]) -> Toxics:
    values = _pairs(words)
    line = {field.name: values.pop(field.name) for field in dataclasses.fields(Line) if field.name in values}
    for name, choices in (("accept", Accept), ("answer", Answer), ("then", Then)):
        if name in values and values[name] not in get_args(choices):
            raise BadCommand(f"{name} is one of: {' '.join(get_args(choices))}")
    return dataclasses.replace(_build(Toxics, values), line=_build(Line, line))


def _build(kind: type[_Built], values: dict[str, str]) -> _Built:
    """A dataclass out of words; its fields' annotations say how to read them."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if unknown := [name for name in values if name not in fields]:
        raise BadCommand(f"no key {unknown[0]!r}; there are: {' '.join(fields)}")
    return kind(**{name: _read(str(fields[name].type), text) for name, text in values.items()})


def _read(annotation: str, text: str) -> object:
    match annotation.removesuffix(" | None"):
        case "int":
            return int(text)
        case "float":
            return float(text)
        case "bool":
            return text.lower() in ("1", "true", "yes", "on")
        case "bytes":
            return text.encode()
        case "tuple[str, ...]":
            return tuple(text.split(","))
        case _:
            return text


def _pairs(words: Sequence[str]) -> dict[str, str]:
    pairs = {}
    for word in words:
        name, separator, value = word.partition("=")
        if not separator:
            raise BadCommand(f"{word!r} is not KEY=VALUE")
        pairs[name] = value
    return pairs


def _exactly(words: Sequence[str], usage: str, count: int) -> Sequence[str]:
    if len(words) != count:
        raise BadCommand(f"usage: {usage}")
    return words


def _switch(words: Sequence[str], usage: str, *, on: str = "on", off: str = "off") -> bool:
    (word,) = _exactly(words, usage, 1)
    if word not in (on, off):
        raise BadCommand(f"usage: {usage}")
    return word == on


def _host_and_port(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host, int(port)


def _last(records: Sequence[_Record], words: Sequence[str]) -> list[_Record]:
    count = int(words[0]) if words else 20
    return list(records)[-count:]


def _shown(record: Connection) -> dict[str, object]:
    return {
        "at": record.opened_at,
        "tls_version": record.tls_version,
        "resumed": record.resumed,
        "server_name": record.server_name,
        "client_serial": f"{record.client_serial:x}",
        "host": record.request.host if record.request else None,
        "port": record.request.port if record.request else None,
        "fields": record.request.fields if record.request else (),
        "after_handshake": record.after_handshake,
        "from_client": record.from_client,
        "to_client": record.to_client,
        "ended": record.ended,
    }
