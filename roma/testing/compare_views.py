"""Log-probs of a token on K+1 images, and their differences view − clean, each to its own bound.

What a matrix unit cuts off a log-prob is much the same on all images of a token: the differences,
of which penalty and worst view are made, are far better than the log-probs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from roma.testing import oracle, tolerance
from roma.testing.matrix_unit import MatrixUnit
from roma.testing.tolerance import Bound, ProductError


def check_views(
    got: Tensor, states: Tensor, weight: Tensor, tokens: Tensor, unit: MatrixUnit | None
) -> tuple[Bound, Bound]:
    """Holds log-probs to float64; returns the bounds of log-probs and of differences.

    Args:
        got: [K+1, n] fp32, clean ones first.
        states: [K+1, n, D].
        weight: [V, D]; τ = 1, no bias, no softcap. All logits are kept, several times, in float64.
        tokens: [n].
        unit: what multiplied; None: sums were rounded to nearest.

    Raises:
        AssertionError: a bound is exceeded.
    """
    rows, labels = states.flatten(0, 1), tokens.repeat(len(states))
    want = oracle.head(rows, weight, labels)
    eager = oracle.head(rows, weight, labels, dtype=torch.float32).logp.view(got.shape)
    off = tolerance.logp_error(tolerance.product_error(rows, weight, unit), want, labels)
    clean, *views = (
        ProductError(*parts)
        for parts in zip(off.offset.view(got.shape), off.spread.view(got.shape), strict=True)
    )
    exact = want.logp.view(got.shape)
    between = torch.stack([view.less(clean).noise for view in views])
    how = {"dtype": torch.float32}
    return (
        tolerance.check("logp", got, exact, eager, noise=off.noise.view(got.shape), **how),
        tolerance.check(
            "view_logp - logp", got[1:] - got[0], exact[1:] - exact[0], eager[1:] - eager[0],
            noise=between, **how,
        ),
    )  # fmt: skip
