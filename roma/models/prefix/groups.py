"""Groups of rollouts behind one copy of their prompt, one after another in one row.

    group = [prompt | completion 1 | … | completion G]        P + Σ(|y_g| − 1) tokens

The row of G rollouts is P + G·T tokens long instead of G·(P + T). Positions restart behind the
prompt for every completion, and `roma.models.prefix.attention` lets a completion see the prompt and
itself. So hidden states, log-probs and gradients are those of a row per rollout, up to rounding;
the last token of a completion predicts nothing and is left out.

A prompt on K degraded views of its image is K more groups (variants 1..K).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from roma.models.prefix.attention import Segments
from roma_kernels.errors import fail

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Group:
    """Rollouts of a prompt on one variant of its images."""

    variant: int  # 0 the clean images, k + 1 view k
    prompt: int
    rollouts: tuple[int, ...]  # rows of `tokens`, none twice


@dataclass(frozen=True)
class Packed:
    """Groups in one row of S tokens, and where the state that predicts each token stands in it."""

    groups: list[Group]  # in the order of their image tokens
    input_ids: Tensor  # [1, S]
    position_ids: Tensor  # [1, S], or [A, 1, S] with A axes of positions
    segments: Segments
    before: Integers  # [n]: of each completion, in the groups' order, the state of its first token
    starts: Integers  # [n]: and that of its second token; the others follow
    lengths: Integers  # [n]: its tokens

    def inputs(self) -> dict[str, Any]:
        """Arguments of a transformers model's forward; images and `use_cache=False` come on top.

        The attention mask has no entries: the registered attention does not read it, and any other,
        which would let the rollouts see one another, fails on it.
        """
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "attention_mask": torch.empty(1, 1, 0, 0, device=self.input_ids.device),
            "shared": self.segments,
        }

    def reads(self, pairs: Sequence[tuple[int, int]]) -> Tensor:
        """Positions in the row of the states that predict the tokens of (variant, rollout) pairs.

        Args:
            pairs: any that were packed, in any order, also several times.

        Returns:
            [N] int64, pair after pair, a position for each token of the rollout.

        Raises:
            ValueError: a pair is in no group.

        Example:
            >>> tokens = torch.tensor([[7, 8, 9], [7, 5, 5]])
            >>> row = pack(
            ...     [torch.tensor([1, 2])], tokens, torch.tensor([3, 2]), [Group(0, 0, (0, 1))]
            ... )
            >>> row.input_ids.tolist(), row.reads([(0, 1)]).tolist()
            ([[1, 2, 7, 8, 7]], [1, 4])
        """
        own = self._numbers(pairs)
        lengths = self.lengths[own]
        where = ranges(self.starts[own] - 1, lengths)
        where[np.cumsum(lengths) - lengths] = self.before[own]
        return torch.from_numpy(where).to(self.input_ids.device)

    def view_rows(self, pairs: Sequence[tuple[int, int]], views: int, rollouts: int) -> Tensor:
        """What `roma_loss` takes as `view_rows`, where `reads(pairs)` are its `view_hidden`.

        Args:
            pairs: (k + 1, i) of view k and rollout i, each once.
            views: K.
            rollouts: B.

        Returns:
            [K, B] int64: where in the states a view of a rollout begins; −1 where it is no pair.

        Raises:
            ValueError: a pair is in no group, or it is one of the clean images.

        Example:
            >>> tokens = torch.tensor([[7, 8, 9], [7, 5, 5]])
            >>> row = pack(
            ...     [torch.tensor([1, 2])], tokens, torch.tensor([3, 2]), [Group(1, 0, (0, 1))]
            ... )
            >>> row.view_rows([(1, 0), (1, 1)], views=1, rollouts=2).tolist()
            [[0, 3]]
        """
        lengths = self.lengths[self._numbers(pairs)]
        at = np.full((views, rollouts), -1, dtype=np.int64)
        variants, own = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
        if (variants < 1).any():
            fail("pairs", "those of views, variants 1 to K", "variant 0", "leave these out")
        at[variants - 1, own] = np.cumsum(lengths) - lengths
        return torch.from_numpy(at).to(self.input_ids.device)

    def _numbers(self, pairs: Sequence[tuple[int, int]]) -> Integers:
        members = ((g.variant, r) for g in self.groups for r in g.rollouts)
        number = {pair: i for i, pair in enumerate(members)}
        for pair in pairs:
            if pair not in number:
                got = f"variant {pair[0]}, rollout {pair[1]}"
                fail("pairs", "pairs of the groups that were packed", got, "add it to a group")
        return np.array([number[pair] for pair in pairs], dtype=np.int64)


def pack(
    prompts: Sequence[Tensor],
    tokens: Tensor,
    lengths: Tensor,
    groups: Sequence[Group],
    *,
    positions: Sequence[Tensor] | None = None,
    next_position: Sequence[int] | Tensor | None = None,
) -> Packed:
    """Lays groups out in one row.

    Args:
        prompts: P of [L_p] int64, token ids without padding.
        tokens: [B, T] int64, completions from the left.
        lengths: [B] int64, 1 to T, tokens of each completion, the uncounted ones in it included.
        groups: what to lay out; images are read in this order. At least one.
        positions: P of [A, L_p] int64, for a model whose positions have A axes (M-RoPE: 3); None:
            0, 1, 2, … and no axis of axes.
        next_position: P, the position of the first completion token; None: L_p.

    Returns:
        Packed. `model(**packed.inputs(), use_cache=False).last_hidden_state[0][packed.reads(…)]`.

    Raises:
        ValueError: no group, an empty prompt, a completion without a token or longer than T, a
            prompt or rollout that is not there, a rollout twice in a variant, positions without
            next_position or not as many as the prompt has tokens.

    Example:
        >>> tokens = torch.tensor([[7, 8, 9], [7, 5, 5]])
        >>> row = pack([torch.tensor([1, 2])], tokens, torch.tensor([3, 1]), [Group(0, 0, (0, 1))])
        >>> row.input_ids.tolist(), row.position_ids.tolist()
        ([[1, 2, 7, 8]], [[0, 1, 2, 3]])
    """
    if not groups:
        fail("groups", "at least one", "none", "leave out the call, or give a rollout that is free")
    if positions is not None and next_position is None:
        remedy = "pass the position of each prompt's first completion token"
        fail("next_position", "P numbers, because positions is given", "None", remedy)
    size = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
    count = lengths.numpy(force=True).astype(np.int64)
    _check(size, count, tokens.shape, groups)
    for prompt, own in enumerate(positions or ()):
        if own.shape[-1] != size[prompt]:
            got = f"{own.shape[-1]} for {size[prompt]} tokens"
            fail(f"positions[{prompt}]", "one for each token", got, "leave padding out of both")
    prompt_of = np.array([g.prompt for g in groups], dtype=np.int64)
    members = np.array([len(g.rollouts) for g in groups], dtype=np.int64)
    rollouts = np.array([r for g in groups for r in g.rollouts], dtype=np.int64)
    group_of = np.repeat(np.arange(len(groups)), members)  # of each completion

    # Segments in the order of the row: of each group its prompt, then its completions.
    number = np.arange(len(rollouts)) + group_of + 1
    prompt_number = np.cumsum(members + 1) - members - 1
    long = np.empty(len(rollouts) + len(groups), dtype=np.int64)
    long[prompt_number], long[number] = size[prompt_of], count[rollouts] - 1
    starts = np.cumsum(long) - long

    # One gather from all prompts and completions laid end to end.
    width, ends = tokens.shape[1], np.cumsum(size)
    sources = np.empty_like(long)
    sources[prompt_number] = (ends - size)[prompt_of]
    sources[number] = ends[-1] + rollouts * width
    device = tokens.device
    take = torch.from_numpy(ranges(sources, long)).to(device)
    ids = torch.cat([*prompts, tokens.reshape(-1)]).index_select(0, take)

    first = np.zeros_like(long)
    first[number] = (size if next_position is None else _numbers(next_position))[
        prompt_of[group_of]
    ]
    place = torch.from_numpy(ranges(first, long)).to(device)
    if positions is not None:
        in_prompt = np.zeros(len(long), dtype=bool)
        in_prompt[prompt_number] = True
        own = torch.from_numpy(np.repeat(in_prompt, long)).to(device)
        of_prompts = torch.cat(list(positions), dim=1).index_select(
            1, take.clamp(max=int(ends[-1]) - 1)
        )
        place = torch.where(own, of_prompts, place)[:, None]
    else:
        place = place[None]
    last = starts[prompt_number] + long[prompt_number] - 1
    return Packed(
        groups=list(groups),
        input_ids=ids[None],
        position_ids=place,
        segments=Segments(
            starts[prompt_number], long[prompt_number], starts[number], long[number], group_of
        ),
        before=last[group_of],
        starts=starts[number],
        lengths=long[number] + 1,
    )


def ranges(starts: Integers, lengths: Integers) -> Integers:
    """starts[0], starts[0] + 1, … (lengths[0] numbers), starts[1], … ."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(starts - (ends - lengths), lengths)


def _numbers(values: Sequence[int] | Tensor) -> Integers:
    array = values.numpy(force=True) if isinstance(values, Tensor) else np.array(values)
    return array.astype(np.int64)


def _check(size: Integers, count: Integers, shape: Sequence[int], groups: Sequence[Group]) -> None:
    rollouts, width = shape
    if len(count) != rollouts:
        fail("lengths", f"[B] = [{rollouts}]", str([len(count)]), "one for each row of tokens")
    seen = set()
    for number, group in enumerate(groups):
        name = f"groups[{number}]"
        if not 0 <= group.prompt < len(size):
            fail(name, f"a prompt from 0 to {len(size) - 1}", str(group.prompt), "number them so")
        if not size[group.prompt]:
            fail(f"prompts[{group.prompt}]", "at least one token", "none", "its last one predicts")
        for rollout in group.rollouts:
            if not 0 <= rollout < rollouts:
                fail(name, f"rollouts from 0 to {rollouts - 1}", str(rollout), "number them so")
            if not 1 <= count[rollout] <= width:
                got = f"{count[rollout]} for rollout {rollout}"
                fail("lengths", f"1 to {width}", got, "leave a rollout without tokens out")
            if (group.variant, rollout) in seen:
                got = f"rollout {rollout} twice on variant {group.variant}, in {name} again"
                fail("groups", "a rollout once on each variant", got, "merge the groups")
            seen.add((group.variant, rollout))
