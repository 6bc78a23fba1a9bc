"""RomaGRPOTrainer's gradient, from what its loss was given and from the dataset's own images.

In float64, one row and one image at a time, without padding; every pair of view and row. The clean
objective is docs/MATH.md section 3's table, ROMA's terms are section 2's; no line is shared with
the trainer. In float32 the same lines are plain PyTorch, whose error bounds the trainer's.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import Qwen3VLForConditionalGeneration as Qwen3VL
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from trl_stack.small import Step, right

from roma.views import degrade_batch, sample, seed_for

BY_TOKEN = ("dapo", "cispo", "vespo")
CLIPPED = ("grpo", "bnpo", "dapo", "dr_grpo", "luspo")


class Float64(TorchFunctionMode):
    """Norms, rotations and softmax, which the model's code casts to float32, stay float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        doubles = isinstance(args[0], Tensor) and args[0].dtype == torch.float64 if args else False
        if doubles and func is Tensor.float:
            return args[0]
        if doubles and func is Tensor.to and torch.float32 in args[1:]:
            return args[0]
        if doubles and kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


@dataclass
class Row:
    """A rollout, without padding."""

    prompt: Tensor
    completion: Tensor
    images: list[np.ndarray]  # at the model's resolution
    clean: dict[str, Tensor]  # what the image processor makes of the dataset's images
    right: bool
    key: str
    advantages: Tensor  # [T]
    counted: Tensor  # [T] bool
    old: Tensor | None
    ref: Tensor | None
    weight: Tensor | None  # [T]


def digest(images: Sequence[np.ndarray]) -> str:
    """What a draw is keyed by; a change of it changes the views of every run."""
    made = hashlib.blake2b(digest_size=16)
    for image in images:
        made.update(repr(image.shape).encode() + image.tobytes())
    return made.hexdigest() if images else ""


def shown(image: Image.Image, processor: Any) -> np.ndarray:
    """[H, W, 3] uint8: a file's image as a Qwen-VL model sees it."""
    clear = image.convert("RGBA")  # what is transparent is white; convert("RGB") would show it
    white = Image.new("RGBA", clear.size, "white")
    rgb, size = Image.alpha_composite(white, clear).convert("RGB"), processor.size
    factor = processor.patch_size * processor.merge_size
    low, high = size["shortest_edge"], size["longest_edge"]
    height, width = smart_resize(rgb.height, rgb.width, factor, low, high)
    return np.asarray(rgb.resize((width, height), Image.Resampling.BICUBIC))


class Oracle:
    """Loss and gradient of a step of a run.

    Args:
        trainer: that ran; its options, data and processor are used, never its methods.
        folder: of the model.
        plant: an error that is made on purpose, by name.
    """

    def __init__(self, trainer: Any, folder: Path, plant: str = "") -> None:
        self.args, self.plant = trainer.args, plant
        self.losses: list[float] = []
        self._views: dict[tuple[str, int, int], dict[str, Tensor]] = {}
        self.steps: list[Step] = trainer.steps
        self.folder, self.processor = folder, trainer.processing_class.image_processor
        self.image_token = trainer.model.config.image_token_id
        # The rows of the dataset by their pixels, bit by bit: what else a micro-batch has is wrong.
        self.data: dict[bytes, tuple[list[np.ndarray], dict[str, Tensor]]] = {b"": ([], {})}
        for row in trainer.train_dataset:
            if row["images"]:
                made = dict(self.processor(images=row["images"], return_tensors="pt"))
                own = [shown(image, self.processor) for image in row["images"]]
                self.data[made["pixel_values"].numpy().tobytes()] = own, made

    # What a row is

    def rows(self, batch: dict[str, Any]) -> list[Row]:
        count = len(batch["completion_ids"])
        numbers = batch.get("num_images") or [0] * count
        per_image = (
            [] if "image_grid_thw" not in batch else batch["image_grid_thw"].prod(1).tolist()
        )
        patches, image = 0, 0
        made = []
        for b, number in enumerate(numbers):
            length = sum(per_image[image : image + number])
            pixels = batch["pixel_values"][patches : patches + length] if number else None
            patches, image = patches + length, image + number
            images, clean = self.data[b"" if pixels is None else pixels.numpy().tobytes()]
            kept = batch["completion_mask"][b].bool()
            completion = batch["completion_ids"][b][kept]

            def own(
                name: str, b: int = b, kept: Tensor = kept, batch: Any = batch
            ) -> Tensor | None:
                value = batch.get(name)
                return None if value is None else value[b].expand(len(kept))[kept].double()

            counted, advantages = own("tool_mask"), own("advantages")
            assert advantages is not None
            if counted is None or self.plant == "tool mask":
                counted = torch.ones(len(completion))
            made.append(
                Row(
                    batch["prompt_ids"][b][batch["prompt_mask"][b].bool()],
                    completion,
                    images,
                    clean,
                    right(completion.tolist()),
                    digest(images),
                    advantages,
                    counted.bool(),
                    own("old_per_token_logps"),
                    own("ref_per_token_logps"),
                    own("importance_sampling_ratio"),
                )
            )
        return made

    def view(self, row: Row, k: int, step: int) -> dict[str, Tensor]:
        """What the image processor makes of view k."""
        args, drawn = self.args, step + (self.plant == "view")
        if (row.key, k, drawn) in self._views:
            return self._views[row.key, k, drawn]
        specs = sample(
            args.view_pool,
            args.num_views,
            (args.view_seed, drawn, row.key),
            max_level=args.view_max_level,
            strength=args.view_strength,
        )
        seeds = [seed_for(args.view_seed, drawn, row.key, k, n) for n in range(len(row.images))]
        images = degrade_batch(row.images, [specs[k]] * len(seeds), seeds)
        made = dict(self.processor(images=images, do_resize=False, return_tensors="pt"))
        self._views[row.key, k, drawn] = made
        return made

    def sampled(self, row: Row, step: int) -> int:
        """The view of the auxiliary loss."""
        ids = np.asarray(row.completion.tolist(), np.int64)
        completion = hashlib.blake2b(ids.tobytes()).hexdigest()
        seed = seed_for("auxiliary view", self.args.view_seed, step, row.key, completion)
        return (seed + (self.plant == "aux view")) % self.args.num_views

    def scored(self, model: Any, row: Row, pixels: dict[str, Tensor], late: int = 0) -> Any:
        """Log-probs and entropies [T] of the completion's tokens."""
        ids = torch.cat([row.prompt, row.completion])[None]
        kinds = (ids == self.image_token).int()
        given = {
            name: value.to(model.dtype) if value.is_floating_point() else value
            for name, value in pixels.items()
        }
        logits = model(input_ids=ids, mm_token_type_ids=kinds, **given).logits[0]
        first = len(row.prompt) - 1 + late
        logits = logits[first : first + len(row.completion)] / self.args.temperature
        logp = logits.log_softmax(-1)
        own = logp.gather(-1, row.completion[:, None])[:, 0]
        return own, -(logp.exp() * logp).sum(-1)

    # The loss

    def clipped(self, x: Tensor, gain: Tensor, low: float, high: float, c: float | None) -> Tensor:
        """MATH.md section 3, with the dual clip."""
        rho = x.clamp(-20, 20).exp()
        loss = -torch.minimum(rho * gain, rho.clamp(1 - low, 1 + high) * gain)
        return loss if c is None else torch.where(gain < 0, loss.minimum(-c * gain), loss)

    def main(self, row: Row, logp: Tensor) -> Tensor:
        """The clean objective of a row's tokens, with its KL."""
        args, gain, loss_type = self.args, row.advantages, self.args.loss_type
        x = logp - (logp.detach() if row.old is None else row.old)
        mean = (x * row.counted).sum() / row.counted.sum().clamp(min=1)
        level = x if args.importance_sampling_level == "token" else mean.expand_as(x)
        rho = level.exp()
        low = args.epsilon
        high = args.epsilon if args.epsilon_high is None else args.epsilon_high
        if loss_type == "cispo":
            loss = -rho.clamp(max=high).detach() * gain * logp
        elif loss_type == "sapo":
            up, down = args.sapo_temperature_pos, args.sapo_temperature_neg
            kappa = torch.where(gain > 0, up, down)
            loss = -4 / kappa * torch.sigmoid(kappa * (rho - 1)) * gain
        elif loss_type == "vespo":
            log_w = (x.clamp(-20, 20) * row.counted).sum()
            if row.weight is not None:
                log_w = log_w + row.weight.log().clamp(math.log(1e-8), 20).sum()
            log_w = log_w.clamp(math.log(1e-8), 20)
            k, lam = (2.0, 3.0) if gain[0] >= 0 else (3.0, 2.0)
            loss = -(lam + k * log_w - lam * log_w.exp()).exp().detach() * gain * logp
        else:
            loss = self.clipped(level, gain, low, high, args.delta)
        if row.weight is not None and loss_type != "vespo":
            loss = loss * row.weight
        if args.beta:
            gap = row.ref - logp
            unbiased = rho if args.use_bias_correction_kl else 1.0
            loss = loss + args.beta * unbiased * (torch.expm1(gap) - gap)
        return loss

    def micro_batch(self, model: Any, number: int, batch: dict[str, Any], step: int) -> Tensor:
        """The loss of one, as the optimizer's step adds them.

        Args:
            model: the policy.
            number: of the step.
            batch: its inputs.
            step: in which its rollouts were sampled.
        """
        args, rows = self.args, self.rows(batch)
        parts = args.gradient_accumulation_steps
        roma_parts = 1 if self.plant == "accumulation" else parts
        clean = [self.scored(model, row, row.clean) for row in rows]
        late = int(self.plant == "tokens")
        views = [
            [
                self.scored(model, row, self.view(row, k, step), late)[0]
                for k in range(args.num_views)
            ]
            if row.images
            else []
            for row in rows
        ]
        share = parts / args.steps_per_generation
        tokens = float(batch["num_items_in_batch"].clamp(min=1)) * share
        counted = sum(int(row.counted.sum()) for row in rows)

        def aggregated(losses: list[Tensor], parts: int) -> Tensor:
            sums = [(own * row.counted).sum() for own, row in zip(losses, rows, strict=True)]
            if args.loss_type in ("grpo", "sapo"):
                sums = [s / max(int(r.counted.sum()), 1) for s, r in zip(sums, rows, strict=True)]
                return sum(sums) / (len(rows) * parts)
            if args.loss_type in BY_TOKEN:
                return sum(sums) / (tokens * (1 if parts == roma_parts else roma_parts / parts))
            if args.loss_type == "bnpo":
                return sum(sums) / (counted * parts)
            longest = 1 if args.loss_type == "luspo" else args.max_completion_length
            return sum(sums) / (len(rows) * longest * parts)

        loss = aggregated(
            [self.main(r, own) for r, (own, _) in zip(rows, clean, strict=True)], parts
        )
        if args.entropy_coef:
            bonus = sum((h * r.counted).sum() for r, (_, h) in zip(rows, clean, strict=True))
            loss = loss - args.entropy_coef * bonus / counted / parts
        auxiliary = []
        for b, (row, (own, _), looks) in enumerate(zip(rows, clean, views, strict=True)):
            gain = rows[b - 1].advantages[:1] if self.plant == "advantages" else row.advantages
            gain = gain if row.weight is None or self.plant == "weight" else gain * row.weight
            behind = own.detach() if row.old is None or self.plant == "old" else row.old
            if not looks:
                auxiliary.append(0 * own)
                continue
            x = looks[self.sampled(row, step)] - behind
            auxiliary.append(self.clipped(x, gain, *self.clip()))
        loss = loss + args.lambda_aux * aggregated(auxiliary, roma_parts)
        over = float(len(rows) * roma_parts)
        if args.penalty_over == "correct":
            over = max(self.rights(number) * share, 1.0)
        loss = loss + args.lambda_inv * self.penalty(rows, [own for own, _ in clean], views) / over
        return loss

    def clip(self) -> tuple[float, float, float | None]:
        """ε_low, ε_high and c of the auxiliary loss."""
        args, given = self.args, self.args.loss_type in CLIPPED
        high = args.epsilon if args.epsilon_high is None else args.epsilon_high
        plain = (args.epsilon, high, args.delta) if given else (0.2, 0.3, 3.0)
        own = (args.clip_low, args.clip_high, args.dual_clip)
        low, high, c = (p if o is None else o for p, o in zip(plain, own, strict=True))
        return low, high, c

    def rights(self, number: int) -> int:
        """Right rollouts with an image in the generation that a step belongs to."""
        args = self.args
        a_step = args.gradient_accumulation_steps
        first = number * a_step // args.steps_per_generation * args.steps_per_generation
        batches = [batch for step in self.steps for batch in step.batches]
        own = batches[first : first + args.steps_per_generation]
        return sum(row.right and bool(row.images) for batch in own for row in self.rows(batch))

    def penalty(self, rows: list[Row], clean: list[Tensor], views: list[list[Tensor]]) -> Tensor:
        """Σ_i m_i max_k D_i^k; d's mean over counted tokens, 0 without one."""
        args, zero = self.args, clean[0].sum() * 0
        direction = 1 if args.penalty_ratio == "view/clean" else -1
        direction = -direction if self.plant == "direction" else direction

        def mean(d: Tensor, row: Row) -> Tensor:
            return (d * row.counted).sum() / row.counted.sum().clamp(min=1)

        tokens = []  # of each row that counts, [K, T]
        for row, own, looks in zip(rows, clean, views, strict=True):
            if looks and (row.right or self.plant == "right"):
                fixed = own if self.plant == "clean side" else own.detach()
                gap = direction * (torch.stack(looks) - fixed).clamp(-20, 20)
                tokens.append((row, torch.expm1(gap) - gap))
        by_view = [[mean(own, row) for own in d] for row, d in tokens]
        if not tokens:
            return zero
        if args.worst_over == "sequence":
            return sum(torch.stack(own).max() for own in by_view)
        if args.worst_over == "token":
            return sum(mean(d.max(0).values, row) for row, d in tokens)
        totals = torch.stack([sum(own[k] for own in by_view) for k in range(args.num_views)])
        return totals.max() if args.worst_over == "batch" else totals.mean()

    # The gradient

    def generated(self, number: int, micro: int) -> int:
        """The step in which a micro-batch was sampled."""
        args = self.args
        every = args.steps_per_generation * args.num_iterations
        at = number * args.gradient_accumulation_steps + micro
        return at // every * every // args.gradient_accumulation_steps

    def model(self, weights: dict[str, Tensor], dtype: torch.dtype) -> Any:
        """transformers' model with these weights."""
        made = Qwen3VL.from_pretrained(self.folder, dtype=torch.float32)
        made.load_state_dict(weights)
        return made.to(dtype).train()

    def gradient(self, number: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """Of a step, by name of the weight; losses are left in `self.losses`."""
        step = self.steps[number]
        model = self.model(step.weights, dtype)
        self.losses = []
        with Float64() if dtype == torch.float64 else nullcontext():
            for micro, batch in enumerate(step.batches):
                loss = self.micro_batch(model, number, batch, self.generated(number, micro))
                loss.backward()
                self.losses.append(float(loss.detach()))
        return {
            name: torch.zeros_like(weight) if weight.grad is None else weight.grad
            for name, weight in model.named_parameters()
        }
