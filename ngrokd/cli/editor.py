"""`ngrokd config edit`: a person, an editor, and a file that is only ever replaced by one that is right.

The person edits a copy in a private folder. What is wrong with it stands as a comment at its top when the editor opens
again, with the numbers of the lines as the editor shows them; those lines are taken out before the copy is looked at.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from typing import Final

from ngrokd.cli.output import clean
from ngrokd.config import parse
from ngrokd.config_edit import Change, ChangedMeanwhileError, rewrite
from ngrokd.errors import ConfigError, NgrokdError, PermissionMissingError

_MARK: Final = "#! "
_HEADER: Final = (
    "This was not saved, because it is wrong. Mend it and save it again, or leave it as it is to give up.",
)
_FALLBACKS: Final = ("sensible-editor", "nano", "vi")


class NotSavedError(ConfigError):
    """The person gave up, and what was wrong is said."""


def edit_file(file: str, environ: Mapping[str, str]) -> bool:
    """Let a person edit a configuration file.

    Args:
        file: its absolute path; one that is missing begins as the commented one.
        environ: `VISUAL` and `EDITOR` name the editor, in this order.

    Returns: whether it was changed.

    Raises:
        NotSavedError: it is wrong and was left so.
        NgrokdError: it cannot be read or written, there is no editor, or that failed; a text that was edited is kept,
            and the message says where.
    """
    editor = find_editor(environ)
    original = _current(file)
    before = original
    if not original:
        from ngrokd.config.manual import commented_file

        before = commented_file()
    folder = tempfile.mkdtemp(prefix="ngrokd-config-")
    copy = os.path.join(folder, os.path.basename(file))
    keep = False
    try:
        try:
            text = _session(editor, copy, before, file)
            if text == before or not text.strip():
                return False
            keep = True
            rewrite(file, lambda now: _replaced(file, now, original, text))
            keep = False
        except NotSavedError as error:
            keep = True
            raise NotSavedError(str(error), remedy=f"your text is in {copy}", mistakes=error.mistakes) from None
        except NgrokdError as error:
            if keep:
                error.remedy = f"{error.remedy + '; ' if error.remedy else ''}your text is in {copy}"
            raise
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    return True


def find_editor(environ: Mapping[str, str]) -> list[str]:
    """The command that edits a file. Raises NgrokdError: there is none."""
    for name in ("VISUAL", "EDITOR"):
        if environ.get(name, "").strip():
            return shlex.split(environ[name])
    for name in _FALLBACKS:
        if shutil.which(name):
            return [name]
    raise NgrokdError("there is no editor here", remedy="name one: EDITOR=... ngrokd config edit")


def _current(file: str) -> str:
    """The text, after making sure that it can be replaced: better said before than after an hour's work."""
    folder = os.path.dirname(os.path.realpath(file))
    if not os.access(folder if os.path.isdir(folder) else os.path.dirname(folder) or "/", os.W_OK):
        raise PermissionMissingError(f"cannot change {file}", remedy="do it with sudo: sudo -E ngrokd config edit")
    change: Change = rewrite(file, lambda text: text)
    return change.before


def _replaced(file: str, now: str, original: str, text: str) -> str:
    if now != original:
        raise ChangedMeanwhileError(f"{file} was changed by somebody else in the meantime")
    return text


def _session(editor: list[str], copy: str, text: str, file: str) -> str:
    """Edit until it is right. Raises NotSavedError when it is left wrong."""
    shown = text
    while True:
        with open(copy, "w", newline="") as stream:
            os.fchmod(stream.fileno(), 0o600)
            stream.write(shown)
        _run(editor, copy)
        edited = _read(copy)
        text = without_header(edited)
        problem = _problem(text, file)
        if problem is None or not text.strip():
            return text
        if edited == shown and shown.startswith(_MARK):
            raise NotSavedError(str(problem), mistakes=problem.mistakes)
        shown = with_header(text, problem)


def _run(editor: list[str], copy: str) -> None:
    try:
        code = subprocess.run([*editor, copy], check=False).returncode
    except OSError as error:
        raise NgrokdError(
            f"cannot start the editor {clean(editor[0])}: {error.strerror}", remedy="set $VISUAL or $EDITOR"
        ) from None
    if code != 0:
        raise NgrokdError(f"the editor {clean(editor[0])} ended with {code}; nothing was saved")


def _read(copy: str) -> str:
    try:
        with open(copy, newline="", encoding="utf-8") as stream:
            return stream.read()
    except UnicodeDecodeError:
        raise NgrokdError(f"{copy} is no text in UTF-8; nothing was saved") from None
    except OSError as error:
        raise NgrokdError(f"the editor left no text: {error.strerror}; nothing was saved") from None


def _problem(text: str, file: str) -> ConfigError | None:
    try:
        parse(text.removeprefix("\ufeff"), file, {})
    except ConfigError as error:
        return error
    return None


def with_header(text: str, problem: ConfigError) -> str:
    """The text, with what is wrong above it; the lines are counted as the editor will."""
    if problem.mistakes:
        height = len(_HEADER) + len(problem.mistakes)
        named = (f"{each.key}: " if each.key else "" for each in problem.mistakes)
        said = [
            f"line {each.line + height}: {name}{each.text}" for each, name in zip(problem.mistakes, named, strict=True)
        ]
    else:
        said = str(problem).splitlines()
    newline = "\r\n" if "\r\n" in text else "\n"
    return "".join(f"{_MARK}{line}{newline}" for line in (*_HEADER, *said)) + text


def without_header(text: str) -> str:
    """The text without what `with_header` put above it, wherever in it the lines were moved to."""
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith(_MARK))
