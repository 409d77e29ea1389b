"""Transfers of all sizes and endings between the kernel's TCP and ours, over a link that is bad at everything."""

from __future__ import annotations

import itertools

import pytest

from tests.netns.support import require_namespaces
from tests.netns.transfers import ENDINGS, FAMILIES, MAX_BYTES, plan, run_transfers


@pytest.mark.timeout(300)
async def test_two_hundred_transfers_arrive_and_end_as_they_were_made() -> None:
    """2 % of all packets are lost, doubled, overtaken, damaged. Thousands of transfers: `make soak-tcp`."""
    require_namespaces()

    report = await run_transfers(plan(200, seed=1), seed=1)

    assert report.failures == []
    assert report.transfers == 200
    assert set(report.faults) == {"lost", "duplicated", "reordered", "corrupted"}
    assert min(report.faults.values()) > 500


@pytest.mark.parametrize("seed", [1, 2])
def test_the_plan_holds_every_size_way_and_ending(seed: int) -> None:
    """And 10,000 transfers are not more than a soak test can carry."""
    transfers = plan(200, seed)

    assert transfers == plan(200, seed) != plan(200, seed + 1)
    sizes = [max(transfer.up, transfer.down) for transfer in transfers]
    assert (min(sizes), max(sizes)) == (1, MAX_BYTES)
    assert {(transfer.ending, transfer.up > transfer.down, transfer.family) for transfer in transfers} == set(
        itertools.product(ENDINGS, (True, False), FAMILIES)
    )
    assert any(transfer.up and transfer.down for transfer in transfers)
    assert sum(transfer.up + transfer.down for transfer in plan(10_000, seed)) < 15_000_000_000
