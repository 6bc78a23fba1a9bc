"""A short run of `RomaGRPOTrainer` under an engine, by one process or by each of two ranks.

Completions are not sampled, as two ranks draw otherwise than one process does: they are a function
of a rollout's place in the global batch and of the step.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from support.ranks import RANKS, join

LIMIT = 240.0  # seconds of a run; a rank that waits for another fails in a quarter of it
WORDS = ("which", "way", "do", "the", "stripes", "run", "say", "are")


@dataclass(frozen=True)
class Job:
    """What is run.

    Attributes:
        engine: "ddp", "zero2", "zero3" or "fsdp2"; one process has none.
        lora: adapters on the body, in the place of all weights.
        right: name of a function in `RIGHT`: which rollouts are right.
        text: name of a function in `TEXT`: which rows of the dataset have no image.
        plant: name of an error in `PLANTS`.
        resume: folder of a checkpoint to go on from.
        options: further options of RomaGRPOConfig.
    """

    engine: str = "ddp"
    lora: bool = False
    right: str = "some"
    text: str = "none"
    plant: str | None = None
    resume: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


# (global row, step) -> is the answer right
RIGHT: dict[str, Callable[[int, int], bool]] = {
    "some": lambda row, step: (row + row // 4 + step) % 2 == 0,
    # The rows of the first rank: none is right, so none has an advantage either.
    "last_rank": lambda row, step: row >= 8 and (row + step) % 2 == 0,
}
# row of the dataset -> is it text alone
TEXT: dict[str, Callable[[int], bool]] = {
    "none": lambda row: False,
    "all": lambda row: True,
    "every_other": lambda row: row % 2 == 1,
    "one_in_four": lambda row: row % 4 == 1,
    # The first rank has text alone, the second images.
    "first_rank": lambda row: row % 4 < 2,
}


def build(folder: Path, out: Path, job: Job, ranks: int = 1) -> Any:
    """A trainer for the job: 16 rollouts a step, 4 of a prompt, two micro-batches.

    Args:
        folder: the small model's.
        out: for checkpoints.
        job: what is run.
        ranks: number of processes that share the 16.
    """
    from datasets import Dataset
    from transformers import Qwen3VLForConditionalGeneration

    from examples.trl import tiny
    from roma.integrations.trl import RomaGRPOConfig, RomaGRPOTrainer

    options = {
        "output_dir": str(out),
        "per_device_train_batch_size": 8 // ranks,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "max_completion_length": 5,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "shuffle_dataset": False,
        "view_max_level": 5.0,
        **_engine(job.engine if ranks > 1 else "", job.lora),
        **job.options,
    }
    data = list(tiny.stripes(16))
    blank = TEXT[job.text]
    data = [{**row, "images": [] if blank(i) else row["images"]} for i, row in enumerate(data)]
    # DeepSpeed's configuration is known before the model is loaded, as TRL asks for ZeRO-3.
    args = RomaGRPOConfig(**options)
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder)
    kind = PLANTS[job.plant](RomaGRPOTrainer)
    made = type("Recorded", (_Recorded, kind), {})(
        model=model,
        args=args,
        processing_class=tiny.processor(folder),
        reward_funcs=knows,
        train_dataset=Dataset.from_list(data),
        peft_config=adapters() if job.lora else None,
    )
    made.right = RIGHT[job.right]
    return made


def knows(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """1 if the answer's word is in the completion."""
    texts = [completion[0]["content"].split() for completion in completions]
    return [float(right in words) for words, right in zip(texts, answer, strict=True)]


def adapters(**given: Any) -> Any:
    """LoRA on the language model, with factors that are not zero: they matter at once."""
    from peft import LoraConfig

    targets = r".*language_model.*\.(q_proj|v_proj|down_proj)"
    options = {"r": 4, "lora_alpha": 16, "init_lora_weights": False, "target_modules": targets}
    return LoraConfig(**{**options, **given})


def _engine(engine: str, lora: bool) -> dict[str, Any]:
    """TRL's options for it."""
    if engine.startswith("zero"):
        zero = {"stage": int(engine[-1]), "stage3_param_persistence_threshold": 0}
        optimizer = {"lr": "auto", "weight_decay": 0, "torch_adam": True}
        batches = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_clipping")
        return {
            "deepspeed": {
                **dict.fromkeys((*batches, "gradient_accumulation_steps"), "auto"),
                "zero_optimization": zero,
                "optimizer": {"type": "AdamW", "params": optimizer},
            }
        }
    if engine == "fsdp2":
        layers = ["Qwen3VLTextDecoderLayer", "Qwen3VLVisionBlock"]
        return {
            "fsdp": True,
            "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": layers},
        }
    return {"use_cpu": True}


class _Recorded:
    """Completions of a table in the place of sampled ones, and rows in an order that is known."""

    right: Callable[[int, int], bool]

    def _generate_and_score_completions(self: Any, inputs: Any) -> Any:
        self.answers = [row["answer"] for row in inputs]
        return super()._generate_and_score_completions(inputs)  # type: ignore[misc]

    def _prepare_inputs(self: Any, generation_batch: Any) -> Any:
        from trl.trainer import grpo_trainer

        shuffle, ranks = grpo_trainer.shuffle_sequence_dict, RANKS // self.accelerator.num_processes
        micro = self.args.per_device_train_batch_size // ranks

        def in_turn(batch: dict[str, Any]) -> dict[str, Any]:
            """One process takes the rows of a micro-batch that each of two ranks takes."""
            rows = torch.arange(len(batch["completion_ids"]))
            order = rows.view(ranks, -1, micro).transpose(0, 1).flatten().tolist()

            def of(value: Any) -> Any:
                if value is None or (isinstance(value, torch.Tensor) and value.ndim == 0):
                    return value
                alike = isinstance(value, torch.Tensor)
                return value[order] if alike else [value[row] for row in order]

            return {name: of(value) for name, value in batch.items()}

        grpo_trainer.shuffle_sequence_dict = in_turn
        try:
            return super()._prepare_inputs(generation_batch)  # type: ignore[misc]
        finally:
            grpo_trainer.shuffle_sequence_dict = shuffle

    def _generate_single_turn(self: Any, prompt_ids: Any, *_: Any) -> Any:
        first, step = self.accelerator.process_index * len(prompt_ids), self.state.global_step
        return [
            self._completion(first + i, step, answer) for i, answer in enumerate(self.answers)
        ], None

    def _completion(self: Any, row: int, step: int, answer: str) -> list[int]:
        words = [WORDS[(row * 5 + step * 3 + t) % len(WORDS)] for t in range(1 + (row + step) % 4)]
        if self.right(row, step):
            words[-1] = answer
        ids = self._tokenizer.convert_tokens_to_ids(words)
        return [*ids, self.eos_token_ids[0]]


def _unscaled(kind: type) -> type:
    """The two terms are not multiplied by the number of ranks."""

    class Planted(kind):  # type: ignore[misc,valid-type]
        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            from roma.integrations.trl import trainer

            terms, ranks = trainer.view_terms, self.accelerator.num_processes

            def fewer(*args: Any, **given: Any) -> Any:
                out = terms(*args, **given)
                return out._replace(loss=out.loss / ranks)

            trainer.view_terms = fewer
            try:
                return super()._compute_loss(model, inputs)
            finally:
                trainer.view_terms = terms

    return Planted


def _own_views(kind: type) -> type:
    """Each rank draws views of its own."""

    class Planted(kind):  # type: ignore[misc,valid-type]
        def __init__(self, *args: Any, **given: Any) -> None:
            super().__init__(*args, **given)
            from dataclasses import replace

            from roma.integrations.views import ViewMaker

            options = replace(self.roma, view_seed=1 + self.accelerator.process_index)
            self._looks.maker = ViewMaker(options, self.processing_class.image_processor)

    return Planted


PLANTS: dict[str | None, Callable[[type], type]] = {
    None: lambda kind: kind,
    "unscaled": _unscaled,
    "own_views": _own_views,
}


def _parameters(trainer: Any) -> list[torch.Tensor]:
    return list(trainer.accelerator.unwrap_model(trainer.model_wrapped).parameters())


def _sharded(weight: Any) -> bool:
    """Whether a rank holds half of it, or less where it does not divide."""
    own = getattr(weight, "ds_tensor", None)
    whole = weight.numel() if own is None else weight.ds_numel
    own = weight.to_local() if own is None else own
    return own.numel() <= (whole + RANKS - 1) // RANKS + weight.shape[-1:].numel()


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    """All weights, whole, by the model's own names; every rank calls it."""
    from torch.distributed.tensor import DTensor

    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    found = {}
    for name, weight in model.named_parameters():
        if hasattr(weight, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([weight]):
                found[name] = weight.detach().clone()
        elif isinstance(weight, DTensor):
            found[name] = weight.full_tensor().detach().clone()
        else:
            found[name] = weight.detach().clone()
    return found


def trained(trainer: Any, job: Job) -> dict[str, Any]:
    """Trains, and gives weights before and after and the lines of the log."""
    begun = {name: w.detach().clone() for name, w in trainer.model.named_parameters()}
    trainer.train(resume_from_checkpoint=job.resume)
    return {"begun": begun, "weights": weights(trainer), "log": trainer.state.log_history}


def on_a_rank(rank: int, store: Path, folder: Path, job: Job) -> None:
    """What each of two ranks does; the first writes rank.pt beside the store."""
    _meet(rank, store, job.engine)
    trainer = build(folder, store.parent / "out", job, RANKS)
    assert trainer.accelerator.num_processes == RANKS
    found = trained(trainer, job)
    assert job.engine not in ("fsdp2", "zero3") or all(map(_sharded, _parameters(trainer)))
    if rank == 0:
        torch.save(found, store.parent / "rank.pt")
    dist.barrier()


def refused_on_a_rank(rank: int, store: Path, folder: Path, job: Job, message: str) -> None:
    """Each of two ranks is told the same before the first step, and none waits."""
    import pytest

    _meet(rank, store, job.engine)
    trainer = build(folder, store.parent / "out", job, RANKS)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0
    dist.barrier()


def _meet(rank: int, store: Path, engine: str) -> None:
    """Joins, once in a process: DeepSpeed keeps the groups that it made."""
    if dist.is_initialized():
        return
    os.environ |= {"LOCAL_WORLD_SIZE": str(RANKS), "MASTER_ADDR": "localhost"}
    join(rank, store, LIMIT / 4)
    if engine != "ddp":
        _pretend_cards()


def _pretend_cards() -> None:
    """DeepSpeed and FSDP on CPUs: accelerate has them for accelerators alone.

    Everything else is accelerate's: the plug-ins, how a model is prepared, the backward.
    """
    from accelerate.state import DistributedType, PartialState

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"

    def gloo(*_: Any) -> tuple[str, Any]:
        return "gloo", DistributedType.MULTI_GPU

    PartialState._prepare_backend = gloo
