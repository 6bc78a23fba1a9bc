"""FLOP of one update in each of its forms, from what is known before it runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from roma.models.flops.passes import (
    Adapters,
    Cost,
    Group,
    Packed,
    backward,
    forward,
    head,
    images,
    packed,
)
from roma.models.flops.shapes import TextShape, VisionShape


@dataclass(frozen=True)
class Prompt:
    """A prompt and its G rollouts, as far as the cost of an update depends on them."""

    tokens: int
    """Image tokens included."""
    frames: Sequence[int]
    """Patches of each of its images."""
    completions: Sequence[int]
    """Tokens of each rollout."""
    right: Sequence[bool]
    learns: Sequence[bool] | None = None
    """Whether a rollout's advantage is not 0; None: all learn."""
    aux: Sequence[int] | None = None
    """The auxiliary view of each rollout; None: not drawn yet, all views equally likely."""


class Form(NamedTuple):
    """A form of the update."""

    pairs: str
    """Which (image, rollout) pairs are run, and how:

    "clean"     every rollout on the clean image: GRPO
    "joint"     every rollout on the clean image and on every view
    "lean"      right rollouts on the clean image and every view; those that learn on the clean
                image and their auxiliary view; no others
    "two_pass"  right rollouts first on all of these without a graph; then as lean, but of a right
                rollout's views the worst and the auxiliary one alone
    """
    share_prompt: bool = True
    """One pass over a prompt for all rollouts on the same image; else a row for each rollout, all
    rows as long as the longest prompt and the longest completion."""
    share_vision: bool = True
    """One pass over an image for all rollouts; else one for each."""


ROW_WISE_GRPO = Form("clean", share_prompt=False, share_vision=False)
"""What TRL and EasyR1 run."""
FORMS = {
    "GRPO, a row and a vision pass per rollout": ROW_WISE_GRPO,
    "GRPO, prompt shared": Form("clean"),
    "joint, row-wise": Form("joint", share_prompt=False),
    "lean, row-wise": Form("lean", share_prompt=False),
    "joint, prompt shared": Form("joint"),
    "lean, prompt shared": Form("lean"),
    "two-pass, prompt shared": Form("two_pass"),
}


class _Runs(NamedTuple):
    """How often a prompt and its rollouts are run."""

    clean: float
    """1 if the prompt is run on its clean image."""
    views: float
    """Distinct views on which it is run."""
    rollouts: list[float]
    """Images, clean or degraded, on which each rollout is run."""


def _runs(
    prompt: Prompt, pairs: str, views: int, invariance: bool, auxiliary: bool
) -> tuple[_Runs, _Runs, list[float]]:
    """What a prompt runs with a graph, what without, and its rows of the head with a gradient.

    These are counted for each token of a rollout, [G].
    """
    count = len(prompt.completions)
    learns = [True] * count if prompt.learns is None else [bool(x) for x in prompt.learns]
    right = [bool(x) and invariance and views > 0 for x in prompt.right]
    drew = [x and auxiliary and views > 0 for x in learns]
    # A right rollout's auxiliary view is also its worst one in one of K cases.
    apart = [d * (1 - r / views) if d else 0.0 for d, r in zip(drew, right, strict=True)]
    active = [x + r + d for x, r, d in zip(learns, right, apart, strict=True)]
    nothing = _Runs(0.0, 0.0, [0.0] * count)
    if pairs == "clean":
        return _Runs(1.0, 0.0, [1.0] * count), nothing, [float(x) for x in learns]
    if pairs == "joint":
        return _Runs(1.0, float(views), [1.0 + views] * count), nothing, active
    known, unknown = 0, sum(drew)
    if prompt.aux is not None:
        known = len({k for k, d in zip(prompt.aux, drew, strict=True) if d})
        unknown = 0
    clean = [float(x or r) for x, r in zip(learns, right, strict=True)]
    if pairs == "lean":
        degraded = float(views) if any(right) else _distinct(views, known, unknown)
        seen = [float(views) if r else float(d) for r, d in zip(right, drew, strict=True)]
        scored = nothing
    else:
        degraded = _distinct(views, known, unknown + sum(right))
        seen = [r + d for r, d in zip(right, apart, strict=True)]
        every = [(1.0 + views) * r for r in right]
        scored = _Runs(float(any(right)), float(views * any(right)), every)
    if any(learns):
        both = [c + s for c, s in zip(clean, seen, strict=True)]
        return _Runs(1.0, degraded, both), scored, active
    # No clean log-prob has a gradient: they are computed without a graph, if two passes do not
    # have them already.
    alone = _Runs(float(any(clean)), 0.0, clean)
    return _Runs(0.0, degraded, seen), scored if pairs == "two_pass" else alone, active


def _distinct(views: int, known: int, draws: int) -> float:
    """Expected number of distinct views, `known` of them given, after so many draws.

    known + (K − known)·(1 − (1 − 1/K)^draws)
    """
    if not views:
        return 0.0
    return known + (views - known) * (1 - (1 - 1 / views) ** draws)


def update(
    text: TextShape,
    vision: VisionShape | None,
    prompts: Sequence[Prompt],
    form: Form,
    *,
    views: int,
    invariance: bool = True,
    auxiliary: bool = True,
    checkpointed: bool = False,
    vision_trained: bool = True,
    adapters: Adapters | None = None,
) -> Cost:
    """FLOP of one update: forward, backward and head. It has no side effects and draws nothing.

    What is not known before the update is an expectation: the worst view of a right rollout is each
    of the K with equal probability, so a prompt with n right rollouts has K·(1 − (1 − 1/K)ⁿ)
    distinct worst views. Clipped tokens count as if they had a gradient. Equal completions of a
    prompt are not merged. A thousand prompts take a few milliseconds.

    Args:
        text: of the text model.
        vision: of the tower; None without images.
        prompts: the batch.
        form: of the update.
        views: K.
        invariance: whether λ_inv > 0.
        auxiliary: whether λ_aux > 0.
        checkpointed: whether layers are run again in the backward pass.
        vision_trained: whether the tower has gradients. If not, shared vision passes run on the
            views alone: the features of the clean images are known from sampling.
        adapters: on the text model, where nothing but them is trained; the tower's is above.
    """
    longest = max((p.tokens for p in prompts), default=0)
    most = max((t for p in prompts for t in p.completions), default=1)
    row = packed([Group(longest, [most])])
    work = [[0.0] * 4, [0.0] * 4]  # with a graph, and without
    rows = active = 0.0
    for prompt in prompts:
        *both, on = _runs(prompt, form.pairs, views, invariance, auxiliary)
        own, seen = packed([Group(prompt.tokens, [])]), images(prompt.frames)
        for done, runs in zip(work, both, strict=True):
            every = sum(runs.rollouts)
            # A frozen tower has seen the clean images when the rollouts were sampled.
            shared = runs.views + (runs.clean if vision_trained else 0.0)
            towers = shared if form.share_vision else every
            done[2] += towers * seen.patches
            done[3] += towers * seen.patch_pairs
            if not form.share_prompt:
                done[0] += every * row.tokens
                done[1] += every * row.pairs
                continue
            done[0] += (runs.clean + runs.views) * own.tokens
            done[1] += (runs.clean + runs.views) * own.pairs
            for t, times in zip(prompt.completions, runs.rollouts, strict=True):
                later = max(t - 1, 0)  # the first one is predicted by the prompt's last state
                done[0] += times * later
                done[1] += times * later * (prompt.tokens + t / 2)
        for number, t in enumerate(prompt.completions):
            rows += t * (both[0].rollouts[number] + both[1].rollouts[number])
            active += t * on[number]
    learnt, scored = (Packed(*done) for done in work)
    found = [
        forward(text, vision, learnt, adapters=adapters),
        forward(text, vision, scored, adapters=adapters),
        backward(
            text,
            vision,
            learnt,
            checkpointed=checkpointed,
            vision_trained=vision_trained,
            adapters=adapters,
        ),
        head(text, rows, active, trained=adapters is None),
    ]
    return Cost(*map(sum, zip(*found, strict=True)))


def cheaper(
    text: TextShape,
    vision: VisionShape | None,
    prompts: Sequence[Prompt],
    *,
    views: int,
    share_prompt: bool = True,
    invariance: bool = True,
    auxiliary: bool = True,
    checkpointed: bool = False,
    vision_trained: bool = True,
    adapters: Adapters | None = None,
) -> str:
    """The cheaper one of "lean" and "two_pass" for this batch; "lean" if they are equal.

    Args: as of `update`.
    """
    lean, two = (
        update(
            text,
            vision,
            prompts,
            Form(pairs, share_prompt),
            views=views,
            invariance=invariance,
            auxiliary=auxiliary,
            checkpointed=checkpointed,
            vision_trained=vision_trained,
            adapters=adapters,
        ).total
        for pairs in ("lean", "two_pass")
    )
    return "two_pass" if two < lean else "lean"
