"""`RomaGRPOTrainer`: swift's GRPO trainer with the view terms of ROMA.

    swift's own  rollout, rewards, advantages, the clean objective of every loss type
    here         which rollouts are right, and the views of a micro-batch's pixel_values
                 one forward of B clean rows and R rows on views, where swift has one of B
                 log-probs of fp32 logits, by `roma.linear_logprob` (docs/MATH.md section 7)
                 loss + λ_aux·L_aux + λ_inv·L_inv (docs/MATH.md section 2)

Views are drawn for the step in which a rollout was sampled, and so are the same in every reuse.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from swift.rl_core.data import GRPOBatch
from swift.rlhf_trainers.grpo_trainer import GRPOTrainer, get_even_process_data
from torch import Tensor

from roma import RomaConfig, RomaLoss
from roma.integrations.lm_head import patch_lm_head
from roma.integrations.options import RomaOptions
from roma.integrations.swift.checks import accuracy_index, check_settings
from roma.integrations.swift.rows import images_per_row, joined
from roma.integrations.terms import (
    PREFIX,
    Totals,
    by_corruption,
    metrics_of,
    pairs_of,
    view_terms,
)
from roma.integrations.views import Pair, RowImages, ViewMaker
from roma_kernels.errors import fail

ACCURACY, HEAD = "ROMA_ACCURACY_REWARD", "ROMA_LM_HEAD"
_BY_TOKENS = ("bnpo", "dapo", "cispo")  # sums over tokens divided by a number of tokens
_NO_LABEL = -100
_OTHER_CLIP = ("cispo", "sapo")  # whose range, if any, is no trust region about 1


@dataclass
class _Note:
    """What a micro-batch's loss needs beside swift's own batch.

    Attributes:
        correct: [B] bool.
        counts: images of each of B rows.
        step: of the rollout.
        right: 0-dim: right rows with an image in the whole rollout batch, all ranks.
    """

    correct: Tensor
    counts: list[int]
    step: int
    right: Tensor


@dataclass
class _Pass:
    """One loss's forward, while swift's own code computes the clean objective.

    Attributes:
        rows: the clean images of the micro-batch and what its views do.
        pairs: (view, row) of R further rows.
        counts: images of each of B rows.
        logp: [B + R, T] nats, once the forward has run.
        weight: the sampler correction, if swift applies one.
    """

    rows: RowImages
    pairs: list[Pair]
    counts: list[int]
    logp: Tensor | None = None
    weight: Tensor | None = None


class RomaGRPOTrainer(GRPOTrainer):
    """swift's GRPO trainer with views; `configure` before it is built.

    Raises:
        ValueError: a setting under which views were not tested, in one line, before training.
    """

    _configured: tuple[RomaOptions, str | int, str] | None = None

    @classmethod
    def configure(
        cls,
        options: RomaOptions | None = None,
        accuracy_reward: str | int | None = None,
        lm_head: str | None = None,
    ) -> None:
        """Takes what `register` has; None: from ROMA_OPTIONS, _ACCURACY_REWARD, _LM_HEAD."""
        wanted = os.environ.get(ACCURACY, 0) if accuracy_reward is None else accuracy_reward
        head = os.environ.get(HEAD, "roma") if lm_head is None else lm_head
        if head not in ("roma", "swift"):
            fail("lm_head", "'roma' or 'swift'", repr(head), f"set {HEAD} to one of them")
        cls._configured = (RomaOptions.from_env() if options is None else options), wanted, head

    def __init__(self, model: Any = None, ref_model: Any = None, *args: Any, **kwargs: Any) -> None:
        """Puts the head on the models, builds swift's trainer, then checks what views need."""
        if self._configured is None:
            self.configure()
        assert self._configured is not None
        self.roma, wanted, head = self._configured
        self._roma_pass: _Pass | None = None
        self._roma_sums: dict[str, Tensor] = {}
        self._roma_head = self.roma.active and head == "roma"
        given = list(kwargs.get("reward_funcs") or [])  # swift puts objects in the place of names
        if self._roma_head:
            settings = kwargs["args"]
            entropy = settings.log_entropy or settings.top_entropy_quantile < 1
            outputs = ("log_probs", "entropy") if entropy else ("log_probs",)
            for own in (model, ref_model):
                if own is not None:
                    patch_lm_head(own, temperature=settings.temperature, outputs=outputs)
        super().__init__(model, ref_model, *args, **kwargs)
        if not self.roma.active:
            return
        check_settings(self)
        self._roma_accuracy = accuracy_index(self.reward_func_names, given, wanted)
        self._roma_views = ViewMaker(self.roma, self.template.processor.image_processor)
        self._roma_config = self._loss_config()

    def _loss_config(self) -> RomaConfig:
        """The auxiliary loss sums as the trainer's own does, and clips so where that clips."""
        clip: dict[str, Any] = {}
        if self.loss_type not in _OTHER_CLIP:
            clip = {"clip_low": self.epsilon_low, "clip_high": self.epsilon_high}
            clip["dual_clip"] = self.args.delta
        if self.loss_type == "dr_grpo":
            longest = self.max_completion_length
            return self.roma.loss_config(aggregation="dr_grpo", max_length=longest, **clip)
        aggregation: Any = "dapo" if self.loss_type in _BY_TOKENS else "grpo"
        return self.roma.loss_config(aggregation=aggregation, **clip)

    def _postprocess_batch(
        self, samples: list[Any], batch_encoded_inputs: list[dict[str, Any]]
    ) -> None:
        """Notes, for each micro-batch, which rollouts are right."""
        noted = self.roma.active and self.model.training
        if noted and self.dynamic_num_samples:
            got = "several training samples from one trajectory"
            remedy = "use a scheduler that returns one, or set num_views=0 in ROMA_OPTIONS"
            fail("multi-turn scheduler", "one sample of each request", got, remedy)
        super()._postprocess_batch(samples, batch_encoded_inputs)
        if not noted:
            return
        rewards = self._rewards_per_func[:, self._roma_accuracy]
        own = get_even_process_data(self, rewards > self.roma.accuracy_threshold)
        correct = {id(sample): right for sample, right in zip(samples, own, strict=True)}
        notes = []
        chunks = self.split_by_mini_batches(samples)
        for chunk, batch in zip(chunks, batch_encoded_inputs, strict=True):
            right = torch.stack([correct[id(sample)] for sample in chunk])
            images = [len(sample.images) for sample in chunk]
            counts = images_per_row(batch["model_inputs"], images, self._roma_views.format.merge)
            batch["grpo_batch"].roma = _Note(right, counts, self.state.global_step, right.sum())
            notes.append(batch["grpo_batch"].roma)
        penalised = [
            (note.correct & torch.tensor(note.counts, device=own.device).bool()).sum()
            for note in notes
        ]
        total = self.accelerator.reduce(torch.stack(penalised).sum(), "sum")
        for note in notes:
            note.right = total

    def _compute_loss_and_metrics(
        self, model: Any, model_inputs: dict[str, Any], grpo_batch: GRPOBatch
    ) -> tuple[Tensor, dict[str, Any]]:
        """The loss and metrics of swift, and the view terms on log-probs of the same forward."""
        if not (self.roma.active and self.model.training):
            return super()._compute_loss_and_metrics(model, model_inputs, grpo_batch)
        note: _Note = grpo_batch.roma
        rows = self._roma_views.read(
            model_inputs.get("pixel_values"),
            model_inputs.get("image_grid_thw"),
            note.counts,
            step=note.step,
        )
        counted = grpo_batch.completion_mask.bool()
        tokens = model_inputs["input_ids"][:, -counted.shape[1] :]
        aux_view = self._roma_views.aux_view(
            rows, [own[on].tolist() for own, on in zip(tokens.cpu(), counted.cpu(), strict=True)]
        )
        if self.overlong_filter:
            counted = counted & ~grpo_batch.truncated_mask[:, None]
        pairs = pairs_of(
            note.correct & counted.any(1),
            aux_view,
            grpo_batch.advantages * counted,
            rows.has_views,
            self.roma,
        )
        running = self._roma_pass = _Pass(rows, pairs, note.counts)
        if not self.old_policy():
            # This very policy sampled: then its ratio is 1, whatever rows it is scored beside.
            # (In bf16 a row's log-probs depend on them.)
            grpo_batch = replace(grpo_batch, old_per_token_logps=None)
        try:
            loss, metrics = super()._compute_loss_and_metrics(model, model_inputs, grpo_batch)
        finally:
            self._roma_pass = None
        if running.logp is None:
            remedy = "use a version of ms-swift that was tested"
            fail("swift's loss", "one forward with a graph", "none", remedy)
        batch = len(counted)
        steps = getattr(
            self, "current_gradient_accumulation_steps", self.args.gradient_accumulation_steps
        )
        mask = metrics["completion_mask"].bool()
        out = view_terms(
            running.logp[:batch],
            running.logp[batch:],
            pairs,
            mask=mask,
            advantages=grpo_batch.advantages,
            correct=note.correct,
            aux_view=aux_view,
            has_views=rows.has_views,
            totals=self._totals(note, grpo_batch, mask, steps),
            config=self._roma_config,
            num_views=self.roma.num_views,
            old_logp=grpo_batch.old_per_token_logps,
            weight=running.weight,
        )
        # The trainer divides by the number of micro-batches, and ranks are averaged.
        scale = steps * self.accelerator.num_processes
        right = note.correct.cpu() & rows.has_views
        names = [rows.corruption(pair) for pair in pairs]
        self._record(out, by_corruption(out, mask, right, pairs, names, self._roma_config), steps)
        return loss + scale * out.loss, metrics

    def _totals(self, note: _Note, grpo_batch: GRPOBatch, mask: Tensor, steps: int) -> Totals:
        """Counts of the whole step, all ranks; each as swift's own loss counts."""
        shards = steps * self.accelerator.num_processes
        share = steps / self.args.steps_per_generation  # of a rollout batch that a step takes
        if self.loss_type == "bnpo":
            tokens = mask.sum().clamp(min=1) * shards
        else:
            tokens = grpo_batch.num_items_in_batch
            tokens = tokens if self.loss_type in _BY_TOKENS else tokens * share
        return Totals(len(mask) * shards, tokens, note.right * share)

    def _record(self, out: RomaLoss, sums: Mapping[str, Tensor], steps: int) -> None:
        """Metrics over all ranks; swift's logger takes the mean over micro-batches."""
        names = sorted(self.roma.corruptions)
        values = metrics_of(out, steps)
        none = torch.zeros(3, dtype=torch.float64)
        table = torch.stack([sums.get(name, none) for name in names])
        own_values = torch.tensor(list(values.values()), dtype=torch.float64)
        flat = torch.cat([own_values, table.flatten()]).to(self.accelerator.device)
        flat = self.accelerator.reduce(flat, "sum")
        for name, value in zip(values, flat.tolist(), strict=False):
            self._metrics["train"][name].append(value)
        for name, own in zip(names, flat[len(values) :].view(-1, 3).cpu(), strict=True):
            if own[1]:
                self._roma_sums[name] = self._roma_sums.get(name, none) + own

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what each corruption did since the last log."""
        if self.model.training:
            for name, (divergence, number, worst) in self._roma_sums.items():
                own = self._metrics["train"]
                own[f"{PREFIX}penalty/{name}"] = [float(divergence / number)]
                own[f"{PREFIX}worst_view/{name}"] = [float(worst / number)]
            self._roma_sums = {}
        super().log(logs, start_time)

    def _get_rollout_is_correction(self, *args: Any, **kwargs: Any) -> Any:
        """Keeps the sampler's weights: the auxiliary loss takes them too."""
        ratio, weight = super()._get_rollout_is_correction(*args, **kwargs)
        if self._roma_pass is not None and weight is not None:
            self._roma_pass.weight = weight.detach()
        return ratio, weight

    def _get_per_token_logps_and_entropies(
        self, model: Any, model_inputs: dict[str, Any], grpo_batch: GRPOBatch, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Within a loss: one forward of the clean rows and the views' rows, side by side."""
        running = self._roma_pass
        if running is None:
            return super()._get_per_token_logps_and_entropies(
                model, model_inputs, grpo_batch, **kwargs
            )
        if running.logp is not None:
            remedy = "use a version of ms-swift that was tested"
            fail("swift's loss", "one forward", "a second one", remedy)
        batch = len(model_inputs["input_ids"])
        inputs = self._with_views(model_inputs, running)
        logp, entropies = super()._get_per_token_logps_and_entropies(
            model, inputs, grpo_batch, **kwargs
        )
        running.logp = logp
        return logp[:batch], None if entropies is None else entropies[:batch]

    def _with_views(self, model_inputs: dict[str, Any], running: _Pass) -> dict[str, Any]:
        if not running.pairs:
            return dict(model_inputs)
        pixels = self._roma_views.pixels(running.rows, running.pairs)
        rows: Sequence[int] = [row for _, row in running.pairs]
        return joined(model_inputs, rows, running.counts, pixels)

    def _get_per_token_logps_and_entropies_single(
        self,
        model: Any,
        model_inputs: dict[str, Any],
        grpo_batch: GRPOBatch,
        compute_entropy: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probs [B, T] (B + R rows within a loss) by our head: of counted tokens, else 0."""
        if not self._roma_head:
            return super()._get_per_token_logps_and_entropies_single(
                model, model_inputs, grpo_batch, compute_entropy=compute_entropy
            )
        counted, tokens = grpo_batch.completion_mask.bool(), model_inputs["input_ids"]
        if self._roma_pass is not None:
            rows = [row for _, row in self._roma_pass.pairs]
            counted = torch.cat([counted, counted[rows]])
        kept = counted.shape[1]
        labels = torch.full_like(tokens, _NO_LABEL)
        labels[:, -kept:] = tokens[:, -kept:].where(counted, _NO_LABEL)
        inputs = {name: own for name, own in model_inputs.items() if name != "logits_to_keep"}
        found = model(**inputs, labels=labels, fused_lm_head=True)
        entropies = found.entropy[:, -kept:] if compute_entropy else None
        return found.log_probs[:, -kept:], entropies
