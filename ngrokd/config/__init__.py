"""The configuration: what may be written, how it is read, and what is said when it is wrong.

`schema` is the list of sections and keys, `readers` turn one value into its type, `lines` knows where each key is
written, `salvage` reads what is broken, `loading` puts them together, `apikey` finds the API key, `showing` shows them.
"""

from __future__ import annotations

from ngrokd.config.apikey import ApiKey, read_key_file, resolve_api_key, stored_key_path
from ngrokd.config.loading import DEFAULT_PATH, Given, convert_texts, find_file, find_files, load, load_alone, parse
from ngrokd.config.readers import (
    format_duration,
    format_size,
    join_address,
    key_problem,
    parse_duration,
    split_address,
)
from ngrokd.config.schema import (
    INGRESS_PORT,
    MOST_AUTO_WORKERS,
    NGROK_CA_FINGERPRINT,
    ApiSettings,
    ControlSettings,
    HostsSettings,
    HttpSettings,
    IngressSettings,
    LimitSettings,
    LogSettings,
    NetSettings,
    Settings,
    StateSettings,
    all_keys,
)
from ngrokd.config.showing import show, shown_value

__all__ = [
    "load",
    "load_alone",
    "parse",
    "convert_texts",
    "Given",
    "find_file",
    "find_files",
    "DEFAULT_PATH",
    "Settings",
    "ApiSettings",
    "IngressSettings",
    "StateSettings",
    "NetSettings",
    "LimitSettings",
    "HostsSettings",
    "ControlSettings",
    "HttpSettings",
    "LogSettings",
    "all_keys",
    "show",
    "shown_value",
    "ApiKey",
    "resolve_api_key",
    "read_key_file",
    "stored_key_path",
    "key_problem",
    "split_address",
    "join_address",
    "parse_duration",
    "format_duration",
    "format_size",
    "INGRESS_PORT",
    "MOST_AUTO_WORKERS",
    "NGROK_CA_FINGERPRINT",
]
