"""Tensors that do not fit `add_rows` are named before anything is laid out."""

import pytest
import torch

from roma.integrations.options import RomaOptions
from roma.integrations.rows import add_rows


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("correct", torch.ones(4), "correct: expected dtype bool, got float32"),
        ("aux_view", torch.full((4,), 2), "aux_view: expected 0 to 1, num_views - 1"),
        ("advantages", torch.ones(3), r"advantages: expected \[B\] = \[4\]"),
        ("view_logp", None, "view_logp: expected a tensor, got NoneType"),
        ("logp", torch.full((4, 3), float("nan")), "logp: expected finite nats"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(name, value, message):
    given = {
        "mask": torch.ones(4, 3, dtype=torch.bool),
        "advantages": torch.randn(4),
        "correct": torch.tensor([True, False, True, False]),
        "logp": -torch.rand(4, 3),
        "view_logp": -torch.rand(2, 4, 3),
        "aux_view": torch.zeros(4, dtype=torch.int64),
    }
    add_rows(**given, options=RomaOptions(), aggregation="grpo")
    with pytest.raises((ValueError, TypeError), match=message):
        add_rows(**{**given, name: value}, options=RomaOptions(), aggregation="grpo")
