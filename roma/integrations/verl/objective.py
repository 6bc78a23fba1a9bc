"""How verl averages and clips, for the terms on views: read from the loss that it hands its engine.

verl's losses of micro-batches are added, and its gradients averaged over data-parallel ranks. Each
micro-batch's loss is therefore divided by the counts of all ranks and multiplied by their number.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from roma import RomaConfig
from roma.integrations.options import RomaOptions
from roma_kernels.errors import fail

_AGGREGATIONS = {
    "token-mean": "dapo",
    "token-sum": "dapo",
    "seq-mean-token-mean": "grpo",
    "seq-mean-token-sum": "dr_grpo",
    "seq-mean-token-sum-norm": "dr_grpo",
}


@dataclass(frozen=True)
class Objective:
    """The options that the terms on views share with verl's actor.

    Attributes:
        options: the user's.
        mode: verl's `loss_agg_mode`.
        scale: its `loss_scale_factor`, or None.
        clip_low: its ε_low, and so on.
        clip_high: ε_high.
        dual_clip: c.
    """

    options: RomaOptions
    mode: str
    scale: float | None
    clip_low: float
    clip_high: float
    dual_clip: float

    @classmethod
    def of(cls, loss_function: Callable[..., Any], options: RomaOptions) -> "Objective":
        """From the loss function of verl's actor, functools.partial(ppo_loss, config=…).

        Raises:
            ValueError: another loss, of which neither clip range nor average is known, or one that
                distils.
        """
        known = loss_function.keywords if isinstance(loss_function, functools.partial) else {}
        actor = known.get("config")
        expected = "verl's own: functools.partial(ppo_loss, config=the actor's config)"
        if "distillation_config" in known:
            remedy = "switch distillation off, or set num_views=0"
            fail("loss function", expected, "one that distils a teacher", remedy)
        mode = getattr(actor, "loss_agg_mode", None)
        if mode not in _AGGREGATIONS:
            got = f"{loss_function!r:.120}" if mode is None else f"loss_agg_mode={mode!r}"
            remedy = "give the partial a config with loss_agg_mode, clip_ratio_low and _high"
            fail("loss function", expected, got, remedy)
        assert actor is not None  # it has a mode
        low, high = actor.clip_ratio_low, actor.clip_ratio_high
        return cls(
            options,
            mode,
            actor.loss_scale_factor,
            actor.clip_ratio if low is None else low,
            actor.clip_ratio if high is None else high,
            actor.clip_ratio_c,
        )

    def config(self, width: int, tokens: float) -> RomaConfig:
        """The loss's options for a micro-batch.

        Args:
            width: T, to which its completions are padded; verl's "norm" divides by it.
            tokens: that count in the whole step.
        """
        aggregation = _AGGREGATIONS[self.mode]
        length: int | None = None
        if aggregation == "dr_grpo":
            length = 1
            if self.mode == "seq-mean-token-sum-norm":
                length = int(width if self.scale is None else self.scale)
        made = self.options.loss_config(
            aggregation=aggregation,  # type: ignore[arg-type]  # one of the three
            max_length=length,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            dual_clip=self.dual_clip,
        )
        if self.mode == "token-sum":
            # A sum is the mean times the count.
            made = replace(made, lambda_aux=self.options.lambda_aux * tokens)
        return made
