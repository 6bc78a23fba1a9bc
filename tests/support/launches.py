"""Run as a program, without Triton's interpreter: which kernels would be compiled for which calls.

Prints a JSON object: scenario → a list of calls, each a list of the specialisations it launches.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget

import roma
from bench.compiled.launches import recorded
from roma.testing.strategies import LossSpec

SM_90 = GPUTarget("cuda", 90, 32)
CAPTURING = (
    "roma_kernels.linear_logprob.backward.capturing",
    "roma_kernels.linear_logprob.rows.capturing",
    "roma_kernels.roma_loss.token_local.op.capturing",
)


def launched(call, *, captured: bool = False) -> list[str]:
    with ExitStack() as stack:
        for name in CAPTURING if captured else ():
            stack.enter_context(mock.patch(name, lambda x: True))
        found = recorded("sm_90", SM_90, iter([call]))
    return sorted(f"{launch.name} {launch.specialization}" for launch in found)


def head(rows: int, active: int, *, depth: int = 64, vocab: int = 1000, offset: int = 0):
    """linear_logprob on `rows` rows, of which the first `active` have a gradient."""
    states = torch.ones(rows * depth + offset, dtype=torch.bfloat16)[offset:].view(rows, depth)
    weight = torch.ones(vocab, depth, dtype=torch.bfloat16)
    tokens = torch.zeros(rows + offset, dtype=torch.int64)[offset:]
    upstream = (torch.arange(rows) < active).float()

    def call() -> None:
        leaves = states.detach().requires_grad_(), weight.detach().requires_grad_()
        roma.linear_logprob(*leaves, tokens, backend="triton", workspace=1).logp.backward(upstream)

    return call


def loss(**sizes: int):
    case = LossSpec(dtype=torch.bfloat16, k=3, d=64, v=1000, **sizes).make()

    def call() -> None:
        leaves = {n: case[n].detach().requires_grad_() for n in ("hidden", "view_hidden", "weight")}
        others = {n: x for n, x in case.items() if n not in leaves}
        roma.roma_loss(**leaves, **others, backend="triton").loss.backward()

    return call


def main() -> None:
    print(
        json.dumps(
            {
                "warm-up with few active rows": [launched(head(2300, 3))],
                "captured": [launched(head(2300, 3), captured=True)],
                "warm-up of the loss": [launched(loss(b=4, t=40))],
                "the loss captured": [launched(loss(b=4, t=40), captured=True)],
                "rows": [launched(head(rows, 2 * rows // 3)) for rows in range(1020, 1060, 3)],
                "batches": [launched(loss(b=b, t=37)) for b in range(3, 11)],
            }
        )
    )


if __name__ == "__main__":
    main()
