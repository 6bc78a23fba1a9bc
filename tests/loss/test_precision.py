"""How far log-probs of bf16 inputs are off, and what that does to the choice of the worst view.

D = 1024, logits up to ±30, tokens sampled from the soft-max, K = 4 views whose divergences are
small (MATH, section 7). Errors are against float64 on the same rounded inputs. These are the bars
of kernels that round to nearest; a GPU's matrix units do not: tests/gpu/test_arithmetic.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import roma
from roma.testing.compare_views import check_views

D, K = 1024, 4
RMS, LARGEST, AGREEMENT = 3e-6, 3e-5, 0.999


@dataclass(frozen=True)
class Case:
    """Clean and degraded states [K+1, N, D], a head [V, D], tokens [N], and all logits."""

    states: Tensor
    weight: Tensor
    tokens: Tensor
    logits: Tensor  # [K+1, N, V] float64

    def by_logits(self, logits: Tensor) -> Tensor:
        """Log-probs [K+1, N] of the tokens."""
        target = logits.gather(-1, self.tokens.expand(K + 1, -1)[..., None])[..., 0]
        return target - torch.logsumexp(logits, -1)


def make(tokens: int, vocabulary: int, shift: float) -> Case:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(vocabulary, D, generator=generator).bfloat16()
    clean = torch.randn(tokens, D, generator=generator)
    views = [clean + shift * torch.randn(tokens, D, generator=generator) for _ in range(K)]
    states = torch.stack([clean, *views]) * (5.3 / D**0.5)
    states = states.bfloat16()
    logits = states.double() @ weight.double().T
    sampled = torch.multinomial(torch.softmax(logits[0], -1), 1, generator=generator)[:, 0]
    assert 25 < float(logits.abs().max()) <= 30
    return Case(states, weight, sampled, logits)


def score(case: Case, kernel: str) -> Tensor:
    states, tokens = case.states.reshape(-1, D), case.tokens.repeat(K + 1)
    out = roma.linear_logprob(states, case.weight, tokens, backend=kernel)
    return out.logp.view(K + 1, -1).double()


def divergences(logp: Tensor) -> Tensor:
    """k3 of each view and token, [K, N]."""
    gap = logp[1:] - logp[0]
    return torch.expm1(gap) - gap


def test_error_of_log_probs(kernel: str) -> None:
    """Rms ≤ 3e-6 and max ≤ 3e-5 nats; logits rounded to bf16 are off by 3e-2, and 0.1."""
    case = make(tokens=128, vocabulary=32_768, shift=1e-3)
    want = case.by_logits(case.logits)

    def errors(logp: Tensor) -> tuple[float, float]:
        off = (logp - want).abs()
        return float(off.square().mean().sqrt()), float(off.max())

    got, rounded = score(case, kernel), case.by_logits(case.logits.bfloat16().float()).double()
    rms, largest = errors(got)
    assert rms <= RMS and largest <= LARGEST
    rms, largest = errors(rounded)
    assert rms > 1000 * RMS and largest > 1000 * LARGEST
    some = slice(16)
    check_views(got[:, some].float(), case.states[:, some], case.weight, case.tokens[some], None)


@pytest.mark.slow
def test_worst_view_is_that_of_float64(kernel: str) -> None:
    """On 99.9 % of tokens at a mean worst divergence of 6e-5 nats; of rounded logits, 31 %."""
    case = make(tokens=8192, vocabulary=1024, shift=8e-4)
    want = divergences(case.by_logits(case.logits))
    assert 5e-5 < float(want.amax(0).mean()) < 7e-5

    def agreement(logp: Tensor) -> float:
        return float((divergences(logp).argmax(0) == want.argmax(0)).double().mean())

    assert agreement(score(case, kernel)) >= AGREEMENT
    assert agreement(case.by_logits(case.logits.bfloat16().float()).double()) < 0.4
