"""Which addresses are dialled, and which failures may pass."""

from __future__ import annotations

import errno
import os

import pytest

from ngrokd.errors import IngressUnreachable
from ngrokd.relay.dialing import Addresses, MayPass
from ngrokd.relay.transport import Transport, memory_transport_pair


class Net:
    """Addresses that fail as they are told, or answer."""

    def __init__(self, **codes: int) -> None:
        self.codes = {name.replace("_", "."): code for name, code in codes.items()}
        self.dialled: list[str] = []

    async def dial(self, address: str, port: int) -> Transport:
        self.dialled.append(address)
        code = self.codes.get("a" + address.rpartition(".")[2], 0)
        if code:
            raise OSError(code, os.strerror(code))
        return memory_transport_pair()[0]

    def addresses(self, *addresses: str) -> Addresses:
        made = Addresses(self.dial, ["10.107.0.0/16"])
        made.set("Ingress.Example.", 443, addresses)
        return made


async def test_the_one_that_answered_last_is_asked_first() -> None:
    net = Net(a1=errno.ECONNREFUSED)
    addresses = net.addresses("203.0.113.1", "203.0.113.2")
    assert (await addresses.connect())[1] == "203.0.113.2"
    net.dialled.clear()
    assert (await addresses.connect())[1] == "203.0.113.2"
    assert net.dialled[0] == "203.0.113.2"


@pytest.mark.parametrize(
    ("codes", "may_pass"),
    [
        ((errno.ECONNREFUSED, errno.ECONNREFUSED), False),
        ((errno.ECONNREFUSED, errno.ECONNRESET), True),
        ((errno.ENETUNREACH, errno.ENETUNREACH), True),
        ((errno.EHOSTUNREACH, errno.ECONNREFUSED), True),
        ((errno.EMFILE, errno.EMFILE), True),
        ((errno.EADDRNOTAVAIL, errno.EADDRNOTAVAIL), True),
        ((errno.EACCES, errno.EPERM), False),  # a firewall of ours says no
        ((errno.ETIMEDOUT, errno.ETIMEDOUT), False),  # that took two minutes
    ],
)
async def test_a_refusal_at_every_address_is_a_verdict(codes: tuple[int, int], may_pass: bool) -> None:
    """Anything else at one of them may be otherwise in a moment."""
    net = Net(a1=codes[0], a2=codes[1])
    with pytest.raises(IngressUnreachable) as caught:
        await net.addresses("203.0.113.1", "203.0.113.2").connect()
    assert isinstance(caught.value, MayPass) == may_pass
    assert os.strerror(codes[0]) in str(caught.value)


async def test_addresses_of_ours_are_left_out_and_the_others_used() -> None:
    net = Net()
    addresses = net.addresses("10.107.0.9", "203.0.113.1", "224.0.0.1")
    assert (await addresses.connect())[1] == "203.0.113.1"
    assert net.dialled == ["203.0.113.1"]


async def test_only_addresses_of_ours_are_an_error_that_names_them() -> None:
    with pytest.raises(IngressUnreachable, match=r"resolves to 10.107.0.9, 0.0.0.0, which is never dialled"):
        await Net().addresses("10.107.0.9", "0.0.0.0").connect()


def test_setting_tells_whether_anything_is_new() -> None:
    """Name servers give addresses in another order each time."""
    addresses = Net().addresses("203.0.113.1", "203.0.113.2")
    assert not addresses.set("ingress.example", 443, ["203.0.113.2", "203.0.113.1"])
    assert addresses.set("ingress.example", 443, ["203.0.113.2"])
    assert addresses.set("ingress.example", 444, ["203.0.113.2"])
    assert addresses.set("other.example", 444, ["203.0.113.2"])
    assert addresses.name == "other.example:444"
    assert "203.0.113.2" in addresses
    assert "203.0.113.1" not in addresses
