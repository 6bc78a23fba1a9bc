"""The loss on the pairs (view, sequence) that were run: their checks, and one sweep of the head.

    rows of the sweep = counted tokens of hidden, then those of the pairs, as view_hidden has them

The head sees one list of rows and no axis K. Their log-probs go to [K+1, M], where a pair that was
not run has the clean ones, detached: zero divergence, no gradient. From there on the loss is that
of all pairs. hidden and view_hidden are joined first, which reads and writes D elements a row; the
head's product does 2·V FLOP for each of them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from roma_kernels.arguments import check_dtype, check_shape, check_tensor, check_values
from roma_kernels.linear_logprob.head import CheckedHead, score
from roma_kernels.linear_logprob.rows import packed_index
from roma_kernels.roma_loss.batch import Constants, Layout
from roma_kernels.roma_loss.checks import check_count, trims
from roma_kernels.roma_loss.config import RomaConfig


class Pairs(NamedTuple):
    """Where the pairs stand among the S positions of view_hidden, [R·T] or [S]."""

    there: Tensor  # [K, B] bool: whether the pair was run
    first: Tensor  # [K, B] int64: position of the pair's first token, if it was
    begin: Tensor  # [B+1] int64: position in hidden of each sequence's first token, and the end


def check_pair_states(value: Tensor | None, hidden: Tensor, layout: Layout) -> Tensor:
    """The argument view_hidden where view_rows is given; None is no row."""
    padded = len(layout.shape) == 2
    if value is None:
        value = hidden.new_zeros((0, *hidden.shape[1:]))
    check_tensor("view_hidden", value, like=hidden)
    check_dtype("view_hidden", value, (hidden.dtype,))
    letters = ("[R, T, D]" if padded else "[S, D]") + " (view_rows is given)"
    count = len(value) if value.ndim else 0
    remedy = "lay the pairs that were run one after another, or leave view_rows out"
    check_shape("view_hidden", value, (letters, (count, *hidden.shape[1:])), remedy=remedy)
    return value


def check_pairs(
    value: Tensor, views: Tensor, layout: Layout, cu_seqlens: Tensor | None, config: RomaConfig
) -> Pairs:
    """The argument view_rows [K, B] beside view_hidden, checked; no position is used twice."""
    sequences, rows = len(layout.lengths), len(views)
    check_tensor("view_rows", value, like=views)
    check_dtype("view_rows", value, (torch.int64,))
    count = len(value) if value.ndim else 0
    check_shape("view_rows", value, ("[K, B]", (count, sequences)))
    check_count("view_rows", count, config)
    if cu_seqlens is None:
        per_row = layout.shape[1]
        begin = torch.arange(sequences + 1, device=value.device) * per_row
        highest = torch.full((sequences,), rows - 1, device=value.device)
    else:
        per_row, begin = 1, cu_seqlens.long()
        highest = rows - begin.diff()
    there, length = value >= 0, begin.diff()
    in_range = (value == -1) | (there & (value <= highest))

    def outside() -> str:
        k, i = (int(x) for x in (~in_range).nonzero()[0])
        one = f"one of the {rows} rows of view_hidden"
        if cu_seqlens is not None:
            one = f"where {int(length[i])} tokens begin among the {rows} of view_hidden"
        return (
            f"view_rows: expected −1 (not run) or {one}, got {int(value[k, i])} for view {k} of "
            f"sequence {i}; give each pair the place of its hidden states"
        )

    check_values(in_range, outside)
    first = value * per_row
    _check_apart(value, first, there & (length > 0), length, rows * per_row)
    return Pairs(there, first, begin)


def _check_apart(
    value: Tensor, first: Tensor, there: Tensor, length: Tensor, positions: int
) -> None:
    """No two pairs share a position: sorted by where they begin, each ends before the next one."""
    starts, order = torch.where(there, first, positions).flatten().sort()
    ends = starts + length.expand(first.shape).flatten()[order]
    apart = (ends[:-1] <= starts[1:]) | (starts[1:] == positions)

    def shared() -> str:
        at = int((~apart).nonzero()[0])
        pair, other = (divmod(int(x), len(length)) for x in order[at : at + 2])
        both = [f"{int(value[p])} for view {p[0]} of sequence {p[1]}" for p in (pair, other)]
        return (
            f"view_rows: expected places of its own for each pair, got {both[0]} and {both[1]}; "
            "lay the pairs one after another in view_hidden"
        )

    check_values(apart, shared)


def check_needed(pairs: Pairs, layout: Layout, constants: Constants, config: RomaConfig) -> None:
    """Checks that the pairs are there on which the loss depends; else it would lose them silently.

    Looks at the values of the lambdas, too: of one that is 0 nothing is needed.
    """
    there, sampled = pairs.there, constants.aux_view
    if sampled is not None:
        run = there.gather(0, sampled[None])[0]
        moves = (constants.advantages != 0) & layout.valid & (constants.lambda_aux > 0)
        if constants.rollout_weight is not None and config.main != "vespo":
            moves = moves & (constants.rollout_weight > 0)
        scored = run[layout.sequence] | ~moves

        def unsampled() -> str:
            i = int(layout.sequence[~scored][0])
            return (
                "view_rows: expected the sampled view of every sequence with an advantage, because "
                f"lambda_aux > 0, got −1 for aux_view = {int(sampled[i])} of sequence {i}; "
                "run that pair, too, or leave aux_view out"
            )

        check_values(scored, unsampled)

    penalised = constants.correct & (constants.lengths > 0) & (constants.lambda_inv > 0)
    every = config.worst_over == "mean"
    seen = (there.all(0) if every else there.any(0)) | ~penalised

    def unseen() -> str:
        i = int((~seen).nonzero()[0])
        expected = "a view of every right sequence, because lambda_inv > 0"
        if every:
            expected = 'all views of every right sequence, because worst_over = "mean"'
        return (
            f"view_rows: expected {expected}, got −1 for {_missing(there, i)} of sequence {i}; "
            "run what is missing, or RomaConfig(lambda_inv=0)"
        )

    check_values(seen, unseen)


def _missing(there: Tensor, sequence: int) -> str:
    """Which view of a sequence was not run, in words."""
    missing = (~there[:, sequence]).nonzero()[:, 0].tolist()
    return f"view {missing[0]}" if len(missing) < len(there) else "all views"


def score_pairs(
    head: CheckedHead,
    hidden: Tensor,
    views: Tensor,
    tokens: Tensor,
    mask: Tensor,
    layout: Layout,
    pairs: Pairs,
    config: RomaConfig,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs [K+1, M] of the counted tokens, the clean ones where a pair was not run.

    And the clean image's entropies [M] if there is a bonus for them.

    Args:
        head: of `check_head`.
        hidden: [B, T, D] or [N, D].
        views: [R, T, D] or [S, D].
        tokens: [B, T] or [N].
        mask: the same.
        layout: of the mask.
        pairs: of `check_pairs`.
        config: gives the temperature, and whether entropies are needed.
    """
    states, view_states = (x.reshape(-1, x.shape[-1]) for x in (hidden, views))
    size, positions = len(states), len(view_states)
    sequence = layout.sequence
    present = pairs.there.T[sequence] & layout.valid[:, None]  # [M, K]
    # One position more, for what has no meaning.
    place = pairs.first.T[sequence] + (layout.index - pairs.begin[sequence])[:, None]
    place = place.where(present, positions).flatten()
    labels = layout.pack(tokens)[:, None].expand(present.shape).flatten()
    view_tokens = labels.new_zeros(positions + 1).scatter(0, place, labels)[:positions]
    of_views = mask.new_zeros(positions + 1).scatter(0, place, present.flatten())[:positions]

    counted = torch.cat([mask.flatten(), of_views])
    index, num_rows = packed_index(counted), counted.sum()
    if trims(head.backend, num_rows):
        index = index[: int(num_rows)]
    logp, _, entropies = score(
        head,
        torch.cat([states, view_states]) if positions else states,
        torch.cat([tokens.flatten(), view_tokens])[index],
        temperature=config.temperature,
        index=index,
        num_tokens=num_rows,
        entropy=config.entropy_coef > 0,
    )
    # The clean tokens are the first rows, in order; so an absent pair may name them for its own.
    own = torch.arange(len(layout.index), device=index.device)[:, None]
    row = (counted.cumsum(0) - 1)[(size + place).where(present.flatten(), 0)]
    row = torch.cat([own, row.view(present.shape).where(present, own)], 1)
    clean, view_logp = logp[0].index_select(0, row.flatten()).view(row.shape).tensor_split([1], 1)
    # The K+1 numbers of a token side by side, as the dense sweep leaves them.
    scored = torch.cat([clean, view_logp.where(present, clean.detach())], 1).T
    return scored, None if entropies is None else entropies[0, : len(layout.index)]
