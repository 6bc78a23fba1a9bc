"""Cards of a page: a question with its image, clean and degraded, and what each model answered."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from roma.evaluate.figures import LineStyle
from roma.evaluate.report.page import data_uri, named
from roma.evaluate.wording import short
from roma.rewards import last_box

_WIDEST = 320  # px: larger images are reduced, so that a report of photographs stays small
_LONGEST = 500  # characters of a question
_ENDING = 120  # characters of an answer that boxes nothing


@dataclass(frozen=True)
class GalleryItem:
    """One question, its image clean and degraded, and what each model answered.

    question, truth: the problem without its image mark, and the right answer; where the data is not
        to be had the question's id, and "".
    condition: of the degraded image, e.g. "jpeg L3".
    clean, degraded: [H, W, 3] uint8; None where they are not to be had.
    answers: model → "clean" and "degraded" → (answer in short, whether it is right).
    """

    question: str
    truth: str
    condition: str
    clean: NDArray[np.uint8] | None
    degraded: NDArray[np.uint8] | None
    answers: Mapping[str, Mapping[str, tuple[str, bool]]]


def cards(items: Sequence[GalleryItem], style: Callable[[str], LineStyle]) -> str:
    """The items side by side, as HTML.

    Args:
        items: their models are listed in the order of `answers`.
        style: of a model.
    """
    return f'<div class="cards">{"".join(_card(item, style) for item in items)}</div>'


def _card(item: GalleryItem, style: Callable[[str], LineStyle]) -> str:
    """Both images, and a row of two answers for each model."""
    shown = {"clean": ("clean", item.clean), "degraded": (item.condition, item.degraded)}
    names = "".join(f"<th>{escape(name.replace('_', ' '))}</th>" for name, _ in shown.values())
    images = "".join(
        f'<td><img src="{data_uri(_png(image))}" alt="{escape(name)}"></td>'
        for name, image in shown.values()
        if image is not None
    )
    rows = f"<tr><td></td>{images}</tr>" if images else ""
    for model, answers in item.answers.items():
        said = "".join(_said(answers.get(where)) for where in shown)
        rows += f"<tr><td>{named(style(model).label, style(model).colour)}</td>{said}</tr>"
    asked = short(item.question, width=_LONGEST)
    truth = f"truth: {short(item.truth, width=_LONGEST)}" if item.truth else ""
    return (
        f'<div class="card"><h3>{escape(asked)} <span class="note">{escape(truth)}</span></h3>'
        f"<table><tr><th></th>{names}</tr>{rows}</table></div>"
    )


def _said(answer: tuple[str, bool] | None) -> str:
    """A cell with an answer, ✓ or ✗."""
    if answer is None:
        return "<td></td>"
    kind, sign = ("right", "✓") if answer[1] else ("wrong", "✗")
    return f'<td class="{kind}">{sign} {escape(short(answer[0], width=_LONGEST))}</td>'


def _png(image: NDArray[np.uint8]) -> bytes:
    picture = Image.fromarray(image)
    picture.thumbnail((_WIDEST, _WIDEST))  # never enlarges
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def short_answer(text: str, *, width: int = 32) -> str:
    r"""The reasoning, where it is at most `width` characters, and the boxed answer.

    Of a text without a box its end, which is where an answer stands.

    Example:
        >>> short_answer(r"<think> left 3 right 5 so 8 </think> \boxed{ 8 }")
        'left 3 right 5 so 8 → 8'
    """
    found = last_box(text)
    if not found:
        flat = " ".join(text.split())
        return f"…{flat[-_ENDING:]}" if len(flat) > _ENDING else flat or "(nothing)"
    answer = found.content
    reasoning = " ".join(text.partition("<think>")[2].partition("</think>")[0].split())
    return f"{reasoning} → {answer}" if 0 < len(reasoning) <= width else answer
