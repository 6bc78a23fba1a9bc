"""Questions answered some at a time, so that memory does not grow with their number.

    chunk of questions ─► images decoded and resized ─► cell by cell: degraded ─► batch by batch:
    answered, scored, recorded

A chunk is as many batches as have 67 million pixels, or 512 questions: starting a pipeline of
degradations takes as long as a hundred small images do, and large ones want the memory. What a
record holds already is neither degraded nor answered. Batches are the same whatever it holds, since
sampling and the last bits of a float model's logits depend on them: a batch of which a part was
recorded is answered whole again, and the rest is added.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from roma.data import Example
from roma.evaluate.answers import Answer, SeveralAnswerer, judged
from roma.evaluate.conditions import Cell, DegradedImages, Image
from roma.evaluate.record import Record, Row
from roma.models.images import count_pixels
from roma.rewards import MarkedReward
from roma.views import seed_for

_PIXELS, _MOST = 2**26, 512  # of a chunk: 200 MB of RGB, questions

Answers = Mapping[Cell, Sequence[Sequence[Answer]]]
"""Of each cell, for each question its k answers."""


@dataclass(frozen=True)
class Unit:
    """What is answered and recorded together.

    Attributes:
        cells: for which it has answers.
        shown: the cell at which it is given the images.
        answer: answers a batch of questions about images.
    """

    cells: Sequence[Cell]
    shown: Cell
    answer: Callable[[Sequence[Example], Sequence[Sequence[Image]]], Answers]


def unit_of(cell: Cell, answer: SeveralAnswerer, *, seed: int) -> Unit:
    """One cell by itself; a batch is sampled with a seed of (seed, cell, its first question)."""

    def answered(examples: Sequence[Example], images: Sequence[Sequence[Image]]) -> Answers:
        problems = [example.problem for example in examples]
        own = seed_for(seed, "answers", str(cell), examples[0].id)
        return {cell: answer(problems, images, seed=own)}

    return Unit([cell], cell, answered)


def answer_all(
    record: Record,
    examples: Sequence[Example],
    units: Sequence[Unit],
    *,
    count: int,
    images: Callable[[Sequence[Example]], DegradedImages],
    batch_size: int,
    score: MarkedReward,
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Answers what the record lacks of every question at every cell, and adds it.

    Args:
        record: grows by a batch of a unit at a time.
        examples: the questions, each of an id of its own; slices of them are held, one at a time.
        units: the cells, in the order in which each chunk is answered.
        count: only the first `count` questions.
        images: of a chunk, at what the units are shown.
        batch_size: questions answered at once, ≥ 1.
        score: the reward function; only its "accuracy" is read.
        progress: called with the number of rows just added.
    """
    for asked in _chunks(examples, count, batch_size):
        open_units = [(unit, list(_open(record, unit, asked, batch_size))) for unit in units]
        if not any(batches for _, batches in open_units):
            continue
        degraded = images(asked)
        for unit, batches in open_units:
            pictures = degraded.at(unit.shown) if batches else []
            for batch in batches:
                answers = unit.answer(asked[batch], pictures[batch])
                rows = _rows(asked[batch], answers, score)
                new = [row for row in rows if not record.has(row.cell, row.id)]
                record.add(new)
                progress(len(new))


def _chunks(examples: Sequence[Example], count: int, batch_size: int) -> Iterator[list[Example]]:
    """Whole batches, as many as are decoded at once."""
    asked: list[Example] = []
    pixels = 0
    for start in range(0, count, batch_size):
        batch = examples[start : min(start + batch_size, count)]
        asked += batch
        pixels += sum(count_pixels(image) for example in batch for image in example.images)
        if pixels >= _PIXELS or len(asked) >= _MOST:
            yield asked
            asked, pixels = [], 0
    if asked:
        yield asked


def _open(record: Record, unit: Unit, asked: Sequence[Example], batch_size: int) -> Iterator[slice]:
    """The batches that the record lacks, or has in part."""
    for start in range(0, len(asked), batch_size):
        batch = slice(start, start + batch_size)
        ids = [example.id for example in asked[batch]]
        if not all(record.has(cell, id) for cell in unit.cells for id in ids):
            yield batch


def _rows(asked: Sequence[Example], answers: Answers, score: MarkedReward) -> list[Row]:
    return [
        Row(example.id, cell, [answer.text for answer in own], *verdict)
        for cell, every in answers.items()
        for example, own, verdict in zip(asked, every, judged(every, asked, score), strict=True)
    ]
