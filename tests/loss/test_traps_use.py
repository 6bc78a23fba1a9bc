"""The ten traps of losses over a large vocabulary: 8 to 10, where the loss is used.

Every test holds the back end to the rule and then shows that it would have noticed: the faulty form
stands in the test, small and in plain PyTorch, and the same comparison must refuse it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import roma
from roma import RomaConfig
from roma.testing import (
    compare_head,
    compare_logp,
    compare_whole,
    count_products,
    oracle,
    tensors,
    tolerance,
)
from roma.testing.strategies import HeadSpec, LossSpec


def test_8_gradients_reach_what_lies_before(backend: str) -> None:
    """Hidden states and head weight are rarely leaves.

    Gradients pass through views, transposes, slices and sums.
    """
    spec = HeadSpec(shape=(2, 3), d=8, v=33)
    inputs = spec.make()
    grads = []
    for call in (lambda **kw: compare_head.score(inputs, backend, **kw).logp, None):
        body = inputs["hidden"].clone().requires_grad_()
        base = inputs["weight"].clone().requires_grad_()
        g = tensors.generator(2)
        low, high = (
            torch.randn(shape, generator=g).requires_grad_() for shape in ((33, 2), (2, 8))
        )
        hidden = torch.cat([body, body.flip(0)], dim=0)[:2].transpose(0, 1).transpose(0, 1)
        weight = base + low @ high  # a low-rank adapter on the head
        if call is None:
            flat = oracle.head(hidden.reshape(6, 8), weight, inputs["tokens"].reshape(6)).logp
        else:
            flat = call(hidden=hidden, weight=weight).reshape(6)
        (flat * torch.arange(1, 7)).sum().backward()
        grads.append([body.grad, base.grad, low.grad, high.grad])
    for got, want in zip(*grads, strict=True):
        slack = tolerance.many(float(want.abs().max()))
        assert bool(want.any()) and bool(((got - want).abs() <= slack).all())


def test_8_nothing_to_differentiate(backend: str) -> None:
    """All frozen, or under no_grad: results without a graph."""
    inputs = HeadSpec(entropy=True).make()
    assert not compare_head.score(inputs, backend, entropy=True).logp.requires_grad
    with torch.no_grad():
        weight = inputs["weight"].clone().requires_grad_()
        assert not compare_head.score(inputs, backend, weight=weight).logp.requires_grad
    case = LossSpec().make()
    assert not compare_whole.call(case, backend).loss.requires_grad
    with torch.inference_mode():
        assert bool(torch.isfinite(compare_whole.call(case, backend).loss))


def test_8_unused_outputs(backend: str) -> None:
    """A backward through entropy alone, or logp alone, when both were asked for."""
    spec = HeadSpec(entropy=True, bias=True)
    inputs = spec.make()
    for name in ("logp", "entropy"):
        upstream = {name: torch.randn(5, generator=tensors.generator(1))}
        _, want = compare_head.run_oracle(inputs, upstream, torch.float64)
        out, leaves = compare_head.call(inputs, spec, backend)
        getattr(out, name).backward(upstream[name])
        for leaf, value in leaves.items():
            slack = tolerance.many(float(want[leaf].abs().max()))
            assert float((value.grad - want[leaf]).abs().max()) <= slack, (name, leaf)


def test_8_frozen_head_costs_no_product(kernel: str) -> None:
    """The same call with a frozen head does one product less.

    Computing dW and dropping it would not show in .grad.
    """
    spec = HeadSpec(shape=(64,), d=16, v=257)
    for frozen, rows in ((("weight",), 0), ((), 64)):
        out, _ = compare_head.call(spec.make(), spec, kernel, frozen=frozen)
        with count_products() as count:
            out.logp.backward(torch.ones(64))
        assert count.rows("dweight", 257) == rows


def test_9_autocast_does_not_round_the_logits(backend: str) -> None:
    """Under autocast a plain linear yields bfloat16 logits; ours are the same bits as without."""
    inputs = HeadSpec(shape=(17,), d=33, v=129).make()
    plain = compare_head.score(inputs, backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = compare_head.score(inputs, backend)
        faulty = torch.log_softmax(
            torch.nn.functional.linear(inputs["hidden"], inputs["weight"]).float(), dim=1
        )
    assert inside.logp.dtype == torch.float32
    assert torch.equal(inside.logp, plain.logp) and torch.equal(inside.lse, plain.lse)
    want, eager = compare_head.truth(inputs), compare_head.truth(inputs, torch.float32)
    wrong = faulty.gather(1, inputs["tokens"][:, None])[:, 0]
    how = {"dtype": torch.float32, "noise": compare_head.row_noise(inputs, want)}
    assert tolerance.refuses("logp", wrong, want.logp, eager.logp, **how)


def test_9_autocast_around_the_whole_loss(backend: str) -> None:
    """A forward of roma_loss under autocast, and its backward after it, equal those without."""
    runs = []
    for enabled in (False, True):
        case = compare_whole.on_leaves(LossSpec(bias=True, v=129).make())
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = compare_whole.call(case, backend).loss
        loss.backward()  # outside, as PyTorch asks
        runs.append([loss.detach(), *(case[n].grad for n in compare_whole.LEAVES)])
    for outside, inside in zip(*runs, strict=True):
        assert inside.dtype == outside.dtype and torch.equal(inside, outside)


def test_9_tied_embeddings(backend: str) -> None:
    """One parameter as embedding and head: its gradient is the sum of both uses."""
    g = tensors.generator(4)
    table = torch.randn(33, 8, generator=g)
    tokens = torch.randint(33, (5,), generator=g)

    def run(head: Any) -> Tensor:
        tied = table.clone().requires_grad_()
        hidden = torch.tanh(tied[tokens.flip(0)])
        head(hidden, tied).sum().backward()
        return tied.grad

    got = run(lambda h, w: roma.linear_logprob(h, w, tokens, backend=backend).logp)
    want = run(lambda h, w: oracle.head(h, w, tokens).logp)
    slack = tolerance.many(float(want.abs().max()))
    assert float((got - want).abs().max()) <= slack
    faulty = run(
        lambda h, w: oracle.head(h, w.detach(), tokens).logp
    )  # the head's own share is lost
    assert float((faulty - want).abs().max()) > slack


def test_9_an_empty_shard_is_refused(backend: str) -> None:
    """ZeRO-3 leaves an empty weight outside the module's hooks.

    An error that says so, not a crash in a product.
    """
    inputs = HeadSpec().make()
    with pytest.raises(ValueError, match=r"weight: expected .*got .*\[0\].*; \S"):
        compare_head.score(inputs, backend, weight=torch.empty(0))


@pytest.mark.parametrize("aggregation", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("penalty_over", ["all", "correct"])
def test_10_normalisers_are_arguments(aggregation: str, penalty_over: str, backend: str) -> None:
    """Uneven shards under global counts add up to the whole.

    With counts of their own, the fault, they do not.
    """
    config = RomaConfig(aggregation=aggregation, penalty_over=penalty_over, max_length=16)
    case = LossSpec(b=5, t=7, seed=3, config=config).make_logp()
    whole = float(compare_logp.call(case, backend).loss)
    shards = [compare_logp.take(case, rows) for rows in torch.arange(5).split([1, 4])]
    counts = {
        "total_sequences": 5,
        "total_tokens": case["mask"].sum(),
        "total_correct": torch.tensor(int(case["correct"].sum())),
    }
    together = sum(float(compare_logp.call(shard | counts, backend).loss) for shard in shards)
    alone = sum(float(compare_logp.call(shard, backend).loss) for shard in shards) / 2
    slack = tolerance.many(1 + abs(whole))
    assert abs(together - whole) <= slack
    assert abs(alone - whole) > 100 * slack


def test_10_clean_loss_is_the_trainers(backend: str) -> None:
    """At ratio 1 the clean loss is -mean A and its gradient -A/(B·|y|).

    What any GRPO trainer computes.
    """
    config = RomaConfig(lambda_inv=0.0)
    case = compare_logp.on_leaves(LossSpec(b=4, t=5, aux=False, config=config).make_logp())
    case["old_logp"] = case["logp"].detach().clone()
    got = compare_logp.call(case, backend)
    got.loss.backward()
    slack = tolerance.few(float(case["advantages"].abs().max()))
    assert abs(float(got.loss.detach() + case["advantages"].mean())) <= slack
    lengths = case["mask"].sum(dim=1, keepdim=True)
    want = torch.where(case["mask"], -case["advantages"][:, None] / (4 * lengths), 0.0)
    assert bool(((case["logp"].grad - want).abs() <= slack).all())


def test_10_the_importance_ratio_is_not_forgotten(backend: str) -> None:
    """old_logp enters value and gradient.

    A loss that takes ratio = exp(logp - sg(logp)) has the slope of ratio 1.
    """
    config = RomaConfig(lambda_inv=0.0, clip_low=0.9, clip_high=9.0, dual_clip=None)
    spec = LossSpec(b=4, t=5, aux=False, config=config)
    case = compare_logp.on_leaves(spec.make_logp())
    got = compare_logp.call(case, backend)
    got.loss.backward()
    ratio = torch.exp(case["logp"].detach() - case["old_logp"])
    weight = -case["advantages"][:, None] / (4 * case["mask"].sum(dim=1, keepdim=True))
    faulty = torch.where(case["mask"], weight, 0.0)
    want = faulty * torch.where(case["mask"], ratio, 1.0)
    slack = tolerance.few(float(want.abs().max()))
    assert bool(((case["logp"].grad - want).abs() <= slack).all())
    assert float((faulty - want).abs().max()) > 1e3 * slack


def test_10_config_is_one_for_both_forms(backend: str) -> None:
    """Temperature and softcap belong to the logits: from log-probs they do nothing."""
    case = LossSpec().make_logp()
    warm = case | {"config": replace(case["config"], temperature=0.5, softcap=10.0)}
    assert torch.equal(compare_logp.call(case, backend).loss, compare_logp.call(warm, backend).loss)
