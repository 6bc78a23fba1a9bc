"""Log-probabilities of the sampled tokens from hidden states, as MATH.md section 1 writes them.

    z = W h + b ;  z ← s·tanh(z/s) if softcap ;  z ← z/τ
    lse = log Σ_v exp z_v ;  logp = z_y − lse ;  p = exp(z − lse) ;  H = −Σ_v p_v (z_v − lse)

Every logit is kept, autograd makes the backward. In float64 this is what every back end is held to,
and through `roma.testing` every kernel of a user's own. It shares no line with a kernel.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class HeadReference:
    """Every intermediate that a test may want to differentiate by."""

    raw: Tensor
    """[R, V], the bare product W h."""
    z: Tensor
    """[R, V], the final logits."""
    p: Tensor
    """[R, V], their softmax."""
    logp: Tensor
    """[R]."""
    lse: Tensor
    """[R]."""
    entropy: Tensor
    """[R]."""


def linear_logprob_reference(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    dtype: torch.dtype | None = None,
) -> HeadReference:
    """Section 1 for hidden [R, D], weight [V, D], tokens [R]; temperature a number or [R].

    Computes in `dtype`; None: fp32, or float64 where hidden is.
    """
    dtype = dtype or torch.promote_types(hidden.dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        raw = hidden.to(dtype) @ weight.to(dtype).T
    z = raw if bias is None else raw + bias.to(dtype)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / (temperature.to(dtype)[:, None] if isinstance(temperature, Tensor) else temperature)
    lse = torch.logsumexp(z, dim=1)
    log_p = z - lse[:, None]
    p = torch.exp(log_p)
    logp = z.gather(1, tokens[:, None])[:, 0] - lse
    # An entry that the bias masks out has p = 0 and takes no part: 0·(−∞) would be NaN.
    entropy = -(p * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(dim=1)
    return HeadReference(raw=raw, z=z, p=p, logp=logp, lse=lse, entropy=entropy)
