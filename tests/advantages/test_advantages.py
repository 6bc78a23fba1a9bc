"""Advantages against their definitions, one group at a time in float64; what an estimator gets."""

import statistics
from typing import get_args, get_type_hints

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from roma.advantages import ESTIMATORS, AdvantageInputs, Estimator, dr_grpo, grpo, rloo
from roma.train.config.sections import AlgorithmConfig

FUNCTIONS = {"grpo": grpo, "dr_grpo": dr_grpo, "rloo": rloo}


def by_hand(name: str, rewards: list[float]) -> list[float]:
    """MATH.md section 3 for one group, in Python floats."""
    mean, count = statistics.fmean(rewards), len(rewards)
    if name == "rloo":
        return [r - (sum(rewards) - r) / (count - 1) for r in rewards]
    if count == 1 or len(set(rewards)) == 1:
        return [0.0] * count
    scale = statistics.stdev(rewards) + 1e-6 if name == "grpo" else 1.0
    return [(r - mean) / scale for r in rewards]


@st.composite
def batches(draw: st.DrawFn, least: int = 1) -> tuple[Tensor, Tensor]:
    """Rewards and groups of mixed sizes, in a random order, with ids that are no positions."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    sizes = draw(st.lists(st.integers(least, 6), min_size=1, max_size=5))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    ids = torch.tensor([7, -3, 10**12, 0, 5])[: len(sizes)]
    groups = ids.repeat_interleave(torch.tensor(sizes))
    rewards = torch.rand(len(groups), generator=generator, dtype=dtype)
    if draw(st.sampled_from(["mixed", "zero_one", "all_equal"])) != "mixed":
        rewards = (rewards > 0.5).to(dtype) * 0.9
    order = torch.randperm(len(groups), generator=generator)
    return rewards[order], groups[order]


@given(st.sampled_from(sorted(FUNCTIONS)), st.data())
def test_definition(name: str, data: st.DataObject) -> None:
    rewards, groups = data.draw(batches(least=2 if name == "rloo" else 1))
    advantages = FUNCTIONS[name](rewards, groups)
    assert advantages.dtype == rewards.dtype and advantages.shape == rewards.shape
    for group in groups.unique():
        expected = by_hand(name, rewards[groups == group].double().tolist())
        # one rounding to the dtype, and the last digits of float64 sums (times 1/std)
        torch.testing.assert_close(
            advantages[groups == group].double(),
            torch.tensor(expected, dtype=torch.float64),
            rtol=torch.finfo(rewards.dtype).eps,
            atol=1e-9,
        )


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
@pytest.mark.parametrize("value", [0.0, 0.1, 0.9, 1 / 3, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_exactly_zero(name: str, value: float, dtype: torch.dtype) -> None:
    # 0.1 in fp64, summed and divided, does not come back as 0.1 for every count.
    for count in range(2, 30):
        rewards = torch.full((count,), value, dtype=dtype)
        advantages = FUNCTIONS[name](rewards, torch.zeros(count, dtype=torch.int64))
        assert torch.equal(advantages, torch.zeros_like(rewards))


def test_group_of_one() -> None:
    rewards, groups = torch.tensor([0.3, 1.0, 0.0]), torch.tensor([4, 9, 9])
    assert grpo(rewards, groups)[0] == 0 and dr_grpo(rewards, groups)[0] == 0
    with pytest.raises(ValueError, match="at least 2 sequences per group, got 1 in group 4"):
        rloo(rewards, groups)


@given(batches(least=2), st.sampled_from([0.5, 3.0]), st.sampled_from([-1.0, 2.0]))
def test_shift_and_scale(batch: tuple[Tensor, Tensor], scale: float, shift: float) -> None:
    rewards, groups = batch[0].double(), batch[1]
    changed = rewards * scale + shift
    for name, power in (("dr_grpo", 1), ("rloo", 1)):
        expected = FUNCTIONS[name](rewards, groups) * scale**power
        found = FUNCTIONS[name](changed, groups)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    # ε is in units of the reward. Rewards of 2^-24 apart, shifted by 2, keep 3e-8 of a difference.
    scaled = grpo(changed, groups, eps=1e-6 * scale)
    torch.testing.assert_close(scaled, grpo(rewards, groups, eps=1e-6), rtol=1e-7, atol=1e-9)


def test_empty_batch() -> None:
    empty = torch.zeros(0)
    assert grpo(empty, torch.zeros(0, dtype=torch.int64)).shape == (0,)


def test_wrong_input() -> None:
    rewards, groups = torch.ones(4), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"rewards: expected finite numbers, got nan at index 2"):
        grpo(torch.tensor([0.0, 1.0, float("nan"), 1.0]), groups)
    with pytest.raises(ValueError, match=r"group: expected \[B\] = \[4\], got \[3\]"):
        grpo(rewards, groups[:3])
    with pytest.raises(ValueError, match=r"rewards: expected \[B\], got \[2, 2\]"):
        grpo(rewards.view(2, 2), groups)
    with pytest.raises(ValueError, match="group: expected dtype int64, got float32"):
        grpo(rewards, groups.float())
    with pytest.raises(ValueError, match="rewards: expected dtype float32 or float64, got int64"):
        grpo(groups, groups)
    with pytest.raises(ValueError, match="eps: expected a positive number"):
        grpo(rewards, groups, eps=0.0)
    with pytest.raises(TypeError, match="rewards: expected a tensor, got list"):
        grpo([1.0], groups)  # type: ignore[arg-type]


def inputs(**optional: Tensor) -> AdvantageInputs:
    """Two groups of two."""
    rewards, group = torch.tensor([1.0, 0.0, 0.9, 0.1]), torch.tensor([0, 0, 1, 1])
    return AdvantageInputs(rewards, group, torch.ones(4, 3, dtype=torch.bool), **optional)


def test_the_registry_holds_the_functions() -> None:
    assert ESTIMATORS.keys() == FUNCTIONS.keys()
    for name, function in FUNCTIONS.items():
        assert not ESTIMATORS[name].needs
        given = inputs()
        assert torch.equal(ESTIMATORS[name](given), function(given.rewards, given.group))


def test_the_configuration_offers_the_registry() -> None:
    choices = get_type_hints(AlgorithmConfig)["adv_estimator"]
    assert set(get_args(choices)) == {*ESTIMATORS, "mssr"}  # which reads a tracker, too


def test_an_estimator_gets_what_it_needs() -> None:
    def shaped(given: AdvantageInputs) -> Tensor:
        assert given.entropy is not None
        return grpo(given.rewards, given.group)[:, None] + given.entropy

    estimator = Estimator(shaped, frozenset({"entropy"}))
    assert estimator(inputs(entropy=torch.ones(4, 3))).shape == (4, 3)
    with pytest.raises(ValueError, match=r"AdvantageInputs\.entropy: expected a tensor, got None"):
        estimator(inputs(logp=torch.ones(4, 3)))
