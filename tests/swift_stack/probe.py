"""swift's trainer and ours, which keep what the tests look at; imported by a run of swift's."""

from types import SimpleNamespace
from typing import Any

import torch
from swift.rlhf_trainers import GRPOTrainer
from swift_stack.small import is_right

from roma.integrations.swift.trainer import RomaGRPOTrainer

KEPT: list[Any] = []


class Probe:
    """Keeps each loss: its inputs, log-probs, their gradient, and what it depends on."""

    one_by_one = False  # completions that do not depend on how samples are dealt to ranks

    def __init__(self, *args, **kwargs):
        self.calls, self.grads, self.sizes, self.known = [], {}, {}, {}
        super().__init__(*args, **kwargs)
        KEPT.append(self)

    def _score_completions(self, samples):
        scored = super()._score_completions(samples)
        for sample in scored:
            text = sample.messages[-1]["content"]
            self.known[id(sample)] = bool(is_right(text, sample.extra["solution"])), text
        return scored

    def _postprocess_batch(self, samples, batch_encoded_inputs):
        super()._postprocess_batch(samples, batch_encoded_inputs)
        chunks = self.split_by_mini_batches(samples)
        rights = [self.known[id(s)][0] and bool(s.images) for chunk in chunks for s in chunk]
        for chunk, batch in zip(chunks, batch_encoded_inputs, strict=True):
            batch["grpo_batch"].seen = SimpleNamespace(
                right=[self.known[id(s)][0] for s in chunk],
                texts=[self.known[id(s)][1] for s in chunk],
                images=[list(s.images) for s in chunk],
                total_right=sum(rights),
                step=self.state.global_step,
            )

    def _rollout(self, samples, request_config, is_global_inputs=False):
        if not self.one_by_one:
            return super()._rollout(samples, request_config, is_global_inputs)
        made, first = [], self.accelerator.process_index * len(samples)
        for number, sample in enumerate(samples):
            torch.manual_seed(1000 * self.state.global_step + first + number)
            made += super()._rollout([sample], request_config, is_global_inputs)
        return made

    def _compute_loss_and_metrics(self, model, model_inputs, grpo_batch):
        self.calls.append(SimpleNamespace(**vars(grpo_batch.seen)))
        loss, metrics = super()._compute_loss_and_metrics(model, model_inputs, grpo_batch)
        call, tokens = self.calls[-1], model_inputs["input_ids"]
        call.loss, call.mask = loss.detach(), metrics["completion_mask"].bool()
        call.advantages, call.num_items = grpo_batch.advantages, grpo_batch.num_items_in_batch
        call.old = grpo_batch.old_per_token_logps if self.old_policy() else None
        call.max_length, call.clean = self.max_completion_length, dict(model_inputs)
        if isinstance(self, RomaGRPOTrainer) and self.roma.active:
            views = self._roma_views
            call.rows = views.read(
                model_inputs.get("pixel_values"),
                model_inputs.get("image_grid_thw"),
                [len(own) for own in call.images],
                step=call.step,
            )
            kept = tokens[:, -call.mask.shape[1] :]
            counted = grpo_batch.completion_mask.bool()
            lists = [row[on].tolist() for row, on in zip(kept, counted, strict=True)]
            call.aux_view = views.aux_view(call.rows, lists)
        return loss, metrics

    def _get_per_token_logps_and_entropies_single(self, model, model_inputs, *args, **kwargs):
        inputs = dict(model_inputs)
        logp, entropies = super()._get_per_token_logps_and_entropies_single(
            model, model_inputs, *args, **kwargs
        )
        if logp.requires_grad:
            logp.retain_grad()
            assert not hasattr(self.calls[-1], "logp"), "one forward a loss"
            self.calls[-1].inputs, self.calls[-1].logp = inputs, logp
        return logp, entropies

    def training_step(self, model, *args, **kwargs):
        named = dict(self.accelerator.unwrap_model(model).named_parameters())
        before = {n: 0 if p.grad is None else p.grad.clone() for n, p in named.items()}
        loss = super().training_step(model, *args, **kwargs)
        self.grads = {n: p.grad.clone() for n, p in named.items() if p.grad is not None}
        for name, grad in self.grads.items():
            self.sizes[name] = self.sizes.get(name, 0) + (grad - before[name]).abs()
        return loss


class Ours(Probe, RomaGRPOTrainer):
    pass


class Stock(Probe, GRPOTrainer):
    pass
