"""Changing the configuration file without disturbing what people wrote into it.

`text` changes one value of a TOML text, `writing` puts the result where the file is. Neither knows what a key means.
"""

from __future__ import annotations

from ngrokd.config_edit.text import EditError, format_key, format_value, has_value, parse_key, set_value, unset_value
from ngrokd.config_edit.writing import Change, ChangedMeanwhileError, rewrite

__all__ = [
    "set_value",
    "unset_value",
    "has_value",
    "format_key",
    "format_value",
    "parse_key",
    "EditError",
    "rewrite",
    "Change",
    "ChangedMeanwhileError",
]
