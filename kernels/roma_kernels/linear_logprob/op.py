"""`roma::linear_logprob` and its backward: the two operators that PyTorch sees, for any back end.

    logp = (target − peak) − log total ;  lse = peak + log total ;  H = lse − moment / total

A back end sweeps the vocabulary and leaves peak, total, target and moment of each row
(`Kernels.sweep`). With a vocabulary-parallel head every rank sweeps its slice, one all-gather
exchanges these three (four) numbers a row, and every rank folds them in the same order:

    peak = max_r peak_r ;  total = Σ_r e^(peak_r − peak)·total_r ;  target = Σ_r target_r

torch.compile sees one node each way. Saved for the backward: the inputs, and lse and entropy [R].
"""

import importlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from roma_kernels.arguments import check_values
from roma_kernels.backends import choose
from roma_kernels.linear_logprob.backward import linear_logprob_bwd
from roma_kernels.linear_logprob.rows import Head, Kernels, Rows
from roma_kernels.once import refuse

_MODULES = {"native": "native_backend", "torch": "torch_backend", "triton": "triton_backend"}


def kernels_of(backend: str) -> Kernels:
    """What a back end provides; of "auto", from a compiled graph, the one that this CPU has."""
    if backend == "auto":
        backend = choose("cpu")[0]
    # Imported when used: Triton is not there on every machine.
    return importlib.import_module(f"roma_kernels.linear_logprob.{_MODULES[backend]}").KERNELS


def _process_group(name: str | None) -> "dist.ProcessGroup | None":
    if name is None:
        return None
    # What torch's own functional collectives do with a name, for want of a public way.
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined,arg-type]


def _arguments(
    hidden: Tensor,
    view_hidden: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    index: Tensor | None,
    counted: Tensor | None,
    row_scale: Tensor | None,
    scale: float,
    softcap: float | None,
    group: "dist.ProcessGroup | None",
) -> tuple[Rows, Head]:
    start = 0 if group is None else dist.get_rank(group) * len(weight)
    return (
        Rows(hidden, view_hidden, tokens, row_scale, index, counted),
        Head(weight, bias, scale, softcap, start),
    )


@torch.library.custom_op("roma::linear_logprob", mutates_args=())
def linear_logprob_op(
    hidden: Tensor,
    view_hidden: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    index: Tensor | None,
    counted: Tensor | None,
    row_scale: Tensor | None,
    scale: float,
    softcap: float | None,
    entropy: bool,
    backend: str,
    group: str | None,
    workspace: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """logp, lse and entropy, each [n, K+1], of the tokens [n] on K+1 views.

    Args:
        hidden: [M, D].
        view_hidden: [K, M, D] or None.
        weight: [V, D].
        bias: [V] or None.
        tokens: [n].
        index: [n], places of the tokens among the M; None: n = M, in order.
        counted: 0-dim; only the first so many tokens are computed (the rest: finite, no meaning).
        row_scale: [n], 1/τ; None: `scale`.
        scale: 1/τ of every row, unless row_scale is given.
        softcap: s or None.
        entropy: whether to return the entropy; if not, [0] comes in its place.
        backend: "triton", "native" or "torch"; "auto" in a compiled graph on a CPU.
        group: name of the process group over which the vocabulary is split.
        workspace: bytes for the backward's tiles; None: the back end's own choice.
    """
    ranks = _process_group(group)
    rows, head = _arguments(
        hidden, view_hidden, weight, bias, tokens, index, counted, row_scale, scale, softcap, ranks
    )
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    sums = torch.zeros(4 if entropy else 3, rows.count, dtype=dtype, device=hidden.device)
    sums[1] = 1  # of a row that nobody sweeps: log 1 = 0
    with torch.autocast(hidden.device.type, enabled=False):
        if rows.count:
            kernels_of(backend).sweep(rows, head, sums)
    if ranks is not None:
        sums = _fold(sums, len(weight), ranks)
    peak, total, target = sums[:3]
    logarithm = total.log()
    # target ≤ peak and total ≥ 1 (the peak's own e⁰), so logp ≤ 0 in floating point too.
    logp, lse = (target - peak) - logarithm, peak + logarithm
    shape = (len(tokens), rows.views)
    if not entropy:
        return logp.view(shape), lse.view(shape), lse.new_empty(0)
    return logp.view(shape), lse.view(shape), (lse - sums[3] / total).view(shape)


def _fold(sums: Tensor, vocab: int, group: "dist.ProcessGroup") -> Tensor:
    """Folds the ranks' sums; with them travels the size of each slice, for a check."""
    own = torch.cat([sums.flatten(), sums.new_tensor([float(vocab)])])
    gathered = own.new_empty(dist.get_world_size(group) * len(own))
    dist.all_gather_into_tensor(gathered, own, group=group)
    gathered = gathered.view(-1, len(own))
    check_values(
        gathered[:, -1] == vocab,
        lambda: (
            f"weight: expected equal slices of the vocabulary on all ranks of vocab_group, got "
            f"{gathered[:, -1].long().tolist()} rows; pad the head to a multiple of the ranks, "
            "with a bias of −inf on the padding"
        ),
    )
    by_rank = gathered[:, :-1].view(-1, *sums.shape).unbind(1)
    peak = by_rank[0].amax(0)
    weights = torch.exp(by_rank[0] - peak)
    folded = [peak, (weights * by_rank[1]).sum(0), by_rank[2].sum(0)]
    if len(by_rank) == 4:
        folded.append((weights * by_rank[3]).sum(0))
    return torch.stack(folded)


@linear_logprob_op.register_fake
def _fake_forward(
    hidden: Tensor,
    view_hidden: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    index: Tensor | None,
    counted: Tensor | None,
    row_scale: Tensor | None,
    scale: float,
    softcap: float | None,
    entropy: bool,
    backend: str,
    group: str | None,
    workspace: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    views = 1 if view_hidden is None else 1 + view_hidden.shape[0]
    shape = (tokens.shape[0], views)
    logp, lse = (hidden.new_empty(shape, dtype=dtype) for _ in range(2))
    return logp, lse, hidden.new_empty(shape if entropy else 0, dtype=dtype)


@torch.library.custom_op("roma::linear_logprob_backward", mutates_args=())
def linear_logprob_backward_op(
    dlogp: Tensor,
    dentropy: Tensor | None,
    lse: Tensor,
    entropy: Tensor | None,
    hidden: Tensor,
    view_hidden: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    index: Tensor | None,
    counted: Tensor | None,
    row_scale: Tensor | None,
    scale: float,
    softcap: float | None,
    backend: str,
    group: str | None,
    workspace: int | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients by hidden, view_hidden, weight and bias; [0] in the place of one not needed."""
    ranks = _process_group(group)
    rows, head = _arguments(
        hidden, view_hidden, weight, bias, tokens, index, counted, row_scale, scale, softcap, ranks
    )
    kernels = kernels_of(backend)
    with torch.autocast(hidden.device.type, enabled=False):
        gradients = linear_logprob_bwd(
            kernels,
            rows,
            head,
            lse.reshape(-1),
            None if entropy is None else entropy.reshape(-1),
            dlogp.reshape(-1),
            None if dentropy is None else dentropy.reshape(-1),
            needs=(need_hidden, need_weight, need_bias),
            workspace=kernels.workspace if workspace is None else workspace,
            group=ranks,
        )
    dhidden, dviews, dweight, dbias = (hidden.new_empty(0) if g is None else g for g in gradients)
    return dhidden, dviews, dweight, dbias


@linear_logprob_backward_op.register_fake
def _fake_backward(
    dlogp: Tensor,
    dentropy: Tensor | None,
    lse: Tensor,
    entropy: Tensor | None,
    hidden: Tensor,
    view_hidden: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    index: Tensor | None,
    counted: Tensor | None,
    row_scale: Tensor | None,
    scale: float,
    softcap: float | None,
    backend: str,
    group: str | None,
    workspace: int | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def like(x: Tensor | None, needed: bool) -> Tensor:
        return hidden.new_empty(0) if x is None or not needed else x.new_empty(x.shape)

    return (
        like(hidden, need_hidden),
        like(view_hidden, need_hidden),
        like(weight, need_weight),
        like(bias, need_bias),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, scale, softcap, entropy, backend, group, workspace = inputs
    _, lse, row_entropy = output
    ctx.save_for_backward(lse, row_entropy if entropy else None, *tensors)
    ctx.options = (scale, softcap, backend, group, workspace)
    ctx.mark_non_differentiable(*([lse] if entropy else [lse, row_entropy]))


def _backward(
    ctx: Any, dlogp: Tensor, _dlse: Tensor, dentropy: Tensor
) -> tuple[Tensor | None, ...]:
    lse, entropy, *tensors = ctx.saved_tensors
    hidden, views, weight, bias = ctx.needs_input_grad[:4]
    gradients = linear_logprob_backward_op(
        dlogp.contiguous(),
        None if entropy is None else dentropy.contiguous(),
        lse,
        entropy,
        *tensors,
        *ctx.options,
        hidden or views,
        weight,
        bias,
    )
    wanted = (hidden, views, weight, bias)
    return *(g if want else None for g, want in zip(gradients, wanted, strict=True)), *[None] * 10


def _refuse(ctx: Any, *gradients: Tensor) -> None:
    refuse("linear_logprob")


linear_logprob_op.register_autograd(_backward, setup_context=_setup_context)
linear_logprob_backward_op.register_autograd(_refuse)
