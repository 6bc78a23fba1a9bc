"""`RomaGRPOTrainer`: TRL's GRPOTrainer with a second look at each rollout, on degraded images.

    one forward      clean rows, and the pairs (view, row) that matter, through TRL's wrapped model
    TRL's loss       of the clean rows, whatever its type and options
    + λ_aux·L_aux    the clipped loss on one sampled view, clean advantages
    + λ_inv·L_inv    the divergence of the worst view, right rollouts alone

One forward, because further ones break reentrant checkpointing and hang where weights are sharded.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer
from trl.extras.profiling import profiling_context
from trl.trainer import grpo_trainer

from roma import RomaConfig
from roma.integrations.lm_head import fused_head
from roma.integrations.options import RomaOptions
from roma.integrations.terms import Totals, view_terms
from roma.integrations.trl import checks, fields
from roma.integrations.trl.config import RomaGRPOConfig
from roma.integrations.trl.fields import ViewFunction
from roma.integrations.trl.look import Look, Looks
from roma.integrations.trl.record import Record
from roma.integrations.trl.sharing import SharedPrompts, whole_groups
from roma.integrations.trl.text_rows import TextRows, of_prompts
from roma.integrations.views import ViewMaker
from roma.views import CORRUPTIONS
from roma_kernels.errors import fail

_CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")  # loss types that clip the ratio


class RomaGRPOTrainer(GRPOTrainer):
    """TRL's GRPOTrainer with ROMA's two terms (arXiv 2605.09262; docs/TRL.md).

    Args:
        *args: as for GRPOTrainer, and so are all further keyword arguments.
        correct_fn: tells right answers where no reward function alone does: called like a reward
            function, returns a list of B booleans.
        view_fn: makes the views where they are not degraded images (docs/TRL.md): called with a row
            of the dataset, K and the step, returns K rows to be read in its place, or None.
        **kwargs: `args` is a RomaGRPOConfig.

    Raises:
        ValueError: before training: the TRL version, the data, the processor, the model's head or
            the options do not fit; the message names the remedy.
    """

    roma = RomaOptions(num_views=0)  # off, until options were read
    _look: Look | None = None

    def __init__(
        self,
        *args: Any,
        correct_fn: Callable[..., Sequence[bool]] | None = None,
        view_fn: ViewFunction | None = None,
        **kwargs: Any,
    ) -> None:
        """Checks, then lets TRL set itself up around our head."""
        checks.check_trl()
        given = checks.bound(GRPOTrainer.__init__, args, kwargs)
        config = given.get("args")
        if config is None:
            config = given["args"] = RomaGRPOConfig("roma-grpo")
        if not isinstance(config, RomaGRPOConfig):
            got, remedy = type(config).__name__, "import RomaGRPOConfig from roma.integrations.trl"
            fail("args", "a RomaGRPOConfig", got, remedy)
        self.roma = config.roma_options()
        self.correct_fn, self.view_fn = correct_fn, view_fn
        self._correct: Tensor | None = None
        if self.roma.active:
            (checks.check_data if view_fn is None else checks.check_view_fn)(given)
        with _head(ours=self.roma.active and config.roma_lm_head):
            super().__init__(**given)
        if not self.roma.active:
            return
        self._loss_config()  # a clip range or delta that the loss refuses is told now
        self._accuracy = checks.accuracy_index(config.accuracy_reward, self.reward_func_names)
        maker = None if view_fn else ViewMaker(self.roma, checks.image_processor(self))
        self._looks = Looks(self.roma, maker, self._tokenizer.pad_token_id)
        names = [f"view_{k}" for k in range(self.roma.num_views)] if view_fn else list(CORRUPTIONS)
        self._record = Record(self, names)
        self._text_rows = TextRows(self)
        self._shared = self._sharing() if config.share_prompts else None
        self._never_sample_images()
        if view_fn is not None:
            fields.try_view_fn(self, view_fn, self.roma.num_views, self.train_dataset)

    def _sharing(self) -> SharedPrompts:
        if getattr(self, "aux_loss_enabled", False):
            expected, remedy = "a model without experts", "set router_aux_loss_coef=0"
            fail("share_prompts", expected, "one with a load-balancing loss", remedy)
        model = self.accelerator.unwrap_model(self.model)
        base = getattr(model, "get_base_model", lambda: model)()
        return SharedPrompts(base)

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """TRL's; where prompts are shared and micro-batches hold whole groups, they stay whole."""
        size = self.num_generations
        whole = self.args.per_device_train_batch_size % size == 0
        if not (self.roma.active and self._shared and whole):
            return super()._prepare_inputs(generation_batch)
        with whole_groups(size):
            return super()._prepare_inputs(generation_batch)

    def _never_sample_images(self) -> None:
        """A sampled image token has no image: the teacher-forced pass would fail on it."""
        config = getattr(self, "generation_config", None)
        marks = [
            getattr(self.model.config, name, None) for name in ("image_token_id", "video_token_id")
        ]
        marks = [mark for mark in marks if mark is not None]
        if config is not None and marks:
            config.suppress_tokens = sorted({*(config.suppress_tokens or ()), *marks})

    # Sampling and rewards

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        """TRL's; a prompt of text alone among others has no images, not None."""
        if self.roma.active:  # before sampling, which runs sharded weights too
            self._text_rows.compare(of_prompts(prompts))
        made = super()._generate(prompts)
        images = made[6]
        if images is not None:
            images = [own if own is not None else [] for own in images]
        if self.roma.active and self.tools:  # whose answers may have images
            self._text_rows.compare(images or [[] for _ in prompts])
        return (*made[:6], images, *made[7:])

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> Tensor:
        """TRL's; keeps which of this rank's rollouts are right."""
        rewards: Tensor = super()._calculate_rewards(
            inputs, prompts, completions, completion_ids_list
        )
        if not self.roma.active:
            return rewards
        if self.correct_fn is None:
            first = self.accelerator.process_index * len(prompts)
            own = rewards[first : first + len(prompts), self._accuracy]
            self._correct = own > self.roma.accuracy_threshold  # NaN: no score, not right
            return rewards
        left_out = ("prompt", "completion", "completion_ids")
        columns = {k: [row[k] for row in inputs] for k in inputs[0] if k not in left_out}
        columns |= {"trainer_state": self.state, "log_extra": self._log_completion_extra}
        columns |= {"log_metric": self._log_metric}
        if self.environments is not None:
            columns["environments"] = self.environments
        flags = self.correct_fn(
            prompts=prompts, completions=completions, completion_ids=completion_ids_list, **columns
        )
        checks.check_flags(flags, len(prompts))
        self._correct = torch.tensor([bool(flag) for flag in flags], device=rewards.device)
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's batch, and for each rollout what its views need."""
        if not self.roma.active:
            stock: dict[str, Any] = super()._generate_and_score_completions(inputs)
            return stock
        inputs = fields.without_images(inputs)
        with self._text_rows.logged():
            output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        assert self._correct is not None
        count, step = len(inputs), self.state.global_step
        correct = self._correct
        output["roma_correct"] = correct
        output["roma_step"] = torch.full((count,), step)
        output["roma_row"] = torch.arange(count) + self.accelerator.process_index * count
        if self.view_fn is not None:
            views = self.roma.num_views
            output["roma_views"] = fields.alternatives(self, inputs, self.view_fn, views, step)
            seen = torch.tensor([bool(own) for own in output["roma_views"]])
        else:
            seen = torch.tensor([n > 0 for n in fields.counts(fields.of(output), count)])
        right = (correct.cpu() & seen).sum().to(correct.device)
        output["roma_total_correct"] = self.accelerator.reduce(right, reduction="sum")
        if self.log_completions:
            self._record.completions(correct)
        return output

    # The loss

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """TRL's loss of the clean rows, and ROMA's two terms."""
        if not self.roma.active:
            return super()._compute_loss(model, inputs)
        inputs = fields.without_blanks(inputs)
        mode = "train" if self.model.training else "eval"
        with profiling_context(self, "roma_views"):
            look = self._looks.of(inputs, lean=self.args.view_update == "lean")
        self._look = look
        try:
            loss: Tensor = super()._compute_loss(model, inputs)
        finally:
            self._look = None
        if look.logp is None or look.pair_logp is None:
            got, remedy = "none", "use a version of TRL that was tested"
            fail("trl.GRPOTrainer._compute_loss", "one scoring of the micro-batch", got, remedy)
        mask = inputs["completion_mask"]
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        correct = inputs["roma_correct"]
        config = self._loss_config()
        totals, shards = self._totals(inputs, mask, mode)
        out = view_terms(
            look.logp,
            look.pair_logp,
            look.pairs,
            mask=mask,
            advantages=inputs["advantages"],
            correct=correct,
            aux_view=look.aux_view,
            has_views=look.has_views,
            totals=totals,
            config=config,
            num_views=self.roma.num_views,
            old_logp=inputs.get("old_per_token_logps"),
            weight=inputs.get("importance_sampling_ratio"),
        )
        told: dict[str, Any] = {"pairs": look.pairs, "names": look.names, "config": config}
        self._record.loss(
            mode, out, mask=mask, correct=correct, has_views=look.has_views, shards=shards, **told
        )
        if self.log_completions:
            right = correct.cpu() & look.has_views
            self._record.worst(out, inputs["roma_row"], mask=mask, correct=right, **told)
        return loss + out.loss.to(loss.dtype) * self.accelerator.num_processes

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """TRL's; within `_compute_loss` the pairs are rows of the same call."""
        score = super()._get_per_token_logps_and_entropies
        own = fields.of(kwargs)
        options = {"compute_entropy": compute_entropy, "compute_aux_loss": compute_aux_loss}
        look = self._look
        if look is None:
            if 0 not in own.get("num_images", ()):
                return score(
                    model, input_ids, attention_mask, logits_to_keep, batch_size, **options, **own
                )
            # Rows of text alone among others: a chunk without an image must have no image fields.
            size, count = batch_size or len(input_ids), len(input_ids)
            parts = [
                score(
                    model,
                    input_ids[chunk],
                    attention_mask[chunk],
                    logits_to_keep,
                    **options,
                    **fields.take(own, chunk),
                )
                for chunk in (list(range(count))[at : at + size] for at in range(0, count, size))
            ]
            return _concatenated(parts)
        if look.logp is not None:
            got, remedy = "two", "use a version of TRL that was tested"
            fail("trl.GRPOTrainer._compute_loss", "one scoring of the micro-batch", got, remedy)
        count = len(input_ids)
        with profiling_context(self, "roma_degrade"):
            rows = self._looks.rows(look, input_ids, attention_mask, logits_to_keep, own)
        packed = None
        if self._shared is not None:
            with self.accelerator.autocast():
                packed = self._shared.score(model, rows, look.identities(), look.pairs)
        if packed is None:
            logp, entropy, aux_loss = score(
                model, rows.ids, rows.attention, logits_to_keep, None, **options, **rows.fields
            )
        else:
            (logp, entropy), aux_loss = packed, None
        look.logp, look.pair_logp = logp[:count], logp[count:]
        return look.logp, None if entropy is None else entropy[:count], aux_loss

    def _loss_config(self) -> RomaConfig:
        """The options of the two terms, in TRL's aggregation and clip range."""
        clip: dict[str, Any] = {}
        if self.loss_type in _CLIPPED:
            clip = {
                "clip_low": self.epsilon_low,
                "clip_high": self.epsilon_high,
                "dual_clip": self.args.delta,
            }
        if self.loss_type in ("grpo", "sapo"):
            return self.roma.loss_config(aggregation="grpo", **clip)
        if self.loss_type in ("bnpo", "dapo", "cispo", "vespo"):
            return self.roma.loss_config(aggregation="dapo", **clip)
        # (1/B) Σ_i Σ_t: Dr.GRPO's sum with a length of one.
        longest = 1 if self.loss_type == "luspo" else self.max_completion_length
        return self.roma.loss_config(aggregation="dr_grpo", max_length=longest, **clip)

    def _totals(self, inputs: dict[str, Any], mask: Tensor, mode: str) -> tuple[Totals, int]:
        """Denominators over the step and all ranks, as TRL's own; and how many shards there are."""
        ranks = self.accelerator.num_processes
        parts = self.current_gradient_accumulation_steps if mode == "train" else 1
        shards = parts * ranks
        # Both counts span the generation batch; TRL gives each step its share of it.
        share = parts / self.args.steps_per_generation if mode == "train" else 1
        if self.loss_type in ("dapo", "cispo", "vespo"):
            tokens = inputs["num_items_in_batch"].clamp(min=1.0) * share
        else:
            tokens = mask.sum().clamp(min=1.0) * shards
        correct = inputs["roma_total_correct"] * share
        return Totals(len(mask) * shards, tokens, correct), shards

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's, with the divergence of each corruption since the last one."""
        if self.roma.active:
            self._record.flush("train" if self.model.training else "eval")
        super().log(logs, start_time)


def _concatenated(
    parts: Sequence[tuple[Tensor, Tensor | None, Tensor | None]],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    logps, entropies, losses = zip(*parts, strict=True)
    return (
        torch.cat(logps),
        None if entropies[0] is None else torch.cat(entropies),
        None if losses[0] is None else torch.stack(losses).mean(),
    )


@contextmanager
def _head(*, ours: bool) -> Iterator[None]:
    """Within it, TRL puts our head where it would put its own.

    Before accelerate and PEFT wrap the model: they wrap forward, and a later change would be lost.
    """
    stock = grpo_trainer.add_fused_lm_head
    if ours:
        grpo_trainer.add_fused_lm_head = fused_head
    try:
        yield
    finally:
        grpo_trainer.add_fused_lm_head = stock
