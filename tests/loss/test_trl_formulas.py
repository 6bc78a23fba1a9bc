"""The clean objectives against TRL 1.16's formulas, written out here, and against Liger's loss."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import roma
from roma import RomaConfig
from roma.testing import tensors, tolerance

B, T, L_MAX, DELTA, BETA, ETA = 4, 6, 9, 4.0, 0.3, 0.05
LOW, HIGH, CAP = 0.2, 0.3, 1.15

# TRL's loss_type → our options.
LOSS_TYPES: dict[str, dict[str, Any]] = {
    "grpo": {},
    "bnpo": {"aggregation": "bnpo"},
    "dr_grpo": {"aggregation": "dr_grpo", "max_length": L_MAX},
    "dapo": {"aggregation": "dapo"},
    "cispo": {"main": "cispo", "clip_high": CAP, "aggregation": "dapo"},
    "sapo": {"main": "sapo"},
    "luspo": {"aggregation": "luspo"},
    "vespo": {"main": "vespo", "aggregation": "dapo"},
}
FORMS = [
    (loss_type, level)
    for loss_type, level in itertools.product(LOSS_TYPES, ("token", "sequence"))
    if loss_type != "vespo" or level == "token"
]


def drawn(seed: int = 0) -> dict[str, Tensor]:
    """What TRL's trainer has of a batch, in float64, and no ratio within 1e-3 of a clip."""
    g = tensors.generator(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    logp = -0.05 - 4 * torch.rand(B, T, generator=g, dtype=torch.float64)
    lengths = torch.tensor([T, 2, 5, 1])
    weights = 2.5 * torch.rand(B, T, generator=g, dtype=torch.float64)
    weights[0, 1] = weights[2, 0] = 0
    old = logp + 0.5 * normal(B, T) + torch.tensor([-0.4, 0.1, 0.3, -1.6])[:, None]
    mask = torch.arange(T) < lengths[:, None]
    means = ((logp - old) * mask).sum(-1) / lengths
    for ratio, edge in itertools.product(
        ((logp - old)[mask].exp(), means.exp()), (1 - LOW, 1 + HIGH, CAP, DELTA)
    ):
        assert float((ratio - edge).abs().min()) > 1e-3
    return {
        "logp": logp,
        "entropy": 3 * torch.rand(B, T, generator=g, dtype=torch.float64),
        "old": old,
        "ref": logp + 0.4 * normal(B, T),
        "mask": mask,
        "advantages": torch.tensor([1.2, -0.7, 0.4, -0.9], dtype=torch.float64),
        "weights": weights,
    }


def trl(
    batch: dict[str, Tensor],
    loss_type: str,
    *,
    level: str = "token",
    delta: float | None = None,
    beta: float = 0.0,
    unbiased: bool = False,
    weights: str = "none",
    eta: float = 0.0,
    steps: int = 1,
    total_tokens: int | None = None,
) -> Tensor:
    """`GRPOTrainer._compute_loss` of one of `steps` micro-batches, formula by formula."""
    logp, old, mask = batch["logp"], batch["old"], batch["mask"].to(batch["logp"].dtype)
    gains, counted = batch["advantages"][:, None], mask.sum(-1).clamp(min=1)
    x = logp - old
    if level == "sequence":
        x = ((x * mask).sum(-1) / counted)[:, None]
    ratio = x.exp()
    sampler = {
        "none": torch.ones_like(logp), "token": batch["weights"],
        "sequence": batch["weights"][:, :1].expand_as(logp),
    }[weights]  # fmt: skip
    gap = batch["ref"] - logp
    kl = gap.exp() - gap - 1
    kl = kl * ratio if unbiased else kl
    if loss_type == "cispo":
        loss = -ratio.clamp(max=CAP).detach() * gains * logp
    elif loss_type == "sapo":
        kappa = torch.where(gains > 0, 1.0, 1.05).to(logp.dtype)
        loss = -torch.sigmoid(kappa * (ratio - 1)) * 4 / kappa * gains
    elif loss_type == "vespo":
        log_w = (x.detach().clamp(-20, 20) * mask).sum(-1, keepdim=True)
        if weights != "none":  # TRL's weights are 1 where the mask is 0
            log_w = log_w + (sampler.log().clamp(math.log(1e-8), 20) * mask).sum(-1, keepdim=True)
        log_w = log_w.clamp(math.log(1e-8), 20)
        k = torch.where(gains >= 0, 2.0, 3.0).to(logp.dtype)
        rate = torch.where(gains >= 0, 3.0, 2.0).to(logp.dtype)
        loss = -(rate + k * log_w - rate * log_w.exp()).exp() * gains * logp
    else:
        free = ratio if delta is None else ratio.clamp(max=delta)
        loss = -torch.min(free * gains, ratio.clamp(1 - LOW, 1 + HIGH) * gains)
    if loss_type != "vespo":
        loss = loss * sampler
    loss = (loss + beta * kl).expand(mask.shape) * mask
    if loss_type in ("grpo", "sapo"):
        total = (loss.sum(-1) / counted).mean() / steps
    elif loss_type == "bnpo":
        total = loss.sum() / mask.sum() / steps
    elif loss_type == "dr_grpo":
        total = loss.sum() / (len(loss) * L_MAX) / steps
    elif loss_type == "luspo":
        total = loss.sum(-1).mean() / steps
    else:
        total = loss.sum() / (mask.sum() if total_tokens is None else total_tokens)
    return total - eta * (batch["entropy"] * mask).sum() / mask.sum() / steps


def ours(
    batch: dict[str, Tensor],
    loss_type: str,
    backend: str,
    *,
    level: str = "token",
    delta: float | None = None,
    beta: float = 0.0,
    unbiased: bool = False,
    weights: str = "none",
    eta: float = 0.0,
    **totals: Any,
) -> Tensor:
    """The same through `roma_loss_from_logp`."""
    options = {"clip_low": LOW, "clip_high": HIGH} | LOSS_TYPES[loss_type]
    config = RomaConfig(
        lambda_inv=0.0, ratio_level=level, dual_clip=delta, ref_coef=beta, ref_unbiased=unbiased,
        entropy_coef=eta, **options,
    )  # fmt: skip
    given = batch["weights"].float()
    if weights == "sequence" and loss_type == "vespo":
        given = given[:, :1].expand_as(given)
    by_sequence = weights == "sequence" and loss_type != "vespo"
    return roma.roma_loss_from_logp(
        batch["logp"],
        None,
        mask=batch["mask"],
        advantages=batch["advantages"].float(),
        correct=torch.ones(len(batch["mask"]), dtype=torch.bool),
        old_logp=batch["old"].float(),
        ref_logp=batch["ref"].float() if beta else None,
        rollout_weight=None if weights == "none" else given[:, 0] if by_sequence else given,
        entropy=batch["entropy"] if eta else None,
        config=config,
        backend=backend,
        **totals,
    ).loss


def leaves(batch: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The batch in a dtype, with fresh differentiable log-probs and entropies."""
    made = {n: x.to(dtype) if x.is_floating_point() else x for n, x in batch.items()}
    return made | {n: made[n].clone().requires_grad_() for n in ("logp", "entropy")}


def outcome(loss: Tensor, batch: dict[str, Tensor]) -> list[Tensor]:
    """The loss and its gradients by log-probs and entropies."""
    inputs = [batch["logp"], batch["entropy"]]
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [
        loss.detach(),
        *(torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)),
    ]


# KL (coefficient, unbiased) × sampler's weights, each pair once; the other two alternate.
KLS = ((0.0, False), (BETA, False), (BETA, True))
OPTIONS = [
    {"beta": beta, "unbiased": unbiased, "weights": weights, "delta": delta, "eta": eta}
    for (beta, unbiased), weights, (delta, eta) in zip(
        *zip(*itertools.product(KLS, ("none", "token", "sequence")), strict=True),
        itertools.islice(itertools.cycle(itertools.product((None, DELTA), (0.0, ETA))), 9),
        strict=True,
    )
]


def noise(want: list[Tensor], batch: dict[str, Tensor]) -> float:
    """A dozen roundings of log-ratios up to 3 nats, of φ's exponent up to 60, and sums of them."""
    size = max(float(x.abs().max()) for x in want)
    return float(tolerance.few(4 * max(size, 1.0)))


@pytest.mark.parametrize(("loss_type", "level"), FORMS)
def test_trl(loss_type: str, level: str, backend: str) -> None:
    """Loss and gradients in fp32, on every back end."""
    batch = drawn()
    for options in OPTIONS:
        exact, plain, mine = (
            leaves(batch, x) for x in (torch.float64, torch.float32, torch.float32)
        )
        want = outcome(trl(exact, loss_type, level=level, **options), exact)
        eager = outcome(trl(plain, loss_type, level=level, **options), plain)
        got = outcome(ours(mine, loss_type, backend, level=level, **options), mine)
        how = {"dtype": torch.float32, "noise": noise(want, batch) / tolerance.SIGMAS}
        for name, *three in zip(("loss", "dlogp", "dentropy"), got, want, eager, strict=True):
            tolerance.check(f"{name} {options}", *three, **how)


@pytest.mark.parametrize(("loss_type", "level"), FORMS)
def test_each_form_is_told_from_the_others(loss_type: str, level: str) -> None:
    """The same bounds refuse every other form, and every other option.

    dapo and bnpo differ where there are several micro-batches.
    """
    exact = leaves(drawn(), torch.float64)
    base = {"level": level, "beta": BETA, "unbiased": False, "weights": "token", "delta": None}
    want = outcome(trl(exact, loss_type, **base), exact)
    limit = tolerance.PLANTED * noise(want, exact)
    same = ("bnpo", "dapo") if loss_type in ("bnpo", "dapo") else (loss_type,)
    others = [(x, base | {"level": y}) for x, y in FORMS if not (x in same and y == level)]
    changes: list[dict[str, Any]] = [
        {"beta": 0.0},
        {"unbiased": True},
        {"weights": "none"},
        {"eta": ETA},
    ]
    if LOSS_TYPES[loss_type].get("main") is None:
        changes.append({"delta": 1 + HIGH})
    for other, options in [*others, *((loss_type, base | change) for change in changes)]:
        wrong = outcome(trl(exact, other, **options), exact)
        assert any(float((a - b).abs().max()) > limit for a, b in zip(wrong, want, strict=True)), (
            f"{other} {options}"
        )


@pytest.mark.parametrize(("loss_type", "level"), FORMS)
def test_equal_micro_batches_add_up_to_trls(loss_type: str, level: str) -> None:
    """Two of equal size under the totals of both, as TRL accumulates them."""
    batch = drawn()
    tokens = int(batch["mask"].sum())
    totals = {"total_sequences": B, "total_tokens": tokens}
    want, got = 0.0, 0.0
    for part in (slice(0, 2), slice(2, 4)):
        own = leaves({name: x[part] for name, x in batch.items()}, torch.float32)
        options = {"level": level, "beta": BETA, "weights": "token"}
        want += float(trl(own, loss_type, steps=2, total_tokens=tokens, **options).detach())
        got += float(ours(own, loss_type, "torch", **options, **totals).detach())
    assert abs(got - want) <= tolerance.few(8 * max(abs(want), 1.0))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_from_hidden_states(loss_type: str, backend: str) -> None:
    """`roma_loss` is `roma_loss_from_logp` of the head's log-probs and entropies."""
    batch, g = drawn(), tensors.generator(1)
    hidden, head = torch.randn(B, T, 8, generator=g), torch.randn(33, 8, generator=g) / 3
    tokens = torch.randint(33, (B, T), generator=g)
    results = []
    for whole in (True, False):
        h = hidden.clone().requires_grad_()
        scored = roma.linear_logprob(h, head, tokens, entropy=True, backend=backend)
        logp = scored.logp.detach()
        case = batch | {"old": logp - 0.3, "ref": logp + 0.2, "logp": scored.logp}
        case["entropy"] = scored.entropy
        how = {"beta": BETA, "weights": "token", "eta": ETA, "level": "token"}
        if whole:
            options = {"clip_low": LOW, "clip_high": HIGH} | LOSS_TYPES[loss_type]
            config = RomaConfig(
                lambda_inv=0.0, ref_coef=BETA, entropy_coef=ETA, dual_clip=None, **options
            )
            loss = roma.roma_loss(
                h, None, head, tokens, mask=batch["mask"], advantages=batch["advantages"].float(),
                correct=torch.ones(B, dtype=torch.bool), old_logp=case["old"], ref_logp=case["ref"],
                rollout_weight=batch["weights"].float(), config=config, backend=backend,
            ).loss  # fmt: skip
        else:
            loss = ours(case, loss_type, backend, **how)
        results.append([loss.detach(), *torch.autograd.grad(loss, h)])
    for first, second in zip(*results, strict=True):
        size = max(float(second.abs().max()), 1.0)
        assert float((first - second).abs().max()) <= tolerance.many(size)


NOT_LIGERS = [("cispo", "sequence"), ("sapo", "sequence"), ("luspo", "token")]


@pytest.mark.parametrize(("loss_type", "level"), [x for x in FORMS if x not in NOT_LIGERS])
def test_liger(loss_type: str, level: str) -> None:
    """Liger's fused loss, from hidden states, where it is installed."""
    liger = pytest.importorskip("liger_kernel.chunked_loss.grpo_loss")
    # Its luspo takes one loss a sequence: without a KL or weights by token.
    beta, by_token = (0.0, "none") if loss_type == "luspo" else (BETA, "token")
    batch, g = drawn(), tensors.generator(1)
    head, tokens = torch.randn(33, 8, generator=g) / 3, torch.randint(33, (B, T), generator=g)
    first = torch.randn(B, T, 8, generator=g)
    logp = roma.linear_logprob(first, head, tokens, backend="torch").logp
    old, ref = logp + (batch["old"] - batch["logp"]).float(), logp + 0.2
    grads = []
    for theirs in (True, False):
        h = first.clone().requires_grad_()
        if theirs:
            high = CAP if loss_type == "cispo" else HIGH
            fused = liger.LigerFusedLinearGRPOLoss(
                beta=beta, compiled=False, epsilon_low=LOW, epsilon_high=high, loss_type=loss_type,
                max_completion_length=L_MAX, importance_sampling_level=level, delta=DELTA,
                use_bias_correction_kl=True,
            )  # fmt: skip
            # Its weights of vespo are summed over masked tokens too.
            weights = batch["weights"].float().where(batch["mask"], 1.0) if beta else None
            loss, *_ = fused(
                h, head, tokens, batch["mask"].float(), batch["advantages"].float(),
                ref_per_token_logps=ref, old_per_token_logps=old, vllm_is_ratio=weights,
            )  # fmt: skip
        else:
            scored = roma.linear_logprob(h, head, tokens, backend="torch").logp
            case = batch | {"logp": scored, "old": old, "ref": ref}
            how = {"level": level, "delta": DELTA, "beta": beta, "unbiased": beta > 0}
            loss = ours(case, loss_type, "torch", weights=by_token, **how)
        grads.append([loss.detach(), *torch.autograd.grad(loss, h)])
    for mine, other in zip(*grads, strict=True):
        size = max(float(other.abs().max()), 1.0)
        assert float((mine - other).abs().max()) <= tolerance.many(size)
