"""Every rule has its test, and the page says so."""

from __future__ import annotations

from collections import Counter

from tests.tun.rules import BUGS, DEVIATIONS, PAGE, RULES, SCENARIOS, marked_tests, render_page


def test_every_rule_has_a_test() -> None:
    """A rule that nothing proves is a wish."""
    proven = {number for test in marked_tests() for number in test.rules}

    assert sorted(RULES) == list(range(1, len(RULES) + 1))
    assert sorted(set(RULES) - proven) == []


def test_every_known_mistake_has_a_test() -> None:
    """What others paid for need not be paid again."""
    proven = {bug for test in marked_tests() for bug in test.bugs}

    assert sorted(set(BUGS) - proven) == []


def test_every_scenario_has_a_test() -> None:
    """The conformance suite that other stacks are measured with."""
    proven = {scenario for test in marked_tests() for scenario in test.scenarios}

    assert sorted(set(SCENARIOS) - proven) == []


def test_marks_name_what_there_is() -> None:
    """A mistyped mark proves nothing."""
    for test in marked_tests():
        assert set(test.rules) <= set(RULES), test
        assert set(test.bugs) <= set(BUGS), test
        assert set(test.scenarios) <= set(SCENARIOS), test


def test_marked_tests_have_names_of_their_own() -> None:
    """The page names a test by file and name."""
    counts = Counter((test.module, test.name) for test in marked_tests())

    assert [key for key, count in counts.items() if count > 1] == []


def test_deviations_are_few_and_about_rules() -> None:
    """Five at most: each is something to explain."""
    assert len(DEVIATIONS) <= 5
    assert all(set(deviation.rules) <= set(RULES) for deviation in DEVIATIONS)


def test_page_is_fresh() -> None:
    """`python -m tests.tun.rules > docs/tcp-states.md`."""
    assert PAGE.read_text(encoding="utf-8") == render_page()
