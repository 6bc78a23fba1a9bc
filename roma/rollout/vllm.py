"""Sampling with vLLM in the trainer's own process, on the trainer's own GPU.

One step:

    wake up → the policy's weights, if they changed → caches emptied → sample → sleep

Every rank has an engine of its own, which samples that rank's prompts. Prompts go in with one mark
per image and the images at model resolution; what vLLM's processor makes of them is held to what
the trainer made, before anything is sampled. docs/ROLLOUTS.md has versions and limits.
"""

import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from roma.models.prompts import PromptBatch
from roma.models.qwen_vl import Policy
from roma.rollout.base import Rollouts
from roma.rollout.vllm_weights import checked, reload, weight_names
from roma.views import seed_for
from roma_kernels.errors import fail

# vLLM's largest: a suppressed token is e^100 times less likely. Its log-prob stays a number, from
# which the log-probs of the others over the whole vocabulary follow (`_logprobs`).
_BIAS = -100.0
# vLLM raises a smaller one to it, with no more than a warning.
_COLDEST = 0.01


class VllmOptions(Protocol):
    """Options of the engine: the configuration's section `worker.rollout.vllm`."""

    @property
    def memory(self) -> float:
        """Share of the GPU's memory for weights and key-value cache, 0 to 1."""

    @property
    def sleep(self) -> bool:
        """Whether the memory is given back between two calls; a CPU build cannot."""

    @property
    def dtype(self) -> str:
        """Of the engine's weights: "float32", "bfloat16", or "auto": fp32 on a CPU, else bf16."""

    @property
    def max_sequences(self) -> int | None:
        """Most completions in flight; None: vLLM's own choice."""


class VllmSampler:
    """A `Sampler` that runs a copy of the policy in vLLM.

    Args:
        policy: the model, in the folder from which it was loaded.
        weights: its weights under Hugging Face names, whole, adapters merged, in one order on all
            ranks; called by all ranks at the same time. None: the folder's, for ever.
        version: changes when the weights do; they are taken again when it did, or when sleep
            discarded them.
        options: of the engine.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: the policy has no folder, the environment asks for an engine in a process of its
            own, or vLLM cannot run here.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        weights: Callable[[], Iterator[tuple[str, Tensor]]] | None,
        version: Callable[[], int] = lambda: 0,
        options: VllmOptions,
    ) -> None:
        """Starts the engine: seconds for a small model, a minute or more for a large one."""
        self.policy, self.weights, self.version = policy, weights, version
        config = policy.model.config
        self.suppressed = [int(config.image_token_id), int(config.video_token_id)]
        ends = policy.model.generation_config.eos_token_id
        self.ends = [int(end) for end in (ends if isinstance(ends, list) else [ends])]
        self.names = weight_names(config) if weights else None
        threads = torch.get_num_threads()
        with _random_state():
            self.llm, self.dtype, self.sleeps = _start(policy, options)
        if torch.get_num_threads() != threads:  # on a GPU vLLM takes one, for the whole process
            torch.set_num_threads(threads)
        self.held: int | None = None if weights else version()
        self.asleep, self.broken = False, False

    def close(self) -> None:
        """Ends the engine, which later would end whatever process group there is then."""
        self.broken = True
        self.llm.llm_engine.engine_core.shutdown()

    def sample(
        self,
        prompts: PromptBatch,
        *,
        group_size: int,
        max_new_tokens: int,
        temperature: float | None,
        seed: int,
    ) -> Rollouts:
        """Samples completions; see `roma.rollout.base.Sampler`.

        Log-probs are those of the whole vocabulary, as a trainer computes them, although image and
        video tokens are never sampled. There are none of greedy completions.

        Raises:
            ValueError: vLLM reads the prompts otherwise than the trainer does, prompt and budget
                are longer than its cache, a temperature below 0.01, or weights are missing.
            RuntimeError: an earlier call failed within vLLM, whose state is then unknown.
        """
        if temperature is not None and temperature < _COLDEST:
            remedy = "vLLM would raise it in silence; None decodes greedily"
            fail("temperature", f"at least {_COLDEST}", str(temperature), remedy)
        here = self.policy.device.type
        with _random_state(), torch.no_grad(), torch.autocast(here, enabled=False):
            inputs = [self._render(prompts, p) for p in range(len(prompts.images))]
            self._check_room(prompts, max_new_tokens)
            with self._intact():
                self._refresh()
                made = self._generate(inputs, group_size, max_new_tokens, temperature, seed)
                self._rest()
        return self._rollouts(made, temperature, prompts.input_ids.device)

    @contextmanager
    def _intact(self) -> Iterator[None]:
        """Refuses to go on where an earlier call was cut off.

        The engine then holds half of the weights, or requests whose answers nobody waits for.
        """
        if self.broken:
            raise RuntimeError("an earlier call failed within vLLM; start it anew")
        self.broken = True
        yield
        self.broken = False

    def _refresh(self) -> None:
        """Wakes the engine with the policy's weights, and empties what older ones left."""
        if self.asleep:
            self.llm.wake_up(["weights"])
        version = self.version()
        if self.held != version:
            self._load()
            self.held = version
            self._reset_caches()
        if self.asleep:
            self.llm.wake_up(["kv_cache"])
            self.asleep = False

    def _load(self) -> None:
        if self.weights is None or self.names is None:
            remedy = "give weights= beside version="
            fail("weights", "a source of new weights", "None", remedy)
        given = checked(self.weights(), *self.names, self.dtype)
        self.llm.collective_rpc(reload, args=(given,))

    def _reset_caches(self) -> None:
        """Keys and values of prompts, images as processed, and features of images."""
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM's cache of prompts is in use: a request was left in it")
        self.llm.reset_mm_cache()
        self.llm.llm_engine.reset_encoder_cache()

    def _rest(self) -> None:
        """Gives the GPU's memory back; the weights are gone with it."""
        if self.sleeps:
            # Level 2 keeps no copy of the weights in the host's memory. The folder's weights have
            # no other source.
            self.llm.sleep(level=2 if self.weights else 1)
            self.asleep = True
            self.held = None if self.weights else self.held

    def _render(self, prompts: PromptBatch, number: int) -> Any:
        """A prompt as vLLM takes it; the tokens and grids that it made are the trainer's."""
        from PIL.Image import fromarray

        own = prompts.images_of(number)
        ids = prompts.input_ids[number][prompts.attention_mask[number].bool()].tolist()
        grids = prompts.grids[own.start : own.stop]
        image, merge = self.suppressed[0], self.policy.processor.image_processor.merge_size
        marks = collapsed(ids, image, (grids.prod(-1) // merge**2).tolist())
        given: dict[str, Any] = {"prompt_token_ids": marks}
        if len(own):
            given["multi_modal_data"] = {"image": [fromarray(x) for x in prompts.images[number]]}
        (made,) = self.llm.renderer.render_cmpl([given])
        remedy = "the preprocessor_config.json of the model's folder is not the policy's processor"
        if made["prompt_token_ids"] != ids:
            got = f"{len(made['prompt_token_ids'])} tokens of vLLM's, which differ"
            fail(f"prompt {number}", f"the trainer's {len(ids)} tokens", got, remedy)
        items = made["mm_kwargs"]["image"] if len(own) else []
        found = [item["image_grid_thw"].data.flatten().tolist() for item in items]
        if found != grids.tolist():
            fail(f"prompt {number}", f"image grids {grids.tolist()}", f"vLLM's {found}", remedy)
        return made

    def _check_room(self, prompts: PromptBatch, budget: int) -> None:
        room, longest = self.llm.model_config.max_model_len, max(prompts.lengths)
        if longest + budget > room:
            expected = f"prompt and completion within vLLM's {room} tokens"
            remedy = "raise worker.rollout.vllm.memory or lower data.max_response_length"
            fail("max_new_tokens", expected, f"{longest} + {budget}", remedy)

    def _generate(
        self, inputs: Sequence[Any], count: int, budget: int, temperature: float | None, seed: int
    ) -> list[Any]:
        """[P·G] completions of vLLM, those of a prompt in a row."""
        from vllm import RequestOutput, SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine = self.llm.llm_engine
        scored: dict[str, Any] = {}
        if temperature is not None:
            few = len(self.suppressed)  # vLLM asks for the same number twice
            scored = {"logprobs": few, "logprob_token_ids": self.suppressed, "flat_logprobs": True}
        for number, given in enumerate(inputs):
            # Its completions get seeds from this one upwards.
            own = seed_for(seed, "vllm", number) >> 2
            options = SamplingParams(
                n=count,
                max_tokens=budget,
                temperature=temperature or 0.0,
                seed=own,
                logit_bias=dict.fromkeys(self.suppressed, _BIAS),
                stop_token_ids=self.ends,
                ignore_eos=True,  # the tokenizer's; `ends` are the model's
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
                **scored,
            )
            engine.add_request(str(next(self.llm.request_counter)), given, options)
        done = self.llm.wait_for_completion(RequestOutput, use_tqdm=False)
        return [made for request in done for made in request.outputs]

    def _rollouts(
        self, made: Sequence[Any], temperature: float | None, device: torch.device
    ) -> Rollouts:
        """Completions as tensors, padded on the right."""
        shape = len(made), max(len(one.token_ids) for one in made)
        tokens = torch.full(shape, self.policy.pad_id)
        mask = torch.zeros(shape, dtype=torch.bool)
        logp = torch.zeros(shape) if temperature is not None else None
        for row, one in enumerate(made):
            own = torch.tensor(list(one.token_ids))
            tokens[row, : len(own)], mask[row, : len(own)] = own, True
            if logp is not None and temperature is not None:
                logp[row, : len(own)] = _logprobs(one.logprobs, own, temperature)
        if bool((torch.isin(tokens, torch.tensor(self.suppressed)) & mask).any()):
            fail("vLLM", "no image or video token sampled", "one", "its logits are beyond 100")
        finished = torch.tensor([one.finish_reason == "stop" for one in made])
        moved = None if logp is None else logp.to(device)
        return Rollouts(tokens.to(device), mask.to(device), finished.to(device), moved)


def collapsed(ids: Sequence[int], image: int, counts: Sequence[int]) -> list[int]:
    """Prompt tokens with one mark per image in the place of its tokens.

    Args:
        ids: with as many tokens `image` in a row as an image has.
        image: the token.
        counts: of the tokens of each image, in order.

    Example:
        >>> collapsed([1, 9, 9, 9, 2, 9], 9, [2, 1, 1])
        [1, 9, 9, 2, 9]
    """
    kept, left, at = [], list(counts), 0
    while at < len(ids):
        kept.append(ids[at])
        at += left.pop(0) if ids[at] == image and left else 1
    return kept


def _logprobs(flat: Any, tokens: Tensor, temperature: float) -> Tensor:
    """[T] log-probs of the sampled tokens over the whole vocabulary, fp32.

    vLLM has normalised over the vocabulary whose suppressed tokens s have the logit z_s − 100; of
    them it reports q_s. Beside the rest, which sums to 1, they weigh exp(q_s + 100/τ), so that

        logp(y) = q(y) − log(1 + Σ_s exp(q_s + 100/τ)).

    Args:
        flat: vLLM's, of the sampled token and the suppressed ones.
        tokens: [T] int64.
        temperature: τ.
    """
    found = torch.tensor(flat.logprobs, dtype=torch.float64).view(len(tokens), -1)
    named = torch.tensor(flat.token_ids).view(found.shape)
    assert torch.equal(named[:, 0], tokens), "vLLM reports the sampled token first"
    hidden = (found[:, 1:] - _BIAS / temperature).logsumexp(-1)
    return (found[:, 0] - torch.nn.functional.softplus(hidden)).float()


def _start(policy: Policy, options: VllmOptions) -> tuple[Any, torch.dtype, bool]:
    """The engine, the dtype of its weights, and whether it can sleep."""
    key = "VLLM_ENABLE_V1_MULTIPROCESSING"
    if os.environ.setdefault(key, "0") != "0":
        remedy = "the engine has to be in the process that holds the weights: unset it"
        fail(key, "0", os.environ[key], remedy)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    try:
        import vllm
        from vllm.platforms import current_platform
    except ImportError as error:
        message = f"worker.rollout.name=vllm needs vLLM, see docs/ROLLOUTS.md: {error}"
        raise ImportError(message) from error
    folder = Path(str(getattr(policy.model, "name_or_path", "")))
    if not (folder / "config.json").is_file():
        remedy = "load the policy from a folder in Hugging Face form"
        fail("policy", "a model that was loaded from a folder", repr(str(folder)), remedy)
    cpu = current_platform.is_cpu()
    named = {"auto": "float32" if cpu else "bfloat16"}.get(options.dtype, options.dtype)
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    more: dict[str, Any] = {}
    if ranks > 1:
        more["distributed_executor_backend"] = "external_launcher"
    if named != "float32":
        more["hf_overrides"] = {"head_dtype": "float32"}  # logits in fp32, as the trainer's
    if options.max_sequences is not None:
        more["max_num_seqs"] = options.max_sequences
    if cpu:
        # A prompt cut in two winds its generator back, which a CPU's cannot do.
        more |= {"enforce_eager": True, "enable_chunked_prefill": False}
    sleeps = options.sleep and not cpu
    llm = vllm.LLM(
        str(folder),
        dtype=named,
        seed=torch.distributed.get_rank() if ranks > 1 else 0,
        gpu_memory_utilization=options.memory,
        max_model_len=-1,  # what the cache has room for
        enable_sleep_mode=sleeps,
        logprobs_mode="processed_logprobs",
        mm_processor_cache_gb=0,  # images of a step do not come back in the next
        mm_processor_kwargs={"do_resize": False},  # they are at model resolution
        limit_mm_per_prompt={"video": 0},
        **more,
    )
    return llm, getattr(torch, named), sleeps


@contextmanager
def _random_state() -> Iterator[None]:
    """Every global generator is left as it was: vLLM seeds them all."""
    numbers, arrays = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(numbers)
        np.random.set_state(arrays)
