"""Where the API key comes from.

The order is fixed and the source is named, because "which key is it using?" is the first question when ngrok says 401.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from ngrokd import files
from ngrokd.config.readers import key_problem
from ngrokd.config.schema import Settings
from ngrokd.endpoints import Secret
from ngrokd.errors import StateError

MAX_KEY_FILE_BYTES: Final = 64 << 10


@dataclass(frozen=True, slots=True)
class ApiKey:
    """The key to use, or why there is none.

    Attributes:
        value: the key; empty where there is none.
        source: where it comes from, for `status` ("api.key_file /etc/ngrokd/key"); "" where nothing is configured.
        problem: why the configured source gives no key; "" where it does, or where nothing is configured.
        locked: a credential or key file is configured, so `set-api-key` must refuse, naming `source`.
        warning: something worth a line in the log, or "".
    """

    value: Secret
    source: str = ""
    problem: str = ""
    locked: bool = False
    warning: str = ""


def stored_key_path(settings: Settings) -> str:
    """Where `set-api-key` keeps the key."""
    return os.path.join(settings.state.directory, "api_key")


def read_key_file(path: str) -> tuple[str, int]:
    """The text and mode of a key file.

    Raises:
        FileNotFoundError: there is none.
        StateError: it is not a short regular file of text, or cannot be read.
    """
    data = files.read_limited(path, MAX_KEY_FILE_BYTES)
    try:
        return data.decode(), os.stat(path).st_mode
    except UnicodeDecodeError:
        raise StateError(f"{path} is not text") from None


def resolve_api_key(
    settings: Settings,
    environ: Mapping[str, str],
    read: Callable[[str], tuple[str, int]] = read_key_file,
) -> ApiKey:
    """Find the API key.

    The first of these: `$CREDENTIALS_DIRECTORY/api_key`, `$NGROKD_API_KEY_FILE`, `api.key_file`, the key that
    `set-api-key` stored, `api.key`, `$NGROK_API_KEY`.

    A file that is configured and cannot be used is a `problem`, not a reason to go on to the next source: the next
    one may be another account's key.
    """
    for path, source in _configured_key_files(settings, environ):
        try:
            text, mode = read(path)
        except FileNotFoundError:
            if source == "credential":  # systemd passes credentials for other purposes in the same folder
                continue
            return ApiKey(Secret(""), f"{source} {path}", f"{path} does not exist", locked=True)
        except StateError as error:
            return ApiKey(Secret(""), f"{source} {path}", str(error), locked=True)
        return _key_from_file(text, mode, path, f"{source} {path}", locked=True)
    stored = stored_key_path(settings)
    try:
        text, mode = read(stored)
    except FileNotFoundError:
        pass
    except StateError as error:
        return ApiKey(Secret(""), f"set-api-key ({stored})", str(error))
    else:
        return _key_from_file(text, mode, stored, f"set-api-key ({stored})", locked=False)
    if settings.api.key.reveal():
        return ApiKey(settings.api.key, "api.key")
    text = environ.get("NGROK_API_KEY", "")
    if text.strip():
        problem = key_problem(text)
        if problem:
            return ApiKey(Secret(""), "$NGROK_API_KEY", f"$NGROK_API_KEY {problem}")
        return ApiKey(Secret(text.strip()), "$NGROK_API_KEY")
    return ApiKey(Secret(""))


def _configured_key_files(settings: Settings, environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    if environ.get("CREDENTIALS_DIRECTORY"):
        yield os.path.join(environ["CREDENTIALS_DIRECTORY"], "api_key"), "credential"
    if environ.get("NGROKD_API_KEY_FILE"):
        yield environ["NGROKD_API_KEY_FILE"], "$NGROKD_API_KEY_FILE"
    if settings.api.key_file:
        yield settings.api.key_file, "api.key_file"


def _key_from_file(text: str, mode: int, path: str, source: str, *, locked: bool) -> ApiKey:
    problem = key_problem(text)
    if problem:
        return ApiKey(Secret(""), source, f"{path} {problem}", locked=locked)
    exposed = bool(mode & stat.S_IROTH)
    warning = f"{path} holds the API key and can be read by every user: chmod 600 {path}" if exposed else ""
    return ApiKey(Secret(text.strip()), source, locked=locked, warning=warning)
