"""Changing the configuration file without disturbing what people wrote into it.

`text` changes one value of a TOML text, `writing` puts the result where the file is; neither knows what a key means.
`go` converts the Go daemon's file.
"""

from __future__ import annotations

from ngrokd.config_edit.text import EditError, format_key, format_value, has_value, parse_key, set_value, unset_value
from ngrokd.config_edit.writing import NEW_FILE_MODE, Change, ChangedMeanwhileError, rewrite

__all__ = [
    "set_value",
    "unset_value",
    "has_value",
    "format_key",
    "format_value",
    "parse_key",
    "EditError",
    "rewrite",
    "NEW_FILE_MODE",
    "Change",
    "ChangedMeanwhileError",
]
