"""Runs fuzz targets: by coverage where atheris is installed, else by a seeded mutator; and keeps corpora small.

    python -m fuzz.packets [--runs N] [--seconds S] [--seed N] [--max-len BYTES] [--plain] [--work DIR]
    python -m fuzz.packets --replay FILE...         what was found, again; without files the whole corpus
    python -m fuzz.packets --minimise [DIR...]      fold DIRs into the corpus, keep what adds coverage

A target is a module with `run_one(data: bytes) -> None`, which raises when an invariant does not hold, `CORPUS`, the
name of its directory below `fuzz/corpus`, and perhaps `MAX_LEN` and `TOKENS` (words of its language).

What is found goes to the directory named by `--work` (by default below the system's temporary one), never into the
corpus: a finding gets there under a name of its own, together with the fix and a test that tells what it is.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import os
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent
TARGETS: Final = (
    "packets", "packets6", "packets_scapy", "stack", "binding", "api", "hosts", "config", "control", "http1", "urls",
    "state", "workers",
)  # fmt: skip
MAX_LEN: Final = 1024
CPU_LIMIT_S: Final = 1.0  # of one input; a slower one is a finding

RunOne = Callable[[bytes], None]

_INTERESTING: Final = (
    0, 1, 0x7F, 0x80, 0xFF, 0x20, 0x0A, 0x22, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF,
)  # fmt: skip


def corpus_files(module: ModuleType) -> list[Path]:
    """The target's corpus, in a fixed order."""
    folder = ROOT / "corpus" / str(module.CORPUS)
    return sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []


def load(name: str) -> ModuleType:
    """The target of this name."""
    return importlib.import_module(f"fuzz.{name}")


def main(file: str) -> None:
    """Run the target that was started as `python -m fuzz.NAME`, in a fresh interpreter.

    Coverage is measured in modules that are imported under atheris's eyes, and by now they are imported.
    """
    os.execv(sys.executable, [sys.executable, "-m", "fuzz.driver", Path(file).stem, *sys.argv[1:]])


def run(arguments: Sequence[str]) -> int:
    """The command line, after the name of the target."""
    parser = argparse.ArgumentParser(prog="python -m fuzz.driver")
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--runs", type=int, default=0, help="inputs; 0: until stopped")
    parser.add_argument("--seconds", type=float, default=0.0, help="stop after this time; 0: never")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--max-len", type=int, default=0, help="bytes of an input")
    parser.add_argument("--plain", action="store_true", help="the seeded mutator, even where atheris is installed")
    parser.add_argument("--work", type=Path, default=None, help="where inputs with new coverage and findings go")
    parser.add_argument("--replay", action="store_true")
    parser.add_argument("--minimise", action="store_true")
    parser.add_argument("files", nargs="*", type=Path)
    options = parser.parse_intermixed_args(arguments)
    work: Path = options.work or Path(tempfile.gettempdir()) / f"fuzz-{os.getuid()}" / options.target
    work.mkdir(parents=True, exist_ok=True)
    if options.replay:
        return replay(load(options.target), options.files)
    if options.minimise:
        minimise(load(options.target), options.files)
        return 0
    atheris = None if options.plain else _atheris()
    if atheris is None:
        return explore(load(options.target), work, options)
    with atheris.instrument_imports(include=["tun", "ngrokd"]):
        module = load(options.target)
    return _explore_with_atheris(atheris, module, work, options)


def replay(module: ModuleType, files: Sequence[Path]) -> int:
    """Run each file once. Returns how many failed."""
    failed = 0
    for path in files or corpus_files(module):
        try:
            module.run_one(path.read_bytes())
        except Exception:  # noqa: BLE001 - whatever it is, it is what we look for
            failed += 1
            print(f"--- {path}")
            traceback.print_exc()
    return failed


# Without atheris


def explore(module: ModuleType, work: Path, options: argparse.Namespace) -> int:
    """Mutate the corpus by chance, the same chances for the same seed. Stops at the first finding."""
    chance = random.Random(options.seed)
    corpus = [path.read_bytes() for path in corpus_files(module)] or [b""]
    tokens: Sequence[bytes] = getattr(module, "TOKENS", ())
    limit = options.max_len or getattr(module, "MAX_LEN", MAX_LEN)
    started = time.monotonic()
    done = 0
    while not (options.runs and done >= options.runs):
        if options.seconds and time.monotonic() - started >= options.seconds:
            break
        data = mutate(chance, corpus, tokens, limit)
        if not _judged(module.run_one, data, work, options.target):
            return 1
        done += 1
    elapsed = time.monotonic() - started
    print(f"{options.target}: {done} inputs in {elapsed:.0f} s, seed {options.seed}, no finding")
    return 0


def mutate(chance: random.Random, corpus: Sequence[bytes], tokens: Sequence[bytes], limit: int) -> bytes:
    """A new input out of one or two old ones."""
    data = bytearray(chance.choice(corpus))
    if chance.random() < 0.2:
        other = chance.choice(corpus)
        data[chance.randint(0, len(data)) :] = other[chance.randint(0, len(other)) :]
    for _ in range(1 << chance.randrange(5)):
        _mutate_once(chance, data, tokens)
    return bytes(data[:limit])


def _mutate_once(chance: random.Random, data: bytearray, tokens: Sequence[bytes]) -> None:
    kind = chance.randrange(8 if tokens else 7)
    at = chance.randint(0, len(data))
    size = min(chance.choice((1, 1, 2, 4, 8, 40)), len(data) - at)
    if kind == 0 and at < len(data):
        data[at] ^= 1 << chance.randrange(8)
    elif kind == 1 and at < len(data):
        data[at] = chance.randrange(256)
    elif kind == 2:
        width = chance.choice((1, 2, 4))
        value = chance.choice(_INTERESTING) & ((1 << 8 * width) - 1)
        data[at : at + width] = value.to_bytes(width, chance.choice(("big", "little")))
    elif kind == 3:
        del data[at : at + size]
    elif kind == 4:
        data[at:at] = chance.randbytes(chance.choice((1, 1, 2, 4, 8)))
    elif kind == 5:
        start = chance.randint(0, len(data))
        data[start:start] = data[at : at + size]
    elif kind == 6:
        start = chance.randint(0, max(len(data) - size, 0))
        data[start : start + size] = data[at : at + size]
    elif kind == 7:
        token = chance.choice(tokens)
        data[at : at + chance.choice((0, len(token)))] = token


def _judged(run_one: RunOne, data: bytes, work: Path, target: str) -> bool:
    """Whether the invariants held for this input; if not, it is kept and shown."""
    before = time.process_time()
    try:
        run_one(data)
        spent = time.process_time() - before
        if spent < CPU_LIMIT_S:
            return True
        print(f"{target}: slow, {spent:.1f} s of processor time")
    except Exception:  # noqa: BLE001 - whatever it is, it is what we look for
        traceback.print_exc()
    path = work / f"finding-{hashlib.sha256(data).hexdigest()[:16]}"
    path.write_bytes(data)
    print(f"{target}: kept as {path}; again: python -m fuzz.{target} --replay {path}")
    return False


# With atheris


def _atheris() -> Any:
    """The module where it is installed. It needs a libFuzzer, so it comes for few platforms."""
    try:
        return importlib.import_module("atheris")
    except ImportError:
        return None


def _explore_with_atheris(atheris: Any, module: ModuleType, work: Path, options: argparse.Namespace) -> int:
    found = work / "found"
    found.mkdir(exist_ok=True)
    arguments = [
        options.target,
        f"-max_len={options.max_len or getattr(module, 'MAX_LEN', MAX_LEN)}",
        f"-seed={options.seed}",
        f"-artifact_prefix={work}/finding-",
        "-timeout=20",
        "-rss_limit_mb=4096",
        "-len_control=20",
        "-print_final_stats=1",
        "-reload=0",
    ]
    if options.runs:
        arguments.append(f"-runs={options.runs}")
    if options.seconds:
        arguments.append(f"-max_total_time={int(options.seconds)}")
    tokens: Sequence[bytes] = getattr(module, "TOKENS", ())
    if tokens:
        dictionary = work / "tokens"
        dictionary.write_text("".join(f'"{_escaped(token)}"\n' for token in tokens))
        arguments.append(f"-dict={dictionary}")
    # libFuzzer writes what it discovers into the first directory, and only reads the others.
    arguments += [str(found), *(str(path) for path in options.files)]
    corpus = ROOT / "corpus" / str(module.CORPUS)
    if corpus.is_dir():
        arguments.append(str(corpus))
    run_one: RunOne = module.run_one

    def judge(data: bytes) -> None:
        before = time.process_time()
        run_one(data)
        spent = time.process_time() - before
        assert spent < CPU_LIMIT_S, f"slow: {spent:.1f} s of processor time"

    atheris.Setup(arguments, judge)
    atheris.Fuzz()
    return 0


def _escaped(token: bytes) -> str:
    return "".join(chr(byte) if byte < 128 and chr(byte).isalnum() else f"\\x{byte:02X}" for byte in token)


# A small corpus


def minimise(module: ModuleType, folders: Iterable[Path]) -> None:
    """Fold what lies in `folders` into the corpus and keep only what adds coverage. Files with a dot stay always.

    Coverage is pairs of lines within `tun` and `ngrokd`, one run after the other. Names without a dot are ours (a
    hash); a finding is named, say `deep-nesting.json`, and stays whatever it covers.
    """
    folder = ROOT / "corpus" / str(module.CORPUS)
    folder.mkdir(parents=True, exist_ok=True)
    own = corpus_files(module)
    named = [path for path in own if "." in path.name]
    candidates = {path.read_bytes() for path in own if "." not in path.name}
    for other in folders:
        candidates |= {path.read_bytes() for path in other.rglob("*") if path.is_file()}
    seen: set[tuple[str, int, int]] = set()
    for path in named:
        seen |= coverage(module.run_one, path.read_bytes())
    kept: set[str] = set()
    for data in sorted(candidates, key=lambda data: (len(data), data)):
        try:
            news = coverage(module.run_one, data) - seen
        except Exception:  # noqa: BLE001 - a finding is handled by hand
            print(f"skipped: {hashlib.sha256(data).hexdigest()[:16]} fails")
            continue
        if news:
            seen |= news
            name = hashlib.sha256(data).hexdigest()[:16]
            (folder / name).write_bytes(data)
            kept.add(name)
    for path in own:
        if "." not in path.name and path.name not in kept:
            path.unlink()
    size = sum(path.stat().st_size for path in corpus_files(module))
    print(f"{module.CORPUS}: {len(candidates)} candidates, {len(corpus_files(module))} kept, {size} bytes")


def coverage(run_one: RunOne, data: bytes) -> set[tuple[str, int, int]]:
    """Which ways through the code this input takes: (file, line, next line)."""
    taken: set[tuple[str, int, int]] = set()

    def trace(frame: FrameType, event: str, _argument: object) -> Any:
        name = frame.f_code.co_filename
        if event != "call" or not ("/tun/" in name or "/ngrokd/" in name):
            return None
        last = 0

        def trace_line(frame: FrameType, event: str, _argument: object) -> Any:
            nonlocal last
            if event == "line":
                taken.add((name, last, frame.f_lineno))
                last = frame.f_lineno
            return trace_line

        return trace_line

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run_one(data)
    finally:
        sys.settrace(before)
    return taken


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
