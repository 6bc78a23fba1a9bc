"""The table of corruptions: names, pools and the parameter at each level. No image is touched here.

Levels 1 to 3 of the seen and unseen corruptions are MATH.md section 2. Where ImageNet-C (arXiv
1903.12261) has a corruption, all five levels are its own, salt_and_pepper's those of its
impulse_noise; downscale and posterize are ours. patch_mask at L3 is PAPO's (arXiv 2507.06448); pgd
is `roma.train.views.attack`'s. Level 0 is the clean image, and between two levels
parameters are interpolated linearly, so a level is any number.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any

from roma_kernels.errors import fail

Parameter = float | tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Corruption:
    """One way to spoil an image, and how much at each level.

    Raises:
        ValueError: a parameter outside its range, or a level milder than the one before it.

    Example:
        >>> CORRUPTIONS["gaussian_noise"].parameter(2.5)
        0.15
        >>> CORRUPTIONS["motion_blur"].training_range
        ((0.0, 0.0), (15.0, 5.0))
    """

    name: str
    pool: str
    """"seen": may be trained on. "unseen": for evaluation. "extra": neither, for studies.
    "masking": patches blackened, for PAPO, DVRP and SRPO. "adversarial": made against a policy."""
    levels: tuple[Parameter, ...]
    """The parameter at L1, L2, …, ever stronger."""
    unit: str
    """What the parameter is; `full_unit` tells too at which size."""
    identity: Parameter
    """Level 0: the parameter that by definition (JPEG of quality 100 too) leaves an image alone."""
    limit: Parameter
    """The strongest parameter that means anything, or that memory allows."""
    reference_size: int | None = None
    """The parameter is in pixels of an image whose shorter side has this length, and is scaled by
    min(H, W)/reference_size. None: taken as it stands."""

    def __post_init__(self) -> None:
        """Checks the levels."""
        if not self.levels:
            fail(f"{self.name}.levels", "at least one level", "none", "give L1")
        before = _parts(self.identity)
        for level, parameter in enumerate(self.levels, 1):
            where = f"{self.name}.levels, L{level}"
            self.check(parameter, name=where)
            now = _parts(parameter)
            ends = zip(_parts(self.identity), before, now, strict=True)
            if any(abs(new - start) < abs(old - start) for start, old, new in ends):
                got = f"{self.describe(parameter)} after {self.describe(self.levels[level - 2])}"
                fail(where, "a level at least as strong as the one before", got, "sort the levels")
            before = now
        if self.reference_size is not None and self.reference_size < 1:
            expected = "a length in pixels, or null for no scaling"
            fail(f"{self.name}.reference_size", expected, str(self.reference_size), "give 224")

    @property
    def full_unit(self) -> str:
        """The unit, and the image size for which a length in it holds: "sigma in px at 224"."""
        return self.unit + (f" at {self.reference_size}" if self.reference_size else "")

    @property
    def training_range(self) -> tuple[Parameter, Parameter]:
        """The parameters between which training customarily draws: of level 0 and of L2."""
        return self.identity, self.parameter(min(2, len(self.levels)))

    def parameter(self, level: float) -> Parameter:
        """The parameter at a level: piecewise linear through the identity (level 0) and each level.

        Raises:
            ValueError: `level` lies outside 0..the last level. TypeError: it is not a number.
        """
        if not isinstance(level, Real) or isinstance(level, bool):
            remedy = "give the number of a level, whole or not"
            fail("level", "a number", repr(level), remedy, error=TypeError)
        if not 0 <= level <= len(self.levels):
            expected = f"0 to {len(self.levels)}, the levels of {self.name}"
            fail("level", expected, f"{level:g}", "choose one of those, or give parameter=")
        points = (self.identity, *self.levels)
        below = min(int(level), len(self.levels) - 1)
        share = level - below
        ends = zip(_parts(points[below]), _parts(points[below + 1]), strict=True)
        # (1-t)·a + t·b is exact at both ends; 12 digits keep 0.15 from being 0.15000000000000002
        found = tuple(round((1 - share) * a + share * b, 12) for a, b in ends)
        return found if isinstance(self.identity, tuple) else found[0]

    def check(self, parameter: Parameter, *, name: str = "parameter") -> None:
        """Checks that a parameter has the right count of finite numbers, each within its range.

        Raises:
            ValueError: it has not. TypeError: it holds something that is not a number.
        """
        parts, start, stop = _parts(parameter), _parts(self.identity), _parts(self.limit)
        ends = [(min(a, b), max(a, b)) for a, b in zip(start, stop, strict=True)]
        expected = f"{self.unit}: " + ", ".join(f"{low:g} to {high:g}" for low, high in ends)
        remedy = "see roma.views.CORRUPTIONS or `roma views --list`"
        if any(isinstance(p, bool) or not isinstance(p, Real) for p in parts):
            fail(name, expected, repr(parameter), remedy, error=TypeError)
        good = len(parts) == len(start) and all(map(math.isfinite, parts))
        if not good or not all(a <= p <= b for p, (a, b) in zip(parts, ends, strict=True)):
            fail(name, expected, self.describe(parameter), remedy)

    def describe(self, parameter: Parameter) -> str:
        """A parameter in at most four digits, as in tables and galleries: "0.15", "(15, 5)"."""
        parts = [f"{part:.4g}" for part in _parts(parameter)]
        return f"({', '.join(parts)})" if isinstance(parameter, tuple) else parts[0]


def _parts(parameter: Parameter) -> tuple[float, ...]:
    """A parameter as a tuple, whether it is one number or several."""
    return parameter if isinstance(parameter, tuple) else (parameter,)


def _table() -> dict[str, Corruption]:
    """Seen before unseen before extra; then masking and what needs a policy."""
    rows = (
        Corruption(
            name="gaussian_noise", pool="seen", levels=(0.08, 0.12, 0.18, 0.26, 0.38),
            unit="sigma, pixels in 0..1", identity=0.0, limit=100.0,
        ),
        Corruption(
            name="gaussian_blur", pool="seen", levels=(1.0, 2.0, 3.0, 4.0, 6.0),
            unit="sigma in px", identity=0.0, limit=1000.0, reference_size=224,
        ),
        Corruption(
            name="jpeg", pool="seen", levels=(25.0, 18.0, 15.0, 10.0, 7.0),
            unit="quality", identity=100.0, limit=1.0,
        ),
        Corruption(
            name="downscale", pool="seen", levels=(0.5, 0.33, 0.25, 0.2, 0.15),
            unit="factor", identity=1.0, limit=0.0,
        ),
        Corruption(
            name="motion_blur", pool="unseen",
            levels=((10.0, 3.0), (15.0, 5.0), (15.0, 8.0), (15.0, 12.0), (20.0, 15.0)),
            unit="(radius, sigma) in px", identity=(0.0, 0.0), limit=(1000.0, 1000.0),
            reference_size=224,
        ),
        Corruption(
            name="salt_and_pepper", pool="unseen", levels=(0.03, 0.06, 0.09, 0.17, 0.27),
            unit="share of pixels", identity=0.0, limit=1.0,
        ),
        Corruption(
            name="speckle", pool="unseen", levels=(0.15, 0.2, 0.35, 0.45, 0.6),
            unit="sigma of x + x·n", identity=0.0, limit=100.0,
        ),
        Corruption(  # one bit is the least there is
            name="posterize", pool="unseen", levels=(4.0, 3.0, 2.0, 1.0, 1.0),
            unit="bits", identity=8.0, limit=1.0,
        ),
        Corruption(
            name="pixelate", pool="unseen", levels=(0.6, 0.5, 0.4, 0.3, 0.25),
            unit="factor", identity=1.0, limit=0.0,
        ),
        Corruption(  # of 60, 25, 12, 5 and 3 photons
            name="shot_noise", pool="extra", levels=(1 / 60, 1 / 25, 1 / 12, 1 / 5, 1 / 3),
            unit="1/photons of white", identity=0.0, limit=1000.0,
        ),
        Corruption(
            name="impulse_noise", pool="extra", levels=(0.03, 0.06, 0.09, 0.17, 0.27),
            unit="share of values", identity=0.0, limit=1.0,
        ),
        Corruption(
            name="defocus_blur", pool="extra",
            levels=((3.0, 0.1), (4.0, 0.5), (6.0, 0.5), (8.0, 0.5), (10.0, 0.5)),
            unit="(radius, sigma of its edge) in px", identity=(0.0, 0.0), limit=(1000.0, 1000.0),
            reference_size=224,
        ),
        Corruption(
            name="zoom_blur", pool="extra",
            levels=((1.11, 0.01), (1.15, 0.01), (1.2, 0.02), (1.24, 0.02), (1.3, 0.03)),
            unit="(largest zoom, step)", identity=(1.0, 0.01), limit=(100.0, 1.0),
        ),
        Corruption(
            name="brightness", pool="extra", levels=(0.1, 0.2, 0.3, 0.4, 0.5),
            unit="shift of HSV's value, 0..1", identity=0.0, limit=1.0,
        ),
        Corruption(
            name="contrast", pool="extra", levels=(0.4, 0.3, 0.2, 0.1, 0.05),
            unit="factor", identity=1.0, limit=0.0,
        ),
        Corruption(  # ImageNet-C's from L3 on; its first two take colour away
            name="saturate", pool="extra",
            levels=((1.3, 0.0), (1.6, 0.0), (2.0, 0.0), (5.0, 0.1), (20.0, 0.2)),
            unit="(factor, shift) of HSV's saturation", identity=(1.0, 0.0), limit=(1e6, 1.0),
        ),
        Corruption(
            name="fog", pool="extra",
            levels=((1.5, 2.0), (2.0, 2.0), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4)),
            unit="(amount, decay)", identity=(0.0, 2.0), limit=(1e6, 1.0),
        ),
        Corruption(
            name="patch_mask", pool="masking", levels=(0.2, 0.4, 0.6, 0.8, 0.9),
            unit="chance of black, patches of 14 px", identity=0.0, limit=1.0,
        ),
        Corruption(
            name="pgd", pool="adversarial", levels=(1.0, 2.0, 4.0, 8.0, 16.0),
            unit="eps, 8-bit levels", identity=0.0, limit=255.0,
        ),
    )  # fmt: skip
    return {row.name: row for row in rows}


CORRUPTIONS: Mapping[str, Corruption] = _table()
"""Name → corruption: four seen, five unseen, eight extra, one masking, one adversarial."""

ADVERSARIAL = "adversarial"
"""The pool whose views follow from the policy, too: `degrade` cannot make them."""
NEEDS_POLICY = (
    "train with algorithm.views.pool=adversarial, or measure with `roma eval --pools adversarial`"
)
"""Where to get them."""


def find(name: str, corruptions: Mapping[str, Corruption], *, argument: str) -> Corruption:
    """The corruption of a name.

    Raises:
        ValueError: there is none; the nearest name is suggested.
    """
    if not isinstance(name, str) or name not in corruptions:
        nearest = difflib.get_close_matches(str(name), corruptions, n=1, cutoff=0)
        remedy = f"did you mean {nearest[0]!r}?" if nearest else "the table is empty"
        fail(argument, "one of " + ", ".join(corruptions), repr(name), remedy)
    return corruptions[name]


def in_pools(
    pools: Sequence[str], corruptions: Mapping[str, Corruption], *, argument: str = "pools"
) -> dict[str, Corruption]:
    """The corruptions of some pools, in the order of the table.

    Raises:
        ValueError: no pool is named, or one that the table does not have.
    """
    known = list(dict.fromkeys(corruption.pool for corruption in corruptions.values()))
    strange = [pool for pool in pools if pool not in known]
    if strange or not pools:
        got = repr(strange[0]) if strange else "none"
        fail(argument, f"one of {', '.join(known)}", got, "choose one of them")
    return {name: row for name, row in corruptions.items() if row.pool in pools}


def load_levels(path: str | Path) -> dict[str, Corruption]:
    """CORRUPTIONS with the levels that a YAML file gives, for images far from 224 pixels.

    The file maps a corruption's name to `levels`, a list from L1 on (of pairs for motion_blur), and
    optionally `reference_size`, which is null where pixels are the image's own. A corruption that
    the file leaves out keeps its levels.

        gaussian_blur: {levels: [1, 1.5, 2], reference_size: null}

    Raises:
        ValueError: not such a file, an unknown name or key, or levels that make no sense.
        FileNotFoundError: there is no such file.
        OSError: the file cannot be read.
    """
    import yaml

    if not Path(path).is_file():
        remedy = f"a relative path starts at {Path.cwd()}; correct it"
        fail("level table", "a YAML file", f"no file {path}", remedy, error=FileNotFoundError)
    try:
        rows = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        fail(str(path), "YAML", f"an error: {' '.join(str(error).split())}", "mend the file")
    if not isinstance(rows, dict) or not rows:
        expected, got = "a mapping from corruption to its levels", type(rows).__name__
        fail(str(path), expected, got, "write for example `jpeg: {levels: [30, 20, 10]}`")
    table = dict(CORRUPTIONS)
    for name, row in rows.items():
        known = find(name, CORRUPTIONS, argument=f"{path}: corruption")
        changes = _changes(row, where=f"{path}: {name}")
        try:
            table[name] = replace(known, **changes)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{path}: {error}") from error
    return table


def _changes(row: Any, *, where: str) -> dict[str, Any]:
    """The fields of a corruption that a row of the file replaces."""
    example = "write for example {levels: [30, 20, 10]}"
    if not isinstance(row, dict):
        fail(where, "a mapping with levels", repr(row), example)
    unknown = sorted(map(str, set(row) - {"levels", "reference_size"}))
    if unknown or "levels" not in row:
        got = f"the keys {', '.join(map(str, row))}"
        fail(where, "levels and, if need be, reference_size", got, example)
    levels, size = row["levels"], row.get("reference_size", -1)
    if not isinstance(levels, Sequence) or isinstance(levels, str):
        fail(f"{where}.levels", "a list from L1 on", repr(levels), example)
    if size is not None and (isinstance(size, bool) or not isinstance(size, int)):
        fail(f"{where}.reference_size", "a length in pixels, or null", repr(size), "give 224")
    tuples = tuple(tuple(level) if isinstance(level, list) else level for level in levels)
    return {"levels": tuples} | ({"reference_size": size} if "reference_size" in row else {})
