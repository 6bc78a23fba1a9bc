"""What the engine reads from a micro-batch of verl's, and how it adds rows to one.

A micro-batch is a TensorDict of B rows. Tensors are nested ([B, j], jagged) under verl's v1 trainer
and padded ([B, T]) under its older one, but for input_ids and position_ids, nested in both.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from roma.integrations.options import RomaOptions
from roma.integrations.views import Pair, RowImages, ViewMaker
from roma_kernels.errors import fail

# What a forward and the slice of its completions take of each row.
_FORWARD = (
    "input_ids",
    "position_ids",
    "prompts",
    "responses",
    "attention_mask",
    "temperature",
)
ACCURACY = ("acc", "accuracy")


@dataclass(frozen=True)
class Rows:
    """What the terms on views need of B rows.

    Attributes:
        media: per row its multi_modal_inputs; empty for text alone.
        images: the clean images, and what their views do.
        mask: [B, T] bool.
        advantages: [B, T].
        old_logp: [B, T] nats.
        weight: [B, T], verl's rollout_is_weights, or None.
        correct: [B] bool, CPU: as `right_of` has it.
        aux_view: [B] int64, CPU.
    """

    media: list[dict[str, Any]]
    images: RowImages
    mask: Tensor
    advantages: Tensor
    old_logp: Tensor
    weight: Tensor | None
    correct: Tensor
    aux_view: Tensor


def read_rows(micro_batch: Any, maker: ViewMaker, step: int) -> Rows:
    """Reads a micro-batch that is on its device.

    Args:
        micro_batch: verl's TensorDict of B rows.
        maker: of the views.
        step: of the run.

    Raises:
        ValueError: a key is missing, or an image is not as the processor made it.
    """
    for key in ("advantages", "old_log_probs", "response_mask", "responses"):
        if key not in micro_batch:
            remedy = "ROMA is for policy gradients: unset VERL_ENGINE_VENDOR for other losses"
            fail("micro-batch", f"the key {key}", ", ".join(sorted(micro_batch.keys())), remedy)
    media = media_of(micro_batch)
    mask = padded(micro_batch["response_mask"]).bool()
    pixels = [own["pixel_values"] for own in media if own.get("pixel_values") is not None]
    grids = [own["image_grid_thw"] for own in media if own.get("image_grid_thw") is not None]
    device = mask.device if maker.options.view_device == "cuda" else torch.device("cpu")
    images = maker.read(
        torch.cat(pixels).to(device) if pixels else None,
        torch.cat(grids) if grids else None,
        [_count(own) for own in media],
        step=step,
    )
    weight = micro_batch.get("rollout_is_weights", None)
    return Rows(
        media,
        images,
        mask,
        padded(micro_batch["advantages"]),
        padded(micro_batch["old_log_probs"]),
        None if weight is None else padded(weight),
        right_of(micro_batch, maker.options),
        maker.aux_view(images, completions_of(micro_batch)),
    )


def right_of(batch: Any, options: RomaOptions) -> Tensor:
    """[B] bool, CPU: right rollouts that have an image and a counted token: the penalty's rows.

    A row that verl added to fill up a batch has no counted token, whatever else it copied.

    Raises:
        ValueError: as `correct_of`.
    """
    counted = [bool(own.any()) for own in batch["response_mask"].unbind()]
    seeing = [_count(own) > 0 for own in media_of(batch)]
    return correct_of(batch, options) & torch.tensor(counted) & torch.tensor(seeing)


def correct_of(batch: Any, options: RomaOptions) -> Tensor:
    """[B] bool, CPU: rollouts whose accuracy is above the threshold.

    Read from what the reward function gave beside its score: under "acc" or "accuracy" of
    extra_fields' reward_extra_info (v1), or as a key of the batch (a colocated reward model, and
    the older trainer). A reward function that returns a number has it under "acc" by verl itself.

    Raises:
        ValueError: there is none. The score is not taken in its place: it may be a mix with format.
    """
    for name in ACCURACY:
        if name in batch:
            return _above(per_row(batch, name), options)
    known = [own.get("reward_extra_info") or {} for own in per_row(batch, "extra_fields")]
    for name in ACCURACY:
        if known and all(name in own for own in known):
            return _above([own[name] for own in known], options)
    got = sorted({name for own in known for name in own}) or sorted(batch.keys())
    remedy = "return {'score': …, 'acc': 1.0 or 0.0} from the reward function"
    fail("accuracy of a rollout", "'acc' from the reward function", ", ".join(got), remedy)


def widen(micro_batch: Any, rows: Rows, pairs: Sequence[Pair], pixels: Tensor) -> Any:
    """The micro-batch with a row more for each pair: the same tokens, a view's pixels.

    Args:
        micro_batch: B rows.
        rows: what was read from them.
        pairs: R pairs (view, row).
        pixels: pixel_values of the pairs, pair after pair.

    Returns:
        A TensorDict of B + R rows with what a forward takes; the micro-batch itself without pairs.
    """
    from tensordict import NonTensorData
    from verl.utils import tensordict_utils as tu

    if not pairs:
        return micro_batch
    count = len(micro_batch)
    # verl's settings (packed or padded, which head) are one value that stands for all rows.
    keys = [
        key
        for key, value in micro_batch.items()
        if key in _FORWARD or isinstance(value, NonTensorData)
    ]
    picked = [*range(count), *(row for _, row in pairs)]
    wide = tu.index_select_tensor_dict(micro_batch.select(*keys), picked)
    clean = [rows.media[row]["pixel_values"] for _, row in pairs]
    made = pixels.split([len(own) for own in clean])
    views = [
        {**rows.media[row], "pixel_values": view.to(own.device, own.dtype)}
        for (_, row), own, view in zip(pairs, clean, made, strict=True)
    ]
    tu.assign_non_tensor_stack(wide, "multi_modal_inputs", [*rows.media, *views])
    return wide


def narrow(model_output: Mapping[str, Any], count: int) -> dict[str, Tensor]:
    """The first `count` rows of a forward's nested tensors [B + R, j], with their graph."""
    made = {}
    for name, value in model_output.items():
        offsets = value.offsets()[: count + 1]
        own = value.values()[: int(offsets[-1])]
        made[name] = torch.nested.nested_tensor_from_jagged(own, offsets)
    return made


def padded(value: Tensor) -> Tensor:
    """[B, T] from a nested [B, j], padded with zeros; a plain tensor as it is."""
    return value.to_padded_tensor(0) if value.is_nested else value


def completions_of(batch: Any) -> list[list[int]]:
    """Per row the tokens of its completion, without padding."""
    answers = batch["responses"]
    rows = answers.unbind()
    if not answers.is_nested:
        there = batch["attention_mask"][:, -answers.shape[1] :].bool()
        rows = [row[own] for row, own in zip(rows, there, strict=True)]
    return [row.tolist() for row in rows]


def media_of(batch: Any) -> list[dict[str, Any]]:
    """Per row its multi_modal_inputs; empty for text alone."""
    given = per_row(batch, "multi_modal_inputs")
    return [dict(own or {}) for own in given] or [{} for _ in range(len(batch))]


def per_row(batch: Any, key: str) -> list[Any]:
    """The value of each row under a key, unwrapped; [] where there is no such key."""
    from tensordict import NonTensorData

    if key not in batch:
        return []
    value = batch[key]
    if isinstance(value, Tensor):
        return value.tolist()
    return [own.data if isinstance(own, NonTensorData) else own for own in value]


def _count(own: Mapping[str, Any]) -> int:
    """The number of images of a row."""
    grid, pixels = own.get("image_grid_thw"), own.get("pixel_values")
    if grid is not None:
        return len(grid)
    return 0 if pixels is None else len(pixels)


def _above(values: Sequence[Any], options: RomaOptions) -> Tensor:
    return torch.tensor([float(value) > options.accuracy_threshold for value in values])
