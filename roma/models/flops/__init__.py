"""What an update costs in floating-point operations, before it is run.

Only matrix products and attention count, two operations per multiply-add. With D hidden, I
intermediate, H heads, H' key-value heads of size d, and M layers, the text model needs forward

    per token             2·M·[D·(H + 2·H')·d + H·d·D + 3·D·I]
    per (query, key) pair 4·M·H·d
    per row of the head   2·D·V

Pairs are those that causal attention needs: a row of S tokens has S(S + 1)/2 of them. Kernels that
skip what lies above the diagonal compute these, torch's for a CPU among them. One that is given a
mask computes all S², as for rows with padded prompts, and costs more than is said here. In the
vision tower a patch sees all P patches of its image: P² pairs.

`passes` has what a pass costs, with adapters on the text model or without, `update` what the forms
of an update run. Both are held to `torch.utils.flop_counter` by tests/models/test_flops.py.
"""

from roma.models.flops.passes import (
    Adapters,
    Cost,
    Group,
    Packed,
    backward,
    forward,
    head,
    images,
    packed,
)
from roma.models.flops.shapes import TextShape, VisionShape
from roma.models.flops.update import FORMS, ROW_WISE_GRPO, Form, Prompt, cheaper, update

__all__ = [
    "FORMS",
    "ROW_WISE_GRPO",
    "Adapters",
    "Cost",
    "Form",
    "Group",
    "Packed",
    "Prompt",
    "TextShape",
    "VisionShape",
    "backward",
    "cheaper",
    "forward",
    "head",
    "images",
    "packed",
    "update",
]
