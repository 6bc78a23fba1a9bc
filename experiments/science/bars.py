r"""Questions about drawn bar charts: four marks to read, then several steps of arithmetic.

The charts are drawn by this program, not scanned. Each has four bars of 0 to 9 units of 3 pixels,
one in each quarter of a 32×64 image: in the small Qwen3-VL of `roma.models.small` a column of two
image tokens. What varies from chart to chart: where the axis stands and each bar beside its place,
how wide the bars are, the shade and tint of the background, of each bar and of the grid (some
charts have none), and the noise of the picture. A unit is a few pixels of a faint shade, so that
blur, noise and loss of resolution spoil the reading first and the arithmetic not at all.

A chain names the four marks before anything else, so that what a model claims to see can be
compared with what is there (`named_marks`). Of the written solutions 60 % are hasty: after the
marks they say the answer at once (`about 17`). A model warm-started on them reads well, mostly
answers at once, and is often wrong; reinforcement learning has it compute.
"""

import re
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from roma.data.synthetic.writer import Question, question_rng

HEIGHT, WIDTH = 32, 64
BARS = 4
TOP = 9
"""The highest mark."""
UNIT = 3
"""Pixels of a unit of height."""

HASTY = 0.6
"""Share of written solutions that name the marks and then the answer, without computing."""

BAR_WORDS: tuple[str, ...] = (
    *("<think>", "</think>", "\\boxed{", "}", "bars", "so", ",", "?"),
    *("sum", "+", "is", "range", "highest", "lowest", "-", "above", "yes", "no", "count", "about"),
    *(str(number) for number in range(BARS * TOP + 1)),
)
"""Every word of every problem and solution; the processor handles `<image>`."""

_NAMED = re.compile(r"^\s*<think> bars ((?:\d+ )+)so ")


def bar_questions(split: str, size: int, *, seed: int = 0) -> Iterator[Question]:
    """Yields `size` questions; question i depends on (seed, split, i) alone.

    Half ask for the sum of the marks, a quarter for the highest less the lowest, a quarter how many
    lie above a threshold of 2 to 7. A worked chain has 23 to 29 tokens, the end token included, a
    hasty one 14.

    Raises:
        ValueError: unknown split.

    Example:
        >>> question = next(bar_questions("train", 1))
        >>> question.image.shape, question.problem.split()[0]
        ((32, 64, 3), '<image>')
    """
    for index in range(size):
        rng = question_rng(seed, split, index)
        marks = tuple(int(mark) for mark in rng.integers(TOP + 1, size=BARS))
        image = draw_bars(marks, rng)
        problem, steps, answer = _ask(marks, rng)
        if rng.random() < HASTY:
            steps = f"about {answer}"
        named = " ".join(map(str, marks))
        yield Question(
            image=image,
            problem=f"<image> {problem} ?",
            answer=str(answer),
            solution=f"<think> bars {named} so {steps} </think> \\boxed{{ {answer} }}",
        )


def _ask(marks: tuple[int, ...], rng: np.random.Generator) -> tuple[str, str, int]:
    """A problem, the steps of its chain, and the answer."""
    word = ("sum", "sum", "range", "above")[rng.integers(4)]
    if word == "sum":
        total, steps = marks[0], []
        for mark in marks[1:]:
            steps.append(f"{total} + {mark} is {total + mark}")
            total += mark
        return "sum", " , ".join(steps), total
    if word == "range":
        high, low = max(marks), min(marks)
        return (
            "range",
            f"highest {high} , lowest {low} , {high} - {low} is {high - low}",
            high - low,
        )
    threshold = int(rng.integers(2, 8))
    count = sum(mark > threshold for mark in marks)
    steps = [f"{mark} {'yes' if mark > threshold else 'no'}" for mark in marks]
    return f"above {threshold}", " , ".join([*steps, f"count {count}"]), count


def draw_bars(marks: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.uint8]:
    """A chart of four bars, [32, 64, 3] uint8: brighter than their ground, of any shade.

    Args:
        marks: heights in units, 0 to 9 each.
        rng: for all that varies.
    """
    ground = rng.uniform(20, 120) + rng.uniform(-10, 10, size=3)
    image = np.broadcast_to(ground, (HEIGHT, WIDTH, 3)).copy()
    axis = HEIGHT - 1 - int(rng.integers(4))  # the row of the axis
    grid = rng.uniform(0, 20) * (rng.random() < 0.7)
    for unit in range(3, TOP + 1, 3):
        image[axis - unit * UNIT] += grid
    strength = rng.uniform(30, 100)
    for i, mark in enumerate(marks):
        width = int(rng.integers(6, 11))
        left = i * WIDTH // BARS + 3 + int(rng.integers(11 - width))
        shade = ground + strength * rng.uniform(0.85, 1.15) + rng.uniform(-15, 15, size=3)
        image[axis - mark * UNIT : axis, left : left + width] = shade
    image[axis] = ground + strength * 0.6
    image += rng.normal(0, rng.uniform(1, 8), size=image.shape[:2])[:, :, None]
    return np.rint(image.clip(0, 255)).astype(np.uint8)


def named_marks(text: str) -> tuple[int, ...] | None:
    r"""The marks that a chain names before it computes; None if it names none.

    As many as it names, in order: a broken chain may name fewer or more than four.

    Example:
        >>> named_marks("<think> bars 3 7 2 5 so highest 7 , lowest 2")
        (3, 7, 2, 5)
        >>> named_marks("<think> so 3 + 7 is 10") is None
        True
    """
    found = _NAMED.match(text + " ")
    return tuple(map(int, found[1].split())) if found else None
