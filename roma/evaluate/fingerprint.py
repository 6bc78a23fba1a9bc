"""Fingerprints of what an evaluation depends on, so that it goes on with the same alone.

A fingerprint is the first 16 hexadecimal digits of a SHA-256. It finds a checkpoint that was
replaced in place and a dataset that was made anew; it is no protection against forgery.
"""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from roma.data import Example
from roma_kernels.errors import fail

_WHOLE = 64 * 2**20  # bytes; larger files are sampled
_STEP, _PIECE = 2**20, 4096  # the first 4 KiB of each MiB: 16 GB of weights are 64 MB to read

# What makes a model's answers, of the files beside its weights.
_NAMES = ("*config.json", "*tokenizer*", "vocab.*", "merges.txt", "*.jinja", "chat_template.json")
_WEIGHTS = ("*.safetensors", "*.bin", "*.index.json", "*.pt", "*.pth")


def of_model(folder: str | Path) -> str:
    """Of a model's folder: its configuration, its tokenizer and its weights, by name and content.

    Files of up to 64 MiB enter whole. Of larger ones enter the size, the first 4 KiB of every MiB
    and the last 4 KiB: training changes large matrices everywhere, also where the file's ends, a
    frozen head or vision tower, stay the same.

    Raises:
        ValueError: there is no config.json.
    """
    root = Path(folder)
    if not (root / "config.json").is_file():
        got = f"no config.json in {str(folder)!r}"
        remedy = "check the path; fetch one of the hub: `hf download NAME --local-dir FOLDER`"
        fail("model", "a Hugging Face model's folder", got, remedy)
    found = {path for pattern in (*_NAMES, *_WEIGHTS) for path in root.glob(pattern)}
    digest = hashlib.sha256()
    for path in sorted(found):
        if path.is_file():
            _take(digest, path.name.encode(), str(path.stat().st_size).encode())
            _take_file(digest, path)
    return digest.hexdigest()[:16]


def of_examples(examples: Iterable[Example]) -> str:
    """Of questions: their ids, texts, answers and encoded images; not what a prompt adds to them.

    An image that is a path enters by name and size: it is not read.

    Raises:
        ValueError: two questions have one id.
    """
    digest, ids = hashlib.sha256(), set[str]()
    for example in examples:
        if example.id in ids:
            got = f"{example.id!r} twice, the second time in {example.origin}"
            fail("ids", "one for each question", got, "rename it, or drop the column id")
        ids.add(example.id)
        texts = example.id, str(example.question), example.answer
        _take(digest, *(text.encode() for text in texts))
        for image in example.images:
            if isinstance(image, bytes):
                _take(digest, image)
            elif isinstance(image, str | Path):
                size = str(os.stat(image).st_size)
                _take(digest, Path(image).name.encode(), size.encode())
            else:
                _take(digest, str(image.size).encode(), image.tobytes())
    return digest.hexdigest()[:16]


def of_file(path: str | Path) -> str:
    """Of one file, whole."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def _take(digest: Any, *parts: bytes) -> None:
    """Each part behind its length: ("ab", "c") is not ("a", "bc")."""
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)


def _take_file(digest: Any, path: Path) -> None:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size <= _WHOLE:
            while part := file.read(_STEP):
                digest.update(part)
            return
        for start in (*range(0, size, _STEP), size - _PIECE):
            file.seek(start)
            digest.update(file.read(_PIECE))
