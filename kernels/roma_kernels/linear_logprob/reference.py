"""Log-probabilities of the sampled tokens from hidden states, as MATH section 1 writes them.

    z = W h + b ; z = s·tanh(z/s) ; z = z/τ ; lse = log Σ_v exp z_v ; logp = z_y − lse ; H = lse −
    Σ_v p_v z_v

Every logit is kept, autograd makes the backward, float64 inputs give float64 results. For tests and
for reading.
"""

import torch
from torch import Tensor


def linear_logprob_reference(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """logp, lse and entropy, each [R], from hidden [R, D], weight [V, D] and tokens [R]."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = hidden.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        logits = logits + bias.to(dtype)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)
    lse = torch.logsumexp(logits, dim=-1)
    logp = logits.gather(-1, tokens[:, None])[:, 0] - lse
    entropy = lse - (torch.softmax(logits, dim=-1) * logits).sum(-1)
    return logp, lse, entropy
