"""Does a local firewall stand between the apps and the daemon?

Packets of the apps leave by the hook "output" towards our interface and come back by "input" from it. Two ways to
know: while a daemon runs, an address that is never given away is knocked at; the stack answers at once, and silence
means that the packets are dropped on the way. Otherwise, where they may be read, the rules are looked at. They are
another program's language, so what they seem to say is a warning, never a verdict; a chain is judged by its own rules
and its policy, jumps to others are not followed.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, ip_network
from typing import Any, Final

from ngrokd.doctor.findings import Finding, fail, ok, warn
from ngrokd.doctor.patient import Patient
from ngrokd.endpoints import printable

_KNOCK_S: Final = 1.5
_KNOCK_PORT: Final = 9  # discard; nothing listens there
_LIST_S: Final = 5.0
_HOOKS: Final = frozenset({"input", "output"})
_DROPS: Final = frozenset({"drop", "reject", "DROP", "REJECT"})


@dataclass(frozen=True, slots=True)
class Suspect:
    """A rule or policy that seems to drop our packets."""

    where: str
    what: str


def firewall(patient: Patient) -> Iterator[Finding]:
    """Knock where a daemon runs, else read the rules."""
    settings = patient.settings
    subnet, interface = IPv4Network(settings.net.subnet), settings.net.interface
    allow = (
        f"accept what leaves by {interface} and what comes in from it, before what drops it:"
        f' oifname "{interface}" accept in the output chain, iifname "{interface}" accept in the input chain'
    )
    suspects = _suspects(interface, subnet)
    if patient.pid and "version" in (patient.status or {}):
        refusal = knock(str(subnet.broadcast_address - 1))
        if not refusal:
            yield ok("firewall", f"packets to {subnet} reach the daemon")
            return
        names = f": {suspects[0].where}: {suspects[0].what}" if suspects else ""
        yield fail("firewall", f"packets to {subnet} do not reach the daemon ({refusal}){names}", allow)
        return
    if suspects is None:
        yield ok("firewall", "no rules of nftables or iptables can be read here")
    elif suspects:
        named = "; ".join(f"{suspect.where}: {suspect.what}" for suspect in suspects[:3])
        yield warn("firewall", f"these rules may drop packets to or from {interface}: {named}", allow)
    else:
        yield ok("firewall", f"no rule that drops packets to or from {interface} was found")


def knock(address: str) -> str:
    """Whether our stack answers for an address that no name has; "" when it does, else what came instead.

    It says "no such host" for what it does not serve, within milliseconds.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as door:
        door.settimeout(_KNOCK_S)
        try:
            door.connect((address, _KNOCK_PORT))
        except TimeoutError:
            return f"no answer within {_KNOCK_S:g} s"
        except OSError as error:
            return "" if error.errno in (errno.EHOSTUNREACH, errno.ECONNREFUSED) else error.strerror or str(error)
    return ""


def _suspects(interface: str, subnet: IPv4Network) -> list[Suspect] | None:
    """What the rules seem to say; None where none can be read."""
    found: list[Suspect] = []
    seen = False
    if (text := _output_of(["nft", "--json", "list", "ruleset"])) is not None:
        seen = True
        found += suspects_of_nft(text, interface, subnet)
    elif (text := _output_of(["iptables-save"])) is not None:
        seen = True
        found += suspects_of_iptables(text, interface, subnet)
    return found if seen else None


def _output_of(command: Sequence[str]) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=_LIST_S, check=False, errors="replace")
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout if run.returncode == 0 else None


def suspects_of_nft(text: str, interface: str, subnet: IPv4Network) -> list[Suspect]:
    """Read `nft --json list ruleset`; text that is none gives nothing."""
    try:
        entries: list[dict[str, Any]] = [one for one in json.loads(text)["nftables"] if isinstance(one, dict)]
    except (ValueError, KeyError, TypeError, RecursionError):
        return []
    found: list[Suspect] = []
    for entry in entries:
        chain = entry.get("chain")
        if not isinstance(chain, dict) or chain.get("hook") not in _HOOKS or chain.get("family") not in ("ip", "inet"):
            continue
        place = tuple(str(chain.get(key)) for key in ("family", "table", "name"))
        rules = [
            rule
            for one in entries
            if isinstance(rule := one.get("rule"), dict)
            and tuple(str(rule.get(key)) for key in ("family", "table", "chain")) == place
        ]
        verdict = _judge_nft(rules, str(chain["hook"]), interface, subnet)
        if verdict is None and chain.get("policy") == "drop":
            verdict = f"policy drop, and no rule that accepts {interface}"
        if verdict:
            found.append(Suspect(f"nftables chain {printable(' '.join(place), 100)}", verdict))
    return found


def _judge_nft(rules: list[dict[str, Any]], hook: str, interface: str, subnet: IPv4Network) -> str | None:
    """The first rule that speaks of us decides: "" accepts, text drops; None: none speaks of us."""
    for rule in rules:
        expressions = [one for one in rule.get("expr", []) if isinstance(one, dict)]
        words = {key for one in expressions for key in one}
        matches = [one["match"] for one in expressions if isinstance(one.get("match"), dict)]
        if not all(_nft_matches(match, hook, interface, subnet) for match in matches):
            continue
        if words & {"accept"}:
            return ""
        if words & {"drop", "reject"}:
            return f"a rule drops {_nft_shown(matches)}"
    return None


def _nft_matches(match: dict[str, Any], hook: str, interface: str, subnet: IPv4Network) -> bool:
    """Whether a match holds for every new connection of an app to us; what is not understood does not."""
    left, right, op = match.get("left"), match.get("right"), match.get("op")
    if op not in ("==", "in") or not isinstance(left, dict):
        return False
    if isinstance(meta := left.get("meta"), dict):
        wanted = "oifname" if hook == "output" else "iifname"
        return meta.get("key") in (wanted, wanted.removesuffix("name")) and _is_ours(right, interface)
    if isinstance(payload := left.get("payload"), dict) and payload.get("protocol") == "ip":
        field = "daddr" if hook == "output" else "saddr"
        return payload.get("field") == field and _covers(right, subnet)
    return False


def _is_ours(value: object, interface: str) -> bool:
    if isinstance(value, str):
        return interface.startswith(value[:-1]) if value.endswith("*") else value == interface
    if isinstance(value, dict) and isinstance(members := value.get("set"), list):
        return any(_is_ours(member, interface) for member in members)
    return False


def _covers(value: object, subnet: IPv4Network) -> bool:
    if isinstance(value, dict) and isinstance(prefix := value.get("prefix"), dict):
        return _contains(f"{prefix.get('addr')}/{prefix.get('len')}", subnet)
    if isinstance(value, dict) and isinstance(members := value.get("set"), list):
        return any(_covers(member, subnet) for member in members)
    return isinstance(value, str) and _contains(value, subnet)


def _contains(text: str, subnet: IPv4Network) -> bool:
    try:
        network = ip_network(text, strict=False)
    except ValueError:
        return False
    return isinstance(network, IPv4Network) and subnet.subnet_of(network)


def _nft_shown(matches: list[dict[str, Any]]) -> str:
    shown = [json.dumps(match.get("right")) for match in matches]
    return printable(", ".join(shown), 100) or "everything"


_CHAIN: Final = re.compile(r"^:(INPUT|OUTPUT) ([A-Z]+)", re.MULTILINE)
_RULE: Final = re.compile(r"^-A (INPUT|OUTPUT) (.*)$", re.MULTILINE)


def suspects_of_iptables(text: str, interface: str, subnet: IPv4Network) -> list[Suspect]:
    """Read `iptables-save`; only its filter table counts."""
    tables = re.split(r"^\*(?=[a-z]+$)", text, flags=re.MULTILINE)
    table = next((part for part in tables if part.startswith("filter\n")), "")
    policies = dict(_CHAIN.findall(table))
    found: list[Suspect] = []
    for chain, policy in policies.items():
        verdict: str | None = None
        for rule in (rule for name, rule in _RULE.findall(table) if name == chain):
            target = _target_for_us(rule, chain, interface, subnet)
            if target in _DROPS or target == "ACCEPT":
                verdict = "" if target == "ACCEPT" else f"-A {chain} {printable(rule, 100)}"
                break
        if verdict is None and policy in _DROPS:
            verdict = f"policy {policy}, and no rule that accepts {interface}"
        if verdict:
            found.append(Suspect(f"iptables chain {chain}", verdict))
    return found


def _target_for_us(rule: str, chain: str, interface: str, subnet: IPv4Network) -> str:
    """The target of a rule that holds for every new connection of an app to us, else ""."""
    words = rule.split()
    target = ""
    device, address = ("-o", "-d") if chain == "OUTPUT" else ("-i", "-s")
    while words:
        option = words.pop(0)
        if option == "-j" and words:
            target = words.pop(0)
            words = [] if target == "REJECT" else words
        elif option == device and words:
            name = words.pop(0)
            if not (name == interface or (name.endswith("+") and interface.startswith(name[:-1]))):
                return ""
        elif option == address and words:
            if not _contains(words.pop(0), subnet):
                return ""
        elif words and (option == "--comment" or (option == "-m" and words[0] == "comment")):
            words.pop(0)
        else:
            return ""
    return target
