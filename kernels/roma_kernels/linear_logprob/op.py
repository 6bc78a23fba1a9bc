"""`roma::linear_logprob` and its backward: the two operators that PyTorch sees, for any back end.

    logp = (target − peak) − log total ;  lse = peak + log total ;  H = lse − moment / total

A back end sweeps the vocabulary and leaves peak, total, target and moment of each row
(`Kernels.sweep`). With a vocabulary-parallel head every rank sweeps its slice, one all-gather
exchanges these three (four) numbers a row, and every rank folds them in the same order:

    peak = max_r peak_r ;  total = Σ_r e^(peak_r − peak)·total_r ;  target = Σ_r target_r

torch.compile sees one node each way. Saved for the backward: the inputs, and lse and entropy [R].
"""

import importlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from roma_kernels.arguments import check_values
from roma_kernels.backends import choose
from roma_kernels.differentiation import differentiable_never, no_gradients
from roma_kernels.linear_logprob.backward import linear_logprob_bwd
from roma_kernels.linear_logprob.rows import GPU_WORKSPACE, Head, Kernels, Rows, Upstream
from roma_kernels.products import as_written

_MODULES = {"native": "native_backend", "torch": "torch_backend", "triton": "triton_backend"}


def kernels_of(backend: str) -> Kernels:
    """What a back end provides; "auto", from a compiled graph, is the one that this CPU has."""
    if backend == "auto":
        backend = choose("cpu")[0]
    # Imported when used: Triton is not there on every machine.
    return importlib.import_module(f"roma_kernels.linear_logprob.{_MODULES[backend]}").KERNELS


def _process_group(name: str | None) -> "dist.ProcessGroup | None":
    if name is None:
        return None
    # torch's own functional collectives resolve a name in this way; there is no public one.
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined,arg-type]


def _rows_and_head(
    hidden: Tensor,
    view_hidden: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    places: Sequence[Tensor | None],
    scale: float,
    softcap: float | None,
    group: "dist.ProcessGroup | None",
) -> tuple[Rows, Head]:
    tokens, index, num_tokens, row_scale = places
    assert tokens is not None  # the operators' own callers pass it
    start = 0 if group is None else dist.get_rank(group) * len(weight)
    rows = Rows(hidden, view_hidden, tokens, row_scale, index, num_tokens)
    return rows, Head(weight, bias, scale, softcap, start)


@torch.library.custom_op("roma::linear_logprob", mutates_args=())
def linear_logprob_op(
    hidden: Tensor,
    view_hidden: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    places: Sequence[Tensor | None],
    *,
    scale: float,
    softcap: float | None,
    entropy: bool,
    backend: str,
    group: str | None,
    workspace: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """logp, lse and entropy, each [n, K+1], of the tokens [n] on K+1 images.

    Args:
        hidden: [M, D].
        view_hidden: [K, M, D] or None.
        weight: [V, D].
        bias: [V] or None.
        places: tokens [n]; index [n] or None; num_tokens 0-dim or None; 1/τ [n] or None: `Rows`.
        scale: 1/τ of every row, where places has none.
        softcap: s or None.
        entropy: whether to return the entropy; if not, a tensor [0] is returned for it.
        backend: "triton", "native" or "torch"; "auto" in a compiled graph on a CPU.
        group: name of the process group over which the vocabulary is split.
        workspace: bytes for the backward's tiles; None: the back end's own choice.
    """
    ranks = _process_group(group)
    rows, head = _rows_and_head(hidden, view_hidden, weight, bias, places, scale, softcap, ranks)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    sums = torch.zeros(4 if entropy else 3, rows.num_rows, dtype=dtype, device=hidden.device)
    sums[1] = 1  # of a row that is not computed: log 1 = 0
    with as_written(hidden):
        if rows.num_rows:
            kernels_of(backend).sweep(rows, head, sums)
    if ranks is not None:
        sums = _fold(sums, len(weight), ranks)
    peak, total, target = sums[:3]
    logarithm = total.log()
    # target ≤ peak and total ≥ 1 (the peak's own e⁰), so logp ≤ 0 in floating point too.
    logp, lse = (target - peak) - logarithm, peak + logarithm
    shape = (len(rows.tokens), rows.per_token)
    if not entropy:
        return logp.view(shape), lse.view(shape), lse.new_empty(0)
    return logp.view(shape), lse.view(shape), (lse - sums[3] / total).view(shape)


def _fold(sums: Tensor, vocab: int, group: "dist.ProcessGroup") -> Tensor:
    """Folds the ranks' sums; the size of each slice is gathered too, and checked."""
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
    by_rank = gathered[:, :-1].unflatten(1, sums.shape).unbind(1)
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
    places: Sequence[Tensor | None],
    *,
    entropy: bool,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    assert places[0] is not None
    shape = (places[0].shape[0], 1 if view_hidden is None else 1 + view_hidden.shape[0])
    logp, lse = (hidden.new_empty(shape, dtype=dtype) for _ in range(2))
    return logp, lse, hidden.new_empty(shape if entropy else 0, dtype=dtype)


@torch.library.custom_op("roma::linear_logprob_backward", mutates_args=())
def linear_logprob_backward_op(
    upstream: Sequence[Tensor | None],
    hidden: Tensor,
    view_hidden: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    places: Sequence[Tensor | None],
    *,
    scale: float,
    softcap: float | None,
    backend: str,
    group: str | None,
    workspace: int | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients by hidden, view_hidden, weight and bias; a tensor [0] for one that is not needed.

    Args:
        upstream: lse, entropy or None, dlogp, dentropy or None, each [n, K+1]: `Upstream`.
        hidden: as in the forward, as are all others but `needs`.
        view_hidden: [K, M, D] or None.
        weight: [V, D].
        bias: [V] or None.
        places: `Rows`.
        scale: 1/τ.
        softcap: s or None.
        backend: "triton", "native", "torch" or "auto".
        group: name of a process group.
        workspace: bytes or None.
        needs: whether the gradients by the hidden states (of either kind), weight, bias are needed.
    """
    ranks = _process_group(group)
    rows, head = _rows_and_head(hidden, view_hidden, weight, bias, places, scale, softcap, ranks)
    kernels = kernels_of(backend)
    need_states, need_weight, need_bias = needs
    with as_written(hidden):
        gradients = linear_logprob_bwd(
            kernels,
            rows,
            head,
            Upstream(*(None if x is None else x.reshape(-1) for x in upstream)),  # type: ignore[arg-type]  # lse, dlogp are there
            needs=(need_states, need_weight, need_bias),
            workspace=_workspace(kernels, hidden) if workspace is None else workspace,
            group=ranks,
        )
    dhidden, dviews, dweight, dbias = (hidden.new_empty(0) if g is None else g for g in gradients)
    return dhidden, dviews, dweight, dbias


def _workspace(kernels: Kernels, hidden: Tensor) -> int:
    return GPU_WORKSPACE if hidden.is_cuda else kernels.workspace


@linear_logprob_backward_op.register_fake
def _fake_backward(
    upstream: Sequence[Tensor | None],
    hidden: Tensor,
    view_hidden: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    places: Sequence[Tensor | None],
    *,
    needs: Sequence[bool],
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    need_states, need_weight, need_bias = needs

    def like(x: Tensor | None, needed: bool) -> Tensor:
        return hidden.new_empty(0) if x is None or not needed else x.new_empty(x.shape)

    return (
        like(hidden, need_states),
        like(view_hidden, need_states),
        like(weight, need_weight),
        like(bias, need_bias),
    )


def _setup_context(
    ctx: Any,
    inputs: tuple[Any, ...],
    keyword_only_inputs: dict[str, Any],
    output: tuple[Tensor, ...],
) -> None:
    *tensors, places = inputs
    _, lse, row_entropy = output
    options = dict(keyword_only_inputs)
    entropy = options.pop("entropy")
    ctx.options = options
    ctx.save_for_backward(lse, row_entropy if entropy else None, *tensors, *places)
    ctx.mark_non_differentiable(*([lse] if entropy else [lse, row_entropy]))


def _backward(ctx: Any, dlogp: Tensor, _dlse: Tensor, dentropy: Tensor) -> tuple[Any, ...]:
    lse, entropy, hidden, view_hidden, weight, bias, *places = ctx.saved_tensors
    needed = ctx.needs_input_grad[:4]
    gradients = linear_logprob_backward_op(
        [lse, entropy, dlogp, None if entropy is None else dentropy],
        hidden,
        view_hidden,
        weight,
        bias,
        places,
        needs=[needed[0] or needed[1], needed[2], needed[3]],
        **ctx.options,
    )
    leaves = (g if need else None for g, need in zip(gradients, needed, strict=True))
    return *leaves, no_gradients(places)


linear_logprob_op.register_autograd(_backward, setup_context=_setup_context)
differentiable_never(linear_logprob_backward_op, "linear_logprob")
