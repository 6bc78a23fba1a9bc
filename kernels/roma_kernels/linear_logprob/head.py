"""A head whose arguments have been checked, and the one way from hidden states to log-probs."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from roma_kernels.arguments import (
    FLOATS,
    check_dtype,
    check_positive,
    check_shape,
    check_tensor,
    check_values,
)
from roma_kernels.backends import resolve
from roma_kernels.differentiation import refuse_transforms
from roma_kernels.errors import fail
from roma_kernels.linear_logprob.op import linear_logprob_op
from roma_kernels.linear_logprob.reference import linear_logprob_reference


@dataclass(frozen=True)
class CheckedHead:
    """What both public functions share: the head, and how its log-probs are computed."""

    weight: Tensor  # [V, D], or this rank's slice
    bias: Tensor | None  # [V]
    softcap: float | None
    vocab_group: "dist.ProcessGroup | None"
    workspace: int | None
    backend: str  # can run here; "auto" only while torch.compile traces

    @property
    def vocabulary(self) -> int:
        """V, over all slices."""
        ranks = 1 if self.vocab_group is None else dist.get_world_size(self.vocab_group)
        return len(self.weight) * ranks

    def check_tokens(self, tokens: Tensor, counted: Tensor | None = None) -> None:
        """Checks that token ids are in the vocabulary, where `counted` says so or everywhere."""
        vocabulary = self.vocabulary
        good = (tokens >= 0) & (tokens < vocabulary)
        if counted is not None:
            good = good | ~counted

        def explain() -> str:
            wrong = tokens[~good]
            return (
                f"tokens: expected ids in 0..{vocabulary - 1} on counted positions, got "
                f"{int(wrong[0])} ({len(wrong)} such); mask padding out, and check that tokenizer "
                "and head belong together"
            )

        check_values(good, explain)


def check_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    softcap: float | None,
    vocab_group: "dist.ProcessGroup | None",
    workspace: int | None,
    backend: str,
) -> CheckedHead:
    """Checks a head against hidden states [..., D], and chooses the back end.

    Raises:
        TypeError: weight or bias is not a tensor.
        ValueError: a shape, dtype, device or option does not fit.
    """
    check_tensor("hidden", hidden)
    check_dtype("hidden", hidden, FLOATS)
    if hidden.ndim == 0 or hidden.shape[-1] == 0:
        got = f"{list(hidden.shape)}" if hidden.ndim else "a 0-dim tensor"
        fail("hidden", "[..., D] with D ≥ 1", got, "give one row as [1, D]")
    check_tensor("weight", weight, like=hidden)
    check_dtype("weight", weight, FLOATS)
    depth = hidden.shape[-1]
    if weight.ndim != 2 or weight.shape[1] != depth or weight.shape[0] == 0:
        expected = f"[V, D] = [V, {depth}] with V ≥ 1, as hidden is [..., {depth}]"
        remedy = "pass the head's weight as nn.Linear keeps it, and the last norm's output"
        if weight.numel() == 0:
            remedy = "under ZeRO-3 or FSDP gather it, or compute the loss inside module.forward"
        fail("weight", expected, str(list(weight.shape)), remedy)
    if bias is not None:
        check_tensor("bias", bias, like=hidden)
        check_dtype("bias", bias, FLOATS)
        check_shape("bias", bias, ("[V]", (weight.shape[0],)))
        bias = bias.contiguous()  # kernels read it entry by entry
    if softcap is not None:
        check_positive("softcap", softcap, "pass None for no soft cap")
    if workspace is not None and not (isinstance(workspace, int) and workspace > 0):
        fail("workspace", "a whole number of bytes > 0, or None", repr(workspace), "pass None")
    float64 = torch.float64 in (hidden.dtype, weight.dtype)
    chosen = resolve(backend, hidden.device.type, float64=float64)
    if chosen == "reference" and vocab_group is not None:
        remedy = "use another back end, or gather the head"
        fail("vocab_group", "None, because backend is 'reference'", "a process group", remedy)
    return CheckedHead(weight, bias, softcap, vocab_group, workspace, chosen)


def score(
    head: CheckedHead,
    hidden: Tensor,
    tokens: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    view_hidden: Tensor | None = None,
    index: Tensor | None = None,
    num_tokens: Tensor | None = None,
    entropy: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probs, lse and entropy of n tokens on the clean image and K views, one sweep over W.

    For callers who have checked everything. Nothing is copied to bring the rows together except
    what one launch works on.

    Args:
        head: of `check_head`.
        hidden: [M, D].
        tokens: [n].
        temperature: τ, one number or [n].
        view_hidden: [K, M, D], or None for K = 0.
        index: [n], position of each token among the M; None: n = M, in order.
        num_tokens: 0-dim; only the first num_tokens are computed, the others are finite and mean
            nothing; None: all n.
        entropy: whether to return the entropy.

    Returns:
        logp, lse and entropy (or None), each [K+1, n].
    """
    if head.backend == "reference":
        # Not as a decorator, which imports torch's compiler with this module.
        by_reference = torch.compiler.disable(_score_by_reference, reason="it is for tests")
        return by_reference(
            head, hidden, tokens, temperature, view_hidden=view_hidden, index=index, entropy=entropy
        )
    refuse_transforms(
        {"hidden": hidden, "view_hidden": view_hidden, "weight": head.weight, "bias": head.bias}
    )
    by_row = isinstance(temperature, Tensor)
    logp, lse, found = linear_logprob_op(
        hidden,
        view_hidden,
        head.weight,
        head.bias,
        [tokens, index, num_tokens, 1 / temperature if by_row else None],
        scale=1.0 if by_row else 1 / float(temperature),
        softcap=head.softcap,
        entropy=entropy,
        backend=head.backend,
        # An operator's arguments are tensors, numbers and strings.
        group=None if head.vocab_group is None else head.vocab_group.group_name,
        workspace=head.workspace,
    )
    return logp.T, lse.T, found.T if entropy else None


def _score_by_reference(
    head: CheckedHead,
    hidden: Tensor,
    tokens: Tensor,
    temperature: float | Tensor,
    *,
    view_hidden: Tensor | None,
    index: Tensor | None,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    states = hidden[None] if view_hidden is None else torch.cat([hidden[None], view_hidden])
    states = states if index is None else states[:, index]
    per_token, count = states.shape[:2]
    if isinstance(temperature, Tensor):
        temperature = temperature.repeat(per_token)
    found = linear_logprob_reference(
        states.flatten(0, 1),
        head.weight,
        tokens.repeat(per_token),
        bias=head.bias,
        temperature=temperature,
        softcap=head.softcap,
    )
    shape = (per_token, count)
    logp, lse = found.logp.view(shape), found.lse.detach().view(shape)
    return logp, lse, found.entropy.view(shape) if entropy else None
