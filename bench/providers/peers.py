"""Other packages' log-probs of the sampled tokens; verl's are in verl.py.

The forms that a careful user takes: the public function of the newest release, options that cost
accuracy left at their defaults, host-side checks of the targets off.
"""

import os

import torch
from torch import Tensor

from bench.providers.base import Load, Score, Unavailable, of_dtypes, on_gpu, taken

TRL_CHUNK = 32768  # columns, as its trainers pass (trl/trainer/utils.py)
IGNORED = -100  # no token has it


def torch_fused(device: str) -> Score:
    """`torch.nn.functional.linear_cross_entropy` without options."""
    return _torch(None)


def torch_chunked(device: str) -> Score:
    """The same in chunks of rows, with its own choice of their size and of accumulation."""
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options is None:
        raise Unavailable(f"torch {torch.__version__} has no LinearCrossEntropyOptions (2.13 has)")
    return _torch(options())


def _torch(options: object) -> Score:
    fused = getattr(torch.nn.functional, "linear_cross_entropy", None)
    if fused is None:
        raise Unavailable(f"torch {torch.__version__} has no linear_cross_entropy (2.13 has)")
    chosen = {} if options is None else {"options": options}

    def score(states: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
        return -fused(states, weight, tokens, reduction="none", **chosen).float()

    return score


def liger(device: str) -> Score:
    """Liger's form for every device, by name: on sm_90 its public function takes `liger_cute`."""
    module = "liger_kernel.ops.fused_linear_scaled_cross_entropy"
    (function,) = taken("liger-kernel", module, "_FusedLinearPPOFallbackFunction")

    def score(states: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
        return -function.apply(states, weight, tokens, 1.0, IGNORED, False).float()

    return score


def _liger_cute(device: str) -> Score:
    module = "liger_kernel.ops.fused_linear_scaled_cross_entropy"
    names = ("LigerFusedLinearScaledCrossEntropyFunction",)
    (function,) = taken("liger-kernel", module, *names)
    # The public function imports it when it is first called.
    taken(
        "liger-kernel",
        "liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90",
        "LigerFusedScaledCrossEntropySM90Function",
    )
    os.environ.setdefault("LIGER_SCALED_CE_SM90_VALIDATE_TARGETS", "0")  # it waits for the device

    def score(states: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
        found: Tensor = function.apply(states, weight, tokens)
        return -found

    return of_dtypes(score, torch.bfloat16)


def cce(impl: str, **options: object) -> Load:
    """Cut Cross-Entropy. 25.1.1, the newest release, has `filter_eps` alone to choose."""

    def load(device: str) -> Score:
        (fused,) = taken("cut-cross-entropy", "cut_cross_entropy", "linear_cross_entropy")

        def score(states: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
            found = fused(states, weight, tokens, reduction="none", impl=impl, **options)
            return -found.float()

        halves = (torch.bfloat16, torch.float16)
        return of_dtypes(score, *halves) if impl == "cce" else score

    return on_gpu(load) if impl == "cce" else load


def trl(device: str) -> Score:
    """TRL's head, as `add_fused_lm_head` calls it."""
    (function,) = taken("trl", "trl.kernels", "ChunkedLogProbFunction")

    def score(states: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
        found: Tensor = function.apply(
            states, weight, None, tokens, 1.0, TRL_CHUNK, None, 1.0, ("log_probs",)
        )[0]
        return found

    return score


def _trl_rows(device: str) -> Score:
    (rows,) = taken("trl", "trl.kernels", "selective_log_softmax_and_entropy")

    def score(states: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
        found: Tensor = rows(states @ weight.T, tokens)[0]
        return found

    return score


def _quack(device: str) -> Score:
    module = "quack.linear_cross_entropy"
    fused, swept = taken("quack-kernels", module, "linear_cross_entropy_func", "lse_target_epi")

    def score(states: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
        if torch.is_grad_enabled() and (states.requires_grad or weight.requires_grad):
            loss = fused(states, weight, None, tokens, reduction="none", inplace_backward=True)
            return -loss.float()
        # As its own evaluation does: no logits in memory.
        found = swept(states, weight.mT, store_d=False, target=tokens, tuned=False)
        logp: Tensor = found["target_logit"] - found["lse"]
        return logp

    return of_dtypes(score, torch.bfloat16, torch.float16)


liger_cute = on_gpu(_liger_cute, hopper=True)
trl_rows = on_gpu(_trl_rows)
quack = on_gpu(_quack)
