"""`RomaConfig`: every option of the loss in one frozen dataclass."""

import ast
import functools
import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from roma_kernels.errors import fail

Main = Literal["grpo", "cispo", "sapo", "vespo"]
RatioLevel = Literal["token", "sequence"]
Aggregation = Literal["grpo", "bnpo", "dapo", "dr_grpo", "luspo"]
PenaltyRatio = Literal["view/clean", "clean/view"]
WorstOver = Literal["sequence", "token", "batch", "mean"]
PenaltyOver = Literal["all", "correct"]
AuxOld = Literal["clean", "view"]
_CHOICES = {
    "penalty_ratio": get_args(PenaltyRatio),
    "worst_over": get_args(WorstOver),
    "penalty_over": get_args(PenaltyOver),
    "main": (*get_args(Main), None),
    "ratio_level": get_args(RatioLevel),
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
    "entropy_coef": (0.0, True, False),
    "gate_bound": (0.0, True, True),
    "gate_tau": (0.0, False, True),
}
_TUPLES = {"sapo_temperature": ("κ₊", "κ₋"), "vespo": ("k₊", "λ₊", "k₋", "λ₋")}
_TENSORS = ("lambda_inv", "lambda_aux", "gate_bound")  # may be 0-dim tensors

LOG_WEIGHTS = (math.log(1e-8), 20.0)
"""vespo's log-weights, a token's of the sampler and a sequence's, are clamped to these."""
_LARGEST_PHI = 80.0  # of log φ: e^80 and its products with an advantage and a log-prob are fp32


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
        main: The clean objective, and the form of the auxiliary loss: "grpo", clipped; "cispo",
            log-prob times capped ratio, a constant; "sapo", a sigmoid of the ratio; "vespo",
            log-prob times a gamma weight of the sequence's ratio, a constant. None for a trainer
            that adds its own, on `RomaLoss.logp`; the auxiliary loss is then grpo's.
        ratio_level: Ratio of each "token", or one of the "sequence" (GSPO): that of the mean
            log-ratio over its counted tokens, for all of them. vespo has a sequence's already.
        aggregation: Mean over tokens within a sequence, then over sequences ("grpo"); over all
            tokens ("dapo"); over this call's tokens, times its share of the sequences ("bnpo"); by
            max_length ("dr_grpo"); sum over tokens, then mean over sequences ("luspo").
        clip_low: ε_low, at most 1: the ratio is clipped below at 1 − ε_low. "grpo" alone.
        clip_high: ε_high: the ratio is clipped above at 1 + ε_high. With "cispo" it is the largest
            ratio itself, at least 1 (ScaleRL's: 5.0).
        dual_clip: c > 1: where A < 0 the loss of a token is at most −c·A; None for none. "grpo"
            alone. TRL's `delta` is the same from 1 + ε_high up.
        ref_coef: β ≥ 0: weight of the k3 estimate of KL(policy ‖ reference) in the clean objective.
        ref_unbiased: Multiply that estimate by the ratio, with a gradient through both (TRL's
            `use_bias_correction_kl`).
        entropy_coef: η ≥ 0: weight of the mean entropy over counted tokens, a bonus.
        sapo_temperature: (κ₊, κ₋), > 0, for A > 0 and for all others.
        vespo: (k₊, λ₊, k₋, λ₋), > 0, for A ≥ 0 and for A < 0: log φ = λ + k·log w − λ·w.
        aux_old: Denominator of the auxiliary ratio: the old policy on the "clean" image or on the
            "view" (needs view_old_logp).
        log_ratio_clamp: Every log-ratio is clamped to ± this many nats, with no gradient beyond.
        temperature: τ of the logits, > 0. (One per row: `linear_logprob`, then
            `roma_loss_from_logp`.)
        softcap: s of the logits' soft cap, > 0, or None.
        max_length: L_max of "dr_grpo", tokens.
        gate_bound: Nats ≥ 0, a number or a 0-dim tensor (which may be ∞): a view whose divergence
            from the clean image is larger has no part in the maximum, so that one on which the
            answer cannot be read teaches nothing. None: every view has. For worst_over "sequence".
        gate_tau: τ > 0, nats: the penalty of sequence i is weighed by exp(−D_i/τ), a constant, of
            its worst view. None: by 1. For worst_over "sequence".

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
    main: Main | None = "grpo"
    ratio_level: RatioLevel = "token"
    aggregation: Aggregation = "grpo"
    clip_low: float = 0.2
    clip_high: float = 0.3
    dual_clip: float | None = 3.0
    ref_coef: float = 0.0
    ref_unbiased: bool = False
    entropy_coef: float = 0.0
    sapo_temperature: tuple[float, float] = (1.0, 1.05)
    vespo: tuple[float, float, float, float] = (2.0, 3.0, 3.0, 2.0)
    aux_old: AuxOld = "clean"
    log_ratio_clamp: float = 20.0
    temperature: float = 1.0
    softcap: float | None = None
    max_length: int | None = None
    gate_bound: float | Tensor | None = None
    gate_tau: float | None = None

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
        for name in _TUPLES:
            object.__setattr__(self, name, _checked_tuple(name, getattr(self, name)))
        if not isinstance(self.ref_unbiased, bool):
            fail("RomaConfig.ref_unbiased", "a bool", repr(self.ref_unbiased), "correct the option")
        self._check_clips()
        self._check_parts_of_main()
        for name in ("gate_bound", "gate_tau"):
            if getattr(self, name) is not None and self.worst_over != "sequence":
                expected = (
                    f"None, because worst_over = {self.worst_over!r} has no view of a sequence"
                )
                remedy = 'leave it out, or worst_over="sequence"'
                fail(f"RomaConfig.{name}", expected, repr(getattr(self, name)), remedy)

    def _check_clips(self) -> None:
        if self.clip_low > 1:
            remedy = "ratios cannot fall below 0"
            fail("RomaConfig.clip_low", "a number ≤ 1", repr(self.clip_low), remedy)
        if self.main == "cispo" and self.clip_high < 1:
            expected = "a number ≥ 1, because with main='cispo' it is the largest ratio itself"
            fail(
                "RomaConfig.clip_high", expected, repr(self.clip_high), "give 5.0, as ScaleRL does"
            )
        if self.main == "vespo" and self.ratio_level == "sequence":
            expected = "'token', because vespo's weight is the ratio of a sequence already"
            fail("RomaConfig.ratio_level", expected, "'sequence'", "leave it out")
        for k, rate in (self.vespo[:2], self.vespo[2:]):
            log_w = min(math.log(k / rate), LOG_WEIGHTS[1])
            if not (highest := rate + k * log_w - rate * math.exp(log_w)) <= _LARGEST_PHI:
                expected = f"k and λ whose φ(w) is at most e^{_LARGEST_PHI:g} for every w"
                remedy = "take a larger λ or a smaller k"
                fail("RomaConfig.vespo", expected, f"e^{highest:.3g} of {self.vespo}", remedy)

    def _check_parts_of_main(self) -> None:
        if self.aggregation == "dr_grpo" and self.max_length is None:
            expected, remedy = "the completion budget in tokens", "dr_grpo divides by it"
            fail("RomaConfig.max_length", expected, "None", remedy)
        if self.main is None and self.ref_coef > 0:
            expected = "0, because main is None: the KL to a reference is a part of main"
            remedy = "add the KL to your own objective, or keep main='grpo'"
            fail("RomaConfig.ref_coef", expected, repr(self.ref_coef), remedy)
        if self.main is None and self.entropy_coef > 0:
            expected = "0, because main is None: the entropy bonus is a part of main"
            remedy = "add the bonus to your own objective, or keep main='grpo'"
            fail("RomaConfig.entropy_coef", expected, repr(self.entropy_coef), remedy)
        if self.ref_unbiased and self.ref_coef == 0:
            expected = "False, because ref_coef = 0: there is no KL to correct"
            fail("RomaConfig.ref_unbiased", expected, "True", "set ref_coef, or leave it out")

    @property
    def penalises(self) -> bool:
        """Whether λ_inv can be positive; a tensor's value is not looked at."""
        return isinstance(self.lambda_inv, Tensor) or self.lambda_inv > 0

    @property
    def gates(self) -> bool:
        """Whether a divergence can keep a view, or a part of the penalty, out of the loss."""
        return self.gate_bound is not None or self.gate_tau is not None

    @property
    def objective(self) -> Main:
        """The per-token form of the main and the auxiliary loss."""
        return self.main or "grpo"

    @property
    def local(self) -> bool:
        """Whether a token's coefficients, without the penalty, depend on that token alone."""
        return self.ratio_level == "token" and self.main != "vespo" and self.entropy_coef == 0

    def encoded(self) -> str:
        """All options but those that may be tensors, which are arguments of the operators."""
        pairs = [f"{name!r}: {getattr(self, name)!r}" for name in _ENCODED]
        return "{" + ", ".join(pairs) + "}"


_ENCODED = tuple(name for name in RomaConfig.__dataclass_fields__ if name not in _TENSORS)


@functools.lru_cache
def decoded(options: str) -> RomaConfig:
    """The options that `RomaConfig.encoded` wrote; of the others the defaults, not looked at."""
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


def _checked_tuple(name: str, value: object) -> tuple[float, ...]:
    letters = _TUPLES[name]
    given = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else ()
    real = [isinstance(x, (int, float, numbers.Real)) and not isinstance(x, bool) for x in given]
    if len(given) == len(letters) and all(real) and all(0 < x < math.inf for x in given):
        return tuple(float(x) for x in given)
    expected = f"{len(letters)} finite numbers > 0: {', '.join(letters)}"
    fail(f"RomaConfig.{name}", expected, repr(value), "correct the option")
