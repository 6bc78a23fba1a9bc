"""`RomaConfig`: every option of the loss in one frozen dataclass."""

import ast
import functools
import math
import numbers
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from roma_kernels.errors import fail

Aggregation = Literal["grpo", "dapo", "dr_grpo"]
PenaltyRatio = Literal["view/clean", "clean/view"]
WorstOver = Literal["sequence", "token", "batch", "mean"]
PenaltyOver = Literal["all", "correct"]
AuxOld = Literal["clean", "view"]
_CHOICES = {
    "penalty_ratio": get_args(PenaltyRatio),
    "worst_over": get_args(WorstOver),
    "penalty_over": get_args(PenaltyOver),
    "main": ("grpo", None),
    "aggregation": get_args(Aggregation),
    "aux_old": get_args(AuxOld),
}
_NUMBERS = {  # name -> (lower end, whether the end itself is allowed, whether None is)
    "lambda_inv": (0.0, True, False),
    "lambda_aux": (0.0, True, False),
    "clip_low": (0.0, True, False),
    "clip_high": (0.0, True, False),
    "dual_clip": (1.0, False, True),
    "ref_coef": (0.0, True, False),
    "log_ratio_clamp": (0.0, False, False),
    "temperature": (0.0, False, False),
    "softcap": (0.0, False, True),
    "max_length": (1.0, True, True),
}
_TENSORS = ("lambda_inv", "lambda_aux")  # may be 0-dim tensors


@dataclass(frozen=True)
class RomaConfig:
    """Options of `roma_loss`, in the terms of docs/MATH.md.

    Where the paper is silent the defaults are the package's own.

    Attributes:
        lambda_inv: Weight of the invariance penalty, ≥ 0; a number or a 0-dim tensor. Its scale
            depends on how many tokens depend on the image.
        lambda_aux: Weight of the auxiliary clipped loss on the sampled view, ≥ 0; a number or a
            0-dim tensor. Without aux_view there is no such loss.
        penalty_ratio: Direction of r in r − 1 − log r. "view/clean": expectation KL(clean ‖ view),
            bounded slope. "clean/view": literal GRPO.
        worst_over: What shares one worst view: each "sequence", each "token", the whole "batch" (of
            this call); "mean": no maximum.
        penalty_over: Denominator of the penalty: "all" sequences (total_sequences) or the "correct"
            ones (total_correct, at least 1).
        main: The clean objective; None for a trainer that adds its own, on `RomaLoss.logp`.
        aggregation: Mean over tokens within a sequence, then over sequences ("grpo"); over all
            tokens ("dapo"); by max_length ("dr_grpo").
        clip_low: ε_low, at most 1: the ratio is clipped below at 1 − ε_low.
        clip_high: ε_high: the ratio is clipped above at 1 + ε_high.
        dual_clip: c > 1: where A < 0 the loss of a token is at most −c·A; None for none.
        ref_coef: β ≥ 0: weight of the k3 estimate of KL(policy ‖ reference) in the clean objective.
        aux_old: Denominator of the auxiliary ratio: the old policy on the "clean" image or on the
            "view" (needs view_old_logp).
        log_ratio_clamp: Every log-ratio is clamped to ± this many nats, with no gradient beyond.
        temperature: τ of the logits, > 0. (One per row: `linear_logprob`, then
            `roma_loss_from_logp`.)
        softcap: s of the logits' soft cap, > 0, or None.
        max_length: L_max of "dr_grpo", tokens.

    Raises:
        ValueError: a value is outside its range or no known choice; the message names the option.

    Example:
        >>> RomaConfig(lambda_inv=3.0, worst_over="token").aggregation
        'grpo'
    """

    lambda_inv: float | Tensor = 1.0
    lambda_aux: float | Tensor = 0.5
    penalty_ratio: PenaltyRatio = "view/clean"
    worst_over: WorstOver = "sequence"
    penalty_over: PenaltyOver = "all"
    main: Literal["grpo"] | None = "grpo"
    aggregation: Aggregation = "grpo"
    clip_low: float = 0.2
    clip_high: float = 0.3
    dual_clip: float | None = 3.0
    ref_coef: float = 0.0
    aux_old: AuxOld = "clean"
    log_ratio_clamp: float = 20.0
    temperature: float = 1.0
    softcap: float | None = None
    max_length: int | None = None

    def __post_init__(self) -> None:
        """Checks every value; numbers and strings of other kinds (numpy's) become Python's."""
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                expected = "one of " + ", ".join([repr(choice) for choice in choices])
                fail(f"RomaConfig.{name}", expected, repr(value), "choose one of them")
            object.__setattr__(self, name, choices[choices.index(value)])
        for name in _NUMBERS:
            value = getattr(self, name)
            if not (name in _TENSORS and isinstance(value, Tensor)):
                object.__setattr__(self, name, _checked_number(name, value))
            elif value.ndim or not value.is_floating_point():
                expected, got = "a number or a 0-dim float tensor", f"{value.dtype} {value.shape}"
                fail(f"RomaConfig.{name}", expected, got, "index or convert it")
        if self.clip_low > 1:
            remedy = "ratios cannot fall below 0"
            fail("RomaConfig.clip_low", "a number ≤ 1", repr(self.clip_low), remedy)
        if self.aggregation == "dr_grpo" and self.max_length is None:
            expected, remedy = "the completion budget in tokens", "dr_grpo divides by it"
            fail("RomaConfig.max_length", expected, "None", remedy)
        if self.main is None and self.ref_coef > 0:
            expected = "0, because main is None: the KL to a reference is a part of main"
            remedy = "add the KL to your own objective, or keep main='grpo'"
            fail("RomaConfig.ref_coef", expected, repr(self.ref_coef), remedy)

    @property
    def penalises(self) -> bool:
        """Whether λ_inv can be positive; a tensor's value is not looked at."""
        return isinstance(self.lambda_inv, Tensor) or self.lambda_inv > 0

    def encoded(self) -> str:
        """All options but the two lambdas, which are tensor arguments of the operators."""
        pairs = [f"{name!r}: {getattr(self, name)!r}" for name in _ENCODED]
        return "{" + ", ".join(pairs) + "}"


_ENCODED = tuple(name for name in RomaConfig.__dataclass_fields__ if name not in _TENSORS)


@functools.lru_cache
def decoded(options: str) -> RomaConfig:
    """The options that `RomaConfig.encoded` wrote; the lambdas are the defaults, not looked at."""
    return RomaConfig(**ast.literal_eval(options))


def _checked_number(name: str, value: object) -> float | int | None:
    low, inclusive, optional = _NUMBERS[name]
    if value is None and optional:
        return None
    whole = name == "max_length"
    kinds = numbers.Integral if whole else numbers.Real
    if isinstance(value, (int, float, kinds)) and not isinstance(value, bool):
        number = int(value) if isinstance(value, (int, numbers.Integral)) else float(value)
        good = number > low or (inclusive and number == low)
        if good and number < math.inf and not (whole and isinstance(number, float)):
            return number
    kind = "a whole number" if whole else "a finite number"
    expected = f"{kind} {'≥' if inclusive else '>'} {low:g}" + (" or None" if optional else "")
    fail(f"RomaConfig.{name}", expected, repr(value), "correct the option")
