"""A prompt once for all its rollouts in TRL's micro-batch: `RomaGRPOConfig(share_prompts=True)`.

    row = [prompt | completion 1 | … | completion G] of each prompt, clean and on each view

Exact: attention keeps completions apart (`roma.models.prefix`). What it saves depends on how many
rollouts of a prompt stand in one micro-batch, so TRL's shuffling then moves whole groups, where a
micro-batch holds whole groups.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from trl.trainer import grpo_trainer

from roma.integrations.trl import fields
from roma.integrations.trl.fields import Joined
from roma.integrations.views import Pair
from roma.models.prefix import Group, pack, share_prompts
from roma_kernels.errors import fail

_READ = ("pixel_values", "image_grid_thw")
_KNOWN = (*_READ, "num_images", "mm_token_type_ids")


class SharedPrompts:
    """Scores a micro-batch in one packed row.

    Args:
        model: the policy, as it was loaded: not wrapped.

    Raises:
        ValueError: its layers cannot share prompts (windows, recurrences, attention of their own).
    """

    def __init__(self, model: Any) -> None:
        """Gives the model's text layers the attention of packed groups."""
        share_prompts(model)
        self._rope = getattr(getattr(model, "model", None), "get_rope_index", None)
        self._image = int(getattr(model.config, "image_token_id", -1))

    def score(
        self,
        forward: Callable[..., Any],
        rows: Joined,
        identities: Sequence[Hashable],
        pairs: Sequence[Pair],
    ) -> tuple[Tensor, Tensor] | None:
        """Log-probs and entropies of all rows.

        Args:
            forward: of the wrapped model, with our head in it.
            rows: B clean rows, then R pairs.
            identities: B + R keys; rows of equal keys have the same prompt and images.
            pairs: R pairs (view, row).

        Returns:
            Two tensors [B + R, T], 0 where there is no token; None if no row has one.

        Raises:
            ValueError: the model takes other inputs, or a completion has an image.
        """
        unknown = [name for name in rows.fields if name not in _KNOWN]
        if unknown:
            got, remedy = ", ".join(unknown), "set share_prompts=False"
            fail("share_prompts", f"a model that takes {', '.join(_KNOWN)} alone", got, remedy)
        count, keep = len(rows.ids) - len(pairs), rows.keep
        members = [*((0, row) for row in range(count)), *((view + 1, row) for view, row in pairs)]
        tokens = rows.ids[:count, -keep:]
        answered = rows.attention[:count, -keep:]
        if bool(((tokens == self._image) & answered.bool()).any()):
            # Its positions would have three axes, and its pixels would be those of one row.
            expected, got = "images in prompts alone", "an image in a completion, from a tool"
            fail("share_prompts", expected, got, "set share_prompts=False")
        lengths = answered.sum(1).cpu()
        live = [n for n, (_, row) in enumerate(members) if lengths[row]]
        if not live:
            return None
        own: dict[Hashable, list[int]] = {}  # rows of the joined batch, by what they have in common
        for n in live:
            own.setdefault((members[n][0], identities[n]), []).append(n)
        first = [numbers[0] for numbers in own.values()]
        groups = [
            Group(members[numbers[0]][0], prompt, tuple(members[n][1] for n in numbers))
            for prompt, numbers in enumerate(own.values())
        ]
        seen = rows.attention[first, :-keep].bool()
        prompts = [row[mask] for row, mask in zip(rows.ids[first, :-keep], seen, strict=True)]
        inputs = fields.take(rows.fields, first)
        where = self._positions(prompts, inputs)
        row = pack(prompts, tokens, lengths, groups, **where)
        order = [members[n] for n in live]
        labels = torch.cat([tokens[r, : lengths[r]] for _, r in order])
        found = forward(
            **row.inputs(),
            **{name: inputs[name] for name in _READ if name in inputs},
            shift_labels=labels[None],
            states_at=row.reads(order),
            fused_lm_head=True,
        )
        lines = torch.tensor(live).repeat_interleave(lengths[[r for _, r in order]])
        columns = torch.cat([torch.arange(int(lengths[r])) for _, r in order])
        index = (lines.to(tokens.device), columns.to(tokens.device))
        blank = found.log_probs.new_zeros(len(members), keep)
        logp, entropy = (blank.index_put(index, x[0]) for x in (found.log_probs, found.entropy))
        return logp, entropy

    def _positions(self, prompts: Sequence[Tensor], inputs: fields.Fields) -> dict[str, Any]:
        """Positions of prompts that have images in them; text alone counts from 0."""
        if self._rope is None:
            return {}
        counts = fields.counts(inputs, len(prompts))
        grids = inputs.get("image_grid_thw")
        own = [None] * len(prompts) if grids is None else list(grids.split(counts))
        made = []
        for ids, grid in zip(prompts, own, strict=True):
            kinds = (ids == self._image).to(torch.int32)
            found, _ = self._rope(ids[None], kinds[None], image_grid_thw=grid)
            made.append(found[:, 0])
        return {"positions": made, "next_position": [int(p.max()) + 1 for p in made]}


@contextmanager
def whole_groups(size: int) -> Iterator[None]:
    """Within it, TRL shuffles groups of `size` rows, not rows."""
    stock = grpo_trainer.shuffle_sequence_dict

    def shuffle(batch: dict[str, Any]) -> dict[str, Any]:
        rows = len(next(value for value in batch.values() if value is not None))
        moved = torch.randperm(rows // size)[:, None] * size + torch.arange(size)
        order = moved.flatten().tolist()

        def permuted(value: Any) -> Any:
            if value is None or (isinstance(value, Tensor) and value.ndim == 0):
                return value
            return value[order] if isinstance(value, Tensor) else [value[i] for i in order]

        return {name: permuted(value) for name, value in batch.items()}

    grpo_trainer.shuffle_sequence_dict = shuffle
    try:
        yield
    finally:
        grpo_trainer.shuffle_sequence_dict = stock
