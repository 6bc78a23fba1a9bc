"""What verl's engine scored and the gradient of its loss by that: seen from inside one step."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Seen:
    """One forward: [B + R] rows' log-probs, nats, and the gradient of the micro-batch's loss."""

    logp: list[Tensor]
    rows: list[Tensor]  # their input_ids
    pixels: list[Tensor | None]
    settings: dict[str, object]
    gradient: list[Tensor] = field(default_factory=list)


@contextmanager
def watch(engine):
    """The forwards of a step, in order."""
    made: list[Seen] = []
    stock = engine.prepare_model_outputs

    def prepare_model_outputs(*args, **named):
        from tensordict import NonTensorData

        from roma.integrations.verl.micro_batch import media_of

        output = stock(*args, **named)
        batch = named["micro_batch"]
        nested = output["log_probs"]
        offsets = nested.offsets()
        spans = list(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True))
        values = nested.values() * 1.0  # bitwise the same, with a place for a hook
        media = media_of(batch)
        seen = Seen(
            [_completion(values.detach()[a:b], batch, i) for i, (a, b) in enumerate(spans)],
            [own.clone() for own in batch["input_ids"].unbind()],
            [own.get("pixel_values") for own in media],
            {key: value.data for key, value in batch.items() if isinstance(value, NonTensorData)},
        )

        def keep(gradient: Tensor) -> None:
            seen.gradient = [_completion(gradient[a:b], batch, i) for i, (a, b) in enumerate(spans)]

        if values.requires_grad:
            values.register_hook(keep)
        made.append(seen)
        output["log_probs"] = torch.nested.nested_tensor_from_jagged(values, offsets)
        return output

    engine.prepare_model_outputs = prepare_model_outputs
    try:
        yield made
    finally:
        del engine.prepare_model_outputs


def _completion(values: Tensor, batch, row: int) -> Tensor:
    """[T] of a row's [j]: position t predicts token t + 1."""
    length = len(batch["responses"].unbind()[row])
    return values[-length - 1 : -1].clone()
