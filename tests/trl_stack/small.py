"""A short run of a GRPO trainer on the small Qwen3-VL; it keeps all that a step is made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor
from transformers import Qwen3VLForConditionalGeneration as Qwen3VL
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from examples.trl import tiny
from roma.integrations.trl import RomaGRPOConfig, RomaGRPOTrainer
from roma.testing.tolerance import Bound, check, many

LAMBDAS = {"lambda_inv": 1.7, "lambda_aux": 0.6}
PARTS = ("model.visual", "model.language_model.embed", "model.language_model.layers", "lm_head")
SCALE = 5  # of the weights: views then move log-probs by 0.2 nats, as drawn they move by 0.02


def model(folder: Path) -> Path:
    """Writes a model that sees its image, and still samples every word."""
    made = Qwen3VL.from_pretrained(tiny.model(folder))
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if weight.ndim > 1 and "embed" not in name and "lm_head" not in name:
                weight.mul_(SCALE)
    made.save_pretrained(folder)
    return folder


def questions(count: int = 16) -> Dataset:
    """Prompts of two lengths, each with a noisy image of its own."""
    draw = np.random.default_rng(0)
    pixels = draw.integers(60, 200, (count, 48, 64, 3), dtype=np.uint8)
    pixels[:, 8:32, 8:40] = draw.integers(0, 256, (count, 1, 1, 3))
    texts = [("which way do the stripes run", "say which way")[n % 2] for n in range(count)]
    return Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": text}] for text in texts],
            "images": [[Image.fromarray(own)] for own in pixels],
        }
    )


def right(completion: list[int]) -> bool:
    """The rule of the tests: a completion is right if its ids add up to an odd number."""
    return sum(completion) % 2 == 1


def form(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that is not the one of accuracy."""
    return [len(own) / 10 for own in completion_ids]


def accuracy(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """1 for a right one."""
    return [float(right(own)) for own in completion_ids]


@dataclass
class Step:
    """One optimizer step.

    Attributes:
        number: steps done before it.
        weights: the model's, before it.
        batches: its micro-batches, as the loss got them.
        losses: what the loss returned for each.
        gradients: what the optimizer got.
    """

    number: int
    weights: dict[str, Tensor]
    batches: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)


def copied(value: Any) -> Any:
    """Tensors of a batch, no longer shared with the trainer."""
    return value.detach().clone() if isinstance(value, Tensor) else value


def weights_of(trainer: GRPOTrainer) -> dict[str, Tensor]:
    """The weights as they are now."""
    return {k: v.detach().clone() for k, v in trainer.model.named_parameters()}


class _Keep(TrainerCallback):
    def __init__(self, run: Any) -> None:
        self.run = run

    def on_step_begin(self, args, state, control, **_):
        self.run.steps.append(Step(state.global_step, weights_of(self.run)))

    def on_pre_optimizer_step(self, args, state, control, **_):
        step = self.run.steps[-1]
        for name, weight in self.run.model.named_parameters():
            grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            step.gradients[name] = grad.detach().clone()


def watched(base: type[GRPOTrainer]) -> type[GRPOTrainer]:
    """The trainer, keeping its steps."""

    class Watched(base):  # type: ignore[misc,valid-type]
        def __init__(self, *args: Any, alter: Any = None, **kwargs: Any) -> None:
            self.steps: list[Step] = []
            self.alter = alter  # changes what a generation gave, in place
            super().__init__(*args, **kwargs)
            self.add_callback(_Keep(self))

        def _generate_and_score_completions(self, inputs):
            made = super()._generate_and_score_completions(inputs)
            if self.alter is not None:
                self.alter(made)
            return made

        def _compute_loss(self, model, inputs):
            kept = {name: copied(value) for name, value in inputs.items()}
            # The branch that a vLLM sampler takes, without one.
            before, self.use_vllm = self.use_vllm, "importance_sampling_ratio" in inputs
            try:
                loss = super()._compute_loss(model, inputs)
            finally:
                self.use_vllm = before
            if self.model.training:
                self.steps[-1].batches.append(kept)
                self.steps[-1].losses.append(float(loss.detach()))
            return loss

    return Watched


Stock, Roma = watched(GRPOTrainer), watched(RomaGRPOTrainer)


def build(
    folder: Path,
    out: Path,
    *,
    base: type[GRPOTrainer] = Roma,
    data: Dataset | None = None,
    given: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """A trainer: 2 micro-batches of 4 rollouts a step, 6 tokens, 2 views.

    Args:
        folder: of the model.
        out: where it may write.
        base: which of the two.
        data: `questions` if not given.
        given: further arguments of the trainer.
        options: of RomaGRPOConfig; those of GRPOConfig alone if `base` is Stock.
    """
    plain: dict[str, Any] = {
        "output_dir": str(out),
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "gradient_accumulation_steps": 2,
        "max_completion_length": 6,
        "max_steps": 1,
        "learning_rate": 1e-2,
        "optim": "sgd",
        "max_grad_norm": 0.0,  # no clipping of gradients
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "accuracy_reward": "accuracy",
    }
    if base is Stock:
        del plain["accuracy_reward"]
    config = (GRPOConfig if base is Stock else RomaGRPOConfig)(**{**plain, **options})
    return base(
        model=Qwen3VL.from_pretrained(folder),
        processing_class=tiny.processor(folder),
        reward_funcs=[form, accuracy],
        train_dataset=questions() if data is None else data,
        args=config,
        **(given or {}),
    )


def run(folder: Path, out: Path, **how: Any) -> Any:
    """A trainer that has trained."""
    trainer = build(folder, out, **how)
    trainer.train()
    return trainer


def vector(named: dict[str, Tensor], part: str = "") -> Tensor:
    """The weights of a part of the model, in one."""
    return torch.cat([x.flatten() for name, x in sorted(named.items()) if name.startswith(part)])


def held(trainer: Any, oracle: Any, number: int = 0) -> dict[str, Bound]:
    """Gradient and losses of a step against the formulas: plain PyTorch's own error, twice.

    The largest weight hides the others, so each part of the model is compared by itself.
    """
    eager = oracle.gradient(number, torch.float32)
    want, got = oracle.gradient(number), trainer.steps[number].gradients
    # A loss is a mean of products of advantages and ratios of a small head's log-probs.
    for mine, loss in zip(trainer.steps[number].losses, oracle.losses, strict=True):
        assert abs(mine - loss) <= many(1 + abs(loss))
    return {
        part: check(
            f"gradient of {part}",
            vector(got, part),
            vector(want, part),
            vector(eager, part),
            dtype=torch.float32,
        )
        for part in PARTS
    }
