"""`RomaOptions`: what a user of a foreign trainer sets, under the same names in each of them."""

import functools
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from roma import RomaConfig
from roma.views import CORRUPTIONS, Corruption, load_levels, sample
from roma_kernels.errors import fail

VARIABLE = "ROMA_OPTIONS"


@dataclass(frozen=True)
class RomaOptions:
    """K degraded views and the two terms of the loss that look at them (docs/MATH.md section 2).

    Attributes:
        num_views: K, views of each prompt's images; 0 switches ROMA off.
        view_pool: the corruptions that they are drawn from: "seen", "unseen" or "extra"; None:
            views are a function's of the user, and any number of them (TRL's view_fn).
        view_max_level: the strongest level drawn.
        view_strength: "uniform" levels in (0, view_max_level], or "strong", most of them high.
        view_level_table: a YAML file with another table of levels (docs/VIEWS.md), or None.
        view_seed: of the draws; they depend on it, the step and the clean images alone.
        view_device: where DALI makes the views: "cpu" or "cuda".
        lambda_inv: weight of the penalty on the worst view of right rollouts.
        lambda_aux: weight of the clipped loss on one sampled view of each rollout.
        penalty_ratio: as in `RomaConfig`, and so are the following two.
        worst_over: what shares one worst view.
        penalty_over: denominator of the penalty.
        accuracy_threshold: a rollout is right if its accuracy reward is above this.
        clip_low: ε_low of the auxiliary loss; None: the trainer's own, else 0.2.
        clip_high: ε_high of the auxiliary loss; None: the trainer's own, else 0.3.
        dual_clip: c of the auxiliary loss; None: the trainer's own, else 3.

    Raises:
        ValueError: a value is outside its range or no known choice; more views than the pool has
            corruptions. FileNotFoundError: there is no such table.
    """

    num_views: int = 2
    view_pool: str | None = "seen"
    view_max_level: float = 2.0
    view_strength: Literal["uniform", "strong"] = "uniform"
    view_level_table: str | None = None
    view_seed: int = 0
    view_device: Literal["cpu", "cuda"] = "cpu"
    lambda_inv: float = 1.0
    lambda_aux: float = 0.5
    penalty_ratio: Literal["view/clean", "clean/view"] = "view/clean"
    worst_over: Literal["sequence", "token", "batch", "mean"] = "sequence"
    penalty_over: Literal["all", "correct"] = "all"
    accuracy_threshold: float = 0.5
    clip_low: float | None = None
    clip_high: float | None = None
    dual_clip: float | None = None

    def __post_init__(self) -> None:
        """Checks every value, by drawing once and by building the loss's own options."""
        whole = isinstance(self.num_views, int) and not isinstance(self.num_views, bool)
        if not whole or self.num_views < 0:
            expected, remedy = "a whole number, 0 or more", "0 switches ROMA off"
            fail("num_views", expected, repr(self.num_views), remedy)
        if self.view_device not in ("cpu", "cuda"):
            fail("view_device", "'cpu' or 'cuda'", repr(self.view_device), "choose one of them")
        if not math.isfinite(self.accuracy_threshold):
            got, remedy = repr(self.accuracy_threshold), "correct the option"
            fail("accuracy_threshold", "a finite number", got, remedy)
        self.loss_config()
        if self.num_views and self.view_pool is not None:
            self._check_views()

    def _check_views(self) -> None:
        size = sum(c.pool == self.view_pool for c in self.corruptions.values())
        if 0 < size < self.num_views:
            expected = f"at most {size}, the corruptions of view_pool {self.view_pool!r}"
            remedy = "the views of a prompt are distinct; with a view_fn set view_pool to None"
            fail("num_views", expected, str(self.num_views), remedy)
        try:
            self.draw("a check")
        except ValueError as error:  # of pool, max_level or strength, as `sample` calls them
            raise ValueError(f"view_{error}") from error

    @property
    def active(self) -> bool:
        """Whether there is anything to do; if not, a trainer runs its own code alone."""
        return self.num_views > 0 and (self.lambda_inv > 0 or self.lambda_aux > 0)

    @functools.cached_property
    def corruptions(self) -> Mapping[str, Corruption]:
        """The table of levels; a file is read once, when the options are checked."""
        if self.view_level_table is None:
            return CORRUPTIONS
        path = Path(self.view_level_table)
        if not path.is_file():
            got, remedy = f"{str(path)!r}, and no file there", "correct the path"
            fail("view_level_table", "a YAML file", got, remedy, error=FileNotFoundError)
        return load_levels(path)

    def draw(self, *key: int | str) -> list[Any]:
        """K `ViewSpec`s of distinct corruptions, a function of view_seed and the key alone."""
        if self.view_pool is None:
            expected, remedy = "'seen', 'unseen' or 'extra'", "None is for a view_fn"
            fail("view_pool", expected, "None", remedy)
        return sample(
            self.view_pool,
            self.num_views,
            (self.view_seed, *key),
            corruptions=self.corruptions,
            max_level=self.view_max_level,
            strength=self.view_strength,
        )

    def loss_config(
        self,
        *,
        aggregation: Literal["grpo", "dapo", "dr_grpo"] = "grpo",
        max_length: int | None = None,
        clip_low: float = 0.2,
        clip_high: float = 0.3,
        dual_clip: float | None = 3.0,
    ) -> RomaConfig:
        """The loss's options without a clean objective, which stays the trainer's.

        Args:
            aggregation: the trainer's, for the auxiliary loss.
            max_length: L_max of "dr_grpo".
            clip_low: the trainer's ε_low, if these options name none; and so on.
            clip_high: ε_high.
            dual_clip: c, or None for none.
        """
        given: dict[str, Any] = dict(
            main=None,
            lambda_inv=self.lambda_inv,
            lambda_aux=self.lambda_aux,
            penalty_ratio=self.penalty_ratio,
            worst_over=self.worst_over,
            penalty_over=self.penalty_over,
            aggregation=aggregation,
            max_length=max_length,
            clip_low=clip_low if self.clip_low is None else self.clip_low,
            clip_high=clip_high if self.clip_high is None else self.clip_high,
            dual_clip=dual_clip if self.dual_clip is None else self.dual_clip,
        )
        try:
            return RomaConfig(**given)
        except ValueError as error:  # told by the names that the user has given
            raise ValueError(str(error).removeprefix("RomaConfig.")) from error

    @classmethod
    def parse(cls, text: str) -> "RomaOptions":
        """Options from "name=value,name=value", or from the YAML file whose path is given.

        Raises:
            ValueError: an unknown name, or a value that does not fit; FileNotFoundError: no file.

        Example:
            >>> RomaOptions.parse("num_views=4, lambda_inv=3").lambda_inv
            3.0
        """
        file = text.strip().endswith((".yaml", ".yml"))
        if file and ("=" not in text or Path(text.strip()).is_file()):
            given = _read(Path(text.strip()))
        else:
            pairs = [part.split("=", 1) for part in text.split(",") if part.strip()]
            for pair in pairs:
                if len(pair) != 2:
                    remedy = "write num_views=2,lambda_inv=1, or the path of a .yaml file"
                    fail(VARIABLE, "name=value pairs", repr(pair[0]), remedy)
            given = {name.strip(): value.strip() for name, value in pairs}
        names = [field.name for field in fields(cls)]
        for name in given:
            if name not in names:
                fail(VARIABLE, "one of " + ", ".join(names), repr(name), "correct the name")
        return replace(cls(), **{name: _typed(name, value) for name, value in given.items()})

    @classmethod
    def from_env(cls) -> "RomaOptions":
        """Options from the environment variable ROMA_OPTIONS; the defaults if it is not set."""
        return cls.parse(os.environ.get(VARIABLE, ""))


_TYPES = {field.name: field.type for field in fields(RomaOptions)}


def _typed(name: str, value: Any) -> Any:
    """A value as its field's type, from text or YAML."""
    kind: Any = _TYPES[name]
    kinds = get_args(kind) or (kind,)
    if type(None) in kinds and (value is None or str(value).lower() in ("none", "null", "")):
        return None
    what = {int: "a whole number", float: "a number"}.get(kinds[0])
    if what is None:  # text: its choices are checked with the options
        if not isinstance(value, str):
            fail(f"{VARIABLE}, {name}", "text", repr(value), "correct the value")
        return value
    made: float | None = None
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        try:
            made = kinds[0](value)
        except (ValueError, OverflowError):
            made = None
    if made is None or (kinds[0] is int and not isinstance(value, str) and made != value):
        fail(f"{VARIABLE}, {name}", what, repr(value), "correct the value")
    return made


def _read(path: Path) -> dict[str, Any]:
    import yaml

    if not path.is_file():
        got, remedy = f"{str(path)!r}, and no file there", "correct the path"
        fail(VARIABLE, "a YAML file", got, remedy, error=FileNotFoundError)
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        got = "an error: " + " ".join(str(error).split())
        fail(f"{VARIABLE}, {path}", "YAML", got, "mend the file")
    if not isinstance(read, dict):
        fail(f"{VARIABLE}, {path}", "a mapping", type(read).__name__, "write `num_views: 2`")
    return {str(name): value for name, value in read.items()}
