"""NoisyRollout's schedule against its published form."""

import math

import pytest

from roma.advantages.noisy_rollout import noise_share


def test_the_published_schedule() -> None:
    shares = [noise_share(step, 60, steepness=30, midpoint=40) for step in range(61)]
    for step, share in enumerate(shares):
        expected = 1 - 1 / (1 + math.exp(-30 * (step - 40) / 60))
        # 1 − a loses what it is near to.
        assert share == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert shares == sorted(shares, reverse=True) and shares[40] == 0.5
    assert noise_share(38, 60, midpoint=40) == pytest.approx(1 - shares[42], rel=1e-12)


def test_extreme_steps_stay_numbers() -> None:
    assert noise_share(0, 10, steepness=1e6, midpoint=5) == 1
    assert noise_share(10, 10, steepness=1e6, midpoint=5) == 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"total_steps": 0}, "total_steps: expected a finite number > 0, got 0"),
        ({"steepness": -1.0}, "steepness: expected a finite number > 0"),
        ({"midpoint": math.nan}, "midpoint: expected a finite number, got nan"),
        ({"step": math.inf}, "step: expected a finite number, got inf"),
    ],
)
def test_wrong_input(changed: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        noise_share(**{"step": 1, "total_steps": 60, "midpoint": 40} | changed)
