"""Fields of a fused head's output that a log-prob does not give, without gradient.

    mean_logits       (1/V) Σ_v z_v = h·w̄ + b̄ without a soft cap: a mean of the head, no logits
    log_sum_sq_probs  log Σ_v p_v² = lse(2z) − 2·lse(z): the same head at half the temperature
    is_top1           p_y > 1/2 is the largest; p_y < e^(−H) is not, since max_v p_v ≥ e^(−H)
                      (H = −Σ p log p ≥ −log max p). Only rows between the two need logits.

Where logits are needed (rows in doubt, and the mean of capped ones) they are formed in fp32, in
tiles of `workspace` bytes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from roma import linear_logprob
from roma_kernels.products import as_written, mm

OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
"""What a fused head can be asked for; log_probs are always there."""
_ROWS = 1024
_COLUMNS = 2048  # at least
_BYTES = {"cpu": 16 << 20}
_GPU_BYTES = 512 << 20


@dataclass(frozen=True)
class Scored:
    """n counted tokens under a head, and what `linear_logprob` found; all of it detached."""

    hidden: Tensor  # [n, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    tokens: Tensor  # [n]
    temperature: float
    softcap: float | None
    logp: Tensor  # [n]
    lse: Tensor  # [n]
    entropy: Tensor | None  # [n]; is_top1 needs it
    backend: str
    workspace: int | None


@torch.no_grad()
def fields(scored: Scored, outputs: tuple[str, ...]) -> dict[str, Tensor]:
    """Those of log_sum_sq_probs, mean_logits and is_top1 that `outputs` names, each [n]."""
    found = {}
    if "log_sum_sq_probs" in outputs:
        found["log_sum_sq_probs"] = _log_sum_squares(scored)
    if "mean_logits" in outputs:
        found["mean_logits"] = _mean_logits(scored)
    if "is_top1" in outputs:
        found["is_top1"] = _is_top1(scored)
    return found


def _log_sum_squares(scored: Scored) -> Tensor:
    half = linear_logprob(
        scored.hidden,
        scored.weight,
        scored.tokens,
        bias=scored.bias,
        temperature=scored.temperature / 2,
        softcap=scored.softcap,
        backend=scored.backend,
        workspace=scored.workspace,
    )
    return half.lse - 2 * scored.lse


def _mean_logits(scored: Scored) -> Tensor:
    dtype = scored.logp.dtype
    if scored.softcap is None:
        mean = scored.weight.mean(0, dtype=dtype)
        with as_written(scored.hidden):
            total = scored.hidden.to(dtype) @ mean
        if scored.bias is not None:
            total = total + scored.bias.mean(dtype=dtype)
        return total / scored.temperature
    total = torch.zeros_like(scored.logp)
    for rows, _, logits in _tiles(scored, torch.arange(len(total), device=total.device)):
        total[rows] += (logits / scored.softcap).tanh_().sum(-1)
    return total * (scored.softcap / scored.temperature / len(scored.weight))


def _is_top1(scored: Scored) -> Tensor:
    """The label is the first of the largest logits."""
    assert scored.entropy is not None  # its caller asks for it
    # Rounding of log-prob and entropy is a few eps of the lse; a wide margin costs a few rows.
    margin = 1e-3 + 1e-5 * scored.lse.abs()
    sure = scored.logp > margin - math.log(2)
    never = scored.logp < -scored.entropy - margin
    doubt = (~(sure | never)).nonzero()[:, 0]
    highest, before, target = scored.logp.new_full((3, len(doubt)), -math.inf).unbind()
    for rows, start, logits in _tiles(scored, doubt):
        place = (scored.tokens[doubt[rows]] - start)[:, None]
        columns = torch.arange(logits.shape[1], device=logits.device)
        own = logits.gather(1, place.clamp(0, logits.shape[1] - 1))[:, 0]
        here = ((place >= 0) & (place < logits.shape[1]))[:, 0]
        target[rows] = torch.where(here, own, target[rows])
        highest[rows] = torch.maximum(highest[rows], logits.amax(1))
        ahead = logits.masked_fill_(columns >= place, -math.inf).amax(1)
        before[rows] = torch.maximum(before[rows], ahead)
    sure[doubt] = (target >= highest) & (target > before)
    return sure


def _tiles(scored: Scored, rows: Tensor) -> Iterator[tuple[slice, int, Tensor]]:
    """Tiles of x = W h + b, before cap and temperature.

    Yields:
        The slice of `rows`, the first column, and x [·, ·] in fp32 (or float64).
    """
    dtype = scored.logp.dtype
    budget = scored.workspace or _BYTES.get(scored.hidden.device.type, _GPU_BYTES)
    height = max(1, min(_ROWS, len(rows)))
    # Of logits, and of the head's rows where they are converted.
    width = max(_COLUMNS, budget // (max(height, scored.hidden.shape[1]) * dtype.itemsize))
    for first in range(0, len(rows), height):
        part = slice(first, first + height)
        hidden = scored.hidden[rows[part]]
        for start in range(0, len(scored.weight), width):
            weight = scored.weight[start : start + width]
            common = torch.promote_types(hidden.dtype, weight.dtype)
            with as_written(hidden):
                logits = mm(hidden.to(common), weight.to(common).T, dtype)
            if scored.bias is not None:
                logits += scored.bias[start : start + width]
            yield part, start, logits
