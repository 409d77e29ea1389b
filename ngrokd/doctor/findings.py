"""What the doctor says: a finding for each thing that was looked at, and what to do where it is not well."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        check: what it is about: a stable word, for scripts.
        level: ok; warn: it works, or may not matter; fail: something does not work, or will not.
        summary: what was found, one sentence.
        remedy: what to do, one line; "" only where nothing is to be done.
        facts: figures and names, for scripts.
    """

    check: str
    level: Level
    summary: str
    remedy: str = ""
    facts: Mapping[str, object] = field(default_factory=dict)

    def as_data(self) -> dict[str, object]:
        """For --json."""
        return {
            "check": self.check,
            "level": self.level,
            "summary": self.summary,
            "remedy": self.remedy,
            "facts": dict(self.facts),
        }


def ok(check: str, summary: str, **facts: object) -> Finding:
    """All is well."""
    return Finding(check, "ok", summary, "", facts)


def warn(check: str, summary: str, remedy: str, **facts: object) -> Finding:
    """It may not matter."""
    return Finding(check, "warn", summary, remedy, facts)


def fail(check: str, summary: str, remedy: str, **facts: object) -> Finding:
    """It does not work."""
    return Finding(check, "fail", summary, remedy, facts)


def is_well(findings: Iterable[Finding]) -> bool:
    """Whether nothing failed."""
    return all(finding.level != "fail" for finding in findings)
