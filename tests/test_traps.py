"""FIELD.md's ten traps, each of which has bitten a known project.

Every test holds the back end to the rule and then shows that it would have noticed: the faulty form stands in the test,
small and in plain PyTorch, and the same comparison must refuse it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import oracle
import pytest
import strategies
import test_linear_logprob
import test_roma_loss
import test_view_loss
import tolerance
import torch
from counting import Watch
from strategies import HeadSpec, LossSpec
from torch import Tensor

import roma
from roma import RomaConfig


def score(inputs: dict[str, Any], backend: str, **changes: Any) -> Any:
    """linear_logprob on the inputs of a HeadSpec."""
    return roma.linear_logprob(**(inputs | changes), backend=backend)


def truth(inputs: dict[str, Any], dtype: torch.dtype = torch.float64) -> oracle.Head:
    """The oracle on the same inputs, whose rows have one leading dimension."""
    return oracle.head(**inputs, dtype=dtype)


def row_noise(inputs: dict[str, Any], want: oracle.Head) -> Tensor:
    return tolerance.logp_noise(want, inputs["hidden"], inputs["weight"], 1.0, inputs["hidden"].dtype)


def hold(inputs: dict[str, Any], backend: str, faulty: dict[str, Tensor]) -> None:
    """The back end's logp and lse pass; each faulty one named in `faulty` is refused."""
    want, eager = truth(inputs), truth(inputs, torch.float32)
    got = score(inputs, backend)
    how = {"dtype": torch.float32, "noise": row_noise(inputs, want)}
    for name in ("logp", "lse"):
        tolerance.check(name, getattr(got, name), getattr(want, name), getattr(eager, name), **how)
    for name, wrong in faulty.items():
        assert tolerance.refuses(name, wrong, getattr(want, name), getattr(eager, name), **how), f"faulty {name} passed"


# ---- 1: the ragged tail of the vocabulary -------------------------------------------------------------------------------


@pytest.mark.parametrize("v", [1, 2, 127, 129, 255, 257, 1023, 2049])
def test_1_padded_lanes_do_not_count(v: int, backend: str) -> None:
    """V just off a multiple of a block, all logits far below 0, so that one lane of exp(0) would own the sum."""
    inputs = HeadSpec(shape=(5,), v=v, difficulty="below_zero").make()
    logits = inputs["hidden"] @ inputs["weight"].T
    padded = torch.nn.functional.pad(logits, (0, 128 - v % 128))  # the fault: the tail's logits are 0, not −∞
    lse = torch.logsumexp(padded, dim=1)
    logp = logits.gather(1, inputs["tokens"][:, None])[:, 0] - lse
    hold(inputs, backend, {"lse": lse, "logp": logp})


@pytest.mark.parametrize("v", [127, 129, 257])
def test_1_last_entry_is_not_lost(v: int, backend: str) -> None:
    """The other way round: nearly all mass on the last entry, which a truncating kernel drops."""
    inputs = HeadSpec(shape=(5,), v=v, difficulty="peaked_tail").make()
    logits = inputs["hidden"] @ inputs["weight"].T
    hold(inputs, backend, {"lse": torch.logsumexp(logits[:, :-1], dim=1)})


def test_1_uniform_weights_would_not_have_told(backend: str) -> None:
    """Why it stayed hidden for months: with equal weights and logits near 0 a padded lane changes lse by log(128/127)."""
    uniform = HeadSpec(shape=(5,), v=127, difficulty="zero_rows").make()
    error = math.log(128 / 127)
    assert error < 1e-2
    hold(uniform, backend, {"lse": torch.full((5,), math.log(128))})  # and yet this comparator sees it


# ---- 2: logits rounded before the softmax -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_2_logits_stay_in_float32(dtype: torch.dtype, backend: str) -> None:
    """Half-precision inputs, float32 logits: the error stays a thousand times below that of rounded logits."""
    inputs = HeadSpec(shape=(17,), d=33, v=257, dtype=dtype).make()
    rounded = (inputs["hidden"].float() @ inputs["weight"].float().T).to(dtype).float()  # the fault
    lse = torch.logsumexp(rounded, dim=1)
    hold(inputs, backend, {"lse": lse, "logp": rounded.gather(1, inputs["tokens"][:, None])[:, 0] - lse})


@pytest.mark.parametrize("dtype", strategies.DTYPES)
def test_2_logp_is_never_positive(dtype: torch.dtype, backend: str) -> None:
    """Target logit and lse from one accumulator: logp ≤ 0 to the last bit where p ≈ 1."""
    inputs = HeadSpec(shape=(257,), d=33, v=129, dtype=dtype, difficulty="peaked_tail").make()
    assert bool((score(inputs, backend).logp <= 0).all())
    # The fault: the target logit from a product of its own, summed in another order.
    hidden, weight = inputs["hidden"].float(), inputs["weight"].float()
    target = (hidden.flip(1) * weight[inputs["tokens"]].flip(1)).cumsum(dim=1)[:, -1]
    assert bool((target - torch.logsumexp(hidden @ weight.T, dim=1) > 0).any())


# ---- 3: gradients summed over chunks in bfloat16 ------------------------------------------------------------------------


def test_3_chunks_accumulate_in_float32(backend: str) -> None:
    """dW over 2048 rows in bfloat16: one rounding at the end, not one per chunk."""
    spec = HeadSpec(shape=(2048,), d=8, v=65, dtype=torch.bfloat16)
    inputs, upstream = spec.make(), {"logp": torch.ones(2048)}
    want, want_grad = test_linear_logprob.run_oracle(inputs, upstream, torch.float64)
    _, eager_grad = test_linear_logprob.run_oracle(inputs, upstream, torch.float32)
    noise = row_noise(inputs, want)
    draw, draw_noise = tolerance.dlogit_noise(
        want, inputs["tokens"], upstream["logp"], 0.0, 0.0, noise, scale=1.0, softcap=None, dtype=spec.dtype
    )  # fmt: skip
    how = {
        "dtype": torch.bfloat16,
        "noise": tolerance.product_noise(draw_noise.T, draw.T, inputs["hidden"], spec.dtype),
    }
    out, leaves = test_linear_logprob.call(inputs, spec, backend)
    out.logp.backward(upstream["logp"])
    tolerance.check("dweight", leaves["weight"].grad, want_grad["weight"], eager_grad["weight"], **how)

    faulty = torch.zeros(65, 8, dtype=torch.bfloat16)
    for rows in torch.arange(2048).split(2):  # the fault: 1024 chunks, each sum rounded to bfloat16
        faulty += (draw[rows].float().T @ inputs["hidden"][rows].float()).bfloat16()
    assert tolerance.refuses("dweight", faulty, want_grad["weight"], eager_grad["weight"], **how)


# ---- 4: 32-bit offsets --------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="more than 2^31 logits: minutes on a CPU")
def test_4_more_than_two_to_the_31_logits() -> None:
    """Row·V passes 2^31 in the last rows; their values and the last column of dW must still be right."""
    rows, v, d = 2**16 + 8, 2**15 + 1, 8
    assert rows * v > 2**31
    spec = HeadSpec(shape=(rows,), d=d, v=v)
    inputs = {n: x.cuda() if isinstance(x, Tensor) else x for n, x in spec.make().items()}
    out, leaves = test_linear_logprob.call(inputs, spec, "auto")
    upstream = torch.zeros(rows, device="cuda")
    upstream[-4:] = 1.0
    out.logp.backward(upstream)
    last = {n: x.detach().cpu() if isinstance(x, Tensor) else x for n, x in inputs.items()}
    last |= {"hidden": last["hidden"][-4:], "tokens": last["tokens"][-4:]}
    ones = {"logp": torch.ones(4)}
    want, want_grad = test_linear_logprob.run_oracle(last, ones, torch.float64)
    eager, eager_grad = test_linear_logprob.run_oracle(last, ones, torch.float32)
    noise = row_noise(last, want)
    tolerance.check("logp", out.logp[-4:].cpu(), want.logp, eager.logp, dtype=torch.float32, noise=noise)
    draw, draw_noise = tolerance.dlogit_noise(
        want, last["tokens"], ones["logp"], 0.0, 0.0, noise, scale=1.0, softcap=None, dtype=torch.float32
    )  # fmt: skip
    spread = tolerance.product_noise(draw_noise.T, draw.T, last["hidden"], torch.float32)
    tolerance.check(
        "dweight",
        leaves["weight"].grad.cpu(),
        want_grad["weight"],
        eager_grad["weight"],
        dtype=torch.float32,
        noise=spread,
    )
    # The fault: an offset kept in 32 bits lands on another row.
    wrapped = ((rows - 1) * v) % 2**32
    assert wrapped // v != rows - 1


# ---- 5: a gradient formed in the forward, an upstream per token -----------------------------------------------------------


def test_5_upstream_per_token(backend: str) -> None:
    """Every token's upstream counts on its own; the faulty form knows their mean only."""
    spec = HeadSpec(shape=(17,), v=33)
    inputs = spec.make()
    upstream = {"logp": torch.randn(17, generator=strategies.generator(3))}
    mean = {"logp": upstream["logp"].mean().expand(17)}
    want, want_grad = test_linear_logprob.run_oracle(inputs, upstream, torch.float64)
    _, eager_grad = test_linear_logprob.run_oracle(inputs, upstream, torch.float32)
    _, faulty = test_linear_logprob.run_oracle(inputs, mean, torch.float32)
    out, leaves = test_linear_logprob.call(inputs, spec, backend)
    out.logp.backward(upstream["logp"])
    spread = 8 * float(row_noise(inputs, want).detach().max()) * float(want_grad["weight"].abs().max())
    for name in ("hidden", "weight"):
        how = {"dtype": torch.float32, "noise": spread}
        tolerance.check(name, leaves[name].grad, want_grad[name], eager_grad[name], **how)
        assert tolerance.refuses(name, faulty[name], want_grad[name], eager_grad[name], **how)


def test_5_gradient_scaling_is_exact(backend: str) -> None:
    """A loss scale of 2^16 scales every gradient bit for bit (float32; no part of it was formed without the upstream)."""
    grads = []
    for factor in (1.0, 2.0**16):
        case = test_roma_loss.on_leaves(LossSpec(bias=True).make())
        (factor * test_roma_loss.call(case, backend).loss).backward()
        grads.append([case[n].grad for n in test_roma_loss.LEAVES])
    for plain, scaled in zip(*grads, strict=True):
        assert bool(plain.any())
        assert torch.equal(plain * 2.0**16, scaled)


def test_5_accumulation_and_retain_graph(backend: str) -> None:
    """A second backward over a retained graph adds the same again; so does a second micro-batch."""
    case = test_roma_loss.on_leaves(LossSpec(bias=True).make())
    loss = test_roma_loss.call(case, backend).loss
    loss.backward(retain_graph=True)
    once = {n: case[n].grad.clone() for n in test_roma_loss.LEAVES}
    loss.backward()
    twice = {n: case[n].grad.clone() for n in test_roma_loss.LEAVES}
    test_roma_loss.call(case, backend).loss.backward()
    for name, grad in once.items():
        assert torch.equal(twice[name], 2 * grad), name
        slack = 2 * tolerance.eps(torch.float32) * float(grad.abs().max()) * 3
        assert bool(((case[name].grad - 3 * grad).abs() <= slack).all()), name


def test_5_backward_twice_without_retaining_fails(backend: str) -> None:
    """Freed buffers are an error as everywhere in PyTorch, never a wrong number."""
    case = test_roma_loss.on_leaves(LossSpec().make())
    loss = test_roma_loss.call(case, backend).loss
    loss.backward()
    with pytest.raises(RuntimeError):
        loss.backward()


def test_5_second_derivatives_are_right_or_refused(backend: str) -> None:
    """Nobody gets a silent zero for a gradient penalty."""
    spec = HeadSpec(shape=(5,), dtype=torch.float32)
    inputs = spec.make()
    out, leaves = test_linear_logprob.call(inputs, spec, backend)
    target = leaves["hidden"]
    (first,) = torch.autograd.grad(out.logp.sum(), target, create_graph=True)
    refused = False
    try:
        (second,) = torch.autograd.grad((first**2).sum(), target)
    except RuntimeError:
        refused = True
    if not refused:
        leaf = inputs["hidden"].double().requires_grad_()
        exact = oracle.head(**(inputs | {"hidden": leaf}))
        (rate,) = torch.autograd.grad(exact.logp.sum(), leaf, create_graph=True)
        (want,) = torch.autograd.grad((rate**2).sum(), leaf)
        assert float((second - want).abs().max()) <= 1e3 * tolerance.eps(torch.float32) * float(want.abs().max())


# ---- 6: cancellation, inf·0, ties -----------------------------------------------------------------------------------------


def penalty(delta: float, backend: str, dtype: torch.dtype = torch.float32) -> float:
    """The penalty of one token whose view is off by delta, through the public function."""
    clean = torch.tensor([[0.0]], dtype=dtype)
    return float(
        roma.roma_loss_from_logp(
            clean,
            torch.tensor([[[delta]]], dtype=dtype),
            mask=torch.tensor([[True]]),
            advantages=torch.tensor([0.0]),
            correct=torch.tensor([True]),
            old_logp=clean,
            config=RomaConfig(main=None),
            backend=backend,
        ).loss
    )


@pytest.mark.parametrize("delta", [2.0**-7, 2.0**-10, -(2.0**-10), 2.0**-12])
def test_6_small_differences_do_not_cancel(delta: float, backend: str) -> None:
    """expm1(δ) − δ keeps the digits that exp(δ) − δ − 1 loses altogether."""
    want = math.expm1(delta) - delta
    # expm1 is off by eps·|δ|, against a value of δ²/2: a relative error of 2·eps/|δ|.
    slack = 2 * tolerance.eps(torch.float32) * abs(delta)
    assert abs(penalty(delta, backend) - want) <= slack
    x = torch.tensor(delta)
    faulty = float(torch.exp(x) - x - 1)
    if abs(delta) <= 2.0**-12:
        assert abs(faulty - want) > 0.05 * want  # the fault is visible,
    assert slack <= 0.02 * want or abs(faulty - want) > slack  # and this bound would have seen it


def test_6_zero_difference_is_exactly_zero(backend: str) -> None:
    """δ = 0: no penalty and no gradient, exactly."""
    spec = LossSpec(difficulty="views_equal_clean", aux=False, config=RomaConfig(main=None))
    case = test_view_loss.on_leaves(spec.make_logp())
    got = test_view_loss.call(case, backend)
    got.loss.backward()
    assert float(got.loss.detach()) == 0.0 and not bool(case["view_logp"].grad.any())


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_6_masked_junk_never_reaches_the_exponential(junk: float, backend: str) -> None:
    """Masked means selected away before exp; multiplying by 0 afterwards gives inf·0 = NaN."""
    case = LossSpec(b=3, t=7, config=RomaConfig(ref_coef=0.1, aux_old="view")).make_logp()
    masked = ~case["mask"]
    assert bool(masked.any())
    dirty = dict(case)
    for name in ("logp", "view_logp", "old_logp", "ref_logp", "view_old_logp"):
        dirty[name] = case[name].masked_fill(masked, junk)
    clean, dirty = test_view_loss.on_leaves(case), test_view_loss.on_leaves(dirty)
    a, b = test_view_loss.call(clean, backend), test_view_loss.call(dirty, backend)
    assert torch.equal(a.loss, b.loss)
    a.loss.backward()
    b.loss.backward()
    for name in test_view_loss.LOGPS:
        assert torch.equal(clean[name].grad, dirty[name].grad)
    for key, value in a.metrics.items():
        assert torch.equal(value, b.metrics[key]), key

    # The fault, forward and backward: mask after the exponential.
    delta = torch.tensor([0.1, junk], requires_grad=True)
    faulty = ((torch.expm1(delta) - delta) * torch.tensor([1.0, 0.0])).sum()
    faulty.backward()
    assert not (bool(torch.isfinite(faulty)) and bool(torch.isfinite(delta.grad).all()))


def test_6_ties_are_not_shared(backend: str) -> None:
    """One rule: the lowest index takes the whole gradient. amax, the faulty form, splits it evenly."""
    spec = LossSpec(k=3, difficulty="views_identical", aux=False, config=RomaConfig(main=None))
    case = test_view_loss.on_leaves(spec.make_logp() | {"correct": torch.ones(3, dtype=torch.bool)})
    got = test_view_loss.call(case, backend)
    got.loss.backward()
    assert bool(case["view_logp"].grad[0].any()) and not bool(case["view_logp"].grad[1:].any())
    views = case["view_logp"].detach().requires_grad_()
    delta = (views - case["logp"].detach()).masked_fill(~case["mask"], 0.0)
    by_view = oracle.k3(delta).sum(dim=2) / case["mask"].sum(dim=1)
    by_view.amax(dim=0).mean().backward()
    assert bool(views.grad[1:].any())


# ---- 7: Python floats that become float64 --------------------------------------------------------------------------------


def test_7_no_float64_in_a_float32_call(kernel: str) -> None:
    """Temperature, softcap, λ, clips and counts are Python floats; no tensor may turn double because of them."""
    config = RomaConfig(temperature=0.7, softcap=5.0, ref_coef=0.1, aux_old="view")
    case = test_roma_loss.on_leaves(LossSpec(bias=True, totals="number", config=config).make())
    with Watch() as watch:
        test_roma_loss.call(case, kernel).loss.backward()
    assert not watch.float64
    with Watch() as faulty:
        torch.randn(3) * torch.tensor([0.7], dtype=torch.float64)  # the fault
    assert faulty.float64


def test_7_results_are_float32_whatever_the_arguments(backend: str) -> None:
    """Double-precision old log-probs, advantages and counts do not promote the loss of a float32 model."""
    case = LossSpec(totals="tensor").make()
    for name in ("old_logp", "advantages", "total_sequences", "total_tokens", "total_correct"):
        case[name] = case[name].double()
    got = test_roma_loss.call(case, backend)
    assert {got.loss.dtype, got.logp.dtype, got.view_logp.dtype} == {torch.float32}
    assert {value.dtype for value in got.metrics.values()} == {torch.float32}


# ---- 8: requires_grad dropped, gradients computed for frozen parts ----------------------------------------------------------


def test_8_gradients_reach_what_lies_before(backend: str) -> None:
    """Hidden states and head weight are rarely leaves: gradients pass through views, transposes, slices and sums."""
    spec = HeadSpec(shape=(2, 3), d=8, v=33)
    inputs = spec.make()
    grads = []
    for call in (lambda **kw: score(inputs, backend, **kw).logp, None):
        body = inputs["hidden"].clone().requires_grad_()
        base = inputs["weight"].clone().requires_grad_()
        g = strategies.generator(2)
        low, high = (torch.randn(shape, generator=g).requires_grad_() for shape in ((33, 2), (2, 8)))
        hidden = torch.cat([body, body.flip(0)], dim=0)[:2].transpose(0, 1).transpose(0, 1)
        weight = base + low @ high  # a low-rank adapter on the head
        if call is None:
            flat = oracle.head(hidden.reshape(6, 8), weight, inputs["tokens"].reshape(6)).logp
        else:
            flat = call(hidden=hidden, weight=weight).reshape(6)
        (flat * torch.arange(1, 7)).sum().backward()
        grads.append([body.grad, base.grad, low.grad, high.grad])
    for got, want in zip(*grads, strict=True):
        slack = 64 * tolerance.eps(torch.float32) * float(want.abs().max())
        assert bool(want.any()) and bool(((got - want).abs() <= slack).all())


def test_8_nothing_to_differentiate(backend: str) -> None:
    """All frozen, or under no_grad: results without a graph."""
    inputs = HeadSpec(entropy=True).make()
    assert not score(inputs, backend, entropy=True).logp.requires_grad
    with torch.no_grad():
        weight = inputs["weight"].clone().requires_grad_()
        assert not score(inputs, backend, weight=weight).logp.requires_grad
    case = LossSpec().make()
    assert not test_roma_loss.call(case, backend).loss.requires_grad
    with torch.inference_mode():
        assert bool(torch.isfinite(test_roma_loss.call(case, backend).loss))


def test_8_unused_outputs(backend: str) -> None:
    """A backward through entropy alone, or logp alone, when both were asked for."""
    spec = HeadSpec(entropy=True, bias=True)
    inputs = spec.make()
    for name in ("logp", "entropy"):
        upstream = {name: torch.randn(5, generator=strategies.generator(1))}
        _, want = test_linear_logprob.run_oracle(inputs, upstream, torch.float64)
        out, leaves = test_linear_logprob.call(inputs, spec, backend)
        getattr(out, name).backward(upstream[name])
        for leaf, value in leaves.items():
            slack = 64 * tolerance.eps(torch.float32) * float(want[leaf].abs().max())
            assert float((value.grad - want[leaf]).abs().max()) <= slack, (name, leaf)


def test_8_frozen_head_costs_no_product(kernel: str) -> None:
    """The same call with a frozen head does one product less; computing dW and dropping it would not show in .grad."""
    _, both = test_linear_logprob.count_flops(kernel)
    _, frozen = test_linear_logprob.count_flops(kernel, frozen=("weight",))
    assert both - frozen >= test_linear_logprob.PRODUCT / test_linear_logprob.SLACK


# ---- 9: the head's weight outside its module --------------------------------------------------------------------------------


def test_9_autocast_does_not_round_the_logits(backend: str) -> None:
    """Under autocast a plain linear yields bfloat16 logits; ours are the same bits as without."""
    inputs = HeadSpec(shape=(17,), d=33, v=129).make()
    plain = score(inputs, backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = score(inputs, backend)
        faulty = torch.log_softmax(torch.nn.functional.linear(inputs["hidden"], inputs["weight"]).float(), dim=1)
    assert inside.logp.dtype == torch.float32
    assert torch.equal(inside.logp, plain.logp) and torch.equal(inside.lse, plain.lse)
    want, eager = truth(inputs), truth(inputs, torch.float32)
    wrong = faulty.gather(1, inputs["tokens"][:, None])[:, 0]
    how = {"dtype": torch.float32, "noise": row_noise(inputs, want)}
    assert tolerance.refuses("logp", wrong, want.logp, eager.logp, **how)


def test_9_autocast_around_the_whole_loss(backend: str) -> None:
    """A forward of roma_loss under autocast, and its backward after it, equal those without."""
    runs = []
    for enabled in (False, True):
        case = test_roma_loss.on_leaves(LossSpec(bias=True, v=129).make())
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = test_roma_loss.call(case, backend).loss
        loss.backward()  # outside, as PyTorch asks
        runs.append([loss.detach(), *(case[n].grad for n in test_roma_loss.LEAVES)])
    for outside, inside in zip(*runs, strict=True):
        assert inside.dtype == outside.dtype and torch.equal(inside, outside)


def test_9_tied_embeddings(backend: str) -> None:
    """One parameter as embedding and head: its gradient is the sum of both uses."""
    g = strategies.generator(4)
    table = torch.randn(33, 8, generator=g)
    tokens = torch.randint(33, (5,), generator=g)

    def run(head: Any) -> Tensor:
        tied = table.clone().requires_grad_()
        hidden = torch.tanh(tied[tokens.flip(0)])
        head(hidden, tied).sum().backward()
        return tied.grad

    got = run(lambda h, w: roma.linear_logprob(h, w, tokens, backend=backend).logp)
    want = run(lambda h, w: oracle.head(h, w, tokens).logp)
    slack = 64 * tolerance.eps(torch.float32) * float(want.abs().max())
    assert float((got - want).abs().max()) <= slack
    faulty = run(lambda h, w: oracle.head(h, w.detach(), tokens).logp)  # the head's own share is lost
    assert float((faulty - want).abs().max()) > slack


def test_9_an_empty_shard_is_refused(backend: str) -> None:
    """ZeRO-3 leaves an empty weight outside the module's hooks: an error that says so, not a crash in a product."""
    inputs = HeadSpec().make()
    with pytest.raises(ValueError, match=r"weight: expected .*got .*\[0\].*; \S"):
        score(inputs, backend, weight=torch.empty(0))


# ---- 10: a second copy of the loss drifts; local normalisers ------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("penalty_over", ["all", "correct"])
def test_10_normalisers_are_arguments(aggregation: str, penalty_over: str, backend: str) -> None:
    """Uneven shards under global counts add up to the whole; with counts of their own, the fault, they do not."""
    config = RomaConfig(aggregation=aggregation, penalty_over=penalty_over, max_length=16)
    case = LossSpec(b=5, t=7, seed=3, config=config).make_logp()
    whole = float(test_view_loss.call(case, backend).loss)
    shards = [test_view_loss.take(case, rows) for rows in torch.arange(5).split([1, 4])]
    counts = {
        "total_sequences": 5,
        "total_tokens": case["mask"].sum(),
        "total_correct": torch.tensor(int(case["correct"].sum())),
    }
    together = sum(float(test_view_loss.call(shard | counts, backend).loss) for shard in shards)
    alone = sum(float(test_view_loss.call(shard, backend).loss) for shard in shards) / 2
    slack = 64 * tolerance.eps(torch.float32) * (1 + abs(whole))
    assert abs(together - whole) <= slack
    assert abs(alone - whole) > 100 * slack


def test_10_clean_loss_is_the_trainers(backend: str) -> None:
    """At ratio 1 the clean loss is −mean A and its gradient −A/(B·|y|): what any GRPO trainer computes."""
    config = RomaConfig(lambda_inv=0.0)
    case = test_view_loss.on_leaves(LossSpec(b=4, t=5, aux=False, config=config).make_logp())
    case["old_logp"] = case["logp"].detach().clone()
    got = test_view_loss.call(case, backend)
    got.loss.backward()
    slack = 8 * tolerance.eps(torch.float32) * float(case["advantages"].abs().max())
    assert abs(float(got.loss.detach() + case["advantages"].mean())) <= slack
    lengths = case["mask"].sum(dim=1, keepdim=True)
    want = torch.where(case["mask"], -case["advantages"][:, None] / (4 * lengths), 0.0)
    assert bool(((case["logp"].grad - want).abs() <= slack).all())


def test_10_the_importance_ratio_is_not_forgotten(backend: str) -> None:
    """old_logp enters value and gradient; a loss that takes ratio = exp(logp − sg(logp)) has the slope of ratio 1."""
    config = RomaConfig(lambda_inv=0.0, clip_low=0.9, clip_high=9.0, dual_clip=None)
    spec = LossSpec(b=4, t=5, aux=False, config=config)
    case = test_view_loss.on_leaves(spec.make_logp())
    got = test_view_loss.call(case, backend)
    got.loss.backward()
    ratio = torch.exp(case["logp"].detach() - case["old_logp"])
    weight = -case["advantages"][:, None] / (4 * case["mask"].sum(dim=1, keepdim=True))
    faulty = torch.where(case["mask"], weight, 0.0)
    want = faulty * torch.where(case["mask"], ratio, 1.0)
    slack = 16 * tolerance.eps(torch.float32) * float(want.abs().max())
    assert bool(((case["logp"].grad - want).abs() <= slack).all())
    assert float((faulty - want).abs().max()) > 1e3 * slack


def test_10_config_is_one_for_both_forms(backend: str) -> None:
    """Temperature and softcap belong to the logits: from log-probs they do nothing."""
    case = LossSpec().make_logp()
    warm = case | {"config": replace(case["config"], temperature=0.5, softcap=10.0)}
    assert torch.equal(test_view_loss.call(case, backend).loss, test_view_loss.call(warm, backend).loss)
