"""Questions about bar charts drawn with Pillow; the answers are known exactly."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from roma.data.synthetic.writer import Progress, Question, question_rng, write_splits

HEIGHT, WIDTH = 224, 320  # multiples of 32: patch 16 and merge 2 of Qwen3-VL keep them as they are
_LEFT, _RIGHT, _TOP, _BOTTOM = 34, 310, 34, 196  # the plot area
_TOP_VALUE = 100

_THEMES = {
    "Harvest (tonnes)": ("Rice", "Corn", "Wheat", "Oats", "Barley", "Rye", "Millet", "Beans"),
    "Visitors (thousands)": ("Paris", "Rome", "Oslo", "Lima", "Cairo", "Delhi", "Quito", "Seoul"),
    "Books lent": ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"),
    "Sales (units)": ("Pens", "Lamps", "Cups", "Bags", "Hats", "Rugs", "Keys", "Bells"),
}
_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#997700", "#555555")


@dataclass(frozen=True)
class BarChart:
    """What a chart shows: distinct multiples of 5 below 100, which can be read off the grid."""

    title: str
    labels: tuple[str, ...]
    values: tuple[int, ...]
    colours: tuple[str, ...]
    numbers: bool  # whether each value is written above its bar

    def draw(self) -> NDArray[np.uint8]:
        """Draws the chart, [224, 320, 3] uint8."""
        image = Image.new("RGB", (WIDTH, HEIGHT), "white")
        draw = ImageDraw.Draw(image)
        font, small = ImageFont.load_default(13), ImageFont.load_default(11)
        draw.text((WIDTH / 2, 12), self.title, fill="black", font=font, anchor="mm")
        for value in range(0, _TOP_VALUE + 1, 10):
            y = self._y(value)
            draw.line((_LEFT, y, _RIGHT, y), fill="#bbbbbb" if value else "black")
            if value % 20 == 0:
                draw.text((_LEFT - 5, y), str(value), fill="black", font=small, anchor="rm")
        step = (_RIGHT - _LEFT) / len(self.labels)
        write = partial(draw.text, fill="black", font=small, anchor="mm")
        bars = zip(self.labels, self.values, self.colours, strict=True)
        for i, (label, value, colour) in enumerate(bars):
            centre, top = _LEFT + (i + 0.5) * step, self._y(value)
            draw.rectangle((centre - 0.32 * step, top, centre + 0.32 * step, _BOTTOM), fill=colour)
            write((centre, _BOTTOM + 12), label)
            if self.numbers:  # the white stroke keeps grid lines out of the digits
                write((centre, top - 8), str(value), stroke_width=2, stroke_fill="white")
        return np.array(image)

    @staticmethod
    def _y(value: int) -> float:
        return _BOTTOM - (_BOTTOM - _TOP) * value / _TOP_VALUE


# Each asks one thing and returns (problem, reasoning, answer).
_Ask = Callable[[BarChart, np.random.Generator], tuple[str, str, str]]


def _extreme(chart: BarChart, rng: np.random.Generator) -> tuple[str, str, str]:
    word, pick = (("highest", np.argmax), ("lowest", np.argmin))[rng.integers(2)]
    i = int(pick(chart.values))
    label, value = chart.labels[i], chart.values[i]
    return f"Which bar is the {word}?", f"The {word} bar is {label} with {value}.", label


def _value(chart: BarChart, rng: np.random.Generator) -> tuple[str, str, str]:
    i = int(rng.integers(len(chart.values)))
    label, value = chart.labels[i], chart.values[i]
    return f"What is the value of {label}?", f"The bar of {label} ends at {value}.", str(value)


def _difference(chart: BarChart, rng: np.random.Generator) -> tuple[str, str, str]:
    i, j = rng.choice(len(chart.values), size=2, replace=False)
    if chart.values[i] < chart.values[j]:
        i, j = j, i
    (a, x), (b, y) = (chart.labels[i], chart.values[i]), (chart.labels[j], chart.values[j])
    reasoning = f"{a} is {x} and {b} is {y}. {x} - {y} = {x - y}."
    return f"How much more is {a} than {b}?", reasoning, str(x - y)


def _total(chart: BarChart, rng: np.random.Generator) -> tuple[str, str, str]:
    i, j = rng.choice(len(chart.values), size=2, replace=False)
    (a, x), (b, y) = (chart.labels[i], chart.values[i]), (chart.labels[j], chart.values[j])
    reasoning = f"{a} is {x} and {b} is {y}. {x} + {y} = {x + y}."
    return f"What are {a} and {b} together?", reasoning, str(x + y)


def _count(chart: BarChart, rng: np.random.Generator) -> tuple[str, str, str]:
    limit = int(rng.integers(2, 9)) * 10
    bars = zip(chart.labels, chart.values, strict=True)
    above = [label for label, value in bars if value > limit]
    reasoning = f"Above {limit}: {', '.join(above) or 'none'}. That is {len(above)}."
    return f"How many bars are higher than {limit}?", reasoning, str(len(above))


_ASKS: tuple[_Ask, ...] = (_extreme, _value, _difference, _total, _count)


def chart_questions(split: str, size: int, *, seed: int = 0) -> Iterator[Question]:
    r"""Yields `size` questions about charts of three to six bars.

    Question i depends on (seed, split, i) alone. There are five kinds: which bar is highest or
    lowest, the value of one, the difference or the sum of two, how many are higher than a limit.
    Half of the charts show their numbers, the others must be read off the grid. The solution is
    written as `<think> … </think> \boxed{answer}`.

    Raises:
        ValueError: unknown split.

    Example:
        >>> next(chart_questions("test", 1)).image.shape
        (224, 320, 3)
    """
    for index in range(size):
        rng = question_rng(seed, split, index)
        chart = _random_chart(rng)
        problem, reasoning, answer = _ASKS[rng.integers(len(_ASKS))](chart, rng)
        solution = f"<think> {reasoning} </think> \\boxed{{{answer}}}"
        yield Question(chart.draw(), f"<image>{problem}", answer, solution)


def _random_chart(rng: np.random.Generator) -> BarChart:
    title = tuple(_THEMES)[rng.integers(len(_THEMES))]
    bars = int(rng.integers(3, 7))
    return BarChart(
        title=title,
        labels=tuple(str(label) for label in rng.choice(_THEMES[title], size=bars, replace=False)),
        values=tuple(5 * int(step) for step in rng.choice(19, size=bars, replace=False) + 1),
        colours=tuple(str(colour) for colour in rng.choice(_COLOURS, size=bars, replace=False)),
        numbers=bool(rng.integers(2)),
    )


def write_charts(
    out: str | Path,
    *,
    train: int = 2000,
    val: int = 200,
    test: int = 500,
    seed: int = 0,
    format: str = "parquet",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Path]:
    """Writes train, val and test; a size of 0 leaves a split out. Returns the path of each.

    Raises:
        ValueError: a negative size or seed, no rows at all, or an unknown format.
        FileExistsError: `out` holds such a split and `overwrite` is false.
    """
    sizes = {"train": train, "val": val, "test": test}
    return write_splits(
        out,
        chart_questions,
        sizes=sizes,
        seed=seed,
        format=format,
        overwrite=overwrite,
        progress=progress,
    )
