"""Adapted policies with a B that is not 0, batches for them, and gradients without peft."""

from __future__ import annotations

from typing import Any

import torch
from support import prefix, update_ranks
from torch import Tensor

from roma import RomaConfig
from roma.models.lora import add_adapters, factors, layers, scaling
from roma.models.qwen_vl import Policy
from roma.train.batch import UpdateBatch
from roma.train.update import PolicyLoss

RANK, ALPHA = 4, 6.0
Gradients = dict[str, Tensor]


def adapted(family: str = "qwen3", *, dtype: torch.dtype = torch.float32, **options: Any) -> Policy:
    """A policy as if it had learnt: B is drawn, at a tenth of W's size in the product."""
    policy = Policy.load(prefix.vision_folder(family), dtype=dtype)
    add_adapters(policy, **({"rank": RANK, "alpha": ALPHA} | options))
    draw = torch.Generator().manual_seed(1)
    for layer in layers(policy.model).values():
        b = factors(layer)[1]
        b.data = (0.02 * torch.randn(b.shape, generator=draw)).to(b.dtype)
    return policy


def plain(policy: Policy) -> Policy:
    """The same function without peft: W + scale·B A in W's place, all of it trained."""
    made = Policy.load(policy.model.name_or_path, dtype=policy.head_weight.dtype)
    with torch.no_grad():
        for name, layer in layers(policy.model).items():
            a, b = factors(layer)
            made.model.get_submodule(name).weight += scaling(layer) * torch.einsum(
                "or,ri->oi", b, a
            )
    return made


def batch_of(policy: Policy) -> UpdateBatch:
    """Four prompts, one without an image and one with two, three rollouts each, two views."""
    return update_ranks.batch_of(policy, CUT, 2)


CUT = update_ranks.Cut((((0, 1, 2, 3),), ()), right=(0, 1, 3), level=(1,))


def gradients(policy: Policy, batch: UpdateBatch, *, bf16: bool = False, **form: Any) -> Gradients:
    """Of one update, by name; of what is trained."""
    policy.zero_grad()
    with policy.autocast("bfloat16" if bf16 else "float32"):
        out = PolicyLoss(policy, RomaConfig(), **form)(batch, batch.totals())
    out.loss.backward()
    return {name: w.grad.clone() for name, w in policy.named_parameters() if w.grad is not None}


def by_chain_rule(policy: Policy, whole: Gradients) -> Gradients:
    """dA = s·Bᵀ dW and dB = s·dW Aᵀ, from gradients by the merged matrices."""
    made = {}
    for name, layer in layers(policy.model).items():
        a, b = (x.detach() for x in factors(layer))
        by_weight = scaling(layer) * whole[f"model.{name}.weight"]
        made[f"model.{name}.lora_A.default.weight"] = b.T @ by_weight
        made[f"model.{name}.lora_B.default.weight"] = by_weight @ a.T
    return made


def apart(found: Gradients, exact: Gradients) -> float:
    """The largest error of a gradient, as a share of its norm."""
    assert found.keys() == exact.keys()
    return max(
        float((found[name].double() - want).norm() / want.norm()) for name, want in exact.items()
    )


def off(found: Gradients, exact: Gradients) -> float:
    """The error of all gradients together, as a share of their norm."""
    error, size = (
        sum(float(x.square().sum()) for x in many)
        for many in ([found[n].double() - exact[n] for n in exact], exact.values())
    )
    return (error / size) ** 0.5
