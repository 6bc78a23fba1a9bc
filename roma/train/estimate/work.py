"""What a step runs: micro-batches, tokens, FLOP, seconds."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from roma.models import flops
from roma.train.batch import micro_batches
from roma.train.config import Config
from roma.train.config.check_methods import scoring_passes
from roma.train.config.sections import AlgorithmConfig
from roma.train.contrast import Contrast
from roma.train.estimate.states import FLOAT, Parameters


class Sizes(NamedTuple):
    """Of the questions, in tokens of the text model, and of the answers."""

    prompt: float
    """Image tokens included."""
    images: float
    """Image tokens of it."""
    largest_prompt: int
    largest_images: int
    response: float
    """Mean."""


@dataclass(frozen=True)
class MicroBatch:
    """What a forward pass runs with a graph."""

    tokens: float
    """Of the text model."""
    queries: float
    """Of its attention: the tokens, and what pads sequences of about equal length."""
    keys: float
    """Tokens that attention sequences see: of a completion its prompt's and its own."""
    mask_entries: float
    """Of attention masks."""
    patches: float
    """Of images that pass through a trained tower."""
    rows: float
    """Of the head."""
    shared: bool
    """A prompt once for all its rollouts."""


class Images(NamedTuple):
    """How many variants of its images a prompt and its rollouts are run on, at most."""

    prompt: int
    rollouts: int  # of all G together


def images(config: Config) -> Images:
    """The most there can be: every rollout right, every one with an advantage."""
    algorithm, group = config.algorithm, config.worker.rollout.n
    views = algorithm.views.k if algorithm.view_mode == "roma" else 0
    roma, contrast = algorithm.roma, Contrast.of(algorithm)
    if contrast:
        seen = 1 + len(contrast.terms)
        return Images(seen, group * seen)
    auxiliary = not isinstance(roma.lambda_aux, float) or roma.lambda_aux > 0
    if not views:
        return Images(1, group)
    if config.worker.actor.update == "joint" or roma.penalises:
        return Images(1 + views, group * (1 + views))
    if auxiliary:
        return Images(1 + min(views, group), 2 * group)
    return Images(1, group)


def largest(config: Config, sizes: Sizes, merge: int, ranks: int) -> tuple[MicroBatch, int]:
    """The largest micro-batch, every answer at its longest; and micro-batches a mini-batch has.

    Of two passes the second has a graph for three images at most, clean, worst and auxiliary; the
    first has none. It counts where it is named, not where "auto" may take it. PAPO's and DVRP's
    views have no graph, only the clean images have.
    """
    actor, run = config.worker.actor, images(config)
    length, most = sizes.largest_prompt, config.data.max_response_length
    own = run.prompt * length + run.rollouts * (most - 1)
    if not actor.share_prompt:
        own = run.rollouts * (length + most - 1)
    count = actor.mini_batch_size // ranks
    parts = micro_batches([own] * count, actor.micro_batch_tokens)
    held = max(map(len, parts))
    seen = min(1.0, 3 / run.prompt) if actor.update == "two_pass" else 1.0
    if Contrast.of(config.algorithm):
        seen = 1 / run.prompt
    return batch_of(
        prompts=held,
        prompt=length,
        response=most,
        run=Images(math.ceil(run.prompt * seen), math.ceil(run.rollouts * seen)),
        patches=sizes.largest_images * merge**2,
        shared=actor.share_prompt,
    ), len(parts)


def batch_of(
    *, prompts: int, prompt: int, response: int, run: Images, patches: int, shared: bool
) -> MicroBatch:
    """A micro-batch of prompts and rollouts of equal lengths, in tokens; `patches` of a prompt."""
    later = max(response - 1, 0)  # the last token predicts nothing
    rows = prompts * run.rollouts
    if not shared:
        tokens = rows * (prompt + later)
        keys, entries = tokens, 0
    else:
        tokens = prompts * run.prompt * prompt + rows * later
        keys = prompts * run.prompt * prompt + rows * (prompt + later if later else 0)
        entries = later * (prompt + later)  # one mask for completions of about one shape
    return MicroBatch(
        tokens=tokens,
        queries=tokens,
        keys=keys,
        mask_entries=entries,
        patches=prompts * run.prompt * patches,
        rows=rows * response,
        shared=shared,
    )


class Work(NamedTuple):
    """FLOP of a step, of all ranks together."""

    update: float
    scoring: float
    sampling: float

    @property
    def total(self) -> float:
        """All three."""
        return sum(self)


def work(config: Config, parameters: Parameters, sizes: Sizes, *, right: float) -> Work:
    """FLOP of a step, on average.

    Args:
        config: of the run.
        parameters: of its model.
        sizes: of questions and answers.
        right: share of right answers; of no account if algorithm.penalised is "every".
    """
    text, tower = parameters.text, parameters.tower
    actor, algorithm, group = config.worker.actor, config.algorithm, config.worker.rollout.n
    views = algorithm.views.k if algorithm.view_mode == "roma" else 0
    count, answer = config.data.rollout_batch_size, max(round(sizes.response), 1)
    frames = [round(sizes.images * tower.merge**2)] if sizes.images else []
    true = group if algorithm.penalised == "every" else round(right * group)
    prompt = flops.Prompt(
        round(sizes.prompt), frames, [answer] * group, [True] * true + [False] * (group - true)
    )
    adapters = actor.lora.rank and flops.Adapters(actor.lora.rank, actor.lora.targets)
    frozen = bool(actor.freeze_vision or adapters)
    roma = algorithm.roma
    forms = ("lean", "two_pass") if actor.update == "auto" else (actor.update,)
    update = min(
        flops.update(
            text,
            tower,
            [prompt],
            flops.Form(form if views else "clean", actor.share_prompt),
            views=views,
            invariance=bool(views and roma.penalises),
            auxiliary=not isinstance(roma.lambda_aux, float) or roma.lambda_aux > 0,
            checkpointed=actor.gradient_checkpointing,
            vision_trained=not frozen,
            adapters=adapters or None,
        ).total
        for form in forms
    )
    seen = flops.forward(text, tower, flops.images(frames)).total

    def scoring(rollouts: int) -> float:
        own = flops.packed([flops.Group(prompt.tokens, [answer] * rollouts)])
        return seen + flops.forward(text, tower, own).total + text.row * rollouts * answer

    once = scoring(group)
    minis = config.data.rollout_batch_size // actor.mini_batch_size
    scored = (minis - 1) / minis  # the first one's log-probs come with its update
    scored += scoring_passes(algorithm)
    contrast = Contrast.of(algorithm)
    if contrast:  # each update scores every rollout on these views
        scored += actor.ppo_epochs * len(contrast.terms)
    if views and algorithm.views.candidates and algorithm.views.candidates > views:
        scored += 1 + algorithm.views.candidates
    # Searches and attacks score a question's penalised rollouts, or all if it has none.
    probed = probes(algorithm)
    scored += probed > 0
    late = probed * scoring(true or group)
    # transformers samples until the longest answer ends; vLLM each one until its own end.
    steps = answer if config.worker.rollout.name == "vllm" else config.data.max_response_length
    decoded = flops.packed([flops.Group(prompt.tokens, [steps + 1] * group)])
    sampled = seen + flops.forward(text, tower, decoded).total + text.row * group * steps
    return Work(
        update=count * actor.ppo_epochs * update,
        scoring=count * (scored * once + late),
        sampling=count * sampled,
    )


def probes(algorithm: AlgorithmConfig) -> int:
    """How often a step scores a view that it searches for or attacks with, views added up.

    A backward pass to the pixels counts as one more (`roma.train.views.attack`).
    """
    views = algorithm.views
    if algorithm.view_mode != "roma":
        return 0
    if views.target_divergence is not None:
        return views.search_steps * views.k
    attacked = views.k if views.pool == "adversarial" else views.attack.count
    return attacked * (2 * views.attack.steps + 1)


class Rate(NamedTuple):
    """What a rank computes and reads in a second."""

    flops: float
    """FLOP/s that an update sustains."""
    bytes: float
    """Bytes/s from memory."""


def seconds(
    config: Config, parameters: Parameters, sizes: Sizes, done: Work, rate: Rate, ranks: int
) -> tuple[float, float]:
    """Seconds of a step: of sampling, and of scoring and update. Nothing overlaps.

    A token of sampling reads every weight once for all answers that run side by side, and the keys
    and values of each.
    """
    vllm = config.worker.rollout.name == "vllm"
    answers = config.data.rollout_batch_size * config.worker.rollout.n / ranks
    limit = config.worker.rollout.vllm.max_sequences if vllm else None
    turns = math.ceil(answers / limit) if limit else 1
    size = 2 if config.trainer.dtype == "bfloat16" else FLOAT
    steps = turns * (sizes.response if vllm else config.data.max_response_length)
    kept = cache_bytes(parameters, config, sizes.prompt + sizes.response / 2)
    read = steps * (size * parameters.total + answers / turns * kept)
    sampling = max(done.sampling / ranks / rate.flops, read / rate.bytes)
    return sampling, (done.update + done.scoring) / ranks / rate.flops


def cache_bytes(parameters: Parameters, config: Config, tokens: float) -> float:
    """Bytes of the keys and values of one answer with so many tokens, its prompt's included.

    In transformers keys stay fp32 under autocast, since their norm's weight is.
    """
    text, half = parameters.text, config.trainer.dtype == "bfloat16"
    both = 2 * (2 if half else FLOAT)
    if config.worker.rollout.name == "hf" and half:
        both = FLOAT + 2
    return tokens * text.layers * text.kv_heads * text.head_dim * both
