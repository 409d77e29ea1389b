"""Settings shown again without their secrets, and compared for a reload."""

from __future__ import annotations

from typing import Any

import msgspec

from ngrokd.config.schema import Leaf, Settings, schema


def show(settings: Settings) -> dict[str, dict[str, object]]:
    """All sections and keys as they would be written in the file; secrets as "***"."""
    return {
        section: {key: shown_value(settings, leaf) for key, leaf in leaves.items()}
        for section, (_, leaves) in schema().items()
    }


def shown_value(settings: Settings, leaf: Leaf) -> object:
    """One key as it would be written in the file; a secret as "***"."""
    return leaf.reader.show(value_of(settings, leaf))


def reloadable(old: Settings, new: Settings) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What a running daemon takes over, and what waits for a restart: two lists of dotted keys that differ."""
    live: list[str] = []
    needs_restart: list[str] = []
    for _, leaves in schema().values():
        for leaf in leaves.values():
            if value_of(old, leaf) != value_of(new, leaf):
                (live if leaf.reader.live else needs_restart).append(leaf.path)
    return tuple(live), tuple(needs_restart)


def merge_live(old: Settings, new: Settings) -> Settings:
    """`old` with those values of `new` that a running daemon takes over."""
    merged = old
    for section, (_, leaves) in schema().items():
        changes = {leaf.attribute: value_of(new, leaf) for leaf in leaves.values() if leaf.reader.live}
        if changes:
            merged = msgspec.structs.replace(
                merged, **{section: msgspec.structs.replace(getattr(merged, section), **changes)}
            )
    return merged


def value_of(settings: Settings, leaf: Leaf) -> Any:  # each key's own type
    """The value of one key."""
    return getattr(getattr(settings, leaf.section), leaf.attribute)
