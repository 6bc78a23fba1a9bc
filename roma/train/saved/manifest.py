"""Size and SHA-256 of every file of a checkpoint, to find a damaged one before anything is read.

    {"format": 1, "step": N, "files": {"actor/config.json": {"bytes": …, "sha256": "…"}, …},
     "sha256": "of all of the above"}

SHA-256 finds every flipped bit, and `sha256sum` shows the same digest. It takes 0.5 s a GB on one
core with the instructions for it, which is what a fast disk takes to write (2.0 GB/s; CRC-32: 6.4).
Several ranks share the files: each measures its part, whoever wrote it.
"""

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from roma.train.ranks import rank, ranks, told
from roma.train.saved.agree import on_first

MANIFEST = "manifest.json"
MODEL = "model.json"
PARTS = ("actor", "trainer.pt", MODEL)  # of any checkpoint; an engine adds its own
FORMAT = 1
_BLOCK = 2**20  # bytes read at a time; hashlib then lets other threads run
_THREADS = 4  # files hashed at a time by a rank

Files = Mapping[str, Mapping[str, Any]]


def files_of(folder: Path) -> dict[str, int]:
    """Sizes in bytes of all files below a folder, by their path in it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}


def share(sizes: Mapping[str, int], part: int, parts: int) -> list[str]:
    """The files of one of several readers, the same number of bytes for each if they allow it.

    Example:
        >>> share({"a": 5, "b": 3, "c": 2, "d": 1}, 1, 2)
        ['b', 'c']
    """
    loads, own = [0] * parts, []
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        lightest = loads.index(min(loads))
        loads[lightest] += sizes[name]
        if lightest == part:
            own.append(name)
    return own


def measure(folder: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Waits until files are on the disk, and returns size and digest of each."""

    def one(name: str) -> dict[str, Any]:
        sync(folder / name)
        return {"bytes": (folder / name).stat().st_size, "sha256": _digest(folder / name)}

    with ThreadPoolExecutor(_THREADS) as threads:
        return dict(zip(names, threads.map(one, names), strict=True))


def write(folder: Path, step: int, files: Files) -> None:
    """Writes the manifest, on the disk when it returns."""
    content = {"format": FORMAT, "step": step, "files": dict(sorted(files.items()))}
    text = json.dumps({**content, "sha256": _own_digest(content)}, indent=1)
    (folder / MANIFEST).write_text(text)
    sync(folder / MANIFEST)


def damage(folder: Path) -> str | None:
    """The first file that is not as it was written, and how; None: all are. Every rank calls.

    Of a checkpoint without a manifest, of an earlier version, only what shows without one.
    """
    if on_first(lambda: is_unverified(folder)):
        return on_first(lambda: _visible_damage(folder))
    found = told(_own_damage(folder))
    return next((wrong for wrong in found if wrong), None)


def is_unverified(folder: Path) -> bool:
    """Whether a checkpoint is of an earlier version of this package, which wrote no manifest."""
    if (folder / MANIFEST).exists():
        return False
    try:
        return "format" not in json.loads((folder / MODEL).read_text())
    except (OSError, ValueError, TypeError):
        return False


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk; a full disk may be noticed only here."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _own_damage(folder: Path) -> str | None:
    """As far as sizes and this rank's share of the digests show it."""
    try:
        files = _read(folder)
    except FileNotFoundError:
        return f"{MANIFEST}: missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return f"{MANIFEST}: cannot be read"
    for name, entry in files.items():
        try:
            size = (folder / name).stat().st_size
        except OSError:
            return f"{name}: missing"
        if size != entry["bytes"]:
            had = f"{size} bytes instead of {entry['bytes']}" if size else "empty"
            return f"{name}: {had}"
    names = share({name: entry["bytes"] for name, entry in files.items()}, rank(), ranks())

    def differs(name: str) -> str | None:
        try:
            same = _digest(folder / name) == files[name]["sha256"]
        except OSError as error:
            return f"{name}: {error.strerror}"
        return None if same else f"{name}: other bytes than were written"

    with ThreadPoolExecutor(_THREADS) as threads:
        return next((wrong for wrong in threads.map(differs, names) if wrong), None)


def _visible_damage(folder: Path) -> str | None:
    """Without a manifest: a part that is missing or empty, or a file of torch that was cut."""
    for part in (*PARTS, "optimizer.pt"):
        path = folder / part
        if not path.exists():
            return f"{part}: missing"
        if path.suffix == ".pt" and not zipfile.is_zipfile(path):
            return f"{part}: cut"
    return None


def _read(folder: Path) -> Files:
    content = json.loads((folder / MANIFEST).read_text())
    own = content.pop("sha256")
    if own != _own_digest(content):
        raise ValueError(MANIFEST)
    files: Files = content["files"]
    return files


def _own_digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
