"""`linear_logprob`: log-probabilities of the sampled tokens straight from hidden states."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from roma_kernels.arguments import FLOATS, check_dtype, check_shape, check_tensor, check_values
from roma_kernels.backends import resolve
from roma_kernels.errors import fail
from roma_kernels.linear_logprob.op import linear_logprob_op
from roma_kernels.linear_logprob.reference import linear_logprob_reference


class TokenLogprobs(NamedTuple):
    """What a head says of each token, fp32 and in nats; `entropy` is None unless asked for."""

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

        z = W h + b ; z = s·tanh(z/s) if softcap ; z = z/τ ; lse = log Σ_v exp z_v ; logp = z_y −
        lse ; H = lse − Σ_v p_v z_v

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

    Example:
        >>> hidden, weight = torch.randn(2, 3, 8), torch.randn(50, 8)
        >>> linear_logprob(hidden, weight, torch.tensor([[1, 2, 3], [4, 5, 6]])).logp.shape
        torch.Size([2, 3])
    """
    _check(hidden, weight, tokens, bias, temperature, softcap, vocab_group)
    check_workspace(workspace)
    chosen = head_backend(backend, hidden, weight, vocab_group)
    rows, labels = hidden.reshape(-1, hidden.shape[-1]), tokens.reshape(-1).contiguous()
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    tau: float | Tensor
    if isinstance(temperature, Tensor):
        tau = temperature.detach().to(dtype).expand(tokens.shape).reshape(-1)
    else:
        tau = float(temperature)
    row_entropy: Tensor | None
    if chosen == "reference":
        logp, lse, row_entropy = linear_logprob_reference(rows, weight, labels, bias, tau, softcap)
        lse = lse.detach()
    else:
        row_scale, scale = (1 / tau, 1.0) if isinstance(tau, Tensor) else (None, 1 / tau)
        logp, lse, row_entropy = linear_logprob_op(
            rows, None, weight, bias, labels, None, None, row_scale, scale, softcap, entropy,
            chosen, _name(vocab_group), workspace,
        )  # fmt: skip
    shape = tokens.shape
    return TokenLogprobs(
        logp.view(shape), lse.view(shape), row_entropy.view(shape) if entropy else None
    )


def rows_logprob(
    hidden: Tensor,
    view_hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    index: Tensor,
    counted: Tensor | None,
    *,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    vocab_group: "dist.ProcessGroup | None",
    workspace: int | None,
    backend: str,
) -> Tensor:
    """Log-probs [K+1, n] of n tokens on the clean image and K views, in one sweep over W.

    For callers who have checked everything. Nothing is copied to bring the rows together but what
    one launch works on.

    Args:
        hidden: [M, D].
        view_hidden: [K, M, D].
        weight: [V, D].
        tokens: [n].
        index: [n], places of the tokens among the M.
        counted: 0-dim or None: only the first so many of the n are computed.
        bias: [V] or None.
        temperature: τ.
        softcap: s or None.
        vocab_group: as in `linear_logprob`.
        workspace: as in `linear_logprob`.
        backend: one that can run here.
    """
    views = len(view_hidden)
    if backend == "reference":
        states = torch.cat([hidden[None], view_hidden])[:, index].flatten(0, 1)
        labels = tokens.repeat(views + 1)
        logp, _, _ = linear_logprob_reference(states, weight, labels, bias, temperature, softcap)
        return logp.view(views + 1, -1)
    logp, _, _ = linear_logprob_op(
        hidden, view_hidden if views else None, weight, bias, tokens, index, counted, None,
        1 / temperature, softcap, False, backend, _name(vocab_group), workspace,
    )  # fmt: skip
    return logp.T


def _check(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    vocab_group: "dist.ProcessGroup | None",
) -> None:
    check_tensor("hidden", hidden)
    check_dtype("hidden", hidden, FLOATS)
    if hidden.ndim == 0:
        fail("hidden", "[..., D]", "a 0-dim tensor", "give one row as [1, D]")
    check_head(weight, bias, hidden)
    check_tensor("tokens", tokens, like=hidden)
    check_dtype("tokens", tokens, (torch.int64,))
    check_shape("tokens", tokens, ("hidden's leading shape [...]", tuple(hidden.shape[:-1])))
    vocabulary = vocabulary_size(weight, vocab_group)
    check_values((tokens >= 0) & (tokens < vocabulary), lambda: bad_tokens(tokens, vocabulary))
    if isinstance(temperature, Tensor):
        check_tensor("temperature", temperature, like=hidden)
        if temperature.ndim:
            check_shape("temperature", temperature, ("tokens' shape [...]", tuple(tokens.shape)))
        check_values(
            temperature > 0,
            lambda: "temperature: expected numbers > 0, got one that is not; pass τ, not 1/τ",
        )
    elif not temperature > 0:
        fail("temperature", "a number > 0", repr(temperature), "pass 1.0 for none")
    if softcap is not None and not softcap > 0:
        fail("softcap", "a number > 0 or None", repr(softcap), "pass None for no soft cap")


def check_head(weight: Tensor, bias: Tensor | None, hidden: Tensor) -> None:
    """Checks a head's weight [V, D] and bias [V] against hidden states [..., D]."""
    check_tensor("weight", weight, like=hidden)
    check_dtype("weight", weight, FLOATS)
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        hint = "under ZeRO-3 or FSDP gather it, or compute the loss inside the module's forward"
        remedy = hint if weight.numel() == 0 else "pass the head's weight as nn.Linear keeps it"
        fail(
            "weight",
            f"[V, D] = [V, {hidden.shape[-1]}] with V ≥ 1",
            str(list(weight.shape)),
            remedy,
        )
    if bias is not None:
        check_tensor("bias", bias, like=hidden)
        check_dtype("bias", bias, FLOATS)
        check_shape("bias", bias, ("[V]", (weight.shape[0],)))


def vocabulary_size(weight: Tensor, vocab_group: "dist.ProcessGroup | None") -> int:
    """V, of all slices."""
    return len(weight) * (1 if vocab_group is None else dist.get_world_size(vocab_group))


def head_backend(
    backend: str, hidden: Tensor, weight: Tensor, vocab_group: "dist.ProcessGroup | None"
) -> str:
    """The back end to run for the argument `backend`."""
    float64 = torch.float64 in (hidden.dtype, weight.dtype)
    chosen = resolve(backend, hidden.device.type, float64=float64)
    if chosen == "reference" and vocab_group is not None:
        fail(
            "vocab_group",
            "None, because backend is 'reference'",
            "a process group",
            "use another back end, or gather the head",
        )
    return chosen


def check_workspace(workspace: int | None) -> None:
    """Checks a number of bytes."""
    if workspace is not None and not (isinstance(workspace, int) and workspace > 0):
        fail("workspace", "a whole number of bytes > 0, or None", repr(workspace), "pass None")


def _name(group: "dist.ProcessGroup | None") -> str | None:
    # An operator's arguments are tensors, numbers and strings.
    return None if group is None else group.group_name


def bad_tokens(tokens: Tensor, vocabulary: int) -> str:
    """The message for tokens outside the vocabulary."""
    wrong = tokens[(tokens < 0) | (tokens >= vocabulary)]
    return (
        f"tokens: expected ids in 0..{vocabulary - 1} on counted positions, got {int(wrong[0])} "
        f"({len(wrong)} such); mask padding out, and check that tokenizer and head belong together"
    )
