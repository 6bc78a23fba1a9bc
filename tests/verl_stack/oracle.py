"""Section 2 of docs/MATH.md in float64, line by line, and verl's clean objective beside it.

Shares no line with the package. One function takes log-probs; the other gets them from the model of
transformers itself, one row and one image after the other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from verl_stack import cases

from roma.integrations.views import ViewMaker
from roma.testing import tolerance
from roma.views import degrade_batch, seed_for


@dataclass(frozen=True)
class Case:
    """What the loss of a step is a function of, beside log-probs."""

    rows: list[dict]
    options: object
    mode: str = "token-mean"
    total: int | None = None  # sequences of the step; None: these
    tokens: float | None = None
    right: float | None = None
    scale: int | None = None
    clip: tuple[float, float, float] = (0.2, 0.28, 3.0)

    @property
    def correct(self) -> list[bool]:
        return [
            row["extra_fields"]["reward_extra_info"]["acc"] > self.options.accuracy_threshold
            and bool(row["response_mask"].any())
            and "pixel_values" in row["multi_modal_inputs"]
            for row in self.rows
        ]


def clipped(logp: Tensor, old: Tensor, gain: Tensor, clip) -> Tensor:
    """Per token: the dual-clipped objective, to minimise."""
    low, high, c = clip
    ratio = (logp - old).clamp(-20, 20).exp()
    loss = torch.maximum(-ratio * gain, -ratio.clamp(1 - low, 1 + high) * gain)
    return torch.where(gain < 0, torch.minimum(loss, -c * gain), loss)


def aggregated(case: Case, losses: list[Tensor], width: int) -> Tensor:
    """Per-token losses [T_i] of each row, as verl's loss_agg_mode says."""
    masks = [row["response_mask"].to(losses[0].dtype) for row in case.rows]
    tokens = float(sum(m.sum() for m in masks)) if case.tokens is None else case.tokens
    total = len(masks) if case.total is None else case.total
    sums = [(m * own).sum() for m, own in zip(masks, losses, strict=True)]
    if case.mode == "token-mean":
        return torch.stack(sums).sum() / tokens
    if case.mode == "token-sum":
        return torch.stack(sums).sum()
    if case.mode == "seq-mean-token-mean":
        sums = [s / m.sum().clamp(min=1) for s, m in zip(sums, masks, strict=True)]
    made = torch.stack(sums).sum() / total
    if case.mode == "seq-mean-token-sum-norm":
        made = made / (width if case.scale is None else case.scale)
    return made


def total_loss(
    case: Case, clean: list[Tensor], views: list[list[Tensor]], aux: list[int]
) -> tuple[Tensor, dict[str, float]]:
    """The loss, and what is logged; `views[i]` is empty for a row without images."""
    options, dtype = case.options, clean[0].dtype
    old = [row["old_log_probs"].to(dtype) for row in case.rows]
    gain = [row["advantages"].to(dtype) for row in case.rows]
    mask = [row["response_mask"].to(dtype) for row in case.rows]
    width = max(len(c) for c in clean)
    main = [clipped(c, o, a, case.clip) for c, o, a in zip(clean, old, gain, strict=True)]
    loss = aggregated(case, main, width)
    extra = [
        clipped(views[i][aux[i]], old[i], gain[i], case.clip) if views[i] else 0 * main[i]
        for i in range(len(clean))
    ]
    auxiliary = aggregated(case, extra, width)
    right = case.correct
    total = every = len(clean) if case.total is None else case.total
    if options.penalty_over == "correct":
        total = max(sum(right) if case.right is None else case.right, 1)
    worst, mean = clean[0].new_zeros(()), clean[0].new_zeros(())
    for i, good in enumerate(right):
        if not good:
            continue
        counted = mask[i].sum().clamp(min=1)
        each = []
        for a in views[i]:
            delta = a - clean[i].detach()
            delta = delta if options.penalty_ratio == "view/clean" else -delta
            each.append(mask[i] * (delta.expm1() - delta))
        d = torch.stack(each)
        mean = mean + d.sum(-1).mean() / counted
        if options.worst_over == "sequence":
            worst = worst + d.sum(-1).max() / counted
        elif options.worst_over == "token":
            worst = worst + d.amax(0).sum() / counted
        else:
            worst = worst + d.sum(-1).mean() / counted
    loss = loss + options.lambda_aux * auxiliary + options.lambda_inv * worst / total
    return loss, {
        "roma/penalty_worst": float(worst.detach() / total),
        "roma/penalty_mean": float(mean.detach() / every),
        # Of a sum over tokens the mean is logged.
        "roma/aux_loss": float(auxiliary.detach())
        / (sum(float(m.sum()) for m in mask) if case.mode == "token-sum" else 1),
    }


def drawn(case: Case, step: int = 0) -> tuple[list[list[dict]], list[int]]:
    """Per row its K views' multi_modal_inputs, from the images themselves; and the sampled view."""
    media = [row["multi_modal_inputs"] for row in case.rows]
    pixels = [own["pixel_values"] for own in media if "pixel_values" in own]
    grids = [own["image_grid_thw"] for own in media if "image_grid_thw" in own]
    counts = [len(own.get("image_grid_thw", ())) for own in media]
    maker = ViewMaker(case.options, cases.processor().image_processor)
    read = maker.read(torch.cat(pixels), torch.cat(grids), counts, step=step)
    aux = maker.aux_view(read, [row["responses"].tolist() for row in case.rows])
    made = []
    for i, row in enumerate(case.rows):
        views = []
        for k, spec in enumerate(read.specs[i]):
            seeds = [
                seed_for(case.options.view_seed, step, read.keys[i], k, n) for n in range(counts[i])
            ]
            images = degrade_batch(row["images"], [spec] * counts[i], seeds)
            own = cases.processor().image_processor(images=images, return_tensors="pt")
            assert torch.equal(own["image_grid_thw"], media[i]["image_grid_thw"])
            views.append({**media[i], "pixel_values": own["pixel_values"]})
        made.append(views)
    return made, aux.tolist()


def model(dtype: torch.dtype):
    """transformers' own, without verl."""
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(
        cases.folder(), dtype=dtype, attn_implementation="eager"
    )


def logp_of(net, row: dict, media: dict) -> Tensor:
    """[T] nats of a row's completion: one forward of one row."""
    dtype = net.lm_head.weight.dtype
    given = {name: media[name] for name in ("pixel_values", "image_grid_thw") if name in media}
    if given:
        given["pixel_values"] = given["pixel_values"].to(dtype)
    out = net(input_ids=row["input_ids"][None], position_ids=row["position_ids"][:, None], **given)
    answer = row["responses"]
    logits = out.logits[0, -len(answer) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, answer[:, None])[:, 0]


def whole(case: Case, dtype: torch.dtype) -> tuple[float, dict[str, Tensor], dict[str, float]]:
    """Loss, every parameter's gradient, and metrics: rows one by one, in `dtype`."""
    net = model(dtype)
    views, aux = drawn(case)
    clean = [logp_of(net, row, row["multi_modal_inputs"]) for row in case.rows]
    degraded = [
        [logp_of(net, row, own) for own in each] for row, each in zip(case.rows, views, strict=True)
    ]
    loss, metrics = total_loss(case, clean, degraded, aux)
    loss.backward()
    made = {name: w.grad for name, w in net.named_parameters() if w.grad is not None}
    return float(loss), made, metrics


def check_whole(got: dict[str, Tensor], case: Case) -> None:
    """Asserts that an engine's gradients are the model's, and that the bound bites."""
    _, want, _ = whole(case, torch.float64)
    _, eager, _ = whole(case, torch.float32)
    assert sorted(got) == sorted(want)
    limit = 2 * furthest(eager, want) + 2 * tolerance.eps(torch.float32)
    assert furthest(got, want) <= limit
    # Other views, a penalty on a wrong rollout and a weight off by 0.02 are far outside.
    heavier = {"lambda_aux": case.options.lambda_aux + 0.02}
    for planted in ({"view_seed": 1}, {"accuracy_threshold": -1.0}, heavier):
        _, other, _ = whole(of_options(case, **planted), torch.float64)
        assert furthest(other, want) > tolerance.PLANTED * limit, planted


def furthest(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """The largest error as a share of its tensor's largest entry, over all tensors.

    All gradients come from the same activations, so a tensor's share is a draw from one
    distribution: the largest of the eager pass's shares bounds that of another order of sums.
    """
    return max(
        float((got[name].double() - w.double()).abs().max() / w.double().abs().max())
        for name, w in want.items()
        if w.any() or got[name].any()  # a merger that feeds no layer has the gradient 0
    )


def of_options(case: Case, **changes) -> Case:
    """The case with other options."""
    return replace(case, options=replace(case.options, **changes))
