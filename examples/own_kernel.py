"""Compares a kernel of your own with this package's oracle, and then the same kernel with a bug.

python examples/own_kernel.py          needs hypothesis: pip install '.[testing]'
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
    """The softmax in blocks of the vocabulary, with the arguments of roma.linear_logprob.

    The bug: the last block is padded with rows of zeros, and their logits, which are 0, count.
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
    """Right where V is a multiple of 64, and nearly right where one logit is large."""
    return blockwise(*tensors, forget_the_tail=True, **options)


# The options that this kernel does not support are held at their defaults.
SCOPE = dict(bias=False, softcap=None, temperature="one", entropy=False)


def main() -> None:
    """Compares both with the oracle."""
    check_backend(blockwise, op="linear_logprob", **SCOPE)
    print("blockwise: values and gradients within the bounds on 200 inputs")
    try:
        check_backend(with_the_bug, op="linear_logprob", **SCOPE)
    except AssertionError as found:
        print("with_the_bug:", found, *getattr(found, "__notes__", []), sep="\n  ")


if __name__ == "__main__":
    main()
