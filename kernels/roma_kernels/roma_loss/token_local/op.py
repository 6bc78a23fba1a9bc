"""`roma::token_local_loss`: loss and gradients in one pass over the tokens, without a recompute.

Where the coefficients of a token depend on that token alone (`is_token_local`), its gradients can
be formed while its logits are still at hand. A chunk of tokens is scored by the vendor's product
into an fp32 workspace [rows, V]; a row kernel takes the log-probs, the view loss their
coefficients, a row kernel dz of the active rows, and two products dh and dW:

    (K+1) + 2A products of a token with the head, in the place of (K+1) + 3A

The price is dW: summed over chunks in fp32, it takes 4·D·V bytes and moves 8·D·V a chunk, hence
`LEAST_ROWS`. What is known only at the end, the loss and its metrics, is formed from all log-probs
at the end. The backward scales the finished gradients by the one upstream number; in fp16 they
would have underflowed before a loss scaler's factor reaches them, so fp16 is not for this path.
Waits for the device: once for the number of tokens, once a chunk for that of active rows.
"""

from typing import Any

import torch
from torch import Tensor

from roma_kernels.once import scaled
from roma_kernels.roma_loss.config import RomaConfig
from roma_kernels.roma_loss.op import config_of
from roma_kernels.roma_loss.packed import METRICS, PackedBatch

# Rows of a chunk from which the saved product outweighs another sum into dW: it saves
# 2·A·D·V FLOP at 790 TFLOP/s and costs 8·D·V bytes at 4.3 TB/s, level at A = 735 active rows; with
# two of five rows active 1840. Twice that, for the logits' own traffic.
LEAST_ROWS = 4096


def is_token_local(config: RomaConfig, views: int) -> bool:
    """Whether a token's coefficients depend on no other token's log-probs."""
    return config.worst_over in ("token", "mean") or views <= 1 or config.lambda_inv == 0


def pays(config: RomaConfig, states: Tensor, views: int, weight: Tensor, workspace: int) -> bool:
    """Whether a loss on `states` [N, D] and K = `views` views is to take this path."""
    rows = (views + 1) * len(states)
    return (
        is_token_local(config, views)
        and states.dtype == weight.dtype != torch.float16
        and rows_per_chunk(workspace, weight) >= min(LEAST_ROWS, rows)
        and not (states.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def rows_per_chunk(workspace: int, weight: Tensor) -> int:
    """How many rows of logits, and of dz, the workspace holds."""
    return workspace // (len(weight) * (4 + weight.dtype.itemsize))


@torch.library.custom_op("roma::token_local_loss", mutates_args=())
def token_local_loss_op(
    hidden: Tensor,
    view_hidden: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    index: Tensor,
    counted: Tensor | None,
    old_logp: Tensor,
    ref_logp: Tensor | None,
    view_old_logp: Tensor | None,
    advantages: Tensor,
    sequence: Tensor,
    lengths: Tensor,
    correct: Tensor,
    aux_view: Tensor | None,
    total_sequences: Tensor,
    total_tokens: Tensor,
    total_correct: Tensor,
    line: str,
    workspace: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, worst view, metrics, logp [K+1, n], and gradients by hidden, views, weight and bias.

    Arguments as in `roma::linear_logprob`, `PackedBatch` and `roma::linear_logprob_backward`. [0]
    stands in the place of a gradient not needed.
    """
    from roma_kernels.roma_loss.token_local.chunks import token_local_fwd

    config = config_of(line)
    logp = hidden.new_zeros(
        1 if view_hidden is None else 1 + len(view_hidden), len(tokens), dtype=torch.float32
    )
    batch = PackedBatch(
        logp[0], logp[1:], old_logp, ref_logp, view_old_logp, advantages, sequence, lengths,
        correct, aux_view, total_sequences, total_tokens, total_correct,
    )  # fmt: skip
    with torch.autocast(hidden.device.type, enabled=False):
        loss, worst, metrics, gradients = token_local_fwd(
            hidden, view_hidden, weight, bias, tokens, index, counted, batch, config, workspace,
            (need_hidden, need_weight, need_bias),
        )  # fmt: skip
    dhidden, dviews, dweight, dbias = (hidden.new_empty(0) if g is None else g for g in gradients)
    return loss, worst, metrics, logp, dhidden, dviews, dweight, dbias


@token_local_loss_op.register_fake
def _fake(
    hidden: Tensor,
    view_hidden: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    index: Tensor,
    counted: Tensor | None,
    old_logp: Tensor,
    ref_logp: Tensor | None,
    view_old_logp: Tensor | None,
    advantages: Tensor,
    sequence: Tensor,
    lengths: Tensor,
    correct: Tensor,
    aux_view: Tensor | None,
    total_sequences: Tensor,
    total_tokens: Tensor,
    total_correct: Tensor,
    line: str,
    workspace: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    views = 0 if view_hidden is None else view_hidden.shape[0]
    shape = {"token": sequence.shape, "batch": ()}.get(config_of(line).worst_over, lengths.shape)

    def like(x: Tensor | None, needed: bool) -> Tensor:
        return hidden.new_empty(0) if x is None or not needed else x.new_empty(x.shape)

    return (
        old_logp.new_empty(()),
        lengths.new_empty(shape),
        old_logp.new_empty(len(METRICS)),
        old_logp.new_empty(views + 1, tokens.shape[0]),
        like(hidden, need_hidden),
        like(view_hidden, need_hidden),
        like(weight, need_weight),
        like(bias, need_bias),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[4:], *inputs[:4])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # or autograd makes zeros in the size of each gradient


def _backward(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    gradients, leaves = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
    by_leaf = [
        scaled("roma_loss", dloss, gradient, leaf) if needed else None
        for gradient, leaf, needed in zip(gradients, leaves, ctx.needs_input_grad[:4], strict=True)
    ]
    return *by_leaf, *[None] * 19


token_local_loss_op.register_autograd(_backward, setup_context=_setup_context)
