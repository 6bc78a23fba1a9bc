"""`roma::token_local_loss`: loss and gradients in one pass over the tokens, without a recompute.

Where the coefficients of a token depend on that token alone (`is_token_local`), its gradients can
be formed while its logits are still in memory. The vendor's product writes the logits of a chunk of
tokens to an fp32 workspace [rows, V]. A row kernel computes the log-probs, the loss's kernels the
coefficients, a second row kernel dz of the active rows; two products give dh and dW:

    (K+1) + 2A products of a token with the head instead of (K+1) + 3A

The price is dW: summed over chunks in fp32, it takes 4·D·V bytes and moves 8·D·V a chunk, hence
`LEAST_ROWS`. Loss and metrics are computed from all log-probs at the end. The backward scales the
finished gradients by the one upstream number; in fp16 they would have underflowed before a loss
scaler's factor reaches them, so fp16 is not for this path. The log-probs are differentiable too: an
upstream gradient by them costs the recompute that the loss alone does not need.

Waits for the device: once for the number of tokens, once a chunk for that of active rows.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from roma_kernels.differentiation import (
    differentiable_never,
    no_gradients,
    refuse_transforms,
    scaled,
)
from roma_kernels.linear_logprob.head import CheckedHead
from roma_kernels.linear_logprob.op import linear_logprob_backward_op
from roma_kernels.linear_logprob.rows import GPU_WORKSPACE
from roma_kernels.products import as_written, capturing
from roma_kernels.roma_loss.batch import METRICS, Batch, Constants, Layout, first_view
from roma_kernels.roma_loss.config import RomaConfig, decoded
from roma_kernels.roma_loss.op import Combined

# Rows of a chunk from which the saved product outweighs another sum into dW: it saves
# 2·A·D·V FLOP at 790 TFLOP/s and costs 8·D·V bytes at 4.3 TB/s, level at A = 735 active rows; with
# two of five rows active 1840. Twice that, for the logits' own traffic.
LEAST_ROWS = 4096


def is_token_local(config: RomaConfig, views: int) -> bool:
    """Whether a token's coefficients depend on no other token's log-probs."""
    alone = config.worst_over in ("token", "mean") or views <= 1 or not config.penalises
    return alone and config.local and not config.gates


def token_local_pays(
    head: CheckedHead, states: Tensor, view_states: Tensor | None, config: RomaConfig
) -> bool:
    """Whether a loss on `states` [M, D] and K views is to take this path."""
    views = 0 if view_states is None else len(view_states)
    weight = head.weight
    leaves = (states, view_states, weight, head.bias)
    return (
        head.backend == "triton"
        and head.vocab_group is None
        and is_token_local(config, views)
        and states.dtype == weight.dtype != torch.float16
        and _chunk_rows(head.workspace, weight) >= min(LEAST_ROWS, (views + 1) * len(states))
        and torch.is_grad_enabled()
        and any(x is not None and x.requires_grad for x in leaves)
        and not capturing(states)
    )


def _chunk_rows(workspace: int | None, weight: Tensor) -> int:
    """Rows whose logits and dz the workspace holds."""
    room = GPU_WORKSPACE if workspace is None else workspace
    return room // (len(weight) * (4 + weight.dtype.itemsize))


def score_and_combine(
    head: CheckedHead,
    states: Tensor,
    view_states: Tensor | None,
    tokens: Tensor,
    layout: Layout,
    constants: Constants,
    config: RomaConfig,
) -> tuple[Tensor, Combined]:
    """Log-probs [K+1, M] and the loss, as `score` and `combine` would give them."""
    leaves = {"hidden": states, "view_hidden": view_states, "weight": head.weight}
    refuse_transforms(leaves | {"bias": head.bias})
    needs = [x is not None and x.requires_grad for x in (*leaves.values(), head.bias)]
    loss, worst_view, metrics, logp, *_ = token_local_loss_op(
        states,
        view_states,
        head.weight,
        head.bias,
        [tokens, layout.index, layout.num_tokens],
        constants.tensors(),
        options=config.encoded(),
        chunk_rows=_chunk_rows(head.workspace, head.weight),
        workspace=head.workspace,
        needs=[needs[0] or needs[1], needs[2], needs[3]],
    )
    return logp, Combined(loss, worst_view, metrics)


_Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("roma::token_local_loss", mutates_args=())
def token_local_loss_op(
    hidden: Tensor,
    view_hidden: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    places: Sequence[Tensor | None],
    constants: Sequence[Tensor | None],
    *,
    options: str,
    chunk_rows: int,
    workspace: int | None,
    needs: Sequence[bool],
) -> _Results:
    """Loss, worst view, metrics; logp, lse, coefficients [K+1, M]; gradients by the four leaves.

    Args:
        hidden: [M, D].
        view_hidden: [K, M, D] or None.
        weight: [V, D].
        bias: [V] or None.
        places: tokens [M], index [M], num_tokens 0-dim: `Rows`.
        constants: `Constants.tensors`.
        options: `RomaConfig.encoded`.
        chunk_rows: rows whose logits are in memory at a time.
        workspace: bytes for the backward that an upstream gradient by logp needs.
        needs: whether the gradients by the hidden states (of either kind), weight, bias are needed;
            a tensor [0] is returned for one that is not.
    """
    from roma_kernels.roma_loss.token_local.chunks import token_local_fwd

    per_token = 1 if view_hidden is None else 1 + len(view_hidden)
    tokens, index, num_tokens = places
    assert tokens is not None and index is not None and num_tokens is not None
    shape = (per_token, len(tokens))
    logp, lse, dlogp = (hidden.new_zeros(shape, dtype=torch.float32) for _ in range(3))
    batch = Batch.of(logp[0], logp[1:], list(constants))
    with as_written(hidden):
        loss, worst, metrics, gradients = token_local_fwd(
            (hidden, view_hidden, weight, bias), (tokens, index, num_tokens), batch, lse, dlogp,
            config=decoded(options), chunk_rows=chunk_rows, needs=needs,
        )  # fmt: skip
    dhidden, dviews, dweight, dbias = (hidden.new_empty(0) if g is None else g for g in gradients)
    return loss, worst, metrics, logp, lse, dlogp, dhidden, dviews, dweight, dbias


@token_local_loss_op.register_fake
def _fake(
    hidden: Tensor,
    view_hidden: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    places: Sequence[Tensor | None],
    constants: Sequence[Tensor | None],
    *,
    options: str,
    needs: Sequence[bool],
    **sizes: Any,
) -> _Results:
    def like(x: Tensor | None, needed: bool) -> Tensor:
        return hidden.new_empty(0) if x is None or not needed else x.new_empty(x.shape)

    per_token = 1 if view_hidden is None else 1 + view_hidden.shape[0]
    assert places[0] is not None
    logp = hidden.new_empty((per_token, places[0].shape[0]), dtype=torch.float32)
    batch = Batch.of(logp[0], logp[1:], list(constants))
    need_states, need_weight, need_bias = needs
    return (
        logp.new_empty(()),
        first_view(batch, decoded(options)),
        logp.new_empty(len(METRICS)),
        logp,
        logp.new_empty(logp.shape),
        logp.new_empty(logp.shape),
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
    _, worst_view, metrics, _, lse, coefficients, *gradients = output
    *leaves, places, constants = inputs
    ctx.save_for_backward(lse, coefficients, *gradients, *leaves, *places)
    ctx.mark_non_differentiable(worst_view, metrics, lse, coefficients, *gradients)
    ctx.set_materialize_grads(False)  # or autograd makes zeros in the size of each gradient
    ctx.of_constants = no_gradients(constants)
    ctx.workspace = keyword_only_inputs["workspace"]
    ctx.options = keyword_only_inputs["options"]


def _backward(
    ctx: Any, dloss: Tensor | None, _worst: Any, _metrics: Any, dlogp: Tensor | None, *_: Any
) -> tuple[Any, ...]:
    lse, coefficients, *saved = ctx.saved_tensors
    gradients, leaves, places = saved[:4], saved[4:8], saved[8:]
    needed = ctx.needs_input_grad[:4]
    found: list[Tensor | None] = [None] * 4
    if dlogp is not None:
        found = token_local_backward_op(
            lse.new_zeros(()) if dloss is None else dloss,
            dlogp,
            lse,
            coefficients,
            gradients,
            leaves,
            places,
            options=ctx.options,
            workspace=ctx.workspace,
            needs=[needed[0] or needed[1], needed[2], needed[3]],
        )
    elif dloss is not None:
        pairs = zip(gradients, leaves, needed, strict=True)
        found = [scaled("roma_loss", dloss, g, leaf) if need else None for g, leaf, need in pairs]
    by_leaf = (g if need else None for g, need in zip(found, needed, strict=True))
    return *by_leaf, no_gradients(places), ctx.of_constants


@torch.library.custom_op("roma::token_local_backward", mutates_args=())
def token_local_backward_op(
    dloss: Tensor,
    dlogp: Tensor,
    lse: Tensor,
    coefficients: Tensor,
    gradients: Sequence[Tensor],
    leaves: Sequence[Tensor | None],
    places: Sequence[Tensor | None],
    *,
    options: str,
    workspace: int | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients by the four leaves where there is an upstream gradient by the log-probs too.

    torch.compile passes zeros for one that was not asked for: the finished gradients are the answer
    then. Else the coefficients of the log-probs are summed first, and the result is rounded once.
    """
    if not bool(dlogp.any()):
        dhidden, dviews, dweight, dbias = ((dloss * g).to(g.dtype) for g in gradients)
        return dhidden, dviews, dweight, dbias
    hidden, view_hidden, weight, bias = leaves
    assert hidden is not None and weight is not None  # bias and views alone are optional
    config, upstream = decoded(options), dlogp + dloss * coefficients
    return linear_logprob_backward_op(
        [lse.T, None, upstream.T, None],
        hidden,
        view_hidden,
        weight,
        bias,
        [*places, None],
        scale=1 / config.temperature,
        softcap=config.softcap,
        backend="triton",
        group=None,
        workspace=workspace,
        needs=needs,
    )


@token_local_backward_op.register_fake
def _fake_backward(
    dloss: Tensor,
    dlogp: Tensor,
    lse: Tensor,
    coefficients: Tensor,
    gradients: Sequence[Tensor],
    *rest: Any,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dhidden, dviews, dweight, dbias = (g.new_empty(g.shape) for g in gradients)
    return dhidden, dviews, dweight, dbias


token_local_loss_op.register_autograd(_backward, setup_context=_setup_context)
differentiable_never(token_local_backward_op, "roma_loss")
