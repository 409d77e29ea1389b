"""Settings shown again without their secrets."""

from __future__ import annotations

from typing import Any

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


def value_of(settings: Settings, leaf: Leaf) -> Any:  # each key's own type
    """The value of one key."""
    return getattr(getattr(settings, leaf.section), leaf.attribute)
