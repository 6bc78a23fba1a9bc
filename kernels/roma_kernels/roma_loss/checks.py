"""The arguments of the loss, each checked once, on their way from [B, T] or [N] to a `Layout`."""

import math
import numbers
from typing import NoReturn

import torch
from torch import Tensor

from roma_kernels.arguments import (
    FLOATS,
    check_dtype,
    check_shape,
    check_tensor,
    check_values,
    readable,
)
from roma_kernels.errors import fail
from roma_kernels.linear_logprob.rows import packed_index
from roma_kernels.roma_loss.batch import Constants, Layout
from roma_kernels.roma_loss.config import RomaConfig

Total = float | Tensor
"""A count over all shards and micro-batches: a number or a 0-dim tensor."""


def check_config(config: RomaConfig) -> None:
    """Checks that the options are a RomaConfig."""
    if not isinstance(config, RomaConfig):
        remedy = "pass RomaConfig(**options)" if isinstance(config, dict) else "build one"
        fail("config", "a RomaConfig", type(config).__name__, remedy, error=TypeError)


def check_layout(
    name: str, like: Tensor, mask: Tensor, cu_seqlens: Tensor | None, *, features: int
) -> Layout:
    """The layout of a batch; `like` is its argument `name`, with 0 or 1 axes of features."""
    check_tensor(name, like)
    letters, ndim = ("[B, T]", 2) if cu_seqlens is None else ("[N]", 1)
    if like.ndim != ndim + features:
        expected = f"{letters[:-1]}, D]" if features else letters
        given = "not given (padded form)" if cu_seqlens is None else "given (packed form)"
        remedy = "reshape it or use the other form"
        fail(name, f"{expected}, because cu_seqlens is {given}", str(list(like.shape)), remedy)
    shape = like.shape[:ndim]
    check_tensor("mask", mask, like=like)
    check_dtype("mask", mask, (torch.bool,))
    check_shape("mask", mask, (letters, shape))
    flat = mask.reshape(-1)
    index, num_tokens = packed_index(flat), flat.sum()
    valid = torch.arange(len(index), device=index.device) < num_tokens
    if cu_seqlens is None:
        sequence, lengths = index // max(shape[1], 1), mask.sum(1)
        return Layout(shape, letters, index, sequence, lengths, num_tokens, valid)
    check_tensor("cu_seqlens", cu_seqlens, like=like)
    check_dtype("cu_seqlens", cu_seqlens, (torch.int32,))
    remedy = "pass torch.cumsum of the lengths with a 0 in front, as int32"
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
        fail("cu_seqlens", "[B+1] with B ≥ 1", str(list(cu_seqlens.shape)), remedy)
    ends = torch.stack([cu_seqlens[0] == 0, cu_seqlens[-1] == shape[0]])
    check_values(
        torch.cat([cu_seqlens[1:] >= cu_seqlens[:-1], ends]),
        lambda: (
            f"cu_seqlens: expected offsets from 0 to N = {shape[0]} that never decrease, got "
            f"{cu_seqlens.tolist()}; {remedy}"
        ),
    )
    sequence = torch.searchsorted(cu_seqlens.contiguous(), index, right=True) - 1
    before = torch.nn.functional.pad(flat.cumsum(0), (1, 0))[cu_seqlens.long()]
    return Layout(shape, letters, index, sequence, before.diff(), num_tokens, valid)


def layout_for(backend: str, layout: Layout) -> Layout:
    """The layout as a back end takes it."""
    return layout.trimmed() if trims(backend, layout.num_tokens) else layout


def trims(backend: str, count: Tensor) -> bool:
    """Whether a back end is given as many rows as count, and not all with the count beside them.

    Where that costs no wait for a device. The reference cannot do without; Triton's kernels never
    ask for it.
    """
    return backend == "reference" or (backend != "triton" and readable(count))


def check_views(
    name: str, value: Tensor | None, clean: Tensor, layout: Layout, config: RomaConfig
) -> Tensor:
    """The argument `name` [K, …] beside `clean` […]; None is K = 0."""
    if value is None:
        value = clean.new_zeros((0, *clean.shape))
    check_tensor(name, value, like=clean)
    check_dtype(name, value, (clean.dtype,))
    count = len(value) if value.ndim else 0
    features = ", D" if clean.ndim > len(layout.shape) else ""
    letters = f"[K, {layout.letters[1:-1]}{features}]"
    remedy = "every view needs the clean image's grid and the same completions"
    check_shape(name, value, (letters, (count, *clean.shape)), remedy=remedy)
    check_count(name, count, config)
    return value


def check_count(name: str, views: int, config: RomaConfig) -> None:
    """Checks that there are views, of which `name` gives the number, if they are penalised."""
    if views == 0 and config.penalises:
        weight = "a tensor" if isinstance(config.lambda_inv, Tensor) else f"{config.lambda_inv:g}"
        expected = f"K ≥ 1 views, because lambda_inv = {weight}"
        fail(name, expected, "K = 0", "pass views, or RomaConfig(lambda_inv=0)")


def check_constants(
    layout: Layout,
    views: int,
    dtype: torch.dtype,
    config: RomaConfig,
    *,
    advantages: Tensor,
    correct: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    aux_view: Tensor | None,
    view_old_logp: Tensor | None,
    rollout_weight: Tensor | None,
    total_sequences: Total | None,
    total_tokens: Total | None,
    total_correct: Total | None,
) -> Constants:
    """Checks what the loss does not differentiate, and brings it to the layout; K = `views`."""
    by_token = _advantages(advantages, layout, dtype)
    right = _per_sequence("correct", correct, layout, torch.bool)
    totals = {"total_sequences": total_sequences, "total_tokens": total_tokens}
    if config.penalty_over == "correct" or total_correct is not None:
        totals["total_correct"] = total_correct
    sampled = _aux_view(aux_view, layout, views)
    needed = {}
    if config.ref_coef > 0:
        needed["ref_logp"] = f"ref_coef = {config.ref_coef:g} > 0", "RomaConfig(ref_coef=0)"
    if config.aux_old == "view" and sampled is not None:
        needed["view_old_logp"] = 'aux_old = "view"', 'RomaConfig(aux_old="clean")'
    given = {"old_logp": old_logp, "ref_logp": ref_logp, "view_old_logp": view_old_logp}
    logps = {name: _logp(name, value, layout, dtype) for name, value in given.items()}
    for name, (because, otherwise) in needed.items():
        if logps[name] is None:
            _missing(name, layout, because, otherwise)
    if "view_old_logp" not in needed:
        logps["view_old_logp"] = None
    own: dict[str, Total] = {
        "total_sequences": len(layout.lengths),
        "total_tokens": layout.num_tokens,
        "total_correct": right.sum(),
    }
    counts = {
        name: _total(name, totals.get(name), value, layout, dtype) for name, value in own.items()
    }
    _check_all_or_none(totals)
    return Constants(
        old_logp=logps["old_logp"],
        ref_logp=logps["ref_logp"],
        view_old_logp=logps["view_old_logp"],
        rollout_weight=_rollout_weight(rollout_weight, layout, dtype, config),
        **counts,
        advantages=by_token,
        sequence=layout.sequence,
        lengths=layout.lengths,
        correct=right,
        aux_view=sampled,
        lambda_inv=_lambda("lambda_inv", config.lambda_inv, layout, dtype),
        lambda_aux=_lambda("lambda_aux", config.lambda_aux, layout, dtype),
        gate_bound=_gate_bound(layout, dtype, config),
    )


def check_entropy(entropy: Tensor | None, logp: Tensor, layout: Layout, config: RomaConfig) -> None:
    """The argument entropy of a caller who has log-probs: given if there is a bonus, or not."""
    if (entropy is None) == (config.entropy_coef == 0):
        if entropy is not None:
            check_tensor("entropy", entropy, like=logp)
            check_dtype("entropy", entropy, (logp.dtype,))
            check_shape("entropy", entropy, (layout.letters, layout.shape))
        return
    if entropy is None:
        because = f"entropy_coef = {config.entropy_coef:g} > 0"
        _missing("entropy", layout, because, "RomaConfig(entropy_coef=0)")
    fail("entropy", "None, because entropy_coef = 0", "a tensor", "leave it out, or set the option")


def _check_all_or_none(totals: dict[str, Total | None]) -> None:
    """Counts of one kind beside counts of another would weigh the terms of the loss unequally."""
    missing = [name for name, value in totals.items() if value is None]
    if missing and len(missing) < len(totals):
        given = ", ".join([name for name in totals if name not in missing])
        expected = f"a number too, because {given} is given"
        fail(missing[0], expected, "None", "pass the counts over all shards, or none of them")


def _advantages(value: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    per_sequence = (len(layout.lengths),)
    check_tensor("advantages", value, like=layout.index)
    check_dtype("advantages", value, FLOATS)
    check_shape("advantages", value, ("[B]", per_sequence), (layout.letters, layout.shape))
    by_token = value[layout.sequence] if value.shape == per_sequence else layout.pack(value)
    bad = ~torch.isfinite(by_token) & layout.valid
    check_values(
        ~bad,
        lambda: (
            f"advantages: expected finite numbers on counted positions, got "
            f"{by_token[bad][0].item()} in sequence {int(layout.sequence[bad][0])}; "
            "a group of one, or of equal rewards, has advantage 0"
        ),
    )
    return by_token.detach().to(dtype)


def _rollout_weight(
    value: Tensor | None, layout: Layout, dtype: torch.dtype, config: RomaConfig
) -> Tensor | None:
    if value is None:
        return None
    per_sequence = (len(layout.lengths),)
    check_tensor("rollout_weight", value, like=layout.index)
    check_dtype("rollout_weight", value, FLOATS)
    check_shape("rollout_weight", value, ("[B]", per_sequence), (layout.letters, layout.shape))
    vespo = config.main == "vespo"
    whole = value.shape == per_sequence and not (vespo and layout.shape == per_sequence)
    if vespo and whole:
        expected = f"{layout.letters} = {list(layout.shape)}, because main is 'vespo'"
        remedy = "give it by token: vespo multiplies the weights of a sequence's tokens itself"
        fail("rollout_weight", expected, f"[B] = {list(value.shape)}", remedy)
    by_token = value[layout.sequence] if whole else layout.pack(value)
    bad = ~((by_token >= 0) & torch.isfinite(by_token)) & layout.valid
    check_values(
        ~bad,
        lambda: (
            f"rollout_weight: expected finite numbers ≥ 0 on counted positions, got "
            f"{by_token[bad][0].item()} in sequence {int(layout.sequence[bad][0])}; "
            "give 1 where the sampler's log-prob is not known"
        ),
    )
    return by_token.detach().to(dtype)


def _gate_bound(layout: Layout, dtype: torch.dtype, config: RomaConfig) -> Tensor | None:
    if not config.gates:
        return None
    given = config.gate_bound
    bound = _scalar(math.inf if given is None else given, layout, dtype)
    if isinstance(given, Tensor):
        check_values(
            bound >= 0,
            lambda: (
                f"RomaConfig.gate_bound: expected a number ≥ 0, got {bound.item():g}; "
                "correct the option"
            ),
        )
    return bound


def _aux_view(value: Tensor | None, layout: Layout, views: int) -> Tensor | None:
    if value is None:
        return None
    sampled = _per_sequence("aux_view", value, layout, torch.int64)
    if views == 0:
        fail("aux_view", "None, because K = 0", "a tensor", "pass views, or leave aux_view out")
    check_values(
        (sampled >= 0) & (sampled < views),
        lambda: (
            f"aux_view: expected view indices in 0..K-1 with K = {views}, got "
            f"{sampled.tolist()}; draw them with torch.randint(K, (B,))"
        ),
    )
    return sampled


def _per_sequence(name: str, value: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    check_tensor(name, value, like=layout.index)
    check_dtype(name, value, (dtype,))
    check_shape(name, value, ("[B]", (len(layout.lengths),)))
    return value.contiguous()  # kernels read it entry by entry


def _logp(name: str, value: Tensor | None, layout: Layout, dtype: torch.dtype) -> Tensor | None:
    if value is None:
        return None
    check_tensor(name, value, like=layout.index)
    check_dtype(name, value, FLOATS)
    check_shape(name, value, (layout.letters, layout.shape))
    packed = layout.pack(value).detach().to(dtype)
    bad = packed.isnan() & layout.valid
    check_values(
        ~bad,
        lambda: (
            f"{name}: expected log-probs on counted positions, got NaN at {int(bad.sum())} of "
            f"{int(layout.num_tokens)}, first in sequence {int(layout.sequence[bad][0])}; "
            "mask those tokens out, or look at what computed them"
        ),
    )
    return packed


def _total(
    name: str, given: Total | None, own: Total, layout: Layout, dtype: torch.dtype
) -> Tensor:
    mine = _scalar(own, layout, dtype)
    if given is None:
        return mine
    expected = "a number or a 0-dim tensor, at least this call's own count"
    remedy = "pass the count over all shards and micro-batches whose losses are summed"
    if isinstance(given, Tensor) and given.ndim:
        fail(name, expected, str(list(given.shape)), remedy)
    if not isinstance(given, (int, float, Tensor, numbers.Real)):
        fail(name, expected, repr(given), remedy)
    count = _scalar(given, layout, dtype)
    least = mine.clamp(min=1) if name == "total_sequences" else mine
    check_values(
        (count >= least) & torch.isfinite(count),
        lambda: f"{name}: expected {expected} ({least:g}), got {count.item():g}; {remedy}",
    )
    return count


def _lambda(name: str, value: float | Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    weight = _scalar(value, layout, dtype)
    if isinstance(value, Tensor):
        check_values(
            (weight >= 0) & torch.isfinite(weight),
            lambda: (
                f"RomaConfig.{name}: expected a finite number ≥ 0, got {weight.item():g}; "
                "correct the option"
            ),
        )
    return weight


def _scalar(value: Total, layout: Layout, dtype: torch.dtype) -> Tensor:
    # A sum, not as_tensor or .to(device), which copy from the host and wait, and not full, where
    # torch.compile takes a float for a constant and recompiles when it changes.
    zero = torch.zeros((), dtype=dtype, device=layout.index.device)
    return (zero + (value.detach() if isinstance(value, Tensor) else value)).to(dtype)


def _missing(name: str, layout: Layout, because: str, otherwise: str) -> NoReturn:
    expected = f"{layout.letters} = {list(layout.shape)}, because {because}"
    fail(name, expected, "None", f"pass it, or {otherwise}")
