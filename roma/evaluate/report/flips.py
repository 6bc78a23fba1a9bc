"""Questions whose answer flips under degradation, with their images made again.

A folder of `roma eval` names its data, its seed and what each condition does to an image, so the
very pixels that the model saw are made anew. Those of an attack cannot be: they depend on the
model's gradients.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from roma.data import Example, load_dataset_rows
from roma.evaluate import fingerprint
from roma.evaluate.conditions import Cell, Image, degrade_at
from roma.evaluate.record import Row, read_rows
from roma.evaluate.report.cards import GalleryItem, short_answer
from roma.evaluate.result import EvalResult
from roma.models.processor import Processor
from roma.views import ADVERSARIAL, CORRUPTIONS

Flip = tuple[str, Cell]
"""Id of a question, and the condition at which its answer is wrong."""


class OtherData(ValueError):
    """The data is not what the models saw; a sentence without its stop."""


def choose_flips(results: Mapping[str, EvalResult], *, items: int = 12) -> list[Flip]:
    """Questions that a model answers right on the clean image and wrong on the degraded one.

    Args:
        results: model → what it answered; one benchmark, the same questions.
        items: at most this number.

    Returns:
        Corruptions in turn, the highest levels first; no question twice; drawn at random, alike
        each time.
    """
    first = next(iter(results.values()))
    cells = [cell for cell in first.cells if cell.corruption and cell.pool != ADVERSARIAL]
    draw = np.random.default_rng(0)
    chosen: dict[str, Cell] = {}
    for level in sorted({cell.level for cell in cells}, reverse=True):
        queues = {c: draw.permutation(_flipping(results, c)) for c in cells if c.level == level}
        for turn in range(max(map(len, queues.values()))):
            for cell, ids in queues.items():
                if turn < len(ids) and len(chosen) < items:
                    chosen.setdefault(str(ids[turn]), cell)
    return list(chosen.items())


def _flipping(results: Mapping[str, EvalResult], cell: Cell) -> list[str]:
    """Ids of the questions whose answers all flip at the cell, of any model."""
    found: dict[str, None] = {}
    for each in results.values():
        if Cell() in each.cells and cell in each.cells:
            right, after = each.cells[Cell()].correct, each.cells[cell].correct
            flipped = np.flatnonzero((right == 1) & (after == 0))
            found |= dict.fromkeys(each.ids[place] for place in flipped)
    return list(found)


def texts_of(flips: Sequence[Flip], files: Mapping[str, Path]) -> list[GalleryItem]:
    """What each model said first about the clean and the degraded image; no images.

    Args:
        flips: of `choose_flips`.
        files: model → its answers.jsonl.
    """
    said = {model: _said(path, flips) for model, path in files.items()}
    return [
        GalleryItem(
            id, "", str(cell), None, None,
            {model: _both(rows, id, cell) for model, rows in said.items()},
        )
        for id, cell in flips
    ]  # fmt: skip


def with_images(
    items: Sequence[GalleryItem], flips: Sequence[Flip], settings: Mapping[str, Any]
) -> list[GalleryItem]:
    """The same with question, right answer and both images.

    Args:
        items: of `texts_of`.
        flips: the same.
        settings: of a `roma eval`; all models saw the same images.

    Raises:
        OtherData: the data is not what it was.
        ValueError: it cannot be read.
        OSError: the data or the model is not there any more.
    """
    examples = _examples([id for id, _ in flips], settings)
    resize = Processor.load(settings["model"]).resize
    made = []
    for item, (id, cell) in zip(items, flips, strict=True):
        example = examples[id]
        question = " ".join(str(example.question).replace("<image>", " ").split())
        shown = replace(item, question=question, truth=example.answer)
        for image in example.load_images()[:1]:  # of several the first; some have none
            clean = resize(image)
            shown = replace(shown, clean=clean, degraded=_degraded(clean, id, cell, settings))
        made.append(shown)
    return made


def _examples(ids: Sequence[str], settings: Mapping[str, Any]) -> dict[str, Example]:
    """The questions of these ids, after checking that the data is what it was."""
    skip, form = settings.get("skip_broken", False), settings.get("format_prompt")
    rows = load_dataset_rows(settings["data"], format_prompt=form, skip_broken=skip)
    wanted, found = set(ids), {}

    def asked() -> Iterator[Example]:  # their images are not all held at once
        for place in range(min(settings["questions"], len(rows))):
            example = rows[place]
            if example.id in wanted:
                found[example.id] = example
            yield example

    if fingerprint.of_examples(asked()) != settings["data_fingerprint"]:
        raise OtherData(f"{settings['data']} has other questions now than the models were asked")
    return found


def _degraded(clean: Image, id: str, cell: Cell, settings: Mapping[str, Any]) -> Image:
    """The first image of a question at the cell, from the parameters that the settings hold."""
    assert cell.corruption is not None  # a flip has a degraded side
    where = [cell.pool, cell.corruption, cell.level]
    (does,) = (
        own for own in settings["cells"] if [own["pool"], own["corruption"], own["level"]] == where
    )
    parameter = does["parameter"]
    strength = tuple(parameter) if isinstance(parameter, list) else parameter
    known, size = CORRUPTIONS[cell.corruption], does["reference_size"]
    own = replace(known, levels=(strength,) * cell.level, reference_size=size)
    keys, seed = [(id, 0)], settings["seed"]
    return degrade_at(cell, [clean], keys, seed=seed, corruptions={known.name: own})[0]


def _said(path: Path, flips: Sequence[Flip]) -> dict[Flip, Row]:
    """The rows of the flips, clean and degraded; one row at a time is in memory."""
    wanted = {(id, at) for id, cell in flips for at in (Cell(), cell)}
    return {(row.id, row.cell): row for row in read_rows(path) if (row.id, row.cell) in wanted}


def _both(rows: Mapping[Flip, Row], id: str, cell: Cell) -> dict[str, tuple[str, bool]]:
    """What a model said first of each image, and whether that is right."""
    found = {"clean": rows.get((id, Cell())), "degraded": rows.get((id, cell))}
    return {
        name: (short_answer(row.texts[0]), row.correct[0] >= 0.5)
        for name, row in found.items()
        if row is not None
    }
