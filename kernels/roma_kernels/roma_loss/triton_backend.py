"""The loss from K+1 log-probs per token in Triton: sums, their total, and the coefficients.

    d = expm1(δ) − δ          δ = ±(a − sg(c))             ∂d/∂δ = expm1(δ)
    l = −min(ρA, clip(ρ)A)    at most −cA where A < 0      ∂l/∂logp = −ρA where nothing clips

and the other forms of l in docs/MATH.md section 3. Four small launches, no wait for the host: one
program a sequence sums its tokens, one program adds the sequences up and finds the worst view of a
batch, one program a sequence writes the coefficients of the clean image, one those of the views. A
ratio of the whole sequence takes one more before them. Reads 8·(K+7) bytes a token and writes
4·(K+1): next to the head's 2·D·V FLOP nothing.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from roma_kernels.linear_logprob.triton.launch import registers
from roma_kernels.roma_loss.batch import METRICS, Batch, divisors, first_view
from roma_kernels.roma_loss.config import LOG_WEIGHTS, RomaConfig
from roma_kernels.roma_loss.triton.coefficients import (
    _clean_coefficients_kernel,
    _view_coefficients_kernel,
)
from roma_kernels.roma_loss.triton.kernels import _ratios_kernel, _sums_kernel, _total_kernel

_SUMS = 10  # numbers of each sequence that are added up
_LEVELS = 5  # and that its tokens read: two log-ratios, two shared slopes, the weight of a gate
_BLOCK_T, _BLOCK_B = 256, 64
_WARPS = 4  # as Triton launches where nothing is said


class Launch(NamedTuple):
    """What the launches of one batch share."""

    penalty_divisor: Tensor
    token_divisors: Tensor
    token_weights: Tensor
    """[B], of each token's clean loss."""
    aux_weights: Tensor
    """[B], of each token's auxiliary loss."""
    penalty_weights: Tensor
    """[B], of each token's divergence."""
    ends: Tensor
    view_logp: Tensor | None
    old_logp: Tensor
    ref_logp: Tensor | None
    view_old_logp: Tensor
    levels: Tensor
    """[B, _LEVELS], where the objective or the gate looks at a whole sequence."""
    strides: tuple[int, ...]
    shapes: tuple[float, ...]
    """The objective's own four numbers, and the clamp of every log-ratio."""
    form: dict[str, Any]
    """Of the objective."""
    options: dict[str, Any]


def prepare(batch: Batch, config: RomaConfig) -> Launch:
    """What depends on no log-prob: built once, also where the log-probs come in chunks."""
    views = len(batch.view_logp)
    block_k = triton.next_power_of_2(max(views, 1))
    penalty_divisor, token_divisors = divisors(batch, config)
    token_weights = 1 / token_divisors
    return Launch(
        penalty_divisor,
        token_divisors,
        token_weights,
        aux_weights=batch.lambda_aux * token_weights,
        penalty_weights=batch.lambda_inv
        * batch.correct
        / (batch.lengths.clamp(min=1) * penalty_divisor),
        ends=batch.lengths.cumsum(0),
        view_logp=batch.view_logp if views else None,
        old_logp=batch.old.contiguous(),
        ref_logp=batch.ref_logp if config.ref_coef else None,
        view_old_logp=batch.view_old.contiguous(),
        levels=torch.zeros(len(batch.lengths), _LEVELS, device=batch.logp.device),
        strides=(batch.logp.stride(0), *batch.view_logp.stride()),
        # Floats even if given as whole numbers, for which Triton would compile its own kernels.
        shapes=tuple(map(float, (*_shapes(config), config.log_ratio_clamp))),
        form={"OBJECTIVE": config.objective, "LEVEL": _level(config), "LEVELS": _LEVELS},
        options={
            "VIEW_OVER_CLEAN": config.penalty_ratio == "view/clean",
            "WORST_OVER": config.worst_over,
            "BLOCK_K": block_k,
            "BLOCK_T": max(_BLOCK_T // block_k, 16),
            **registers(_WARPS, batch.logp.device),
        },
    )


def _shapes(config: RomaConfig) -> tuple[float, float, float, float]:
    """What `_objective` takes as shape_0 to shape_3."""
    dual = float("inf") if config.dual_clip is None else config.dual_clip
    return {
        "grpo": (1 - config.clip_low, 1 + config.clip_high, dual, 0),
        "cispo": (config.clip_high, 0, 0, 0),
        "sapo": (*config.sapo_temperature, 0, 0),
        "vespo": config.vespo,
    }[config.objective]


def _level(config: RomaConfig) -> str:
    """What a token's ratio is made of: the "token", the "mean" of its sequence, or the "sum"."""
    if config.main == "vespo":
        return "sum"
    return "mean" if config.ratio_level == "sequence" else "token"


def totals(batch: Batch, config: RomaConfig, launch: Launch) -> tuple[Tensor, Tensor]:
    """Metrics, of which the first is the loss, and the worst view; fills the levels."""
    (views, _), sequences = batch.view_logp.shape, len(batch.lengths)
    device = batch.logp.device
    sums = torch.zeros(_SUMS, sequences, device=device)
    divergence = torch.zeros(views, sequences, device=device) if views else None
    worst = first_view(batch, config)
    metrics = torch.zeros(len(METRICS), device=device)
    if sequences and launch.form["LEVEL"] != "token":
        _ratios_kernel[(sequences,)](
            launch.levels, batch.logp, launch.view_logp, launch.old_logp, launch.view_old_logp,
            batch.rollout_weight, launch.ends, batch.lengths, batch.aux_view, *launch.strides,
            launch.shapes[-1], *LOG_WEIGHTS, LEVEL=launch.form["LEVEL"], BLOCK_T=_BLOCK_T,
            LEVELS=_LEVELS,
        )  # fmt: skip
    if sequences:
        _sums_kernel[(sequences,)](
            sums, divergence, worst, launch.levels, batch.logp, launch.view_logp, launch.old_logp,
            launch.ref_logp, launch.view_old_logp, batch.advantages, batch.rollout_weight,
            launch.ends, batch.lengths, batch.aux_view, batch.gate_bound, *launch.strides,
            sequences, views, *launch.shapes, float(config.ref_coef),
            1 / config.gate_tau if config.gate_tau else 0.0, MAIN=config.main is not None,
            UNBIASED=config.ref_unbiased, **launch.form, **launch.options,
        )  # fmt: skip
    block_k = launch.options["BLOCK_K"]
    block_b = max(min(_BLOCK_B, 4096 // block_k), 16)  # of 128 views and 64 sequences, some spill
    _total_kernel[(1,)](
        metrics, worst, sums, divergence, batch.correct, launch.token_divisors,
        launch.penalty_divisor, batch.total_sequences, batch.total_tokens, batch.lambda_inv,
        batch.lambda_aux, sequences, views, float(config.ref_coef),
        WORST_OVER=config.worst_over, BLOCK_K=block_k, BLOCK_B=block_b, **registers(_WARPS, device),
    )  # fmt: skip
    return metrics, worst


def coefficients(
    batch: Batch,
    config: RomaConfig,
    launch: Launch,
    worst: Tensor,
    out: tuple[Tensor, Tensor],
    tokens: slice,
) -> None:
    """Fills the coefficients `out`, by logp [M] and view_logp [K, M], of a range of tokens.

    `worst` [B] or 0-dim is read if worst_over is "sequence" or "batch", and the levels if the
    objective or a gate looks at whole sequences: `totals` fills both.
    """
    (views, size), sequences = batch.view_logp.shape, len(batch.lengths)
    dlogp, dview_logp = out
    if sequences and config.main is not None:
        _clean_coefficients_kernel[(sequences,)](
            dlogp, launch.token_weights, launch.levels, batch.logp, launch.old_logp,
            launch.ref_logp, batch.advantages, batch.rollout_weight, launch.ends, batch.lengths,
            launch.strides[0], tokens.start, tokens.stop, *launch.shapes, float(config.ref_coef),
            UNBIASED=config.ref_unbiased, BLOCK_T=_BLOCK_T, **launch.form,
        )  # fmt: skip
    if sequences and views:
        _view_coefficients_kernel[(sequences,)](
            dview_logp, worst, launch.penalty_weights, launch.aux_weights, launch.levels,
            batch.logp, launch.view_logp, launch.view_old_logp, batch.advantages,
            batch.rollout_weight, launch.ends, batch.lengths, batch.aux_view, *launch.strides,
            size, views, tokens.start, tokens.stop, *launch.shapes,
            GATED=batch.gate_bound is not None, **launch.form, **launch.options,
        )  # fmt: skip


def combine(batch: Batch, config: RomaConfig) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, worst view, metrics, and the coefficients by logp [M] and view_logp [K, M].

    Tokens beyond Σ lengths are not read, and their coefficients are 0.
    """
    launch = prepare(batch, config)
    metrics, worst = totals(batch, config, launch)
    dlogp, dview_logp = (
        torch.zeros(x.shape, device=x.device) for x in (batch.logp, batch.view_logp)
    )
    everything = slice(0, len(batch.logp))
    coefficients(batch, config, launch, worst, (dlogp, dview_logp), everything)
    return metrics[0].clone(), worst, metrics, dlogp, dview_logp
