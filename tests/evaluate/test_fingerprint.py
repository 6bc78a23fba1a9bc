"""Fingerprints: what a run depends on changes them, and nothing else does."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from roma.data import Example
from roma.evaluate import fingerprint

MIB = 2**20


def model(folder: Path, weights: bytes = b"w" * 1000) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"hidden_size": 96}')
    (folder / "preprocessor_config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def test_a_model_is_its_files_wherever_they_lie(tmp_path: Path) -> None:
    first = model(tmp_path / "a")
    found = fingerprint.of_model(first)
    assert len(found) == 16 and int(found, 16) >= 0
    second = shutil.copytree(first, tmp_path / "b")
    (second / "README.md").write_text("not of the model")
    (second / "answers.json").write_text("{}")
    os.utime(second / "model.safetensors", (0, 0))
    assert fingerprint.of_model(second) == found
    for name in (
        "config.json",
        "preprocessor_config.json",
        "tokenizer.json",
        "chat_template.jinja",
    ):
        other = shutil.copytree(first, tmp_path / f"without {name}")
        (other / name).write_text("other")
        assert fingerprint.of_model(other) != found
    (second / "model-2.safetensors").write_bytes(b"")
    assert fingerprint.of_model(second) != found
    (second / "model-2.safetensors").rename(second / "model-3.safetensors")
    with_third = fingerprint.of_model(second)
    (second / "model-3.safetensors").rename(second / "model-4.safetensors")
    assert fingerprint.of_model(second) not in (found, with_third)
    with pytest.raises(ValueError, match=r"^model: expected a Hugging Face model's folder, got no"):
        fingerprint.of_model(tmp_path)


@pytest.mark.parametrize("at", [0, 499, 999])
def test_one_byte_of_a_file_that_is_read_whole(tmp_path: Path, at: int) -> None:
    weights = bytearray(b"w" * 1000)
    weights[at] ^= 1
    pair = [model(tmp_path / "a"), model(tmp_path / "b", bytes(weights))]
    assert len({fingerprint.of_model(each) for each in pair}) == 2


def test_a_checkpoint_that_was_replaced_in_place(tmp_path: Path, monkeypatch) -> None:
    """Of a large file a change of any matrix shows, also where its first and last MiB are equal."""
    monkeypatch.setattr(fingerprint, "_WHOLE", MIB)
    weights = bytearray(8 * MIB + 100)
    folder = model(tmp_path / "a", bytes(weights))
    found = fingerprint.of_model(folder)
    for start, end in ((0, 2 * MIB), (3 * MIB, 4 * MIB), (5 * MIB + 7, 6 * MIB + 7), (-100, None)):
        changed = weights.copy()
        changed[start:end] = b"\1" * len(changed[start:end])
        (folder / "model.safetensors").write_bytes(bytes(changed))
        assert fingerprint.of_model(folder) != found
    (folder / "model.safetensors").write_bytes(bytes(weights) + b"\0")
    assert fingerprint.of_model(folder) != found
    (folder / "model.safetensors").write_bytes(bytes(weights))
    assert fingerprint.of_model(folder) == found


def small(value: int) -> Image.Image:
    return Image.fromarray(np.full((2, 2, 3), value, dtype=np.uint8))


ASKED = [Example("0", (b"png",), "<image> sum ?", "8"), Example("1", (), "1 + 1 ?", "2")]


@pytest.mark.parametrize(
    "change",
    [
        lambda asked: asked[:1],
        lambda asked: asked[::-1],
        lambda asked: [replace(asked[0], id="2"), asked[1]],
        lambda asked: [replace(asked[0], question="<image> larger ?"), asked[1]],
        lambda asked: [replace(asked[0], answer="9"), asked[1]],
        lambda asked: [replace(asked[0], images=(b"pnG",)), asked[1]],
        lambda asked: [replace(asked[0], images=(small(1),)), asked[1]],
        lambda asked: [replace(asked[0], question="<image> sum ?8", answer=""), asked[1]],
    ],
)
def test_questions_that_differ(change: Callable[[list[Example]], list[Example]]) -> None:
    found = fingerprint.of_examples(ASKED)
    assert fingerprint.of_examples(list(ASKED)) == found
    assert fingerprint.of_examples(change(ASKED)) != found


def test_images_of_files_and_ids_that_are_not_one_each(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"1234")
    asked = [replace(ASKED[0], images=(path,))]
    found = fingerprint.of_examples(asked)
    path.write_bytes(b"12345")
    assert fingerprint.of_examples(asked) != found
    pictures = [[replace(ASKED[0], images=(small(value),))] for value in (1, 2)]
    assert fingerprint.of_examples(pictures[0]) != fingerprint.of_examples(pictures[1])
    twice = [ASKED[0], replace(ASKED[1], id="0", origin="x.parquet, row 7")]
    with pytest.raises(ValueError, match=r"^ids: expected one for each question, got '0' twice, t"):
        fingerprint.of_examples(twice)


def test_questions_are_the_same_whatever_a_prompt_adds_to_them() -> None:
    asked = [replace(each, problem=f"{each.problem} Box it.") for each in ASKED]
    assert fingerprint.of_examples(asked) == fingerprint.of_examples(ASKED)
