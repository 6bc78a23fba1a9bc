"""Rows of TRL's multimodal inputs: pixel_values, grids, token types, of a batch or of one row.

TRL keeps images packed over a micro-batch, each model family in its own way, and has functions that
split them by row and join them again. These do that for any choice of rows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from trl.data_utils import apply_chat_template, prepare_multimodal_messages
from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid

from roma.integrations.trl.checks import FIELDS
from roma_kernels.errors import fail

Fields = dict[str, Any]

# view_fn(row, views, step) -> K rows, or None for a row that has no views
ViewFunction = Callable[[Mapping[str, Any], int, int], Sequence[Mapping[str, Any]] | None]

_BY_TOKEN = ("token_type_ids", "mm_token_type_ids")


def of(inputs: Mapping[str, Any]) -> Fields:
    """The multimodal fields of a micro-batch, those that are there."""
    return {name: inputs[name] for name in FIELDS if inputs.get(name) is not None}


def take(fields: Fields, rows: Sequence[int]) -> Fields:
    """The fields of `rows`, in that order; a row may come several times.

    Rows of text alone have no images: where none is left, the image fields are dropped.
    """
    split = split_pixel_values_by_grid(fields)
    index = list(rows)
    picked = {
        name: value[index] if isinstance(value, Tensor) else [value[row] for row in index]
        for name, value in split.items()
    }
    return without_blanks(unsplit_pixel_values_by_grid(picked))


def without_blanks(inputs: Mapping[str, Any]) -> Fields:
    """Without the image fields, if no row has an image: models fail on pixel_values of no rows."""
    counts = inputs.get("num_images")
    if counts is None or any(counts):
        return dict(inputs)
    return {k: v for k, v in inputs.items() if k not in FIELDS or k in _BY_TOKEN}


def without_images(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a dataset; where none has an image, with an empty list of images for None.

    TRL reads a list as no image, and hands None to the image processor.
    """
    if any(row.get("image") is not None or row.get("images") for row in rows):
        return rows
    named = any("image" in row or "images" in row for row in rows)
    return [{**row, "images": []} for row in rows] if named else rows


def counts(fields: Fields, rows: int) -> list[int]:
    """Images (or tiles, where an image has several) of each row."""
    found = fields.get("num_tiles", fields.get("num_images"))
    if found is None or "pixel_values" not in fields:
        return [0] * rows
    return [int(count) for count in found]


@dataclass(frozen=True)
class Alternative:
    """One view of one row, from a view_fn: another prompt, or other images; the same completion.

    Attributes:
        ids: [P'] int64: the prompt's tokens.
        fields: the row's multimodal fields, as in a micro-batch of one row.
    """

    ids: Tensor
    fields: Fields


def alternatives(
    trainer: Any, inputs: Sequence[Mapping[str, Any]], view_fn: ViewFunction, views: int, step: int
) -> list[list[Alternative]]:
    """K alternatives of each row of the dataset, tokenised as TRL tokenises the row itself.

    Args:
        trainer: the GRPOTrainer.
        inputs: B rows.
        view_fn: of the user.
        views: K.
        step: optimizer steps done.

    Returns:
        [B][K]; none for a row that has no views. Equal rows (the rollouts of a prompt) are asked
        for once.

    Raises:
        ValueError: view_fn returned another number of rows, or a row without a prompt.
    """
    made: dict[int, list[Alternative]] = {}
    known: list[tuple[Mapping[str, Any], int]] = []
    found = []
    for row in inputs:
        same = next((number for other, number in known if _equal(other, row)), None)
        if same is None:
            same = len(known)
            known.append((row, same))
            made[same] = _of_row(trainer, row, view_fn, views, step)
        found.append(made[same])
    return found


def try_view_fn(trainer: Any, view_fn: ViewFunction, views: int, dataset: Any) -> None:
    """Asks a view_fn for the views of the dataset's first row, so that it fails before sampling.

    Args:
        trainer: the GRPOTrainer.
        view_fn: of the user.
        views: K.
        dataset: the training set; of a stream nothing is read.

    Raises:
        ValueError: it is no function, or what it returned is no rows.
    """
    if not callable(view_fn):
        got, remedy = type(view_fn).__name__, "give a function of a row, K and the step"
        fail("view_fn", "a function", got, remedy)
    if hasattr(dataset, "__getitem__") and len(dataset):
        _of_row(trainer, dataset[0], view_fn, views, 0)


def _equal(one: Any, other: Any) -> bool:
    """Of what a dataset may hold, arrays too, which `==` compares number by number."""
    if one is other:
        return True
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    if hasattr(one, "shape") and hasattr(other, "shape"):
        return one.shape == other.shape and bool((one == other).all())
    return bool(one == other)


def _of_row(
    trainer: Any, row: Mapping[str, Any], view_fn: ViewFunction, views: int, step: int
) -> list[Alternative]:
    others = view_fn(row, views, step)
    if others is None or others == []:
        return []
    if not isinstance(others, (list, tuple)):
        expected, remedy = f"a list of {views} rows, or None", "put the rows into a list"
        fail("view_fn", expected, type(others).__name__, remedy)
    if len(others) != views:
        expected, remedy = f"{views} rows, num_views", "return that many, or None for no views"
        fail("view_fn", expected, f"{len(others)} rows", remedy)
    for other in others:
        got, remedy = type(other).__name__, "copy the row: {**row, ...}"
        if isinstance(other, Mapping):
            got = f"the columns {', '.join(other)}"
        if not isinstance(other, Mapping) or "prompt" not in other:
            fail("view_fn", "rows with a prompt", got, remedy)
        if type(other["prompt"]) is not type(row["prompt"]):
            expected, got = type(row["prompt"]).__name__, type(other["prompt"]).__name__
            fail("view_fn, prompt", f"a {expected}, as in the row that it was given", got, remedy)
        if not isinstance(other.get("images", []), (list, tuple, type(None))):
            got = type(other["images"]).__name__
            fail("view_fn, images", "a list of images", got, "put the image into a list")
    return [_tokenised(trainer, other) for other in others]


def _tokenised(trainer: Any, row: Mapping[str, Any]) -> Alternative:
    images = row.get("images")
    if images is None and row.get("image") is not None:
        images = [row["image"]]
    prompt = row["prompt"]
    if not images:
        (ids,), _, _ = trainer._tokenize_prompts([prompt])
        return Alternative(torch.as_tensor(ids), {})
    messages = prepare_multimodal_messages(prompt, images=list(images))
    options = {"tools": trainer.tools, **trainer.chat_template_kwargs}
    text = apply_chat_template({"prompt": messages}, trainer.processing_class, **options)["prompt"]
    made = trainer.processing_class(images=[list(images)], text=[text], return_tensors="pt")
    fields = {name: value for name, value in made.items() if name in FIELDS}
    return Alternative(made["input_ids"][0], {**fields, "num_images": [len(images)]})


@dataclass(frozen=True)
class Joined:
    """One call's rows: B clean ones, then the pairs.

    Attributes:
        ids: [B + R, P + T]; prompts padded on the left.
        attention: [B + R, P + T].
        fields: of all rows.
        keep: T.
    """

    ids: Tensor
    attention: Tensor
    fields: Fields
    keep: int


def joined(
    ids: Tensor,
    attention: Tensor,
    keep: int,
    fields: Fields,
    chosen: Sequence[tuple[int, Alternative]],
    pad: int,
) -> Joined:
    """B clean rows and alternatives of them, with the completions of the rows that they are of.

    Args:
        ids: [B, P + T].
        attention: [B, P + T].
        keep: T.
        fields: of the B rows.
        chosen: R pairs of a row and an alternative of it.
        pad: token id to pad with.
    """
    if not chosen:
        return Joined(ids, attention, fields, keep)
    before = ids.shape[1] - keep
    width = max(before, *(len(other.ids) for _, other in chosen))

    def left(row: Tensor, length: int, fill: int) -> Tensor:
        return torch.nn.functional.pad(row, (length - row.shape[-1], 0), value=fill)

    rows = [row for row, _ in chosen]
    prompts = torch.stack([left(other.ids, width, pad) for _, other in chosen]).to(ids.device)
    seen = [left(torch.ones_like(other.ids), width, 0) for _, other in chosen]
    marks = torch.stack(seen).to(attention)
    all_ids = torch.cat([left(ids, width + keep, pad), torch.cat([prompts, ids[rows, before:]], 1)])
    all_attention = torch.cat(
        [left(attention, width + keep, 0), torch.cat([marks, attention[rows, before:]], 1)]
    )
    both = _joined_fields(fields, chosen, len(ids), width, keep, ids)
    return Joined(all_ids, all_attention, both, keep)


def _joined_fields(
    fields: Fields,
    chosen: Sequence[tuple[int, Alternative]],
    count: int,
    width: int,
    keep: int,
    like: Tensor,
) -> Fields:
    """The fields of the clean rows and of the alternatives, side by side."""
    own = [other.fields for _, other in chosen]
    names = [name for name in FIELDS if name in fields or any(name in other for other in own)]
    made: Fields = {}
    for name in names:
        if name == "num_images":
            clean = list(fields.get(name, [0] * count))
            made[name] = clean + [other.get(name, [0])[0] for other in own]
        elif name == "num_tiles":  # a row of pixel_values each
            made[name] = fields[name] + [len(other.get("pixel_values", ())) for other in own]
        elif name in _BY_TOKEN:
            total = width + keep
            clean = fields.get(name, like.new_zeros(count, total))
            made[name] = like.new_zeros(count + len(own), total)
            made[name][:count, total - clean.shape[1] :] = clean
            for number, other in enumerate(own):
                if name in other:
                    kinds = other[name][0].to(like.device)
                    made[name][count + number, width - len(kinds) : width] = kinds
        else:
            parts = [fields.get(name), *(other.get(name) for other in own)]
            made[name] = torch.cat([part.to(like.device) for part in parts if part is not None])
    return made
