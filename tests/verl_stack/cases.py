"""A tiny Qwen3-VL under verl's own engine, and batches in the form that its agent loop stores."""

from __future__ import annotations

import functools
import os
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from roma.data import DIGIT_WORDS
from roma.models.small import build_small_vlm

_KEPT = TemporaryDirectory()  # removed when the process ends
# (height, width) of each row's images; a row of text alone; two images of different grids.
IMAGES = (((32, 64),), ((32, 64),), (), ((32, 32), (64, 48)), ((32, 64),), ((48, 48),))
# Rows 0 and 1 are rollouts of one prompt. Advantages 0: nothing but the penalty on row 4.
ADVANTAGES = (1.3, -0.7, 0.9, -1.1, 0.0, 0.6)
SCORES = (1.0, 0.0, 1.0, 1.0, 1.0, 0.0)
LENGTHS = (5, 3, 4, 6, 2, 5)  # tokens of the completions
SEEING = 4.0  # of the small model's weights, so that it sees its image


@lru_cache(maxsize=1)
def folder() -> Path:
    """The model; ROMA_TEST_MODEL names one that another process built."""
    if "ROMA_TEST_MODEL" in os.environ:
        return Path(os.environ["ROMA_TEST_MODEL"])
    from safetensors.torch import load_file, save_file

    made = build_small_vlm(Path(_KEPT.name) / "model", words=DIGIT_WORDS)
    weights = load_file(made / "model.safetensors")
    grown = {name: w * SEEING if w.ndim > 1 else w for name, w in weights.items()}
    save_file(grown, made / "model.safetensors", metadata={"format": "pt"})
    os.environ["ROMA_TEST_MODEL"] = str(made)
    return made


def join() -> None:
    """A group of one process, if there is none."""
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}  # verl's Worker asks
    if not dist.is_initialized():
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        store = Path(_KEPT.name) / "store"
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)


def actor(**changes):
    """The actor's options: what verl's ppo_loss and the engine read."""
    from verl.workers.config import FSDPActorConfig

    settings = {
        "rollout_n": 1,
        "strategy": "fsdp2",
        "ppo_micro_batch_size_per_gpu": 2,
        "clip_ratio_low": 0.2,
        "clip_ratio_high": 0.28,
        "clip_ratio_c": 3.0,
        "loss_agg_mode": "token-mean",
        **changes,
    }
    return FSDPActorConfig(**settings)


def loss_of(config):
    """What verl hands to its engine."""
    from verl.workers.utils.losses import ppo_loss

    return functools.partial(ppo_loss, config=config)


def config(
    *,
    remove_padding: bool = False,
    lora: int = 0,
    checkpointing: bool = False,
    fused: bool = False,
    **engine,
):
    """verl's own configuration of a worker of the actor's."""
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import (
        FSDPEngineConfig,
        FSDPOptimizerConfig,
        HFModelConfig,
        TrainingWorkerConfig,
    )

    return TrainingWorkerConfig(
        model_type="language_model",
        model_config=HFModelConfig(
            path=str(folder()),
            override_config={"attn_implementation": "sdpa"},
            use_remove_padding=remove_padding,
            enable_gradient_checkpointing=checkpointing,
            use_fused_kernels=fused,
            fused_kernel_options={"impl_backend": "torch"},
            lora_rank=lora,
            lora_alpha=8,
            target_modules=["q_proj", "v_proj"],
        ),
        engine_config=FSDPEngineConfig(
            **{
                "strategy": "fsdp2",
                "use_torch_compile": False,
                "use_dynamic_bsz": False,
                "micro_batch_size_per_gpu": 6,
                "mixed_precision": {
                    name: "fp32" for name in ("param_dtype", "reduce_dtype", "buffer_dtype")
                },
                **engine,
            }
        ),
        optimizer_config=FSDPOptimizerConfig(lr=1e-3, total_training_steps=10, clip_grad=1e9),
        checkpoint_config=CheckpointConfig(),
    )


def worker(**options):
    """verl's TrainingWorker in this process, its engine built; `options` as in `config`."""
    from verl.workers.engine_workers import TrainingWorker

    join()
    made = TrainingWorker(config(**options))
    made.reset()
    return made


@lru_cache(maxsize=1)
def processor():
    """As verl loads it."""
    from verl.utils import hf_processor

    return hf_processor(str(folder()))


def image(height: int, width: int, seed: int) -> np.ndarray:
    """Random pixels: at this size a blur of a low level leaves any coarser image as it is."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def rows(picked: tuple[int, ...] = (0, 1, 2, 3, 4, 5)) -> list[dict]:
    """Rows as verl's agent loop puts them into its queue; made by its own methods."""
    from verl.experimental.agent_loop.agent_loop import AgentLoopWorker

    generator = torch.Generator().manual_seed(0)
    tools = processor()
    fake = SimpleNamespace(
        processor=tools, tokenizer=tools.tokenizer, _get_mm_processor_kwargs=lambda audios: {}
    )
    vocabulary = len(tools.tokenizer)
    words = [i for i in range(vocabulary) if i not in tools.tokenizer.all_special_ids]
    completions = [
        torch.tensor(words)[torch.randint(len(words), (n,), generator=generator)] for n in LENGTHS
    ]
    noise = [0.3 * torch.randn(n, generator=generator) for n in LENGTHS]
    made = []
    for row in picked:
        images = [image(*size, seed=7 * max(row, 1) + i) for i, size in enumerate(IMAGES[row])]
        text = "<|vision_start|><|image_pad|><|vision_end|> " * len(images) + " larger sum ?"
        given = {"images": images} if images else {}
        prompt = tools(text=[text], return_tensors="pt", **given)["input_ids"][0]
        input_ids = torch.cat([prompt, completions[row]])
        output = SimpleNamespace(multi_modal_data=given, mm_processor_kwargs=None)
        media = AgentLoopWorker._compute_multi_modal_inputs(fake, output, input_ids)
        position_ids = AgentLoopWorker._compute_position_ids(
            fake, input_ids[None], torch.ones_like(input_ids)[None], media
        )[0]
        counted = torch.ones(LENGTHS[row], dtype=torch.int64)
        if row == 3:
            counted[2] = 0  # what a tool wrote
        made.append(
            {
                "input_ids": input_ids,
                "position_ids": position_ids,
                "prompts": prompt,
                "responses": completions[row],
                "response_mask": counted,
                "loss_mask": counted,
                "multi_modal_inputs": media,
                "old_log_probs": noise[row],  # `with_old` adds the policy's own
                "advantages": torch.full((LENGTHS[row],), ADVANTAGES[row]),
                "extra_fields": {"reward_extra_info": {"acc": SCORES[row]}},
                "uid": f"prompt {max(row, 1)}",
                "images": images,  # for the oracle: verl stores none
            }
        )
    return made


def batch(given: list[dict], *, total: int | None = None, **settings):
    """verl's TensorDict of rows, with what its trainer and worker assign."""
    from verl.utils import tensordict_utils as tu

    made = tu.list_of_dict_to_tensordict(
        [{name: value for name, value in row.items() if name != "images"} for row in given]
    )
    tu.assign_non_tensor(
        made,
        **{
            "temperature": 1.0,
            "global_batch_size": len(given) if total is None else total,
            "calculate_entropy": False,
            "compute_loss": False,
            **settings,
        },
    )
    return made


def scored(engine_worker, given: list[dict]) -> list[Tensor]:
    """The policy's log-probs of each row's completion, nats, by verl's own pass."""
    from verl.workers.utils.padding import no_padding_2_padding

    data = batch(given, micro_batch_size_per_gpu=len(given), use_dynamic_bsz=False)
    out = engine_worker.infer_batch(data)
    every = no_padding_2_padding(out["log_probs"], data)
    return [own[: len(row["responses"])] for own, row in zip(every, given, strict=True)]


def with_old(engine_worker, given: list[dict]) -> list[dict]:
    """Rows whose old log-probs are the policy's, and the noise that they had: ratios that clip."""
    return [
        {**row, "old_log_probs": logp + row["old_log_probs"]}
        for row, logp in zip(given, scored(engine_worker, given), strict=True)
    ]


def gradients(engine_worker) -> dict[str, Tensor]:
    """Every gradient, whole."""
    return {
        name: weight.grad.full_tensor().clone()
        for name, weight in engine_worker.engine.module.named_parameters()
        if weight.grad is not None
    }


def step(engine_worker, data, config=None) -> tuple[dict, dict[str, Tensor]]:
    """One forward and backward pass of verl's engine; its output, and the gradients."""
    from verl.utils import tensordict_utils as tu

    engine = engine_worker.engine
    for name, value in {
        "use_remove_padding": engine.use_remove_padding,
        "use_dynamic_bsz": engine.engine_config.use_dynamic_bsz,
        "max_token_len_per_gpu": engine.engine_config.max_token_len_per_gpu,
        "micro_batch_size_per_gpu": engine.engine_config.micro_batch_size_per_gpu,
        "use_fused_kernels": engine.engine_config.use_fused_kernels,
    }.items():
        if name not in data:
            tu.assign_non_tensor(data, **{name: value})
    with engine.train_mode():
        engine.optimizer_zero_grad()
        output = engine.forward_backward_batch(data, loss_of(config or actor()))
        made = gradients(engine_worker)
    return output, made
