r"""Arithmetic questions about two real handwritten digits: small enough to learn on two CPU cores.

The digits are the 1797 scans of 8×8 pixels and 17 gray levels that scikit-learn carries (UCI
"Optical Recognition of Handwritten Digits", the test part, 13 writers). Of each class, scans 5n to
5n+2 are for training, 5n+3 for validation and 5n+4 for testing, with every seed: no two splits
share a scan, though they share the writers.
"""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from roma.data.synthetic.writer import Progress, Question, question_rng, write_splits
from roma_kernels.errors import fail

HEIGHT, WIDTH = 32, 64

# Every word of every problem and solution; the processor handles `<image>`.
DIGIT_WORDS: tuple[str, ...] = (
    *("<think>", "</think>", "\\boxed{", "}", "left", "right", "so", "sum", "larger", "?"),
    *(str(number) for number in range(19)),
)

_SHARES = {"train": (0, 1, 2), "val": (3,), "test": (4,)}  # of every five scans of a class


@lru_cache(maxsize=3)
def digit_scans(split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The scans of a split: images [n, 8, 8] uint8 in 0..255, and labels [n] int64 in 0..9.

    Needs scikit-learn, which carries the scans.

    Raises:
        ValueError: unknown split.
        ModuleNotFoundError: scikit-learn is not installed.
    """
    if split not in _SHARES:
        fail("split", " or ".join(_SHARES), repr(split), "choose one of them")
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        remedy = "the digits need scikit-learn; pip install 'roma-vlm[train]'"
        raise ModuleNotFoundError(remedy, name=error.name) from error
    data = load_digits()
    labels = data.target.astype(np.int64)
    rank = np.empty(len(labels), dtype=np.int64)  # of a scan among those of its class
    for digit in range(10):
        rank[labels == digit] = np.arange((labels == digit).sum())
    chosen = np.isin(rank % 5, _SHARES[split])
    return np.rint(data.images[chosen] * (255 / 16)).astype(np.uint8), labels[chosen]


def digit_questions(split: str, size: int, *, seed: int = 0) -> Iterator[Question]:
    """Yields `size` questions; question i depends on (seed, split, i) alone.

    Each half of the 32×64 image holds one scan, enlarged to 24–28 px by bicubic interpolation, at a
    random place and strength, bright on a dark background. Half of the problems ask for the sum,
    half for the larger digit (of equal ones, that digit).

    Example:
        >>> question = next(digit_questions("train", 1))
        >>> question.image.shape, question.problem.split()[0]
        ((32, 64, 3), '<image>')
    """
    scans, labels = digit_scans(split)
    for index in range(size):
        rng = question_rng(seed, split, index)
        left, right = rng.integers(len(scans), size=2)
        strength = np.concatenate([_place(scans[left], rng), _place(scans[right], rng)], axis=1)
        gray = np.rint(rng.uniform(0, 40) * (1 - strength) + 255 * strength).astype(np.uint8)
        word = ("sum", "larger")[rng.integers(2)]
        a, b = int(labels[left]), int(labels[right])
        answer = a + b if word == "sum" else max(a, b)
        yield Question(
            image=np.repeat(gray[:, :, None], 3, axis=2),
            problem=f"<image> {word} ?",
            answer=str(answer),
            solution=f"<think> left {a} right {b} so {answer} </think> \\boxed{{ {answer} }}",
        )


def _place(scan: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.float64]:
    """Strength of the ink, 0..1, on a square [32, 32] that holds a scan [8, 8]."""
    size = int(rng.integers(24, 29))
    top, left = rng.integers(HEIGHT - size + 1, size=2)
    enlarged = Image.fromarray(scan).resize((size, size), Image.Resampling.BICUBIC)
    strength = np.zeros((HEIGHT, HEIGHT))
    strength[top : top + size, left : left + size] = np.asarray(enlarged) / 255
    return strength * rng.uniform(0.75, 1)


def write_digits(
    out: str | Path,
    *,
    train: int = 8000,
    val: int = 500,
    test: int = 1000,
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
        digit_questions,
        sizes=sizes,
        seed=seed,
        format=format,
        overwrite=overwrite,
        progress=progress,
    )
