"""The training loop, to be read from top to bottom: draw, collect, views, update, log, save.

GRPO on clean images, with a second, teacher-forced pass over K degraded views of them. One step:

    draw prompts → sample G completions on the clean images → rewards → advantages
    degrade each image K times, meanwhile
    clean and view passes, loss, backward → optimizer step

Every random draw is a function of (run seed, step, row id), so that a resumed run equals an
uninterrupted one.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR

from roma.data import Columns, Example, RomaDataset, load_dataset_rows
from roma.models.device import resolve_device
from roma.models.qwen_vl import Policy
from roma.rewards import RewardFunction, compute_score, load_reward
from roma.rollout.hf import HfSampler
from roma.train import checkpoint
from roma.train.batch import UpdateBatch
from roma.train.collect import Collector, Experience
from roma.train.config import Config, changed_options, dump, to_dict
from roma.train.metrics import JsonLines, Stopwatch, open_log, peak_memory
from roma.train.sections import RewardConfig
from roma.train.update import PolicyLoss
from roma.train.views import ViewMaker, Views, by_corruption, hardest
from roma.views import ViewSpec, seed_for
from roma_kernels.backends import choose

Progress = Callable[[int, Mapping[str, float]], None]


def train(config: Config, *, progress: Progress | None = None) -> Path:
    """Trains a policy and returns the folder of its last checkpoint (`actor/` in it is the model).

    Says on stdout what runs, if the console is one of the loggers, and on stderr which options of a
    resumed run have changed, and that a run is finished.

    Args:
        config: see `roma.train.config`; `roma train --list-keys` prints every key.
        progress: called after each step with (step, its metrics).

    Raises:
        ValueError: device, model, data or checkpoint do not fit; the message says what to do.
    """
    start = checkpoint.starting_point(config.trainer.out, config.trainer.resume)
    done = checkpoint.step_of(start) if start else 0
    _announce(config, start)
    if start and done >= config.trainer.total_steps:
        finished = f"{start} has trainer.total_steps = {config.trainer.total_steps} steps"
        remedy = "raise it to go on, or give trainer.resume=never to start anew"
        print(f"nothing left to train: {finished}; {remedy}", file=sys.stderr)
        return start
    return Trainer(config).fit(progress)


class Trainer:
    """Policy, optimizer and data of a run.

    Args:
        config: of the run.
    """

    def __init__(self, config: Config) -> None:
        """Loads everything, the model last but for the checkpoint that the run resumes from."""
        self.config, self.step = config, 0
        actor, trainer = config.worker.actor, config.trainer
        if trainer.threads:
            torch.set_num_threads(trainer.threads)
        device = resolve_device(trainer.device, name="trainer.device")
        self.view_maker = ViewMaker(config.algorithm, trainer.seed, device)
        score = _reward_of(config.worker.reward)
        self.data = self._load(config.data.train_files)
        self.data_size = min(len(self.data), config.data.limit or len(self.data))
        self.val_data = self._load(config.data.val_files) if config.data.val_files else None
        self.policy = Policy.load(actor.model_path, device=device)
        if actor.freeze_vision:
            self.policy.model.model.visual.requires_grad_(False)
        self.policy_loss = PolicyLoss(
            self.policy,
            config.algorithm.roma,
            update=actor.update,
            share_prompt=actor.share_prompt,
        )
        if actor.share_prompt and not self.policy_loss.share_prompt:
            kind = type(self.policy.model).__name__
            print(f"{kind} cannot share prompts: a row per rollout instead", file=sys.stderr)
        sampler = HfSampler(self.policy)
        self.collector = Collector(config, self.policy_loss, sampler, score, self.view_maker)
        trained = [weight for weight in self.policy.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(
            trained, lr=actor.lr, betas=actor.betas, weight_decay=actor.weight_decay
        )
        self.scheduler = LambdaLR(self.optimizer, self._rate)
        start = checkpoint.starting_point(trainer.out, trainer.resume)
        if start:
            state = checkpoint.restore(
                start, policy=self.policy, optimizer=self.optimizer, scheduler=self.scheduler
            )
            self.step = state["step"]
            self._apply_optimizer_options()

    def _apply_optimizer_options(self) -> None:
        """This run's options over those that a checkpoint's optimizer and schedule bring along."""
        actor = self.config.worker.actor
        rate = self._rate(self.scheduler.last_epoch)
        for group in self.optimizer.param_groups:
            group |= {"lr": actor.lr * rate, "initial_lr": actor.lr}
            group |= {"betas": actor.betas, "weight_decay": actor.weight_decay}
        self.scheduler.base_lrs = [actor.lr] * len(self.optimizer.param_groups)

    def fit(self, progress: Progress | None = None) -> Path:
        """Runs the remaining steps."""
        trainer = self.config.trainer
        out, last, resumed_at = Path(trainer.out), trainer.total_steps, self.step or None
        log = open_log(
            trainer.logger,
            out,
            total_steps=last,
            resumed_at=resumed_at,
            project=trainer.project_name,
            experiment=trainer.experiment_name,
            config=to_dict(self.config),
        )
        (out / "config.yaml").write_text(dump(self.config), encoding="utf-8")
        with ExitStack() as files:
            files.enter_context(log)
            view_log = None
            if "file" in trainer.logger and self.view_maker.count:
                view_log = JsonLines(out / "views.jsonl", resumed_at=resumed_at)
                files.enter_context(closing(view_log))
            while self.step < last:
                self.step += 1
                metrics = self.train_step(view_log)
                if trainer.val_freq and self.step % trainer.val_freq == 0:
                    metrics |= self.validate()
                if self.step == last or (trainer.save_freq and self.step % trainer.save_freq == 0):
                    metrics |= self.save()
                log.log(self.step, metrics)
                if progress:
                    progress(self.step, metrics)
        return out / f"global_step_{self.step}"

    def train_step(self, view_log: JsonLines | None = None) -> dict[str, float]:
        """One step of training; returns its metrics, and logs its views."""
        clock = Stopwatch()
        with clock.stage("step"):
            with clock.stage("gen"):
                experience, metrics = self.collector.collect(self.draw(), self.step)
            with clock.stage("views"):
                views = experience.views.result()
            if len(views.specs) > self.config.algorithm.views.k:
                with clock.stage("choose_views"):
                    views = self.choose(experience, views)
            if view_log:
                view_log.write(self.step, views.rows(experience.examples))
            metrics |= views.metrics()
            with clock.stage("update_actor"):
                seen = views if self.view_maker.loss_sees_views else Views.none()
                metrics |= self.update(experience, seen)
        metrics |= clock.metrics
        tokens = int(experience.rollouts.mask.sum())
        metrics["perf/tokens_per_second"] = tokens / metrics["timing_s/step"]
        metrics["perf/peak_memory_mib"] = peak_memory(self.policy.device)
        return metrics

    def draw(self) -> list[Example]:
        """The step's questions: each epoch takes every row once, in its own order."""
        count, rows = self.config.data.rollout_batch_size, self.data_size
        first = (self.step - 1) * count
        epochs = range(first // rows, (first + count - 1) // rows + 1)
        order = torch.cat([self._order(epoch) for epoch in epochs])[first % rows :]
        return [self.data[i] for i in order[:count].tolist()]

    def _order(self, epoch: int) -> Tensor:
        seed = seed_for(self.config.data.seed, "epoch", epoch)
        return torch.randperm(self.data_size, generator=torch.Generator().manual_seed(seed))

    def choose(self, experience: Experience, candidates: Views) -> Views:
        """The K candidates of each prompt on which the policy diverges most."""
        limit = self.config.worker.actor.micro_batch_tokens
        with self.policy.autocast(self.config.trainer.dtype):
            divergence = self.policy_loss.divergence(experience.batch(candidates), limit=limit)
        right = experience.correct.view(len(experience.examples), -1)
        kept = hardest(divergence, right, self.config.algorithm.views.k)
        return candidates.keep(experience.prompts, kept)

    def update(self, experience: Experience, views: Views) -> dict[str, float]:
        """All optimizer steps on one experience; returns the mean of their metrics."""
        config, size = self.config, self.config.worker.actor.mini_batch_size
        batch = experience.batch(views, aux_view=self._aux_view(experience, views))
        minis = list(batch.split(size))
        # The first one's log-probs are the sampler's; after it the policy is another.
        minis[1:] = [self._with_old_logp(mini) for mini in minis[1:]]
        found = defaultdict(list)
        for epoch in range(config.worker.actor.ppo_epochs):
            for number, mini in enumerate(minis):
                specs = [column[number * size : (number + 1) * size] for column in views.specs]
                metrics, logp = self._optimizer_step(mini, specs)
                if not epoch and not number and config.worker.actor.ppo_epochs > 1:
                    minis[0] = replace(mini, old_logp=logp)
                for name, value in metrics.items():
                    found[f"actor/{name}"].append(value)
        # A corruption that an update has not seen has no value there.
        mean = {name: sum(values) / len(values) for name, values in found.items()}
        return mean | {"actor/lr": float(self.scheduler.get_last_lr()[0])}

    def _aux_view(self, experience: Experience, views: Views) -> Tensor | None:
        """[B]: the view of each rollout on which the auxiliary loss is taken."""
        if not views.pixels or self.config.algorithm.roma.lambda_aux == 0:
            return None
        seed = seed_for(self.config.trainer.seed, "aux_view", self.step)
        generator = torch.Generator().manual_seed(seed)
        if self.config.algorithm.aux_view == "rollout":
            drawn = torch.randint(len(views.pixels), experience.group.shape, generator=generator)
            return drawn.to(self.policy.device)
        prompts = (len(experience.examples),)
        drawn = torch.randint(len(views.pixels), prompts, generator=generator)
        return drawn.to(self.policy.device)[experience.group]

    def _with_old_logp(self, batch: UpdateBatch) -> UpdateBatch:
        limit = self.config.worker.actor.micro_batch_tokens
        with self.policy.autocast(self.config.trainer.dtype):
            return replace(batch, old_logp=self.policy_loss.score(batch, limit=limit).logp)

    def _optimizer_step(
        self, batch: UpdateBatch, specs: Sequence[Sequence[ViewSpec]]
    ) -> tuple[dict[str, float], Tensor]:
        """One optimizer step on a mini-batch, by micro-batches: metrics, and log-probs [B, T]."""
        totals, scored = batch.totals(), 0
        metrics: dict[str, float] = defaultdict(float)
        logp = torch.zeros_like(batch.mask, dtype=torch.float32)
        divergence = logp.new_full((len(batch.view_pixels), len(batch.group)), torch.nan)
        self.optimizer.zero_grad()
        limit = self.config.worker.actor.micro_batch_tokens
        for rows, part in self.policy_loss.parts(batch, limit):
            with self.policy.autocast(self.config.trainer.dtype):
                out = self.policy_loss(part, totals)
            out.loss.backward()
            for name, value in out.metrics.items():
                if specs or not name.startswith("roma_"):
                    metrics[name] += float(value)
            logp[rows], divergence[:, rows] = out.logp, out.divergence
            scored += out.scored
        metrics["ppo_kl"] *= totals.tokens / max(scored, 1)  # a mean over what was run
        largest = self.config.worker.actor.max_grad_norm
        metrics["grad_norm"] = float(clip_grad_norm_(self.policy_loss.parameters(), largest))
        self.optimizer.step()
        self.scheduler.step()
        if specs:
            metrics.update(by_corruption(divergence, specs))
        return dict(metrics), logp

    def _rate(self, update: int) -> float:
        """The learning rate of an optimizer step, as a share of the peak."""
        actor = self.config.worker.actor
        if update < actor.warmup_steps:
            return (update + 1) / actor.warmup_steps
        if actor.schedule == "constant":
            return 1.0
        total = self.config.trainer.total_steps * self.config.updates_per_step
        return max(total - update, 0) / max(total - actor.warmup_steps, 1)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean reward of greedy answers on clean validation images."""
        assert self.val_data is not None  # Config refuses val_freq without val_files
        clock, size = Stopwatch(), self.config.data.rollout_batch_size
        batches, rows = self.config.trainer.val_batches, len(self.val_data)
        count = rows if batches is None else min(batches * size, rows)
        scores: dict[str, list[Tensor]] = defaultdict(list)
        with clock.stage("testing"):
            for start in range(0, count, size):
                examples = self.val_data[start : min(start + size, count)]
                for part, values in self.collector.answer(examples).items():
                    scores[part].append(values)
        means = {f"val/{part}": float(torch.cat(v).mean()) for part, v in scores.items()}
        return clock.metrics | means

    def save(self) -> dict[str, float]:
        """Writes a checkpoint; returns the time that it took."""
        clock = Stopwatch()
        with clock.stage("save"):
            checkpoint.save(
                self.config.trainer.out,
                self.step,
                policy=self.policy,
                optimizer=self.optimizer,
                scheduler=self.scheduler,
                state={"step": self.step},
                keep=self.config.trainer.save_limit,
            )
        return clock.metrics

    def _load(self, path: str) -> RomaDataset:
        data = self.config.data
        columns = Columns(images=data.image_key, problem=data.prompt_key, answer=data.answer_key)
        rows = load_dataset_rows(
            path, columns=columns, image_dir=data.image_dir, skip_broken=data.skip_broken
        )
        for _, reason in rows.skipped:
            print(f"skipped {reason}", file=sys.stderr)
        return rows


def _reward_of(config: RewardConfig) -> RewardFunction:
    if config.function != "builtin":
        return load_reward(config.function)
    return partial(compute_score, format_weight=config.format_weight, strict_end=config.strict_end)


def _announce(config: Config, start: Path | None) -> None:
    """Prints what is about to run, and what differs from the run that it continues."""
    trainer = config.trainer
    device = resolve_device(trainer.device, name="trainer.device")
    if "console" in trainer.logger:
        name, reason = choose(device.type)
        resumed = f", from {start}" if start else ""
        print(f"run folder: {trainer.out}{resumed}")
        print(f"model: {config.worker.actor.model_path}, on {device}")
        print(f"back end: auto takes {name}: {reason}", flush=True)
    if start is None:
        return
    try:
        changed = changed_options(start.parent / "config.yaml", config)
    except (OSError, ValueError) as error:
        print(f"options of {start} are not compared: {error}", file=sys.stderr)
        return
    for key, values in changed.items():
        old, new = (json.dumps(value, ensure_ascii=False) for value in values)
        note = "; the weights are the checkpoint's" if key == "worker.actor.model_path" else ""
        print(f"changed since {start}: {key}: {old} -> {new}{note}", file=sys.stderr)
