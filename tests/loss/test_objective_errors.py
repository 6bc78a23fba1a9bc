"""Objectives, weights, entropies and gates that do not fit are refused, with the remedy."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.refusals import DTYPE_ERRORS, SPEC, B, T, logp_call, refuse, whole_call

from roma import RomaConfig
from roma.testing import compare_logp
from roma.testing.strategies import LossSpec

VESPO = RomaConfig(main="vespo", ref_coef=0.1, aux_old="view")


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("ratio_level", "sentence"),
        ("ref_unbiased", 1),
        ("entropy_coef", -0.1),
        ("entropy_coef", math.inf),
        ("sapo_temperature", (1.0, 0.0)),
        ("sapo_temperature", (1.0,)),
        ("sapo_temperature", 1.0),
        ("sapo_temperature", "ab"),
        ("vespo", (2.0, 3.0, 3.0)),
        ("vespo", (2.0, -3.0, 3.0, 2.0)),
        ("vespo", (2.0, 3.0, 3.0, math.nan)),
        ("gate_bound", -1.0),
        ("gate_bound", math.nan),
        ("gate_tau", 0.0),
    ],
)
def test_values(name: str, wrong: Any) -> None:
    with refuse(f"RomaConfig.{name}", str(wrong)):
        RomaConfig(**{name: wrong})


@pytest.mark.parametrize(
    ("name", "parts", "options"),
    [
        ("clip_high", ("largest ratio itself", "0.3"), {"main": "cispo"}),
        ("ratio_level", ("vespo",), {"main": "vespo", "ratio_level": "sequence"}),
        ("ref_unbiased", ("ref_coef",), {"ref_unbiased": True}),
        ("entropy_coef", ("main is None",), {"main": None, "entropy_coef": 0.1}),
        ("gate_bound", ("worst_over",), {"gate_bound": 1.0, "worst_over": "token"}),
        ("gate_tau", ("worst_over",), {"gate_tau": 1.0, "worst_over": "mean"}),
        ("gate_bound", ("dtype",), {"gate_bound": torch.tensor(1)}),
        ("vespo", ("φ(w)",), {"vespo": (50.0, 0.1, 3.0, 2.0)}),
    ],
)
def test_combinations(name: str, parts: tuple[str, ...], options: dict[str, Any]) -> None:
    """An option that does not apply is refused where it is set."""
    if name == "gate_bound" and "dtype" in parts:
        parts = ("torch.int64",)
    with refuse(f"RomaConfig.{name}", *parts):
        RomaConfig(**options)


def test_options_become_pythons() -> None:
    """Lists of a YAML file, and whole numbers; the encoded options say the same."""
    config = RomaConfig(sapo_temperature=[1, 2], vespo=[2, 3, 3, 2])  # type: ignore[arg-type]
    assert config.sapo_temperature == (1.0, 2.0) and config.vespo == (2.0, 3.0, 3.0, 2.0)


@pytest.mark.parametrize("call", [whole_call, logp_call])
def test_rollout_weight(call: Any) -> None:
    """Shapes, dtype and values; on positions that do not count anything goes."""
    for wrong in (torch.ones(T, B), torch.ones(B + 1), torch.ones(())):
        with refuse("rollout_weight"):
            call("torch", rollout_weight=wrong)
    with refuse("rollout_weight", "int64", kind=DTYPE_ERRORS):
        call("torch", rollout_weight=torch.ones(B, dtype=torch.int64))
    for bad in (math.nan, math.inf, -0.5):
        case = SPEC.make() if call is whole_call else SPEC.make_logp()
        weight = torch.ones(B, T)
        masked, counted = (~case["mask"]).nonzero()[0], case["mask"].nonzero()[0]
        weight[tuple(masked)] = bad
        call("torch", rollout_weight=weight)
        weight[tuple(counted)] = bad
        with refuse("rollout_weight", str(bad)):
            call("torch", rollout_weight=weight)


def test_vespo_takes_weights_by_token() -> None:
    """It multiplies them itself; one a sequence would be counted once a token, or not at all."""
    for call in (whole_call, logp_call):
        with refuse("rollout_weight", "vespo", "by token"):
            call("torch", config=VESPO, rollout_weight=torch.ones(B))
        call("torch", config=VESPO, rollout_weight=torch.ones(B, T))


def test_entropy() -> None:
    """Needed by the bonus, in the dtype of the log-probs, and refused without one."""
    bonus = RomaConfig(entropy_coef=0.1, ref_coef=0.1, aux_old="view")
    with refuse("entropy", "None", "entropy_coef"):
        logp_call("torch", config=bonus)
    with refuse("entropy", "entropy_coef = 0"):
        logp_call("torch", entropy=torch.ones(B, T))
    with refuse("entropy"):
        logp_call("torch", config=bonus, entropy=torch.ones(B))
    with refuse("entropy", "float64", kind=DTYPE_ERRORS):
        logp_call("torch", config=bonus, entropy=torch.ones(B, T).double())
    whole_call("torch", config=bonus)


def test_a_negative_bound_as_a_tensor() -> None:
    case = LossSpec().make_logp()
    for wrong in (-1.0, math.nan):
        config = RomaConfig(gate_bound=torch.tensor(wrong))
        with refuse("RomaConfig.gate_bound", str(wrong).removesuffix(".0")):
            compare_logp.call(case | {"config": config}, "torch")
