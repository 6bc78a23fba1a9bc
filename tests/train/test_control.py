"""What moves from step to step: λ_inv towards its target, and the bound of the legibility gate."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import small_model
from support.engine_run import run_config, trainer_of, weights
from support.small_run import config
from support.update_ranks import CUTS, batch_of

from roma.train.batch import Totals
from roma.train.config import load_config
from roma.train.config.losses import ControlConfig
from roma.train.control import DECAY, Gate, LambdaControl
from roma.train.gradients import squared_norms
from roma.train.scoring import Scorer
from roma.train.trainer import Trainer
from roma.train.update import PolicyLoss
from roma_kernels.roma_loss.config import RomaConfig

RUN = ("data.train_files=d", "worker.actor.model_path=m")
PENALTY = ("algorithm.control.target=penalty", "algorithm.control.value=1e-4")
SHARE = ("algorithm.control.target=gradient_share", "algorithm.control.value=0.3")
FAST = "algorithm.control.rate=0.5"


@given(
    start=st.sampled_from([1e-2, 1.0, 30.0]),
    target=st.sampled_from([0.005, 0.02, 0.2]),
    power=st.sampled_from([0.3, 1.0]),
)
def test_a_penalty_comes_to_its_target(start: float, target: float, power: float) -> None:
    """A penalty that falls as a power of λ: one step shrinks what is left by rate · power."""
    options = ControlConfig(target="penalty", value=target, rate=0.2, low=1e-6, high=1e6)
    control = LambdaControl(options, start)
    for step in range(1, 700):
        control.on_penalty(step, 0.05 * control.value**-power)
    assert 0.05 * control.value**-power == pytest.approx(target, rel=1e-3)


@given(
    start=st.sampled_from([1e-3, 1.0, 50.0]),
    target=st.sampled_from([0.1, 0.5, 0.9]),
    size=st.sampled_from([1e-3, 1.0]),
)
def test_a_share_comes_to_its_target(start: float, target: float, size: float) -> None:
    options = ControlConfig(target="gradient_share", value=target, rate=0.5, low=1e-9, high=1e9)
    control = LambdaControl(options, start)
    for step in range(1, 60):
        control.on_norms(step, control.value * size, 1.0)
    share = control.value * size / (control.value * size + 1)
    assert share == pytest.approx(target, rel=1e-4)


def test_a_share_of_rate_one_takes_one_step() -> None:
    options = ControlConfig(target="gradient_share", value=0.5, rate=1.0)
    control = LambdaControl(options, 1.0)
    control.on_norms(1, 0.5, 1.0)
    assert control.value == pytest.approx(2.0)


def test_what_shows_nothing_moves_nothing() -> None:
    """No right rollout, no gradient on one side, no number; a step in between; an option off."""
    penalty = LambdaControl(ControlConfig(target="penalty", value=0.1, every=3), 2.0)
    for step, found in ((1, 5.0), (2, 5.0), (3, None), (3, math.nan), (4, 5.0)):
        penalty.on_penalty(step, found)
    penalty.on_norms(3, 1.0, 1.0)
    assert penalty.value == 2.0 and not penalty.measures(3)
    share = LambdaControl(ControlConfig(target="gradient_share", value=0.1, every=2), 2.0)
    assert [share.measures(step) for step in (1, 2, 3, 4)] == [False, True, False, True]
    for step, norms in ((2, (0.0, 1.0)), (2, (1.0, 0.0)), (1, (1.0, 1.0)), (2, (math.nan, 1.0))):
        share.on_norms(step, *norms)
    share.on_penalty(2, 5.0)
    assert share.value == 2.0
    off = LambdaControl(ControlConfig(), 2.0)
    off.on_penalty(1, 5.0)
    off.on_norms(1, 5.0, 1.0)
    assert off.value == 2.0 and not off.on and off.state_dict() == {}


def test_lambda_moves_by_the_rate_at_most_and_stays_in_its_bounds() -> None:
    options = ControlConfig(target="penalty", value=0.01, rate=0.5, low=0.1, high=10.0)
    control = LambdaControl(options, 1.0)
    control.on_penalty(1, 1e6)
    assert control.value == pytest.approx(math.exp(0.5))
    for step in range(2, 20):
        control.on_penalty(step, 1e6)
    assert control.value == 10.0
    for step in range(20, 60):
        control.on_penalty(step, 0.0)
    assert control.value == 0.1
    control.load_state_dict({"lambda_inv": 99.0})  # of a run with wider bounds
    assert control.value == 10.0


@given(
    seed=st.integers(0, 99), quantile=st.sampled_from([0.0, 0.3, 0.9, 1.0]), steps=st.integers(1, 4)
)
def test_the_gate_runs_after_the_quantiles(seed: int, quantile: float, steps: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gate, expected = Gate(quantile), None
    for _ in range(steps):
        found = torch.rand(3, 5, generator=generator, dtype=torch.float64)
        found[torch.rand(3, 5, generator=generator) < 0.3] = math.nan
        gate.observe(found)
        gate.observe(torch.full((3, 5), math.nan))  # a step without a right rollout
        own = float(torch.quantile(found[~found.isnan()], quantile))
        expected = own if expected is None else DECAY * expected + (1 - DECAY) * own
        assert gate.bound == pytest.approx(expected, rel=1e-12)
    again = Gate(quantile)
    again.load_state_dict(gate.state_dict())
    assert again.bound == gate.bound


def test_norms_are_those_of_the_two_losses() -> None:
    """λ_inv·L_inv and the rest, by autograd through all logits, in float64."""
    policy = small_model.policy().double()
    made = batch_of(policy, CUTS["right_on_one"], 2)
    pixels = [pixels.double() for pixels in made.view_pixels]
    prompts = replace(made.prompts, pixel_values=made.prompts.pixel_values.double())
    batch = replace(made, view_pixels=pixels, prompts=prompts, advantages=made.advantages.double())
    batch = replace(batch, old_logp=batch.mask.double() - 4.0)
    config, totals = RomaConfig(lambda_inv=torch.tensor(3.0), lambda_aux=0.7), Totals(40, 99, 30)
    with torch.no_grad():
        states = torch.stack(Scorer(policy, config)._padded(batch))
    leaf = states.requires_grad_()
    logits = torch.log_softmax(leaf @ policy.head_weight.detach().T, -1)
    clean, *views = logits.gather(-1, batch.tokens[None, ..., None].expand(3, -1, -1, 1))[..., 0]
    on, length = batch.mask, batch.mask.sum(-1).clamp(min=1)

    def clipped(logp: torch.Tensor) -> torch.Tensor:
        ratio, gain = (logp - batch.old_logp).exp(), batch.advantages[:, None]
        loss = -torch.minimum(ratio * gain, ratio.clamp(0.8, 1.3) * gain)
        loss = torch.where(gain < 0, torch.minimum(loss, -3 * gain), loss)
        return ((loss * on).sum(-1) / length).sum() / totals.sequences

    apart = [torch.expm1(a - clean.detach()) - (a - clean.detach()) for a in views]
    worst = torch.stack([(d * on).sum(-1) / length for d in apart]).amax(0)
    inv = 3.0 * (batch.correct * worst).sum() / totals.sequences
    sampled = torch.stack(views)[batch.aux_view, torch.arange(len(on))]
    rest = clipped(clean) + 0.7 * clipped(sampled)
    truth = [
        float(torch.autograd.grad(x, leaf, retain_graph=True)[0][:, on].norm())
        for x in (inv, rest)
    ]  # fmt: skip
    for form in (
        {"update": "joint", "share_prompt": False},
        {"update": "lean"},
        {"update": "two_pass"},
    ):
        policy_loss = PolicyLoss(policy, config, **form)
        before = policy_loss(batch, totals)
        policy_loss.measures = True
        out = policy_loss(batch, totals)
        assert torch.equal(out.loss, before.loss)
        found = [math.sqrt(out.metrics.pop(f"grad_sq_{term}")) for term in ("inv", "rest")]
        assert out.metrics.keys() == before.metrics.keys()
        assert found == pytest.approx(truth, rel=1e-7)
        # A planted error: λ_inv left out, and terms exchanged.
        assert found != pytest.approx([truth[0] / 3, truth[1]], rel=1e-2)
        assert found != pytest.approx(truth[::-1], rel=1e-2)
    assert all(weight.grad is None for weight in policy.parameters())


def test_norms_need_no_gradient_of_the_weight() -> None:
    hidden = torch.randn(4, 8, requires_grad=True)
    views, weight = torch.randn(1, 4, 8), torch.nn.Parameter(torch.randn(20, 8))
    given: dict[str, Any] = {
        "mask": torch.ones(4, dtype=torch.bool),
        "advantages": torch.ones(1),
        "correct": torch.ones(1, dtype=torch.bool),
        "cu_seqlens": torch.tensor([0, 4], dtype=torch.int32),
        "ref_logp": torch.full((4,), -3.0),
    }
    config = RomaConfig(ref_coef=0.1, ref_unbiased=True, entropy_coef=0.1, lambda_aux=0.0)
    with torch.no_grad():
        found = squared_norms(hidden, views, weight, torch.arange(4), config=config, **given)
    assert found["inv"] > 0 and found["rest"] > 0
    assert weight.grad is None and hidden.grad is None


def run(out: Path, *options: str) -> tuple[Trainer, list[dict[str, float]]]:
    trainer = trainer_of(run_config(out, "trainer.total_steps=4", *options))
    lines: list[dict[str, float]] = []
    trainer.fit(lambda _, metrics: lines.append(dict(metrics)))
    return trainer, lines


@pytest.mark.parametrize(
    "options",
    [(*PENALTY, FAST), (*SHARE, FAST), ("algorithm.views.gate_quantile=0.7",)],
    ids=["penalty", "gradient_share", "gate"],
)
def test_a_run_moves_it_and_a_resumed_run_goes_on_to_the_bit(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    whole, lines = run(tmp_path / "whole", *options, "trainer.save_freq=2")
    start = f"trainer.resume={tmp_path / 'whole' / 'global_step_2'}"
    resumed, rest = run(tmp_path / "resumed", *options, start)
    assert whole.learner.state_dict() == resumed.learner.state_dict() != {}
    want, found = weights(whole), weights(resumed)
    assert all(torch.equal(found[name], weight) for name, weight in want.items())
    name = "actor/roma_gate_bound" if "gate" in options[0] else "actor/lambda_inv"
    values = [line[name] for line in lines if name in line]
    assert [line[name] for line in rest] == values[-2:] and len(set(values)) == len(values)
    if "gate" in options[0]:
        assert name not in lines[0] and lines[0]["actor/roma_gated"] == 0
        assert any(line["actor/roma_gated"] > 0 for line in lines[1:])
        return
    assert values[0] == 1.0
    assert isinstance(whole.engine.policy_loss.config.lambda_inv, torch.Tensor)
    if "penalty" in options[0]:  # from λ and D of a step the next λ
        for line, after in zip(lines, values[1:], strict=False):
            off = line["actor/roma_penalty_right"] / 1e-4 - 1
            factor = math.exp(0.5 * min(max(off, -1), 1))
            assert after == pytest.approx(line[name] * factor, rel=1e-12)
    else:
        for line, after in zip(lines, values[1:], strict=False):
            share = line["actor/gradient_share"]
            inv, rest_norm = (line[f"actor/grad_norm/{term}"] for term in ("inv", "rest"))
            assert share == pytest.approx(inv / (inv + rest_norm))
            off = math.log(0.3 / 0.7) - math.log(share / (1 - share))
            factor = math.exp(0.5 * min(max(off, -1), 1))
            assert after == pytest.approx(line[name] * factor, rel=1e-9)


def test_rollouts_without_a_view_left_are_no_penalty_of_0(tmp_path: Path) -> None:
    """Counted as 0 they would lower λ_inv, and a lower λ_inv would leave more of them."""
    one = (*PENALTY, "trainer.total_steps=1")
    found: list[torch.Tensor] = []
    plain = Trainer(config(tmp_path / "plain", *one))
    plain.learner.gate.observe = found.append  # type: ignore[method-assign]
    plain.fit()
    bound = float(found[0].amin(0).nanmedian())  # NaN: not a right rollout's
    gated = Trainer(config(tmp_path / "gated", *one, f"algorithm.roma.gate_bound={bound}"))
    lines: list[dict[str, float]] = []
    gated.fit(lambda _, metrics: lines.append(dict(metrics)))
    worst = found[0].masked_fill(~(found[0] <= bound), -math.inf).amax(0)
    left = worst[worst.isfinite()]
    assert 0 < len(left) < len(worst) - int(found[0].isnan().any(0).sum())
    assert lines[0]["actor/roma_penalty_right"] == pytest.approx(float(left.mean()), rel=1e-4)
    out = torch.tensor([[2 * bound, math.nan]] * 2)
    nothing = gated.learner._penalty_of_right({"roma_penalty_worst": 0.0}, Totals(2, 9, 1), out)
    assert nothing == {}


def test_off_is_as_before(tmp_path: Path) -> None:
    """The loss has the configuration's own options, numbers where they were numbers."""
    trainer, lines = run(tmp_path / "off", "trainer.total_steps=1")
    assert trainer.engine.policy_loss.config is trainer.config.algorithm.roma
    assert trainer.learner.state_dict() == {}
    none = ("lambda", "gate", "share", "grad_norm/", "penalty_right", "entropy", "contrast")
    assert not any(part in name for name in lines[0] for part in none if name.startswith("actor"))


VLLM = "worker.rollout.name=vllm"
SLIPS = {  # options of `algorithm`, or of `worker`
    "papo.coef=0.1": "papo.coef: expected 0.01 without algorithm.view_mode=papo",
    "dvrp.cap=1 view_mode=papo": "dvrp.cap: expected 10.0 without algorithm.view_mode=dvrp",
    "control.rate=0.5": "control.rate: expected 0.1 without algorithm.control.target",
    "control.value=0.5": "control.value: expected null without algorithm.control.target",
    "control.target=penalty": "control.value: expected a number with target=penalty",
    "control.target=gradient_share control.value=1": "control.value: expected less than 1",
    "control.target=penalty control.value=1 view_mode=none": "control.target: expected none with",
    "control.target=penalty control.value=1 roma.lambda_inv=0": "roma.lambda_inv: expected within",
    "control.target=penalty control.value=1 roma.gate_tau=1": "roma.gate_tau: expected null with",
    "worker.actor.update=two_pass view_mode=dvrp": "worker.actor.update: expected auto, joint or",
    "roma.gate_tau=1 view_mode=none": "roma.gate_tau: expected null without a penalty",
    "views.gate_quantile=0.9 roma.lambda_inv=0": "views.gate_quantile: expected null without a",
    "views.gate_quantile=0.9 roma.gate_bound=1": "roma.gate_bound: expected null with views.gate",
    "views.gate_quantile=0.9 roma.worst_over=token": "roma.worst_over: expected sequence with",
    "penalised=every view_mode=none": "penalised: expected right without a penalty",
    "penalised=every roma.lambda_inv=0": "penalised: expected right without a penalty",
    "penalised=all": "penalised: expected one of right, every, got",
    "roma.aggregation=bnpo": "roma.aggregation: expected grpo, dapo, dr_grpo or luspo, got",
    "worker.rollout.weight_level=sequence": "worker.rollout.weight_level: expected token with",
    "worker.rollout.weight=mask": "worker.rollout.weight: expected none with worker.rollout.name",
    "worker.rollout.off_policy=1": "worker.rollout.off_policy: expected null with worker.rollout.n",
    f"{VLLM} worker.rollout.weight_level=sequence worker.rollout.weight=truncate roma.main=vespo": (
        "worker.rollout.weight_level: expected token with algorithm.roma.main=vespo"
    ),
    f"{VLLM} worker.rollout.off_policy=1 view_mode=noisy_rollout": (
        "worker.rollout.off_policy: expected null with algorithm.view_mode=noisy_rollout"
    ),
    f"{VLLM} worker.rollout.weight=mask roma.main=vespo": (
        "worker.rollout.weight: expected none or truncate with algorithm.roma.main=vespo"
    ),
    "roma.main=null view_mode=papo": "roma.main: expected grpo, cispo, sapo or vespo with",
    "view_mode=papo papo.probability=0": "papo.probability: expected a number > 0",
    "roma.main=cispo": "roma.clip_high: expected a number ≥ 1",
    "roma.ref_unbiased=true": "roma.ref_unbiased: expected False",
}


def named(options: str) -> list[str]:
    return [o if o.startswith("worker") else f"algorithm.{o}" for o in options.split()]


@pytest.mark.parametrize("options", SLIPS)
def test_what_does_not_go_together_names_key_and_remedy(options: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_config(None, [*RUN, *named(options)])
    said = str(caught.value)
    assert SLIPS[options] in said and "\n" not in said and ";" in said


def test_what_goes_together() -> None:
    papo = ("algorithm.view_mode=papo", "algorithm.papo.cap=0.2")
    vespo = ("algorithm.roma.main=vespo", "worker.rollout.weight=truncate", VLLM)
    for options in (PENALTY, SHARE, papo, vespo):
        load_config(None, [*RUN, *options])
    config = load_config(None, [*RUN, *vespo, "algorithm.roma.vespo=[1, 2, 2, 1]"])
    assert config.algorithm.roma.vespo == (1.0, 2.0, 2.0, 1.0)
