"""The training loop, to be read from top to bottom: draw, collect, views, update, log, save.

GRPO on clean images, with a second, teacher-forced pass over K degraded views of them. One step:

    draw prompts → sample G completions on the clean images → rewards → advantages
    degrade each image K times, meanwhile
    clean and view passes, loss, backward → optimizer step

Every random draw is a function of (run seed, step, row id), so that a resumed run equals an
uninterrupted one.
"""

import difflib
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from roma.data import Columns, Example, RomaDataset, load_dataset_rows
from roma.models.device import resolve_device
from roma.models.lora import add_adapters
from roma.models.qwen_vl import Policy
from roma.rewards import make_reward
from roma.rollout import make_sampler
from roma.rollout.base import Closeable, Sampler
from roma.train import checkpoint, ranks
from roma.train.alarms import Alarms
from roma.train.collect import Collector
from roma.train.config import Config, changed_options, dump, to_dict
from roma.train.contrast import Contrast
from roma.train.engine import SHARDED, Within, chosen, make_engine
from roma.train.late import LateViews
from roma.train.learner import Learner
from roma.train.loggers import JsonLines, open_log
from roma.train.metrics import Stopwatch, memory, peak_memory
from roma.train.signals import Preemption
from roma.train.update import PolicyLoss
from roma.train.views import ViewMaker, Views
from roma.views import seed_for
from roma_kernels.backends import choose
from roma_kernels.errors import fail

Progress = Callable[[int, Mapping[str, float]], None]


def train(config: Config, *, progress: Progress | None = None) -> Path:
    """Trains a policy and returns the folder of its last checkpoint (`actor/` in it is the model).

    One process, or each that torchrun, `accelerate launch` or `deepspeed` has started. SIGTERM or
    SIGUSR1 ends the run after the step at hand and a checkpoint.

    Says on stdout what runs, if the console is one of the loggers, and on stderr which options of a
    resumed run have changed, and that a run is finished.

    Args:
        config: see `roma.train.config`; `roma train --list-keys` prints every key.
        progress: called after each step with (step, its metrics), on the first rank.

    Raises:
        ValueError: device, model, data or checkpoint do not fit; the message says what to do.
    """
    ranks.take_card()
    device = resolve_device(config.trainer.device, name="trainer.device")
    alone = config.trainer.engine not in ("auto", "single")
    with ranks.started(device, alone=alone) as device:
        start = checkpoint.starting_point(config.trainer.out, config.trainer.resume)
        done = checkpoint.step_of(start) if start else 0
        if ranks.rank() == 0:
            _announce(config, start, device)
        if start and done >= config.trainer.total_steps:
            if ranks.rank() == 0:
                finished = f"{start} has trainer.total_steps = {config.trainer.total_steps} steps"
                remedy = "raise it to go on, or give trainer.resume=never to start anew"
                print(f"nothing left to train: {finished}; {remedy}", file=sys.stderr)
            return start
        trainer = Trainer(config, device, start)
        try:
            return trainer.fit(progress)
        finally:
            trainer.close()


class Trainer:
    """Policy, optimizer and data of a run.

    Args:
        config: of the run.
        device: of this process; None: the configuration's.
        start: the checkpoint to resume from, verified; None: as the configuration says.
    """

    def __init__(
        self, config: Config, device: torch.device | None = None, start: Path | None = None
    ) -> None:
        """Loads everything, the model last but for the checkpoint that the run resumes from."""
        self.config, self.step = config, 0
        trainer, engine = config.trainer, chosen(config)
        ranks.share(config.worker.actor.mini_batch_size, "worker.actor.mini_batch_size")
        if trainer.threads:
            torch.set_num_threads(trainer.threads)
        device = device or resolve_device(trainer.device, name="trainer.device")
        self.view_maker = ViewMaker(config.algorithm, trainer.seed, device)
        contrast = Contrast.of(config.algorithm)
        if contrast:
            masked = replace(self.view_maker.masked, parameter=contrast.probability)
            self.view_maker.masked = masked
        score = make_reward(config.worker.reward)
        self.data = self._load(config.data.train_files)
        self.data_size = min(len(self.data), config.data.limit or len(self.data))
        self.val_data = self._load(config.data.val_files) if config.data.val_files else None
        # Where weights are sharded no card has to hold all of them.
        self.policy = _policy(config, torch.device("cpu") if engine in SHARDED else device)
        policy_loss = _policy_loss(config, self.policy)
        self.engine = make_engine(config, policy_loss, device, self._rate)
        self.learner = Learner(config, self.engine)
        self.late_views = LateViews(self.learner, self.view_maker)
        self.collector = Collector(
            config, self.engine, self._sampler(), score, self.view_maker, self.data
        )
        start = start or checkpoint.starting_point(trainer.out, trainer.resume)
        self._resumed_from = start
        if start:
            state = checkpoint.restore(start, policy=self.policy, engine=self.engine)
            self.step = state["step"]
            self.learner.load_state_dict(state.get("learner", {}))
            self.collector.advantages.load_state_dict(state.get("advantages", {}))

    def _sampler(self) -> Sampler:
        engine, options = self.engine, self.config.worker.rollout
        sampler = make_sampler(
            options,
            self.policy,
            weights=engine.weights,
            version=lambda: engine.version,
            synced=engine.sharded,
        )
        return Within(engine, sampler) if options.name == "hf" else sampler

    def close(self) -> None:
        """Ends an engine of the sampler's own, while the ranks are still together."""
        if isinstance(self.collector.sampler, Closeable):
            self.collector.sampler.close()

    def fit(self, progress: Progress | None = None) -> Path:
        """Runs the remaining steps, or as many as there are before a request to stop."""
        trainer = self.config.trainer
        out, last, resumed_at = Path(trainer.out), trainer.total_steps, self.step or None
        first = ranks.rank() == 0
        log = open_log(
            trainer.logger,
            out,
            total_steps=last,
            resumed_at=resumed_at,
            project=trainer.project_name,
            experiment=trainer.experiment_name,
            config=to_dict(self.config),
            active=first,
        )
        if first:
            (out / "config.yaml").write_text(dump(self.config), encoding="utf-8")
        alarms = Alarms(self.config)
        with ExitStack() as opened:
            opened.enter_context(log)
            preemption = opened.enter_context(Preemption())
            view_log = None
            if first and "file" in trainer.logger:
                if self.view_maker.count:
                    view_log = JsonLines(out / "views.jsonl", resumed_at=resumed_at)
                    opened.enter_context(closing(view_log))
                failures = JsonLines(out / "reward_failures.jsonl", resumed_at=resumed_at)
                opened.enter_context(closing(failures))
                self.collector.failure_log = failures.write
            save_time: dict[str, float] = {}  # of the step before, whose line was written
            while self.step < last:
                self.step += 1
                metrics = save_time | self.train_step(view_log)
                self._check_best(metrics)
                stop = preemption.requested()
                if not stop and trainer.val_freq and self.step % trainer.val_freq == 0:
                    metrics |= self.validate()
                # Before the checkpoint: a run that is killed in between logs the step again.
                log.log(self.step, metrics)
                due = trainer.save_freq and self.step % trainer.save_freq == 0
                save_time = {}
                if self.step == last or due or stop:
                    save_time = self.save(metrics)
                    stop = stop or preemption.requested()  # while it was saved
                if first:
                    log.warn(alarms.check(self.step, metrics))
                if progress and first:
                    progress(self.step, metrics)
                if stop and self.step < last:
                    if first:
                        saved = f"step {self.step} is saved, the same command goes on"
                        print(f"stopped by {preemption.name}: {saved}", file=sys.stderr)
                    break
        return out / f"global_step_{self.step}"

    def _check_best(self, metrics: Mapping[str, float]) -> None:
        """Raises ValueError if no step has the metric by which the best checkpoint is kept."""
        best = self.config.trainer.best_metric
        if best is None or best in metrics or best.startswith("val/"):
            return
        near = difflib.get_close_matches(best, metrics, n=1)
        remedy = f"did you mean {near[0]}?" if near else "`roma train --list-metrics` has them"
        fail("trainer.best_metric", "a metric that every step logs", repr(best), remedy)

    def train_step(self, view_log: JsonLines | None = None) -> dict[str, float]:
        """One step of training; returns its metrics, and logs its views."""
        clock = Stopwatch()
        with clock.stage("step"):
            with clock.stage("gen"):
                experience, metrics = self.collector.collect(self.draw(), self.step)
            with clock.stage("views"):
                views = experience.views.result()
            if self.late_views.needed:
                with clock.stage("choose_views"):
                    views = self.late_views.of(experience, views, self.step)
                kept: Future[Views] = Future()
                kept.set_result(views)
                experience = replace(experience, views=kept)  # the others' pixels are let go
            if self.view_maker.count:
                rows = ranks.told(list(views.rows(experience.examples)))
                if view_log:
                    view_log.write(self.step, [row for own in rows for row in own])
            metrics |= views.metrics()
            with clock.stage("update_actor"):
                seen = views if self.view_maker.loss_sees_views else Views.none()
                metrics |= self.learner.update(experience, seen, self.step)
                self.collector.advantages.observe(metrics)
        metrics |= clock.metrics
        tokens = sum(ranks.told(int(experience.rollouts.mask.sum())))
        metrics["perf/tokens_per_second"] = tokens / metrics["timing_s/step"]
        metrics["perf/memory_mib"] = max(ranks.told(memory(self.engine.device)))
        metrics["perf/peak_memory_mib"] = max(ranks.told(peak_memory(self.engine.device)))
        return metrics

    def draw(self) -> list[Example]:
        """This rank's of the step's questions: an epoch takes every row once, in its own order.

        With algorithm.mssr.prioritised a step takes rows by what is tracked of them.
        """
        count, rows = self.config.data.rollout_batch_size, self.data_size
        mssr = self.collector.advantages.mssr
        if mssr is not None and mssr.options.prioritised:
            drawn = mssr.draw(self.step, count)
            return [self.data[i] for i in drawn[self.learner.own()].tolist()]
        first = (self.step - 1) * count
        epochs = range(first // rows, (first + count - 1) // rows + 1)
        order = torch.cat([self._order(epoch) for epoch in epochs])[first % rows :]
        return [self.data[i] for i in order[self.learner.own()].tolist()]

    def _order(self, epoch: int) -> Tensor:
        seed = seed_for(self.config.data.seed, "epoch", epoch)
        return torch.randperm(self.data_size, generator=torch.Generator().manual_seed(seed))

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
                questions = list(range(start, min(start + size, count)))
                own = questions[ranks.rank() :: ranks.ranks()]
                # A rank without a question answers one, too: the model's calls are all ranks'.
                examples = [self.val_data[i] for i in own or questions[:1]]
                for part, values in self.collector.answer(examples).items():
                    scores[part].append(values[: len(own)])
        means = {
            f"val/{part}": float(ranks.gathered(torch.cat(values)).mean())
            for part, values in scores.items()
        }
        return clock.metrics | means

    def save(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Writes a checkpoint; returns the time that it took."""
        clock, trainer = Stopwatch(), self.config.trainer
        with clock.stage("save"):
            checkpoint.save(
                trainer.out,
                self.step,
                engine=self.engine,
                policy=self.policy,
                state={
                    "step": self.step,
                    "metrics": dict(metrics),
                    "learner": self.learner.state_dict(),
                    "advantages": self.collector.advantages.state_dict(),
                },
                keep=trainer.save_limit,
                best_of=trainer.best_metric,
                resumed_from=self._resumed_from,
            )
        return clock.metrics

    def _load(self, path: str) -> RomaDataset:
        data = self.config.data
        columns = Columns(images=data.image_key, problem=data.prompt_key, answer=data.answer_key)
        rows = load_dataset_rows(
            path,
            columns=columns,
            image_dir=data.image_dir,
            skip_broken=data.skip_broken,
            format_prompt=data.format_prompt,
        )
        for _, reason in rows.skipped if ranks.rank() == 0 else ():
            print(f"skipped {reason}", file=sys.stderr)
        return rows


def _policy(config: Config, device: torch.device) -> Policy:
    """The model as it is trained."""
    actor = config.worker.actor
    policy = Policy.load(actor.model_path, device=device)
    if config.data.plain_think_tokens is not None:
        policy.processor.plain_think_tokens = config.data.plain_think_tokens
    if actor.freeze_vision:
        policy.model.model.visual.requires_grad_(False)
    if actor.lora.rank:
        add_adapters(
            policy,
            rank=actor.lora.rank,
            alpha=actor.lora.alpha,
            targets=actor.lora.targets,
            seed=config.trainer.seed,
        )
    if actor.gradient_checkpointing:
        policy.checkpoint()
    return policy


def _policy_loss(config: Config, policy: Policy) -> PolicyLoss:
    actor = config.worker.actor
    made = PolicyLoss(
        policy,
        config.algorithm.roma,
        update=actor.update,
        share_prompt=actor.share_prompt,
        contrast=Contrast.of(config.algorithm),
    )
    if actor.share_prompt and not made.share_prompt and ranks.rank() == 0:
        kind = type(policy.model).__name__
        print(f"{kind} cannot share prompts: a row per rollout instead", file=sys.stderr)
    return made


def _announce(config: Config, start: Path | None, device: torch.device) -> None:
    """Prints what is about to run, and what differs from the run that it continues."""
    trainer = config.trainer
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
