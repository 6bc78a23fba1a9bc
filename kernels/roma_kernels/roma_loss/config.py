"""`RomaConfig`: every option of the loss in one frozen dataclass."""

import json
from dataclasses import asdict, dataclass, fields
from typing import ClassVar, Literal, get_args

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
_NUMBERS = {  # name -> (smallest, whether the smallest itself is allowed, whether None is)
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


@dataclass(frozen=True)
class RomaConfig:
    """Options of `roma_loss`, in the terms of docs/MATH.md.

    Where the paper is silent the defaults are the package's own.

    Raises:
        ValueError: a value is outside its range or no known choice; the message names the option.

    Example:
        >>> RomaConfig(lambda_inv=3.0, worst_over="token").aggregation
        'grpo'
    """

    lambda_inv: float = 1.0
    """Weight of the invariance penalty, ≥ 0. Scale depends on how many tokens depend on the
    image."""
    lambda_aux: float = 0.5
    """Weight of the auxiliary clipped loss on the sampled view, ≥ 0."""
    penalty_ratio: PenaltyRatio = "view/clean"
    """Direction of r in r − 1 − log r. "view/clean": expectation KL(clean ‖ view), bounded slope.
    "clean/view": literal GRPO."""
    worst_over: WorstOver = "sequence"
    """What shares one worst view: each "sequence", each "token", the whole "batch" (of this call);
    "mean": no maximum."""
    penalty_over: PenaltyOver = "all"
    """Denominator of the penalty: "all" sequences (total_sequences) or the "correct" ones
    (total_correct, at least 1)."""
    main: Literal["grpo"] | None = "grpo"
    """The clean objective; None for a trainer that adds its own."""
    aggregation: Aggregation = "grpo"
    """Mean over tokens within a sequence, then over sequences ("grpo"); over all tokens ("dapo");
    by max_length ("dr_grpo")."""
    clip_low: float = 0.2
    """ε_low: the ratio is clipped below at 1 − ε_low; at most 1."""
    clip_high: float = 0.3
    """ε_high: the ratio is clipped above at 1 + ε_high."""
    dual_clip: float | None = 3.0
    """c > 1: for negative advantages the loss of a token is at most −c·A; None for none."""
    ref_coef: float = 0.0
    """β: weight of the k3 estimate of KL(policy ‖ reference) in the clean objective, ≥ 0."""
    aux_old: AuxOld = "clean"
    """Denominator of the auxiliary ratio: the old policy on the "clean" image or on the "view"
    (needs view_old_logp)."""
    log_ratio_clamp: float = 20.0
    """Every log-ratio is clamped to ± this many nats, with no gradient beyond."""
    temperature: float = 1.0
    """τ of the logits, > 0."""
    softcap: float | None = None
    """s of the logits' soft cap, > 0, or None."""
    max_length: int | None = None
    """L_max of "dr_grpo", tokens."""
    line: ClassVar[str]

    def __post_init__(self) -> None:
        """Checks every value, and writes them down as one line of JSON for `roma::view_loss`."""
        # Here, not at every call, which torch.compile would have to trace.
        object.__setattr__(self, "line", json.dumps(asdict(self)))
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in _CHOICES:
                choices = _CHOICES[field.name]
                if value not in choices:
                    expected = "one of " + ", ".join(map(repr, choices))
                    fail(f"RomaConfig.{field.name}", expected, repr(value), "choose one of them")
            else:
                self._check_number(field.name, value)
        if self.clip_low > 1:
            fail(
                "RomaConfig.clip_low",
                "a number ≤ 1",
                repr(self.clip_low),
                "ratios cannot fall below 0",
            )
        if self.aggregation == "dr_grpo" and self.max_length is None:
            fail(
                "RomaConfig.max_length",
                "the completion budget in tokens",
                "None",
                "dr_grpo divides by it",
            )

    @staticmethod
    def _check_number(name: str, value: object) -> None:
        smallest, allowed, optional = _NUMBERS[name]
        if value is None and optional:
            return
        kinds = (int,) if name == "max_length" else (int, float)
        good = isinstance(value, kinds) and not isinstance(value, bool) and value < float("inf")
        if not good or not (value >= smallest if allowed else value > smallest):  # type: ignore[operator]  # a number by then
            kind = "a whole number" if name == "max_length" else "a finite number"
            expected = f"{kind} {'≥' if allowed else '>'} {smallest:g}" + (
                " or None" if optional else ""
            )
            fail(f"RomaConfig.{name}", expected, repr(value), "correct the option")
