"""The estimate of a run, from its configuration and what is assumed beside it."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from roma.data import Columns, RomaDataset, load_dataset_rows
from roma.models.device import resolve_device
from roma.models.processor import Processor
from roma.train.config import Config
from roma.train.estimate.activations import Options, activations, casts
from roma.train.estimate.states import ENGINES, FLOAT, Parameters, States, states
from roma.train.estimate.work import (
    MicroBatch,
    Rate,
    Sizes,
    Work,
    cache_bytes,
    largest,
    seconds,
    work,
)
from roma_kernels.errors import fail
from roma_kernels.linear_logprob.rows import GPU_WORKSPACE

SAMPLED = 16  # rows of the data that are looked at
PROMPT, IMAGES = 1200, 1024  # tokens, where there is nothing to look at: docs/COST.md
SHARE = 0.4  # of the rate of products that an update sustains
INTENSITY = 150  # FLOP a byte: what a GPU sustains of products, over what its memory gives
CPU_WORKSPACE = 16 * 2**20
_REMEDIES = {
    "sampling": "worker.rollout.name=vllm, or fewer prompts a rank",
    "update": "worker.actor.gradient_checkpointing=true, a lower micro_batch_tokens (a prompt "
    "stays whole: fewer rollouts, views or tokens), an engine that shards, or lora.rank",
    "step": "an engine that shards, more ranks, or lora.rank",
}


@dataclass(frozen=True)
class Assumed:
    """What a configuration does not say; None: measured or assumed, and the page says which."""

    ranks: int | None = None
    """None: WORLD_SIZE, or 1."""
    tflops: float | None = None
    """TFLOP/s that a rank's update sustains."""
    gpu_gib: float = 80.0
    """Memory of a GPU, of which vLLM takes its share."""
    prompt_tokens: int | None = None
    """Of a question, image tokens included."""
    image_tokens: int | None = None
    response_tokens: int | None = None
    """Mean length of an answer."""
    right: float = 0.5
    """Share of right answers."""


class Part(NamedTuple):
    """Bytes of a rank, and when they are there."""

    name: str
    size: float
    sampling: bool
    update: bool
    step: bool


class Estimate(NamedTuple):
    """What a run takes."""

    parameters: Parameters
    engine: str
    ranks: int
    states: States
    batch: MicroBatch
    micro_batches: int
    parts: list[Part]
    rows: int
    sizes: Sizes
    work: Work
    sampling_s: float
    learning_s: float
    said: list[str]
    """What is measured, assumed or given, a line each."""

    def peak(self, phase: str) -> float:
        """Bytes of a rank in a phase: "sampling", "update" or "step"."""
        return sum(part.size for part in self.parts if getattr(part, phase))


def estimate(config: Config, assumed: Assumed | None = None) -> Estimate:
    """Estimates a run.

    Args:
        config: of the run.
        assumed: beside it.

    Raises:
        ValueError: model or data are missing, the engine does not go with the ranks, or the ranks
            do not divide a mini-batch.
        FileNotFoundError: there are no data.
    """
    assumed = assumed or Assumed()
    ranks = assumed.ranks or int(os.environ.get("WORLD_SIZE", "1"))
    engine = _engine(config, ranks)
    here = torch.cuda.is_available() or assumed.tflops is not None
    cuda = config.trainer.device == "cuda" or (config.trainer.device == "auto" and here)
    parameters, options = Parameters.of(config), Options.of(config, cuda=cuda)
    data = _data(config)
    said: list[str] = []
    sizes = _sizes(config, data, parameters.tower.merge, assumed, said)
    batch, count = largest(config, sizes, parameters.tower.merge, ranks)
    held = states(parameters, engine, ranks, half=options.half, cuda=cuda)
    done = work(config, parameters, sizes, right=assumed.right)
    said.append(f"{assumed.right:.0%} of the answers right, all with an advantage: assumed")
    rate = _rate(config, assumed, said)
    sampling, learning = seconds(config, parameters, sizes, done, rate, ranks)
    parts = _parts(config, parameters, options, held, batch, sizes, ranks, assumed.gpu_gib, cuda)
    found = Estimate(
        parameters,
        engine,
        ranks,
        held,
        batch,
        count,
        parts,
        min(len(data), config.data.limit or len(data)),
        sizes,
        done,
        sampling,
        learning,
        said,
    )
    for phase, remedy in _REMEDIES.items():
        if cuda and found.peak(phase) > assumed.gpu_gib * 2**30:
            said.append(f"the {phase} does not fit into {assumed.gpu_gib:g} GiB: {remedy}")
    return found


def _engine(config: Config, ranks: int) -> str:
    name, mini = config.trainer.engine, config.worker.actor.mini_batch_size
    if name == "auto":
        name = "fsdp2" if ranks > 1 else "single"
    assert name in ENGINES
    if name == "single" and ranks > 1:
        remedy = "choose ddp, zero1, zero2, zero3 or fsdp2"
        fail("trainer.engine", f"one for {ranks} ranks", "single", remedy)
    if mini % ranks:
        remedy = "every rank takes equally many prompts of an optimizer step"
        key = "worker.actor.mini_batch_size"
        fail(key, f"a multiple of the {ranks} ranks", str(mini), remedy)
    return name


def _parts(
    config: Config,
    parameters: Parameters,
    options: Options,
    held: States,
    batch: MicroBatch,
    sizes: Sizes,
    ranks: int,
    gpu_gib: float,
    cuda: bool,
) -> list[Part]:
    always, update, sampling = (True, True, True), (False, True, False), (True, False, False)
    text, rollout = parameters.text, config.worker.rollout
    tiles = float(GPU_WORKSPACE if cuda else CPU_WORKSPACE)
    loss = tiles + 3 * FLOAT * batch.rows * text.hidden  # states, and their gradients twice
    loss += FLOAT * text.vocab * text.hidden * parameters.head_trained
    parts = [
        Part("weights", held.weights, *always),
        Part("weights of other ranks, gathered", held.gathered, True, True, False),
        Part("optimizer", held.optimizer, *always),
        Part("optimizer step, temporary", held.stepping, False, False, True),
        Part("gradients", held.gradients, False, True, True),
        Part("activations", activations(parameters, batch, options).total, *update),
        # FSDP2's weights are gathered in bfloat16: autocast has nothing to copy.
        Part("weights in bfloat16", casts(parameters, options), True, True, False)
        if not held.gathered or config.trainer.engine.startswith("zero")
        else Part("weights in bfloat16", 0.0, *update),
        Part("loss workspace", loss, *update),
    ]
    if rollout.name == "vllm":
        size = rollout.vllm.memory * gpu_gib * 2**30
        stays = not rollout.vllm.sleep
        return [*parts, Part("vLLM", size, True, stays, stays)]
    answers = config.data.rollout_batch_size * rollout.n / ranks
    cache = answers * cache_bytes(
        parameters, config, sizes.largest_prompt + config.data.max_response_length
    )
    logits = 4 * FLOAT * answers * text.vocab  # raw, fp32, processed, probabilities
    return [
        *parts,
        Part("keys and values of sampling", cache, *sampling),
        Part("logits of sampling", logits, *sampling),
    ]


def _data(config: Config) -> RomaDataset:
    data = config.data
    columns = Columns(images=data.image_key, problem=data.prompt_key, answer=data.answer_key)
    return load_dataset_rows(
        data.train_files,
        columns=columns,
        image_dir=data.image_dir,
        skip_broken=data.skip_broken,
        format_prompt=data.format_prompt,
    )


def _sizes(
    config: Config, data: RomaDataset, merge: int, assumed: Assumed, said: list[str]
) -> Sizes:
    path, longest = Path(config.worker.actor.model_path), config.data.max_response_length
    response = assumed.response_tokens or max(longest // 2, 1)
    source = "given" if assumed.response_tokens else "half of data.max_response_length: assumed"
    said.append(f"answers of {response} tokens, {source}")
    images, prompt = assumed.image_tokens, assumed.prompt_tokens
    if images is not None and prompt is not None:
        said.append(f"prompts of {prompt} tokens, {images} of images: given")
        return Sizes(prompt, images, prompt, images, response)
    if not (path / "tokenizer_config.json").is_file():
        prompt, images = prompt or PROMPT, IMAGES if images is None else images
        said.append(
            f"prompts of {prompt} tokens, {images} of images: assumed, as {path} has no "
            "tokenizer; give --prompt-tokens and --image-tokens"
        )
        return Sizes(prompt, images, prompt, images, response)
    found = _looked_at(Processor.load(path), data, merge)
    prompts = [prompt if prompt is not None else tokens for tokens, _ in found]
    of_images = [images if images is not None else tokens for _, tokens in found]
    mean = [sum(x) / len(x) for x in (prompts, of_images)]
    said.append(
        f"prompts of {mean[0]:.0f} tokens, {mean[1]:.0f} of images; the largest has "
        f"{max(prompts)}: {len(found)} rows of the data"
    )
    return Sizes(mean[0], mean[1], max(prompts), max(of_images), response)


def _looked_at(processor: Processor, data: RomaDataset, merge: int) -> list[tuple[int, int]]:
    """Tokens of some prompts, and how many of them are of images."""
    found, side = [], processor.image_processor.patch_size
    for number in range(min(SAMPLED, len(data))):
        example = data[number * len(data) // min(SAMPLED, len(data))]
        sizes = [processor.resize(image).shape for image in example.load_images()]
        grids = torch.tensor([[1, h // side, w // side] for h, w, _ in sizes]).view(-1, 3)
        tokens = int(grids.prod(-1).sum()) // merge**2
        found.append((len(processor.prompt_ids(example.problem, grids)), tokens))
    return found


def _rate(config: Config, assumed: Assumed, said: list[str]) -> Rate:
    if assumed.tflops is not None:
        rate = Rate(assumed.tflops * 1e12, assumed.tflops * 1e12 / INTENSITY)
        said.append(
            f"{assumed.tflops:g} TFLOP/s a rank: given; {rate.bytes / 1e9:.0f} GB/s of memory: "
            f"assumed, a byte for {INTENSITY} FLOP"
        )
        return rate
    if config.trainer.device == "cuda" and not torch.cuda.is_available():
        remedy = "give what its update sustains, --tflops N"
        fail("--tflops", "a rate, as trainer.device is cuda", "none, and no GPU here", remedy)
    device = resolve_device(config.trainer.device, name="trainer.device")
    half = config.trainer.dtype == "bfloat16"
    threads = torch.get_num_threads()
    torch.set_num_threads(config.trainer.threads or threads)
    products, read = _measure(device, torch.bfloat16 if half else torch.float32)
    torch.set_num_threads(threads)
    said.append(
        f"{SHARE * products / 1e12:.3g} TFLOP/s a rank: {SHARE:.0%}, assumed, of the "
        f"{products / 1e12:.3g} that products in {config.trainer.dtype} reach on this machine's "
        f"{device.type}; {read / 1e9:.0f} GB/s of memory: measured there; "
        "give --tflops for another"
    )
    return Rate(SHARE * products, read)


def _measure(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """FLOP/s of a large product, and bytes/s that a sum over memory reads: the best of some."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    long = torch.ones(2**28 if device.type == "cuda" else 2**24, device=device)

    def best(call: object, tries: int = 5) -> float:
        assert callable(call)
        times = []
        for _ in range(tries):
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
        return min(times)

    return 2 * size**3 / best(lambda: a @ b), long.numel() * FLOAT / best(long.sum)
