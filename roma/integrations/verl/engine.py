"""`RomaEngine`: verl's FSDP engine with one forward of clean and view rows, and two terms more.

In a training step each micro-batch of B rows gets a row more for every (view, rollout) that has a
gradient or takes part in a maximum: the same tokens, degraded pixels. verl's own forward_step runs
them in one call, so that clean and view rows are scored side by side and every rank runs as many
forwards as without ROMA. Its loss sees the clean rows alone. The terms on views (docs/MATH.md
section 2) are added to what it returns.

Without views, in a pass without a gradient, and in other roles than the actor's, verl's code runs
and nothing else.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from verl.utils.device import get_device_id
from verl.utils.metric import AggregationType, Metric
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp import FSDPEngineWithLMHead
from verl.workers.utils.padding import no_padding_2_padding

from roma.integrations.guard import check_parameters, check_version
from roma.integrations.options import RomaOptions
from roma.integrations.terms import (
    Totals,
    by_corruption,
    corruption_metrics,
    metrics_of,
    pairs_of,
    view_terms,
)
from roma.integrations.verl import VENDOR
from roma.integrations.verl.micro_batch import Rows, narrow, read_rows, right_of, widen
from roma.integrations.verl.objective import Objective
from roma.integrations.views import Pair, ViewMaker
from roma_kernels.errors import fail

BACKENDS = ("fsdp", "fsdp2")


class RomaEngine(FSDPEngineWithLMHead):
    """verl's engine for language models, with ROMA; the options are in ROMA_OPTIONS.

    Raises:
        ValueError: the options do not fit; the model has no image processor, or one whose pixels
            cannot be turned back into images; the loss is not verl's ppo_loss; a rollout has no
            accuracy.
    """

    def __init__(self, *args: Any, **named: Any) -> None:
        """As verl's; options that do not fit are refused before a model is loaded."""
        options = RomaOptions.from_env()
        super().__init__(*args, **named)
        self._prepare(options)

    def _prepare(self, options: RomaOptions) -> None:
        """What a training step needs, if there is one with views."""
        self._maker: ViewMaker | None = None
        if options.active and not self.engine_config.forward_only:
            processor = self.model_config.get_processor()
            images = getattr(processor, "image_processor", None)
            if images is None:
                got, remedy = type(processor).__name__, "train a model with images, or num_views=0"
                fail("processor", "one with an image_processor", got, remedy)
            self._maker = ViewMaker(options, images)
            self._names = sorted(options.corruptions)

    def forward_backward_batch(
        self, data: Any, loss_function: Callable[..., Any], forward_only: bool = False
    ) -> Any:
        """verl's, with the counts of a step before it and the metrics of corruptions after it."""
        if forward_only or self._maker is None:
            return super().forward_backward_batch(data, loss_function, forward_only)
        options = self._maker.options
        self._objective = Objective.of(loss_function, options)
        # A checkpoint has it, and all reuses of a rollout see one value.
        self._step = int(self.lr_scheduler.last_epoch)
        self._total_correct: float | None = None
        if options.penalty_over == "correct":
            right = right_of(data, options).sum()
            self._total_correct = float(self._summed(right[None].double())[0])
        self._sums: dict[str, Tensor] = {}
        output = super().forward_backward_batch(data, loss_function, forward_only)
        output["metrics"].update(self._corruptions())
        return output

    def forward_step(
        self, micro_batch: Any, loss_function: Callable[..., Any], forward_only: bool
    ) -> Any:
        """The clean rows and those of views in one call, with a loss that tells them apart."""
        if forward_only or self._maker is None:
            return super().forward_step(micro_batch, loss_function, forward_only)
        micro_batch = micro_batch.to(get_device_id())
        rows = read_rows(micro_batch, self._maker, self._step)
        pairs = pairs_of(
            rows.correct,
            rows.aux_view,
            rows.advantages * rows.mask,
            rows.images.has_views,
            self._maker.options,
        )
        pixels = self._maker.pixels(rows.images, pairs)
        wide = widen(micro_batch, rows, pairs, pixels)

        def loss(model_output: dict[str, Tensor], data: Any, dp_group: Any) -> Any:
            scored = no_padding_2_padding(model_output["log_probs"], data)
            clean = narrow(model_output, len(micro_batch))
            own, metrics = loss_function(model_output=clean, data=micro_batch, dp_group=dp_group)
            terms, ours = self._terms(micro_batch, rows, pairs, scored)
            model_output.clear()
            model_output.update(clean)  # what verl returns is of the clean rows, too
            return own + terms, {**metrics, **ours}

        return super().forward_step(wide, loss, forward_only)

    def _terms(
        self, micro_batch: Any, rows: Rows, pairs: list[Pair], scored: Tensor
    ) -> tuple[Tensor, dict[str, Metric]]:
        """The terms on views, scaled as verl scales its own loss, and their metrics.

        Args:
            micro_batch: B rows.
            rows: what was read from them.
            pairs: R pairs.
            scored: [B + R, T] nats, of clean rows and pairs.
        """
        assert self._maker is not None  # forward_step asked
        count, ranks = len(micro_batch), micro_batch["dp_size"]
        tokens = micro_batch["batch_num_tokens"]
        config = self._objective.config(scored.shape[1], tokens)
        out = view_terms(
            scored[:count],
            scored[count:],
            pairs,
            mask=rows.mask,
            advantages=rows.advantages,
            correct=rows.correct,
            aux_view=rows.aux_view,
            has_views=rows.images.has_views,
            totals=Totals(micro_batch["global_batch_size"], tokens, self._total_correct),
            config=config,
            num_views=self._maker.options.num_views,
            old_logp=rows.old_logp,
            weight=rows.weight,
        )
        seen = rows.correct & rows.images.has_views
        names = [rows.images.corruption(pair) for pair in pairs]
        for name, sums in by_corruption(out, rows.mask, seen, pairs, names, config).items():
            self._sums[name] = self._sums.get(name, 0) + sums
        # Added over micro-batches and averaged over ranks, as its own loss is.
        metrics = Metric.from_dict(metrics_of(out, ranks), AggregationType.SUM)
        return out.loss * ranks, metrics

    def _corruptions(self) -> dict[str, Metric]:
        """The metrics of corruptions, over the step's micro-batches and all ranks."""
        none = torch.zeros(3, dtype=torch.float64)
        every = self._summed(torch.stack([self._sums.get(name, none) for name in self._names]))
        found = corruption_metrics(dict(zip(self._names, every.unbind(), strict=True)))
        return dict(Metric.from_dict(found, AggregationType.MEAN))

    def _summed(self, values: Tensor) -> Tensor:
        """Over data-parallel ranks; every rank calls it as often."""
        values = values.to(get_device_id())
        dist.all_reduce(values, group=self.get_data_parallel_group())
        return values.cpu()


def register() -> None:
    """Makes verl take `RomaEngine` for language models where VERL_ENGINE_VENDOR is roma.

    A back end for which there is no such engine gets one that refuses to be built: verl would fall
    back to its own, and train without ROMA.

    Raises:
        ValueError: verl's version or signatures are not those that the engine was written for.
    """
    check_version("verl", "0.9", "0.9")
    base = FSDPEngineWithLMHead
    step = ["micro_batch", "loss_function", "forward_only"]
    check_parameters(base.forward_step, step, "verl's FSDPEngineWithLMHead.forward_step")
    batch = ["data", "loss_function", "forward_only"]
    check_parameters(base.forward_backward_batch, batch, "verl's forward_backward_batch")
    check_parameters(no_padding_2_padding, ["tensor", "data"], "verl's no_padding_2_padding")
    known = EngineRegistry._engines["language_model"]
    if ("cuda", VENDOR) in known[BACKENDS[0]]:
        return  # by the other of the two ways in
    others = [backend for backend in known if backend not in BACKENDS]
    add = EngineRegistry.register
    add(model_type="language_model", backend=list(BACKENDS), device="cuda", vendor=VENDOR)(
        RomaEngine
    )
    if others:
        add(model_type="language_model", backend=others, device="cuda", vendor=VENDOR)(NoEngine)


class NoEngine(FSDPEngineWithLMHead):
    """Stands where there is no engine with ROMA: building it fails.

    Raises:
        ValueError: always.
    """

    def __init__(self, *args: Any, **named: Any) -> None:
        """Says what to set."""
        config = named.get("engine_config")
        got = getattr(config, "strategy", None) or type(config).__name__
        remedy = "set actor_rollout_ref.actor.strategy=fsdp2, or unset VERL_ENGINE_VENDOR"
        fail("strategy", "fsdp or fsdp2, for which roma has an engine", str(got), remedy)
