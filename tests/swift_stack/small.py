"""A small Qwen3-VL that sees its image, a dataset, rewards, and a run of swift's on them."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

WORDS = ("user", "assistant", "what", "is", "this", "?", *(str(n) for n in range(12)))
SIZES = ((32, 48), (48, 32), (64, 64), (32, 32))  # of the images: several grids in a micro-batch


def build_model(folder: Path, seed: int = 0) -> Path:
    """Writes it. Matrices are ten times their usual size: else the image hardly matters."""
    from transformers import GenerationConfig, Qwen3VLForConditionalGeneration

    from roma.models.small import SPECIAL, build_small_vlm

    build_small_vlm(folder, words=WORDS, seed=seed)
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2 and "embed" not in name and "lm_head" not in name:
                weight.mul_(10 if "visual" in name else 3)
    generation = GenerationConfig.from_pretrained(folder)
    # A sampled image token would ask for an image that is not there.
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    ids = {entry["content"]: entry["id"] for entry in tokenizer["added_tokens"]}
    vocabulary = tokenizer["model"]["vocab"] | ids
    generation.suppress_tokens = [vocabulary[name] for name in SPECIAL if name != "<|im_end|>"]
    model.generation_config = generation
    model.save_pretrained(folder)
    return folder


def build_rows(folder: Path, kinds: Sequence[str]) -> Path:
    """Writes a dataset; a row is an "image", "two" images, or "text" alone."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for number, kind in enumerate(kinds):
        count = {"image": 1, "two": 2, "text": 0}[kind]
        paths = []
        for which in range(count):
            height, width = SIZES[(number + which) % len(SIZES)]
            draw = np.random.default_rng((number, which))
            coarse = draw.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
            path = folder / f"{number}-{which}.png"
            Image.fromarray(coarse.repeat(8, 0).repeat(8, 1)).save(path)
            paths.append(str(path))
        question = "<image>" * count + "what is this ?"
        messages = [{"role": "user", "content": question}]
        made.append({"messages": messages, "images": paths, "solution": str(number)})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def is_right(completion: str, solution: str) -> float:
    """About half of random completions, and a function of nothing else."""
    return float(hashlib.blake2b(f"{solution}:{completion}".encode()).digest()[0] % 2)


@dataclass
class Run:
    """What a run of swift's left."""

    trainer: Any
    logs: list[dict[str, float]]
    weights: dict[str, Tensor]

    @property
    def calls(self) -> list[Any]:
        """What was captured of each loss in training (probe.py)."""
        return self.trainer.calls

    def norms(self) -> list[float]:
        return [entry["grad_norm"] for entry in self.logs if "grad_norm" in entry]

    def logged(self, name: str) -> list[float]:
        return [entry[name] for entry in self.logs if name in entry]


def flags(model: Path, rows: Path, out: Path, **changed: Any) -> list[str]:
    """The command's, for a CPU; `changed` replaces or adds some, None leaves one out."""
    plain: dict[str, Any] = {
        "rlhf_type": "grpo",
        "model": model,
        "dataset": rows,
        "output_dir": out,
        "model_type": "qwen3_vl",
        "template": "qwen3_vl",
        "use_hf": "true",
        "use_cpu": "true",
        "check_model": "false",
        "torch_dtype": "float32",
        "tuner_type": "full",
        "freeze_vit": "false",
        "freeze_aligner": "false",
        "split_dataset_ratio": 0,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "num_generations": 4,
        "max_completion_length": 8,
        "learning_rate": 1e-3,
        "warmup_ratio": 0,
        "lr_scheduler_type": "constant",
        "beta": 0,
        "temperature": 1.0,
        "gradient_checkpointing": "false",
        "reward_funcs": "right",
        "dataset_shuffle": "false",
        "train_dataloader_shuffle": "false",
        "dataset_num_proc": 1,
        "dataloader_num_workers": 0,
        "attn_impl": "eager",
        "add_version": "false",
        "seed": 1,
    }
    chosen = {name: value for name, value in (plain | changed).items() if value is not None}
    words: list[str] = []
    for name, value in chosen.items():
        many = value if isinstance(value, (list, tuple)) else [value]
        words += [f"--{name}", *map(str, many)]
    return words


def prepare_swift(model: Path) -> None:
    """The small tokenizer's ids in swift's template, which has Qwen's; and the reward."""
    from swift.rewards import ORM, orms
    from swift.template.templates.qwen import Qwen2VLTemplate
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    Qwen2VLTemplate.image_token_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    Qwen2VLTemplate.video_token_id = tokenizer.convert_tokens_to_ids("<|video_pad|>")

    class Right(ORM):
        def __call__(self, completions, solution, **kwargs):
            return [is_right(*pair) for pair in zip(completions, solution, strict=True)]

    class Length(ORM):
        def __call__(self, completions, **kwargs):
            return [len(text) / 100 for text in completions]

    orms["right"], orms["length"] = Right, Length


def train(words: list[str], options: str | None = "", **configured: Any) -> Run:
    """One run of `swift rlhf` in this process, with our trainer; options None: with swift's."""
    import swift_stack.probe as probe
    from swift import rlhf_main
    from swift.trainers import TrainerFactory

    from roma.integrations.options import RomaOptions
    from roma.integrations.swift.trainer import RomaGRPOTrainer

    if options is not None:
        RomaGRPOTrainer.configure(RomaOptions.parse(options), **configured)
    before = TrainerFactory.TRAINER_MAPPING["grpo"]
    chosen = "Stock" if options is None else "Ours"
    TrainerFactory.TRAINER_MAPPING["grpo"] = f"swift_stack.probe.{chosen}"
    try:
        rlhf_main(words)
    finally:
        TrainerFactory.TRAINER_MAPPING["grpo"] = before
    made = probe.KEPT.pop()
    weights = {name: value.detach().clone() for name, value in made.model.state_dict().items()}
    return Run(made, made.state.log_history, weights)
