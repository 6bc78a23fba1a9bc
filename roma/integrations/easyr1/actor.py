"""`ViewTerms`: the views and their two terms inside EasyR1's update of a policy.

A mixin in front of its DataParallelPPOActor, whose `update_policy` stays as it is. That method runs
a micro-batch through `_forward_micro_batch` and takes the backward of its own loss on the log-probs
that come back. So the views ride along:

    in     the rows of the micro-batch and, behind them, the (view, row) pairs that have a gradient:
           one forward, one backward, on every rank
    out    the clean log-probs, whose backward also starts that of λ_aux·L_aux + λ_inv·L_inv

The trainer's loss, its scale and its metrics are not touched; without views the stock code runs.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from roma.integrations.options import RomaOptions
from roma.integrations.terms import (
    Totals,
    by_corruption,
    corruption_metrics,
    metrics_of,
    pairs_of,
    view_terms,
)
from roma.integrations.views import Pair, ViewMaker
from roma_kernels.errors import fail

CORRECT, TOTALS, STEP = "roma_correct", "roma_totals", "roma_step"
_AGGREGATION: dict[str, Any] = {"token": "dapo", "seq": "grpo"}

if TYPE_CHECKING:

    class _Actor:
        config: Any
        world_size: int

        def _forward_micro_batch(self, micro_batch: Any, temperature: float) -> Tensor: ...
        def _optimizer_step(self) -> Tensor: ...
        def update_policy(self, data: Any) -> dict[str, Any]: ...

else:
    _Actor = object


class ViewTerms(_Actor):
    """Mixin in front of EasyR1's DataParallelPPOActor.

    Attributes:
        maker: makes the views; None: the stock code runs (a reference policy, or ROMA is off).
    """

    maker: ViewMaker | None = None

    def update_policy(self, data: Any) -> dict[str, Any]:
        """EasyR1's update, with views; adds roma/… to its metrics.

        Args:
            data: a DataProto, with roma_correct [B] bool in its batch and roma_step in its meta
                information: what `driver.CorrectnessTrainer` adds.

        Raises:
            ValueError: they are missing, or rows have a video.
        """
        if self.maker is None:
            return super().update_policy(data)
        if CORRECT not in data.batch.keys() or STEP not in data.meta_info:
            remedy = "start the run by `python -m roma.integrations.easyr1`"
            fail("update_policy", f"{CORRECT} and {STEP} in the data", "neither", remedy)
        options, config = self.maker.options, self.config
        self._step = int(data.meta_info[STEP])
        self._loss_config = options.loss_config(
            aggregation=_AGGREGATION[config.loss_avg_mode],
            clip_low=config.clip_ratio_low,
            clip_high=config.clip_ratio_high,
            dual_clip=config.clip_ratio_dual,
        )
        self._sums: dict[str, float] = defaultdict(float)
        self._named: dict[str, list[float]] = defaultdict(list)
        self._corruptions: dict[str, Tensor] = {}
        metrics = super().update_policy(self._kept(data))
        metrics.update(self._named)
        metrics.update(corruption_metrics(self._over_ranks(data.batch[CORRECT].device)))
        return metrics

    def _kept(self, data: Any) -> Any:
        """The data, whose `select` keeps what is ours, with the counts of each row's mini-batch.

        The counts are over all ranks: a mini-batch is what an optimizer step averages over.
        """
        batch = data.batch.clone(recurse=False)
        size = self.config.global_batch_size_per_device
        tokens = batch["response_mask"].sum(1)
        each = torch.stack([torch.ones_like(tokens), tokens, batch[CORRECT].to(tokens.dtype)], 1)
        counts = torch.stack([part.sum(0) for part in each.double().split(size)])
        if dist.is_initialized():
            dist.all_reduce(counts)
        batch[TOTALS] = counts.repeat_interleave(size, 0)[: len(tokens)]
        kind = type(data)
        kept = kind(batch=batch, non_tensor_batch=data.non_tensor_batch, meta_info=data.meta_info)

        def select(batch_keys: Sequence[str], *rest: Any, **named: Any) -> Any:
            return kind.select(kept, [*batch_keys, CORRECT, TOTALS], *rest, **named)

        kept.select = select
        return kept

    def _forward_micro_batch(self, micro_batch: Mapping[str, Any], temperature: float) -> Tensor:
        """[B, T] nats: the clean log-probs; their backward starts that of the view terms too."""
        if self.maker is None or CORRECT not in micro_batch:
            return super()._forward_micro_batch(micro_batch, temperature=temperature)
        maker, options = self.maker, self.maker.options
        mask, correct = micro_batch["response_mask"], micro_batch[CORRECT].bool()
        own = _own_inputs(micro_batch, len(mask))
        grids = [row["image_grid_thw"] for row in own if "image_grid_thw" in row]
        pixels = [row["pixel_values"] for row in own if "pixel_values" in row]
        device = mask.device if options.view_device == "cuda" else torch.device("cpu")
        rows = maker.read(
            torch.cat(pixels).to(device) if pixels else None,
            torch.cat(grids) if grids else None,
            [_images(row) for row in own],
            step=self._step,
        )
        responses = zip(micro_batch["responses"].tolist(), mask.tolist(), strict=True)
        completions = [[t for t, on in zip(*pair, strict=True) if on] for pair in responses]
        aux_view = maker.aux_view(rows, completions)
        advantages = micro_batch["advantages"]
        pairs = pairs_of(correct, aux_view, advantages * mask, rows.has_views, options)

        joint = _with_pairs(micro_batch, own, pairs, maker.pixels(rows, pairs))
        logp = super()._forward_micro_batch(joint, temperature=temperature)
        clean, pair_logp = logp[: len(mask)], logp[len(mask) :]
        counts = micro_batch[TOTALS][0]
        out = view_terms(
            clean,
            pair_logp,
            pairs,
            mask=mask,
            advantages=advantages,
            correct=correct,
            aux_view=aux_view,
            has_views=rows.has_views,
            totals=Totals(*counts.tolist()),
            config=self._loss_config,
            num_views=options.num_views,
            old_logp=micro_batch["old_log_probs"],
        )
        for name, value in metrics_of(out).items():
            self._sums[name] += value
        names = [rows.corruption(pair) for pair in pairs]
        seen = correct.cpu() & rows.has_views
        found = by_corruption(out, mask, seen, pairs, names, self._loss_config)
        for name, sums in found.items():
            self._corruptions[name] = self._corruptions.get(name, 0) + sums
        # FSDP averages gradients over ranks, which the totals have already done.
        return _Carry.apply(clean, out.loss * self.world_size)

    def _optimizer_step(self) -> Tensor:
        """EasyR1's; a mini-batch is complete: the mean over ranks of what is kept is its sum."""
        if self.maker is not None:
            for name, value in self._sums.items():
                self._named[name].append(value * self.world_size)
            self._sums.clear()
        return super()._optimizer_step()

    def _over_ranks(self, device: torch.device) -> dict[str, Tensor]:
        """The sums of each corruption over all ranks, in one reduction."""
        assert self.maker is not None
        names = sorted(self.maker.options.corruptions)
        blank = torch.zeros(3, dtype=torch.float64)
        sums = torch.stack([self._corruptions.get(name, blank) for name in names]).to(device)
        if dist.is_initialized():
            dist.all_reduce(sums)
        return dict(zip(names, sums.cpu(), strict=True))


class _Carry(torch.autograd.Function):
    """Log-probs as they are; their backward also gives `loss` a gradient of 1, whatever theirs is.

    So a term that has its own scale goes with a loss that someone else scales.
    """

    @staticmethod
    def forward(ctx: Any, logp: Tensor, loss: Tensor) -> Tensor:
        """[B, T], a view of logp."""
        ctx.save_for_backward(loss)
        return logp.view_as(logp)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of the log-probs, and 1."""
        (loss,) = ctx.saved_tensors
        return gradients[0], torch.ones_like(loss)


def _own_inputs(micro_batch: Mapping[str, Any], count: int) -> list[dict[str, Tensor]]:
    """What the image processor made of each row's images; nothing for text alone."""
    own = [dict(row) for row in micro_batch.get("multi_modal_inputs", [{}] * count)]
    for row in own:
        if row and "pixel_values" not in row:
            got, remedy = ", ".join(sorted(row)), "take videos out of the data, or switch ROMA off"
            fail("multi_modal_inputs", "pixel_values, of images", got, remedy)
    return own


def _images(row: Mapping[str, Tensor]) -> int:
    """The number of a row's images, or tiles."""
    if "pixel_values" not in row:
        return 0
    return len(row["image_grid_thw"] if "image_grid_thw" in row else row["pixel_values"])


def _with_pairs(
    micro_batch: Mapping[str, Any],
    own: Sequence[dict[str, Tensor]],
    pairs: Sequence[Pair],
    pixels: Tensor,
) -> dict[str, Any]:
    """The micro-batch with a row for each pair behind its own, and degraded pixel_values there."""
    picked = [*range(len(own)), *(row for _, row in pairs)]
    sizes = [len(own[row]["pixel_values"]) for _, row in pairs]
    parts = pixels.split(sizes) if pairs else ()
    inputs = [
        *own,
        *(
            {**own[row], "pixel_values": part.to(own[row]["pixel_values"].device)}
            for (_, row), part in zip(pairs, parts, strict=True)
        ),
    ]
    joint: dict[str, Any] = {
        name: value[torch.tensor(picked, device=value.device)]
        for name, value in micro_batch.items()
        if isinstance(value, Tensor)
    }
    if "multi_modal_inputs" in micro_batch:
        column = np.empty(len(inputs), dtype=object)
        column[:] = inputs
        joint["multi_modal_inputs"] = column
    return joint


def maker_for(config: Any, processor: Any) -> ViewMaker | None:
    """The views of a policy whose configuration asks for them; None: the stock code runs.

    Args:
        config: the actor's; `roma_options` on it, if any, is a `RomaOptions`.
        processor: of the model; has an image_processor.

    Raises:
        ValueError: the model has no image processor, or one whose pixels are not known.
    """
    options: RomaOptions | None = getattr(config, "roma_options", None)
    if options is None or not options.active:
        return None
    image_processor = getattr(processor, "image_processor", None)
    if image_processor is None:
        remedy = "train a vision-language model, or set roma.num_views=0"
        fail("the model", "an image processor", f"{type(processor).__name__}", remedy)
    if config.loss_avg_mode not in _AGGREGATION:
        expected = " or ".join(map(repr, _AGGREGATION))
        got = repr(config.loss_avg_mode)
        fail("worker.actor.loss_avg_mode", expected, got, "choose one of them")
    return ViewMaker(options, image_processor)
