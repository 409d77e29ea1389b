"""Every input that fuzzing found worth keeping, once more, without the fuzzer.

The targets assert their invariants themselves, so running them is the test. What these inputs cover and how they were
found stands in fuzz/README.md.
"""

from __future__ import annotations

import random

import pytest

from fuzz import driver

FAST = [name for name in driver.TARGETS if name != "packets_scapy"]  # it shares its corpus with `packets`


@pytest.mark.parametrize("name", driver.TARGETS)
def test_invariants_hold_for_the_whole_corpus(name: str) -> None:
    """A finding that comes back, or an invariant that a change has broken."""
    target = driver.load(name)
    files = driver.corpus_files(target)

    assert files, "a target without a corpus"
    for path in files:
        try:
            target.run_one(path.read_bytes())
        except Exception as error:
            error.add_note(f"python -m fuzz.{name} --replay {path}")
            raise


@pytest.mark.parametrize("name", FAST)
def test_invariants_hold_for_new_inputs(name: str) -> None:
    """Some hundred new ones each run, the same ones each time: whether the mutator and the targets still work."""
    target = driver.load(name)
    chance = random.Random(20)
    corpus = [path.read_bytes() for path in driver.corpus_files(target)]

    for _ in range(300):
        target.run_one(driver.mutate(chance, corpus, getattr(target, "TOKENS", ()), getattr(target, "MAX_LEN", 1024)))


@pytest.mark.parametrize("name", FAST)
def test_a_corpus_stays_small(name: str) -> None:
    """It is replayed by every run of the tests; `--minimise` keeps it to what adds coverage."""
    files = driver.corpus_files(driver.load(name))

    assert len(files) <= 400
    assert sum(path.stat().st_size for path in files) <= 200_000


def test_empty_input_is_fine() -> None:
    """The shortest input of all; a target that reads its first byte must not insist on one."""
    for name in driver.TARGETS:
        driver.load(name).run_one(b"")


def test_the_same_seed_gives_the_same_inputs() -> None:
    """Or a finding of the plain mutator could not be found again."""
    corpus = [b"one input", b"another one"]

    first = [driver.mutate(random.Random(7), corpus, (b"token",), 50) for _ in range(3)]
    second = [driver.mutate(random.Random(7), corpus, (b"token",), 50) for _ in range(3)]

    assert first == second
