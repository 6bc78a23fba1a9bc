"""The trainer: GRPO on clean images, and a second, teacher-forced pass over K degraded views.

One step: draw prompts → sample G completions on the clean images → reward → group advantages →
degrade each image K times → clean and view passes, loss, backward → optimizer step. Every random
draw is a function of (run seed, step, row id): a resumed run goes on as if it had never stopped.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR

from roma.advantages import ESTIMATORS
from roma.data import Columns, Example, RomaDataset, load_dataset_rows
from roma.models.qwen_vl import Policy, PromptBatch
from roma.rewards import RewardFunction, compute_score, load_reward
from roma.rollout.hf import Rollouts, generate
from roma.train import checkpoint
from roma.train.config import Config, RewardConfig, dump, to_dict
from roma.train.metrics import JsonLines, open_log, peak_memory, timed
from roma.train.update import UpdateBatch, UpdateStep, distinct_rows
from roma.train.views import OnlineViews, Views, by_corruption, hardest, record
from roma.views import seed_for
from roma_kernels.roma_loss.api import view_divergence

Progress = Callable[[int, Mapping[str, float]], None]


def train(config: Config, *, progress: Progress | None = None) -> Path:
    """Trains a policy and returns the folder of its last checkpoint (`actor/` in it is the model).

    Args:
        config: see `roma.train.config`; `roma train --list-keys` prints every key.
        progress: called after each step with (step, its metrics).

    Raises:
        ValueError: model, data or checkpoint do not fit; the message says what to do.
    """
    return Trainer(config).fit(progress)


@dataclass(frozen=True)
class Experience:
    """What one rollout phase leaves to learn from: P prompts, B = P·G rollouts."""

    examples: list[Example]
    prompts: PromptBatch
    rollouts: Rollouts
    rows: Tensor  # [B] the prompt of each rollout
    rewards: dict[str, Tensor]  # each [B]
    advantages: Tensor  # [B]
    views: "Future[Views]"  # that a thread may still be making


class Trainer:
    """Holds policy, optimizer and data of a run.

    Args:
        config: the run's configuration.
    """

    def __init__(self, config: Config) -> None:
        """Loads everything and resumes from a checkpoint where there is one to resume from."""
        self.config, self.step = config, 0
        actor, algorithm, trainer = config.worker.actor, config.algorithm, config.trainer
        if trainer.threads:
            torch.set_num_threads(trainer.threads)
        self.data = self._load(config.data.train_files)
        self.rows = min(len(self.data), config.data.limit or len(self.data))
        self.val = self._load(config.data.val_files) if config.data.val_files else None
        device = trainer.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.policy = Policy.load(actor.model_path, device=device)
        if actor.freeze_vision:
            self.policy.model.model.visual.requires_grad_(False)
        loss = algorithm.roma
        if algorithm.view_mode != "roma":
            loss = replace(loss, lambda_inv=0.0, lambda_aux=0.0)
        self.update_step = UpdateStep(self.policy, loss)
        self.views = OnlineViews(algorithm, trainer.seed)
        self.view_log: JsonLines | None = None
        self.score = _reward_of(config.worker.reward)
        trained = [weight for weight in self.policy.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(
            trained, lr=actor.lr, betas=actor.betas, weight_decay=actor.weight_decay
        )
        self.scheduler = LambdaLR(self.optimizer, self._rate)
        self._resume()

    def _load(self, path: str) -> RomaDataset:
        data = self.config.data
        columns = Columns(images=data.image_key, problem=data.prompt_key, answer=data.answer_key)
        rows = load_dataset_rows(
            path, columns=columns, image_dir=data.image_dir, skip_broken=data.skip_broken
        )
        for _, reason in rows.skipped:
            print(f"skipped {reason}", file=sys.stderr)
        return rows

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps in a step of the run."""
        actor = self.config.worker.actor
        return actor.ppo_epochs * (self.config.data.rollout_batch_size // actor.mini_batch_size)

    def _rate(self, update: int) -> float:
        actor = self.config.worker.actor
        if update < actor.warmup_steps:
            return (update + 1) / actor.warmup_steps
        if actor.schedule == "constant":
            return 1.0
        total = self.config.trainer.total_steps * self.updates_per_step
        return max(total - update, 0) / max(total - actor.warmup_steps, 1)

    def _precision(self) -> torch.autocast:
        """The model's products in the configured dtype; weights and logits stay fp32."""
        low = self.config.trainer.dtype == "bfloat16"
        return torch.autocast(self.policy.device.type, torch.bfloat16, enabled=low)

    def _resume(self) -> None:
        trainer = self.config.trainer
        path = Path(trainer.resume)
        if trainer.resume in ("auto", "never"):
            found = checkpoint.latest(trainer.out) if trainer.resume == "auto" else None
            if found is None:
                return
            path = found
        state = checkpoint.restore(
            path, policy=self.policy, optimizer=self.optimizer, scheduler=self.scheduler
        )
        self.step = state["step"]

    def fit(self, progress: Progress | None = None) -> Path:
        """Runs the steps that are left."""
        trainer = self.config.trainer
        out, last = Path(trainer.out), trainer.total_steps
        resumed = self.step or None
        log = open_log(
            trainer.logger,
            out,
            total_steps=last,
            resumed_at=resumed,
            project=trainer.project_name,
            experiment=trainer.experiment_name,
            config=to_dict(self.config),
        )
        (out / "config.yaml").write_text(dump(self.config), encoding="utf-8")
        with ExitStack() as files:
            files.enter_context(log)
            if "file" in trainer.logger and self.config.algorithm.view_mode != "none":
                self.view_log = JsonLines(out / "views.jsonl", resumed_at=resumed)
                files.enter_context(closing(self.view_log))
            while self.step < last:
                self.step += 1
                metrics = self.train_step()
                if trainer.val_freq and self.step % trainer.val_freq == 0:
                    metrics |= self.validate()
                if self.step == last or (trainer.save_freq and self.step % trainer.save_freq == 0):
                    with timed(metrics, "save"):
                        self._save()
                log.log(self.step, metrics)
                if progress:
                    progress(self.step, metrics)
        return out / f"global_step_{self.step}"

    def _save(self) -> None:
        checkpoint.save(
            self.config.trainer.out,
            self.step,
            policy=self.policy,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            state={"step": self.step},
            keep=self.config.trainer.save_limit,
        )

    def train_step(self) -> dict[str, float]:
        """One step: experience, views, updates; returns its metrics."""
        metrics: dict[str, float] = {}
        with timed(metrics, "step"):
            with timed(metrics, "gen"):
                experience = self.collect(metrics)
            with timed(metrics, "views"):
                views = experience.views.result()
            if self.config.algorithm.view_mode != "roma":
                views = Views.none()
            elif self.config.algorithm.views.candidates:
                with timed(metrics, "choose_views"):
                    views = self._chosen(experience, views)
            if views.specs:
                metrics |= record(views, experience.examples, self.step, self.view_log)
            with timed(metrics, "update_actor"):
                self.update(experience, views, metrics)
        tokens = int(experience.rollouts.mask.sum())
        metrics["perf/tokens_per_second"] = tokens / metrics["timing_s/step"]
        metrics["perf/peak_memory_mib"] = peak_memory(self.policy.device)
        return metrics

    def draw(self) -> list[Example]:
        """The step's prompts: an epoch takes every row once, in an order of its own."""
        size, rows = self.config.data.rollout_batch_size, self.rows
        first = (self.step - 1) * size
        epochs = range(first // rows, (first + size - 1) // rows + 1)
        order = torch.cat([self._order(epoch) for epoch in epochs])[first % rows :]
        return [self.data[i] for i in order[:size].tolist()]

    def _order(self, epoch: int) -> Tensor:
        seed = seed_for(self.config.data.seed, "epoch", epoch)
        return torch.randperm(self.rows, generator=torch.Generator().manual_seed(seed))

    def collect(self, metrics: dict[str, float]) -> Experience:
        """Samples completions and scores them."""
        config, examples = self.config, self.draw()
        prompts = self._encode(examples)
        views = self.views.start(self.policy, prompts, examples, self.step)
        if config.algorithm.view_mode == "rollout":
            degraded = views.result()
            metrics |= record(degraded, examples, self.step, self.view_log)
            prompts = replace(prompts, pixel_values=degraded.pixels[0])
        group = config.worker.rollout.n
        with self._precision():
            rollouts = generate(
                self.policy,
                prompts,
                group_size=group,
                max_new_tokens=config.data.max_response_length,
                temperature=config.worker.rollout.temperature,
                seed=seed_for(config.trainer.seed, "rollout", self.step),
            )
        rows = torch.arange(len(examples), device=self.policy.device).repeat_interleave(group)
        rewards = self._rewards(examples, rows, rollouts)
        advantages = ESTIMATORS[config.algorithm.adv_estimator](rewards["overall"], rows)
        lengths = rollouts.mask.sum(-1).float()
        metrics |= {f"reward/{part}": float(values.mean()) for part, values in rewards.items()}
        metrics["advantage/nonzero_share"] = float((advantages != 0).float().mean())
        metrics["response_length/mean"] = float(lengths.mean())
        metrics["response_length/max"] = float(lengths.max())
        metrics["response_length/clip_ratio"] = float((~rollouts.finished).float().mean())
        distinct = distinct_rows(rows, rollouts.tokens, rollouts.mask)[0]
        metrics["rollout/distinct_share"] = len(distinct) / len(rows)
        return Experience(examples, prompts, rollouts, rows, rewards, advantages, views)

    def _encode(self, examples: list[Example]) -> PromptBatch:
        images = [example.load_images() for example in examples]
        return self.policy.encode_prompts([example.problem for example in examples], images)

    def _rewards(
        self, examples: list[Example], rows: Tensor, rollouts: Rollouts
    ) -> dict[str, Tensor]:
        texts = self.policy.processor.decode(rollouts.tokens, rollouts.mask)
        lengths, finished = rollouts.mask.sum(-1).tolist(), rollouts.finished.tolist()
        answers = [examples[row].answer for row in rows.tolist()]
        keys = ("response", "response_length", "ground_truth", "finished")
        scored = zip(texts, lengths, answers, finished, strict=True)
        scores = self.score([dict(zip(keys, row, strict=True)) for row in scored])
        device = self.policy.device
        return {
            part: torch.tensor([float(s[part]) for s in scores], device=device)
            for part in scores[0]
        }

    def _chosen(self, experience: Experience, views: Views) -> Views:
        """Of the candidates those that are kept, on which the policy diverges most."""
        algorithm = self.config.algorithm
        parts = self._micro(slice(0, len(experience.examples)))
        batches = (self._batch(experience, views, part) for part in parts)
        with self._precision():
            scored = torch.cat([self.update_step.divergence(batch) for batch in batches], dim=1)
        right = experience.rewards["accuracy"].view(len(experience.examples), -1) >= 0.5
        return views.of_prompts(experience.prompts, hardest(scored, right, algorithm.views.k))

    def _batch(self, experience: Experience, views: Views, chosen: slice) -> UpdateBatch:
        """The prompts of a slice, with normalisers as if it were an optimizer step by itself."""
        group = self.config.worker.rollout.n
        rows = slice(chosen.start * group, chosen.stop * group)
        mask, correct = experience.rollouts.mask[rows], experience.rewards["accuracy"][rows] >= 0.5
        aux_view = None
        if views.pixels and self.update_step.config.lambda_aux > 0:
            seed = seed_for(self.config.trainer.seed, "aux_view", self.step)
            generator = torch.Generator().manual_seed(seed)
            drawn = torch.randint(len(views.pixels), experience.rows.shape, generator=generator)
            aux_view = drawn[rows].to(self.policy.device)
        patches = experience.prompts.patches(chosen)
        return UpdateBatch(
            prompts=experience.prompts.select(chosen),
            view_pixels=[pixels[patches] for pixels in views.pixels],
            rows=experience.rows[rows] - chosen.start,
            tokens=experience.rollouts.tokens[rows],
            mask=mask,
            advantages=experience.advantages[rows],
            correct=correct,
            aux_view=aux_view,
            old_logp=None,
            total_sequences=len(mask),
            total_tokens=int(mask.sum()),
            total_correct=int(correct.sum()),
        )

    def update(self, experience: Experience, views: Views, metrics: dict[str, float]) -> None:
        """All optimizer steps on one experience; their metrics are averaged."""
        actor, prompts = self.config.worker.actor, len(experience.examples)
        old_logp = None
        if self.updates_per_step > 1:  # later updates are off the policy that sampled
            parts = self._micro(slice(0, prompts))
            batches = (self._batch(experience, Views.none(), part) for part in parts)
            with self._precision():
                old_logp = torch.cat([self.update_step.old_logp(batch) for batch in batches])
        sums: dict[str, float] = defaultdict(float)
        for _ in range(actor.ppo_epochs):
            for start in range(0, prompts, actor.mini_batch_size):
                mini = slice(start, start + actor.mini_batch_size)
                for name, value in self._optimizer_step(experience, views, old_logp, mini).items():
                    sums[name] += value
        metrics |= {f"actor/{name}": value / self.updates_per_step for name, value in sums.items()}
        metrics["actor/lr"] = float(self.scheduler.get_last_lr()[0])

    def _micro(self, chosen: slice) -> list[slice]:
        """Cuts prompts into micro-batches; a prompt's rollouts share features, so stay together."""
        at_once = max(self.config.worker.actor.micro_batch_size // self.config.worker.rollout.n, 1)
        starts = range(chosen.start, chosen.stop, at_once)
        return [slice(start, min(start + at_once, chosen.stop)) for start in starts]

    def _optimizer_step(
        self, experience: Experience, views: Views, old_logp: Tensor | None, mini: slice
    ) -> Mapping[str, float]:
        """One optimizer step, micro-batch by micro-batch; normalisers are those of the whole."""
        group = self.config.worker.rollout.n
        whole = self._batch(experience, Views.none(), mini)
        metrics: dict[str, float] = defaultdict(float)
        divergences = []
        self.optimizer.zero_grad()
        for part in self._micro(mini):
            rows = slice(part.start * group, part.stop * group)
            batch = replace(
                self._batch(experience, views, part),
                old_logp=None if old_logp is None else old_logp[rows],
                total_sequences=whole.total_sequences,
                total_tokens=whole.total_tokens,
                total_correct=whole.total_correct,
            )
            with self._precision():
                out = self.update_step(batch)
            out.loss.backward()
            for name, value in out.metrics.items():
                if views.specs or not name.startswith("roma_"):
                    metrics[name] += float(value)
            config = self.update_step.config
            divergences.append(view_divergence(out.logp, out.view_logp, batch.mask, config=config))
        limit = self.config.worker.actor.max_grad_norm
        metrics["grad_norm"] = float(clip_grad_norm_(self.update_step.parameters(), limit))
        self.optimizer.step()
        self.scheduler.step()
        if views.specs:
            specs = [own[mini] for own in views.specs]
            metrics.update(by_corruption(torch.cat(divergences, dim=1), specs))
        return metrics

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Greedy answers on clean validation images."""
        assert self.val is not None  # Config refuses val_freq without val_files
        config, metrics = self.config, dict[str, float]()
        size = config.data.rollout_batch_size
        batches = config.trainer.val_batches
        count = len(self.val) if batches is None else min(batches * size, len(self.val))
        scores: dict[str, list[Tensor]] = {}
        with timed(metrics, "testing"):
            for start in range(0, count, size):
                examples = [self.val[i] for i in range(start, min(start + size, count))]
                length = config.data.max_response_length
                rollouts = generate(
                    self.policy, self._encode(examples), max_new_tokens=length, temperature=None
                )
                rows = torch.arange(len(examples))
                for part, values in self._rewards(examples, rows, rollouts).items():
                    scores.setdefault(part, []).append(values)
        return metrics | {f"val/{part}": float(torch.cat(v).mean()) for part, v in scores.items()}


def _reward_of(config: RewardConfig) -> RewardFunction:
    if config.function != "builtin":
        return load_reward(config.function)
    return partial(compute_score, format_weight=config.format_weight, strict_end=config.strict_end)
