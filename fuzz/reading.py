"""Choices out of fuzz data: small numbers, one after the other, zeros when the data is used up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Source:
    """The rest of one input."""

    __slots__ = ("at", "data")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    @property
    def more(self) -> bool:
        """Is anything left?"""
        return self.at < len(self.data)

    def byte(self) -> int:
        """0..255."""
        at = self.at
        self.at = at + 1
        return self.data[at] if at < len(self.data) else 0

    def short(self) -> int:
        """0..65535."""
        return self.byte() << 8 | self.byte()

    def long(self) -> int:
        """0..2**32 - 1."""
        return self.short() << 16 | self.short()

    def pick(self, choices: Sequence[T]) -> T:
        """One of these."""
        return choices[self.byte() % len(choices)]

    def bit(self) -> bool:
        """True or false; takes a byte."""
        return self.byte() & 1 == 1

    def take(self, count: int) -> bytes:
        """At most so many bytes, as they are."""
        at = self.at
        self.at = at + count
        return self.data[at : at + count]

    def rest(self) -> bytes:
        """Everything that is left."""
        at = self.at
        self.at = len(self.data)
        return self.data[at:]
