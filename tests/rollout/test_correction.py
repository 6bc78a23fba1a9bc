"""The weight of a sampler's tokens: values by hand, an oracle in float64, what it is for."""

import math

import pytest
import torch
from torch import Tensor

from roma.rollout.correction import off_policy_mask, rollout_weight

HOWS = ("truncate", "mask")


def drawn(rows: int = 6, length: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """Two policies' log-probs that differ by about 0.7 nats, and a ragged mask; float64."""
    generator = torch.Generator().manual_seed(0)
    trainer = -torch.rand(rows, length, generator=generator, dtype=torch.float64) * 5
    noise = torch.randn(rows, length, generator=generator, dtype=torch.float64)
    lengths = torch.arange(rows) * 8
    return trainer, trainer - 0.7 * noise, torch.arange(length) < lengths[:, None]


def by_hand(trainer: Tensor, sampler: Tensor, mask: Tensor, how: str, cap: float) -> Tensor:
    """MATH.md section 3, token by token, with math.exp alone."""
    weight = torch.ones_like(trainer)
    for at in map(tuple, mask.nonzero().tolist()):
        ratio = math.exp(float(trainer[at]) - float(sampler[at]))
        if how == "truncate":
            weight[at] = min(ratio, cap)
        else:
            weight[at] = ratio if 1 / cap <= ratio <= cap else 0.0
    return weight


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("cap", [1.0, 2.0, 4.0])
def test_values(how: str, cap: float) -> None:
    trainer, sampler, mask = drawn()
    expected = by_hand(trainer, sampler, mask, how, cap)
    weight, _ = rollout_weight(trainer, sampler, mask, how=how, cap=cap)
    # exp of a difference of magnitude < 8: relative error of 8·eps at most, twice over.
    bound = 16 * torch.finfo(torch.float64).eps * float(expected.max())
    assert float((weight - expected).abs().max()) <= bound
    # The bound bites: a cap that is off by one part in 10⁹ is seen.
    other = by_hand(trainer, sampler, mask, "truncate", cap * (1 + 1e-9))
    if how == "truncate":
        assert float((weight - other).abs().max()) > 10 * bound
    # In fp32 the difference of two log-probs of up to 9 nats rounds by 9·eps32.
    single, _ = rollout_weight(trainer.float(), sampler.float(), mask, how="truncate", cap=cap)
    truth = by_hand(trainer, sampler, mask, "truncate", cap)
    assert single.dtype == torch.float32
    assert float((single - truth).abs().max()) <= 4 * 9 * torch.finfo(torch.float32).eps * cap


@pytest.mark.parametrize("how", HOWS)
def test_equal_log_probs_weigh_one(how: str) -> None:
    trainer, _, mask = drawn()
    weight, metrics = rollout_weight(trainer, trainer.clone(), mask, how=how, cap=1.0)
    assert torch.equal(weight, torch.ones_like(weight))
    assert set(metrics.values()) == {0.0}


def test_an_expectation_under_the_sampler_becomes_the_policys() -> None:
    """Σ_y q(y)·w(y)·f(y) = Σ_y p(y)·f(y), as long as nothing is truncated."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 50, generator=generator, dtype=torch.float64)
    policy, sampler = logits.log_softmax(-1)
    value = torch.randn(50, generator=generator, dtype=torch.float64)
    row = torch.ones(1, 50, dtype=torch.bool)
    weight, metrics = rollout_weight(policy[None], sampler[None], row, how="truncate", cap=1e6)
    plain, truth = (float((p.exp() * value).sum()) for p in (sampler, policy))
    corrected = float((sampler.exp() * weight[0] * value).sum())
    # A sum of 50 terms, each with a rounding or two: 50·eps, and values up to 3.
    assert abs(corrected - truth) <= 50 * 3 * torch.finfo(torch.float64).eps
    assert abs(plain - truth) > 1e-3 and metrics["rollout/weight_clipped_share"] == 0


@pytest.mark.parametrize("how", HOWS)
def test_masked_tokens_are_not_read(how: str) -> None:
    trainer, sampler, mask = drawn()
    weight, metrics = rollout_weight(trainer, sampler, mask, how=how, cap=2.0)
    dirty = [x.masked_fill(~mask, math.nan) for x in (trainer, sampler)]
    again, same = rollout_weight(*dirty, mask, how=how, cap=2.0)
    assert torch.equal(weight, again) and metrics == same
    assert bool((weight[~mask] == 1).all())


def test_metrics() -> None:
    """100 tokens, of which token t differs by t/10 nats; 0.99 of them are the first 99."""
    difference = torch.arange(100, dtype=torch.float64) / 10
    sampler = torch.full((1, 101), -3.0, dtype=torch.float64)
    trainer = sampler.clone()
    trainer[0, :100] += difference * torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(50)
    mask = torch.arange(101)[None] < 100
    for how, clipped in {
        # exp(t/10) > 2 from t = 7 on: with a plus sign the even ones, 8 to 98.
        "truncate": 46 / 100,
        # And below 1/2 the odd ones, 7 to 99.
        "mask": 93 / 100,
    }.items():
        _, metrics = rollout_weight(trainer, sampler, mask, how=how, cap=2.0)
        assert metrics["rollout/mismatch_mean"] == pytest.approx(4.95, rel=1e-12)
        assert metrics["rollout/mismatch_p99"] == pytest.approx(9.8, rel=1e-12)
        assert metrics["rollout/weight_clipped_share"] == clipped


def test_a_log_prob_that_is_missing_weighs_one_and_is_counted() -> None:
    trainer, sampler, mask = drawn()
    sampler[5, :4] = trainer[5, :4]
    _, metrics = rollout_weight(trainer, sampler, mask, how="mask", cap=2.0)
    clipped = metrics["rollout/weight_clipped_share"] + 4 / int(mask.sum())
    sampler[5, :4] = math.nan
    weight, metrics = rollout_weight(trainer, sampler, mask, how="mask", cap=2.0)
    assert bool((weight[5, :4] == 1).all()) and bool(weight.isfinite().all())
    assert metrics["rollout/weight_clipped_share"] == pytest.approx(clipped)
    assert math.isfinite(metrics["rollout/mismatch_mean"])
    # One of the trainer's own is an error further up, and is not hidden.
    trainer[5, 6] = math.nan
    weight, _ = rollout_weight(trainer, sampler, mask, how="truncate", cap=2.0)
    assert bool(weight[5, 6].isnan())


def test_no_token_counts() -> None:
    trainer, sampler, mask = drawn()
    weight, metrics = rollout_weight(trainer, sampler, mask & False, how="mask", cap=2.0)
    assert torch.equal(weight, torch.ones_like(weight)) and set(metrics.values()) == {0.0}


def test_extreme_differences_stay_finite_and_no_gradient_flows() -> None:
    trainer = torch.tensor([[-1e4, -1.0, 0.0]], requires_grad=True)
    sampler = torch.tensor([[-1.0, -1e4, -1e-3]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    weight, _ = rollout_weight(trainer, sampler, mask, how="truncate", cap=3.0)
    assert not weight.requires_grad
    assert weight[0].tolist() == pytest.approx([math.exp(-20), 3.0, math.exp(1e-3)], rel=1e-6)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("cap", [1.0, 2.0, 50.0])
def test_a_weight_for_each_sequence(how: str, cap: float) -> None:
    trainer, sampler, mask = drawn()
    sampler[4, 3:9] = math.nan
    trainer[5, :30] += 4  # a sum beyond the clamp at 20
    weight, metrics = rollout_weight(trainer, sampler, mask, how=how, cap=cap, level="sequence")
    assert weight.shape == (6,) and weight.dtype == torch.float64
    clipped = 0
    for i in range(6):
        known = [t for t in range(40) if mask[i, t] and not bool(sampler[i, t].isnan())]
        total = math.fsum(float(trainer[i, t] - sampler[i, t]) for t in known)
        ratio = math.exp(min(max(total, -20.0), 20.0))
        inside = ratio <= cap and (how == "truncate" or ratio >= 1 / cap)
        clipped += int(mask[i].sum()) - (len(known) if inside else 0)
        expected = ratio if inside else cap if how == "truncate" else 0.0
        # exp of a sum of 40 differences of up to 9: each off by an eps of it.
        assert float(weight[i]) == pytest.approx(expected, rel=40 * 9 * 2.3e-16)
    assert float(weight[0]) == 1  # no token
    assert metrics["rollout/weight_clipped_share"] == clipped / int(mask.sum())
    by_token = rollout_weight(trainer, sampler, mask, how=how, cap=cap)[1]
    for name in ("rollout/mismatch_mean", "rollout/mismatch_p99"):
        assert metrics[name] == by_token[name]


def test_a_sequence_of_one_token_is_that_token() -> None:
    trainer, sampler, mask = drawn()
    alone = mask & (torch.arange(40) == 2)
    for how in HOWS:
        options = {"how": how, "cap": 2.0}
        token = rollout_weight(trainer, sampler, alone, **options)[0]  # type: ignore[arg-type]
        whole = rollout_weight(trainer, sampler, alone, level="sequence", **options)[0]  # type: ignore[arg-type]
        assert torch.equal(whole, token[:, 2])


def test_bad_rollouts_of_another_policy_are_left_out() -> None:
    trainer, sampler, mask = drawn()
    advantages = torch.tensor([-1.0, 0.0, -0.5, 2.0, -1.0, -1e-9])
    sampler[4, :5] = math.nan
    mean = [
        [float(s - p) for p, s, on in zip(*rows, strict=True) if on and not math.isnan(float(s))]
        for rows in zip(trainer, sampler, mask, strict=True)
    ]
    mean = [math.fsum(own) / len(own) if own else -math.inf for own in mean]
    kept = set()
    for threshold in (-0.5, *(own - 1e-9 for own in mean[1:]), *(own + 1e-9 for own in mean[1:])):
        found = off_policy_mask(advantages, trainer, sampler, mask, threshold=threshold)
        pairs = zip(advantages.tolist(), mean, strict=True)
        expected = [float(not (A < 0 and own > threshold)) for A, own in pairs]
        assert found.dtype == torch.float32 and found.tolist() == expected
        dirty = [x.masked_fill(~mask, math.nan) for x in (trainer, sampler)]
        again = off_policy_mask(advantages, *dirty, mask, threshold=threshold)
        assert torch.equal(again, found)
        kept.add(tuple(expected))
    assert len(kept) > 3
    # The sign of the difference matters: a policy that has come nearer is kept.
    nearer, row = torch.full((1, 4), -1.0), torch.ones(1, 4, dtype=torch.bool)
    for logp, sampled, expected in ((nearer, nearer * 3, 1), (nearer * 3, nearer, 0)):
        assert int(off_policy_mask(-row[:, 0].float(), logp, sampled, row, threshold=1)) == expected
    # No token, or none that the sampler knows, is no evidence.
    unknown = torch.full_like(nearer, math.nan)
    for given in (row & False, row):
        assert int(off_policy_mask(-row[:, 0].float(), nearer, unknown, given, threshold=-9)) == 1


def test_errors_of_the_mask() -> None:
    logp, mask, one = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), torch.ones(2)
    with pytest.raises(ValueError, match=r"advantages: expected floating point \[B\] = \[2\], got"):
        off_policy_mask(logp, logp, logp, mask, threshold=1.0)
    with pytest.raises(ValueError, match="threshold: expected a finite number of nats, got nan"):
        off_policy_mask(one, logp, logp, mask, threshold=math.nan)
    with pytest.raises(ValueError, match=r"logp_sampler: expected \[2, 3\], as logp, got \[2, 4\]"):
        off_policy_mask(one, logp, torch.zeros(2, 4), mask, threshold=1.0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"logp_trainer": torch.zeros(3)}, r"logp_trainer: expected \[B, T\], got \[3\]"),
        ({"logp_sampler": torch.zeros(2, 4)}, r"logp_sampler: expected \[2, 3\], .* got \[2, 4\]"),
        ({"mask": torch.ones(2, dtype=torch.bool)}, r"mask: expected \[2, 3\].* got \[2\]"),
        ({"mask": torch.ones(2, 3)}, r"mask: expected bool, got torch.float32"),
        ({"logp_sampler": torch.zeros(2, 3).long()}, "logp_sampler: expected floating point"),
        ({"how": "clip"}, """how: expected "truncate" or "mask", got 'clip'"""),
        ({"cap": 0.5}, "cap: expected at least 1, got 0.5"),
        ({"cap": math.nan}, "cap: expected at least 1, got nan"),
        ({"level": "batch"}, """level: expected "token" or "sequence", got 'batch'"""),
    ],
)
def test_errors(changed: dict[str, object], message: str) -> None:
    given = {
        "logp_trainer": torch.zeros(2, 3),
        "logp_sampler": torch.zeros(2, 3),
        "mask": torch.ones(2, 3, dtype=torch.bool),
        "how": "truncate",
        "cap": 2.0,
    }
    with pytest.raises(ValueError, match=message):
        rollout_weight(**(given | changed))  # type: ignore[arg-type]
