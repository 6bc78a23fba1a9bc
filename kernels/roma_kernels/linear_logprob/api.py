"""`linear_logprob`: log-probabilities of the sampled tokens straight from hidden states."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from roma_kernels.arguments import (
    check_dtype,
    check_positive,
    check_shape,
    check_tensor,
    check_values,
)
from roma_kernels.linear_logprob.head import check_head, score


class TokenLogprobs(NamedTuple):
    """Log-prob, log-sum-exp and entropy of each token, fp32, in nats.

    Attributes:
        logp: [...], differentiable.
        lse: [...], a constant.
        entropy: [...], differentiable; None unless asked for.
    """

    logp: Tensor
    lse: Tensor
    entropy: Tensor | None


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    vocab_group: "dist.ProcessGroup | None" = None,
    workspace: int | None = None,
    backend: str = "auto",
) -> TokenLogprobs:
    """Log-probability of each token under a linear head, without materialising the logits.

        z = W h + b ;  z ← s·tanh(z/s) if softcap ;  z ← z/τ
        lse = log Σ_v exp z_v ;  logp = z_y − lse ;  H = lse − Σ_v p_v z_v

    (MATH.md section 1.) The logits stay in fp32 from the product through the softmax whatever the
    inputs' dtype, and `logp ≤ 0` always. The backward computes only the rows whose upstream
    gradients are not all zero.

    Args:
        hidden: [..., D] fp32, bf16 or fp16 (float64 is accepted and then kept): output of the
            model's last norm.
        weight: [V, D], any of these dtypes, not necessarily the one of `hidden`.
        tokens: [...] int64 in 0..V-1. There is no padding value: leave padded rows out, or give
            them any valid token and no upstream gradient.
        bias: [V] or None.
        temperature: τ > 0, a float or a tensor [...] of one per row.
        softcap: s > 0, or None for no soft cap.
        entropy: whether to return the entropy too.
        vocab_group: the ranks that hold the head between them, each an equal slice of the
            vocabulary in the order of ranks; `weight` and `bias` are this rank's slice, all else is
            the same on every rank, and so are the results. One all-gather of three numbers a row
            forward (four with the entropy), one all-reduce of dh backward.
        workspace: bytes that the backward may use for its tiles of logits; None: 512 MiB on a GPU,
            16 MiB on a CPU. A tile has 1024 rows and 2048 columns at least, whatever is asked for.
        backend: "auto", "triton", "native", "torch" or "reference"; `roma info` shows which can run
            here.

    Returns:
        TokenLogprobs of fp32 [...] tensors, nothing reduced. Gradients flow to `hidden`, `weight`
        and `bias` through `logp` and `entropy`, once (no double backward); `lse`, `temperature` and
        `tokens` are not differentiated. A frozen head costs no dW, a frozen body no dh.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: a shape, dtype, device or value does not fit; the message names the argument and
            the remedy.
        RuntimeError: a tensor of forward-mode autograd or inside a transform of torch.func, which
            backend "reference" alone supports.

    Example:
        >>> hidden, weight = torch.randn(2, 3, 8), torch.randn(50, 8)
        >>> linear_logprob(hidden, weight, torch.tensor([[1, 2, 3], [4, 5, 6]])).logp.shape
        torch.Size([2, 3])
    """
    head = check_head(
        hidden,
        weight,
        bias,
        softcap=softcap,
        vocab_group=vocab_group,
        workspace=workspace,
        backend=backend,
    )
    check_tensor("tokens", tokens, like=hidden)
    check_dtype("tokens", tokens, (torch.int64,))
    check_shape("tokens", tokens, ("hidden's leading shape [...]", tuple(hidden.shape[:-1])))
    head.check_tokens(tokens)
    tau = _check_temperature(temperature, tokens)
    if isinstance(tau, Tensor):
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        tau = tau.detach().to(dtype).expand(tokens.shape).reshape(-1)
    states, labels = hidden.reshape(-1, hidden.shape[-1]), tokens.reshape(-1).contiguous()
    found = score(head, states, labels, temperature=tau, entropy=entropy)
    logp, lse, row_entropy = (None if x is None else x.reshape(tokens.shape) for x in found)
    assert logp is not None and lse is not None  # score's own promise
    return TokenLogprobs(logp, lse, row_entropy)


def _check_temperature(temperature: float | Tensor, tokens: Tensor) -> float | Tensor:
    if not isinstance(temperature, Tensor):
        check_positive("temperature", temperature, "pass 1.0 for none")
        return temperature
    check_tensor("temperature", temperature, like=tokens)
    if temperature.ndim:
        check_shape("temperature", temperature, ("tokens' shape [...]", tuple(tokens.shape)))
    check_values(
        (temperature > 0) & torch.isfinite(temperature),
        lambda: "temperature: expected finite numbers > 0, got one that is not; pass τ, not 1/τ",
    )
    return temperature
