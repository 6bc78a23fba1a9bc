"""VGPO against MATH.md section 4, a prompt at a time in Python floats."""

import math
import statistics
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from roma.advantages.vgpo import reweight, weights

VARIANTS = ("paper", "code")
# Floats whose binary would round ⌊(1 − γ)T⌋ and ⌊κ·n⌋ down: γ = 0.9 of 10, κ = 0.29 of 100.
SETTINGS = [("0.3", "0.5", "0.2"), ("0", "1", "1"), ("2", "0.9", "0.29"), ("0.5", "0.3", "0.7")]

Batch = dict[str, Tensor]


def cosine(a: list[float], b: list[float]) -> float:
    size = math.sqrt(math.fsum(x * x for x in a) * math.fsum(y * y for y in b))
    return math.fsum(x * y for x, y in zip(a, b, strict=True)) / size if size else 0.0


def minmax(values: list[float]) -> list[float]:
    low, high = min(values), max(values)
    return [(v - low) / (high - low + 1e-8) for v in values]


def centred(values: list[float]) -> list[float]:
    return [v - statistics.fmean(values) for v in values]


def token_weights(
    S: list[float], beta: Fraction, gamma: Fraction, kappa: Fraction, variant: str
) -> list[float]:
    """w_t of one sequence, from its cosines."""
    T = len(S)
    rho = [(s + 1) / 2 for s in S] if variant == "paper" else [s - min(0.0, min(S)) for s in S]
    begin = math.floor((1 - gamma) * T)
    late = sorted(rho[begin:], reverse=True)
    least = late[max(1, math.floor(kappa * len(late))) - 1]
    w = []
    for t in range(T):
        place = (t + 1) / T if variant == "paper" else t / max(T - 1, 1)
        gate = t >= begin and rho[t] >= least
        w.append(rho[t] * (1 + gate * float(beta) * place))
    return w


def weights_by_hand(
    batch: Batch, options: tuple[str, str, str], variant: str, *, adjacent: bool = False
) -> Tensor:
    beta, gamma, kappa = map(Fraction, options)
    mask, group = batch["mask"], batch["group"].tolist()
    if adjacent:  # the planted error: rows that stand side by side, two by two
        group = [row // 2 for row in range(len(group))]
    found = torch.zeros(mask.shape, dtype=torch.float64)
    for prompt in set(group):
        rows = [row for row, own in enumerate(group) if own == prompt]
        w, places = {}, {}
        for row in rows:
            places[row] = mask[row].nonzero().flatten().tolist()
            h = batch["hidden"][row].double().tolist()
            mu = batch["image_state"][row].double().tolist()
            S = [cosine(h[t], mu) for t in places[row]]
            w[row] = token_weights(S, beta, gamma, kappa, variant) if S else []
        scaled = {row: minmax(own) if own else [] for row, own in w.items()}
        totals = [math.fsum((w if variant == "paper" else scaled)[row]) for row in rows]
        phi = dict(zip(rows, centred(minmax(totals)), strict=True))
        for row in rows:
            psi = centred(scaled[row]) if scaled[row] else []
            for t, own in zip(places[row], psi, strict=True):
                token, rollout = min(max(1 + own, 0.1), 2.0), min(max(1 + phi[row], 0.9), 2.0)
                seen = bool((batch["image_state"][row] != 0).any())
                found[row, t] = token * rollout if seen else 1.0
    return found


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Prompts of one to four rollouts, in a random order; what is masked is no number."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    sizes = draw(st.sampled_from([[1], [3], [1, 2, 4], [2, 2]]))
    T, D = draw(st.sampled_from([(1, 4), (10, 4), (40, 3)]))
    group = torch.tensor([7, -3, 10**12])[: len(sizes)].repeat_interleave(torch.tensor(sizes))
    B = len(group)
    hidden = torch.randn(B, T, D, generator=generator, dtype=torch.float64)
    image = torch.randn(len(sizes), D, generator=generator, dtype=torch.float64)
    mask = torch.rand(B, T, generator=generator) < 0.9
    difficulty = draw(
        st.sampled_from(
            [*("plain", "no_gaps", "all_equal", "empty_row"), *("no_image", "opposite", "one_low")]
        )
    )
    if difficulty == "no_gaps":
        mask = torch.ones_like(mask)
    elif difficulty == "all_equal":
        hidden, mask = hidden[:1, :1].expand(B, T, D).clone(), torch.ones_like(mask)
    elif difficulty == "empty_row":
        mask[0] = False
    elif difficulty == "no_image":
        image[0] = 0.0
    elif difficulty == "opposite":  # every cosine is below 0
        hidden[:] = -image[0] + 0.1 * hidden
    image_state = image.repeat_interleave(torch.tensor(sizes), 0)
    if difficulty == "one_low":  # 1 + ψ of it is below the bound
        hidden = image_state[:, None].repeat(1, T, 1)
        hidden[:, 0] *= -1
    hidden = hidden.masked_fill(~mask[..., None], math.nan)
    order = torch.randperm(B, generator=generator)
    batch = {"hidden": hidden, "image_state": image_state, "mask": mask, "group": group}
    return {name: value[order] for name, value in batch.items()}


def named(options: tuple[str, str, str], variant: str) -> dict[str, Any]:
    names = ("beta", "gamma", "kappa")
    return dict(zip(names, map(float, options), strict=True)) | {"variant": variant}


# Cosines are within 10·eps; min-max divides by a range, of which nothing drawn has less than 1e-5
# unless all are equal to the bit.
BOUND = 1e-9


@given(batches(), st.sampled_from(SETTINGS), st.sampled_from(VARIANTS))
@settings(max_examples=80)
def test_weights(batch: Batch, options: tuple[str, str, str], variant: str) -> None:
    before = {name: value.clone() for name, value in batch.items()}
    found, mask = weights(**batch, **named(options, variant)), batch["mask"]
    expected = weights_by_hand(batch, options, variant)
    assert float((found - expected).abs().max()) <= BOUND
    assert bool((found[mask] > 0).all()) and bool((found[~mask] == 0).all())
    for name, value in batch.items():  # float64 states are used as they are, and left so
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


@given(batches(), st.sampled_from(VARIANTS), st.integers(0, 2**32 - 1))
@settings(max_examples=40)
def test_advantages(batch: Batch, variant: Any, seed: int) -> None:
    generator, mask = torch.Generator().manual_seed(seed), batch["mask"]
    A = torch.randn(len(mask), generator=generator, dtype=torch.float64)
    found = reweight(A, **batch, variant=variant)
    assert torch.equal(found, A[:, None].where(mask, 0.0) * weights(**batch, variant=variant))
    assert torch.equal(found.sign(), A.sign()[:, None] * mask)
    by_token = A[:, None].where(mask, math.nan)
    assert torch.equal(reweight(by_token, **batch, variant=variant), found)

    def close(other: Tensor, own: Tensor) -> None:
        torch.testing.assert_close(other, own, rtol=0, atol=BOUND)

    order = torch.randperm(len(mask), generator=generator)
    moved = {name: value[order] for name, value in batch.items()}
    close(reweight(A[order], **moved, variant=variant), found[order])
    # Whole prompts by themselves, and with other names.
    for prompt in batch["group"].unique():
        own = batch["group"] == prompt
        part = {name: value[own] for name, value in batch.items()}
        part["group"] = torch.full_like(part["group"], 3)
        close(reweight(A[own], **part, variant=variant), found[own])
    pad = torch.nn.functional.pad
    hidden = pad(batch["hidden"], (0, 0, 0, 5), value=math.nan)
    longer = batch | {"hidden": hidden, "mask": pad(mask, (0, 5))}
    close(reweight(A, **longer, variant=variant)[:, :-5], found)


def plain(dtype: torch.dtype = torch.float64) -> Batch:
    """Two prompts of two rollouts, not side by side."""
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(4, 10, 6, generator=generator, dtype=torch.float64).to(dtype)
    image = torch.randn(2, 6, generator=generator, dtype=torch.float64).to(dtype)
    mask, group = torch.ones(4, 10, dtype=torch.bool), torch.tensor([0, 1, 0, 1])
    return {"hidden": hidden, "image_state": image[group], "mask": mask, "group": group}


def test_shares_of_a_length_are_whole() -> None:
    """0.29·100 is 28.999999999999996 in binary, and 29 tokens pass the gate."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(1, 100, 4, generator=generator, dtype=torch.float64)
    mask, group = torch.ones(1, 100, dtype=torch.bool), torch.tensor([0])
    batch = {"hidden": hidden, "image_state": hidden[:, 0], "mask": mask, "group": group}
    options = ("0.5", "1", "0.29")
    found, expected = (
        weights(**batch, **named(options, "paper")),
        [weights_by_hand(batch, (*options[:2], kappa), "paper") for kappa in ("0.29", "0.28")],
    )
    assert float((found - expected[0]).abs().max()) <= BOUND
    assert float((found - expected[1]).abs().max()) > 1e4 * BOUND


@pytest.mark.parametrize("variant", VARIANTS)
def test_planted_errors_are_seen(variant: Any) -> None:
    batch, usual = plain(), SETTINGS[0]
    found = weights(**batch, variant=variant)
    wrong = {
        "adjacent rows": weights_by_hand(batch, usual, variant, adjacent=True),
        "the other variant": weights_by_hand(batch, usual, *(v for v in VARIANTS if v != variant)),
        "no gate": weights_by_hand(batch, ("0.3", "1", "1"), variant),
        "no compensation": weights_by_hand(batch, ("0", "0.5", "0.2"), variant),
    }
    for name, other in wrong.items():
        assert float((found - other).abs().max()) > 1e4 * BOUND, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_to_compare_leaves_advantages_alone(variant: Any) -> None:
    batch, A = plain(), torch.tensor([1.0, -2.0, 0.0, 3.0], dtype=torch.float64)
    one_token = batch | {"mask": torch.arange(10).expand(4, 10) == 4, "group": torch.arange(4)}
    no_image = batch | {"image_state": torch.zeros(4, 6)}
    for alone in (one_token, no_image):
        mask = alone["mask"]
        assert torch.equal(reweight(A, **alone, variant=variant), A[:, None] * mask)
    empty = {name: value[:0] for name, value in batch.items()}
    assert reweight(A[:0], **empty, variant=variant).shape == (0, 10)
    short = batch | {"hidden": batch["hidden"][:, :0], "mask": batch["mask"][:, :0]}
    assert reweight(A, **short, variant=variant).shape == (4, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_and_gradients(dtype: torch.dtype) -> None:
    batch = plain(dtype)
    batch["hidden"].requires_grad_()
    found = reweight(torch.ones(4).requires_grad_(), **batch)
    assert found.dtype == torch.float32 and not found.requires_grad
    # What is left of a rounding is that of the result: all between is float64.
    expected = weights_by_hand(batch, SETTINGS[0], "paper")
    assert float((found - expected).abs().max()) <= 2 * torch.finfo(torch.float32).eps


def test_states_are_widened_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = plain()
    whole = weights(**batch)
    for chunk in (1, 2 * 60, 3 * 60):
        monkeypatch.setattr("roma.advantages.vgpo._CHUNK", chunk)
        assert torch.equal(weights(**batch), whole)


def test_wrong_input() -> None:
    batch, one = plain(), torch.ones(4)
    broken = batch["hidden"].clone()
    broken[1, 2, 0] = math.nan
    with pytest.raises(ValueError, match=r"hidden: expected finite .*, got nan .* \[1, 2\]"):
        reweight(one, **dict(batch, hidden=broken))
    with pytest.raises(ValueError, match=r"hidden: expected \[B, T, D\] = \[4, 10, D\], got"):
        reweight(one, **dict(batch, hidden=broken[:, 1:]))
    with pytest.raises(
        ValueError, match=r"image_state: expected \[B, D\] = \[4, 6\], got \[2, 6\]"
    ):
        reweight(one, **dict(batch, image_state=batch["image_state"][:2]))
    with pytest.raises(ValueError, match=r"image_state: expected finite numbers, got inf"):
        reweight(one, **dict(batch, image_state=batch["image_state"] * math.inf))
    with pytest.raises(ValueError, match="group: expected dtype int64, got int32"):
        reweight(one, **dict(batch, group=batch["group"].int()))
    for options, message in (
        ({"beta": -1.0}, "beta: expected a finite number ≥ 0"),
        ({"gamma": 0.0}, r"gamma: expected a share in \(0, 1\]"),
        ({"kappa": 1.5}, r"kappa: expected a share in \(0, 1\]"),
        ({"variant": "both"}, 'variant: expected "paper" or "code"'),
    ):
        with pytest.raises(ValueError, match=message):
            reweight(one, **batch, **options)
