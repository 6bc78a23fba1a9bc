"""Views on a card: what PyTorch computes is the CPU's, to the bit."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.gpu
def test_views_in_pytorch_are_the_cpus() -> None:
    """The noise by its definition, the others sum in one order."""
    views = pytest.importorskip("roma.views", exc_type=ImportError)
    from roma.views import operators

    draw = torch.Generator().manual_seed(0)
    images = [torch.randint(256, (h, w, 3), generator=draw).byte() for h, w in ((64, 91), (5, 1))]
    for name in [*sorted(operators.NOISES), *sorted(operators.IN_PYTORCH - {"zoom_blur"})]:
        parameters, seeds = [views.CORRUPTIONS[name].parameter(2)] * 2, [5, 2**64 - 1]
        degraded = operators.OPERATORS[name]([x.cuda() for x in images], parameters, seeds)
        wanted = operators.OPERATORS[name](images, parameters, seeds)
        for found, want in zip(degraded, wanted, strict=True):
            assert torch.equal(found.cpu(), want), name
