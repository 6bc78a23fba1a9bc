"""A kernel of your own, held to the oracle of this package; and the same with a bug in it.

python examples/own_kernel.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import roma
from roma.testing import check_backend

BLOCK = 64


def blockwise(
    hidden: Tensor, weight: Tensor, tokens: Tensor, *, forget_the_tail: bool = False, **_: object
) -> roma.TokenLogprobs:
    """The soft-max in blocks of the vocabulary; takes what roma.linear_logprob takes.

    The bug: the last block is filled up with rows of zeros, and their logits of 0 are counted.
    """
    states = hidden.float().reshape(-1, hidden.shape[-1])
    lse = states.new_full((len(states),), -torch.inf)
    logits = []
    for rows in weight.float().split(BLOCK):
        if forget_the_tail:
            rows = F.pad(rows, (0, 0, 0, BLOCK - len(rows)))
        logits.append(states @ rows.T)
        lse = torch.logaddexp(lse, logits[-1].logsumexp(1))
    target = torch.cat(logits, 1).gather(1, tokens.reshape(-1, 1))[:, 0]
    shape = tokens.shape
    return roma.TokenLogprobs((target - lse).reshape(shape), lse.detach().reshape(shape), None)


def with_the_bug(*tensors: Tensor, **options: object) -> roma.TokenLogprobs:
    """What passes wherever V is a multiple of 64, and hardly shows where logits are near 0."""
    return blockwise(*tensors, forget_the_tail=True, **options)


# What this kernel does not claim to do.
SCOPE = dict(bias=False, softcap=None, temperature="one", entropy=False)


def main() -> None:
    """Hold both to the oracle."""
    check_backend(blockwise, op="linear_logprob", **SCOPE)
    print("blockwise: values and gradients within the bounds on 200 inputs")
    try:
        check_backend(with_the_bug, op="linear_logprob", **SCOPE)
    except AssertionError as found:
        print("with_the_bug:", found, *getattr(found, "__notes__", []), sep="\n  ")


if __name__ == "__main__":
    main()
