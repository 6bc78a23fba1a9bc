"""Run as a program: our head and our whole loss against float64, without pytest.

    python -m bench.gpu.correct essential|more PLAN DEVICE

PLAN is a plan of the Triton back end ("triton", "vendor", "gluon") or another back end ("torch",
"native"). Three numbers stand behind every bound: ours, float64, and plain PyTorch, which is the
vendor's product with fp32 sums, the softmax in fp32, dlogits rounded to the inputs' dtype, and two
more products. Ours may lose twice what that loses, and a rounding:

    log-probs    2·max|plain − f64| + 2·eps32·max|z| ; the same for their root mean square,
                 and for the differences of a token's views from its clean row
    entropy      2·max|plain − f64| + 8·eps32·max|z| : the difference of lse and Σ p·z
    gradients    2·‖plain − f64‖/‖f64‖ + eps(dtype)/2 + 2·eps32·max|z| : p = e^(z − lse) ;
                 and the entropy's bound where it has a gradient: dz = −p·(g + e·(log p + H)) + …
    loss         2·Σ|∂loss/∂logp|·|plain − f64| + 8·eps32·max(1, |loss|) ; to its gradients is added
                 what ∂loss/∂logp changes by if the log-probs change by their own bound

On Hopper the vendor's product truncates as ours does, so that plain PyTorch shows it too.
"""

import argparse
import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import roma
from bench import data
from bench.gpu.journal import done, start, tell
from bench.gpu.steps import PLANS
from bench.loss_case import plain_loss

_ROWS = 512  # of float64 logits at once: 0.6 GB at V = 152k
_EPS32 = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Case:
    """B sequences of T tokens on K views, a head [V, D], and options of the head."""

    name: str
    sequences: int
    length: int
    views: int
    depth: int
    vocab: int
    dtype: torch.dtype = torch.bfloat16
    options: bool = False
    """A bias, a softcap, a temperature by row and the entropy, all at once; the head alone."""

    @property
    def gib(self) -> float:
        """Memory that float64 needs."""
        return (3 * self.depth + 6 * _ROWS) * self.vocab * 8 / 2**30


FULL = {"depth": 4096, "vocab": 151_936}
CASES = {
    "essential": (
        Case("ragged", 6, 11, 2, 200, 1543),
        Case("few rows", 2, 4, 3, 256, 4000),
        Case("fp16", 4, 16, 1, 512, 32_000, torch.float16),
        Case("fp32", 2, 20, 1, 128, 1000, torch.float32),
        Case("full head", 2, 32, 4, **FULL),
        Case("many rows", 8, 256, 1, **FULL),
    ),
    "more": (
        *(Case(f"options {d}", 5, 13, 1, 200, 1544, getattr(torch, d), options=True)
          for d in ("bfloat16", "float16", "float32")),
        Case("options, few rows", 3, 5, 1, 256, 4000, options=True),
        Case("options, full head", 1, 128, 1, **FULL, options=True),
        Case("one row", 1, 1, 0, 64, 257),
        Case("one column more than a tile", 3, 50, 1, 64, 2049),
    ),
    "small": (
        Case("ragged", 6, 11, 2, 200, 1543),
        Case("few rows", 2, 4, 3, 256, 4000),
        Case("options", 5, 13, 1, 200, 1544, options=True),
    ),
    "interpreted": (
        Case("tiny fp32", 2, 5, 2, 48, 257, torch.float32),
        Case("tiny fp16", 2, 3, 1, 32, 200, torch.float16),
    ),
}  # fmt: skip


class Found(NamedTuple):
    """Of one way to compute: log-probs [R], gradients, the largest logit on the way."""

    logp: Tensor
    entropy: Tensor | None
    dstates: Tensor
    dweight: Tensor
    largest: float


def main(level: str, plan: str, device: str) -> None:
    """Tells every case that was not told before."""
    earlier = done()
    for case in CASES[level]:
        for what, check in {"head": head, "loss": loss}.items():
            item = f"{plan}, {case.name}, {what}"
            if item in earlier or (case.options and what == "loss"):
                continue
            start(item)
            if device == "cuda" and case.gib > torch.cuda.mem_get_info()[0] / 2**30:
                tell(item, "skipped", reason=f"float64 needs {case.gib:.0f} GiB")
                continue
            begin = time.perf_counter()
            with planned(plan) as backend:
                errors = check(case, backend, device)
            wrong = [f"{name} {value:.2e} exceeds {bound:.2e}"
                     for name, (value, bound) in errors.items() if not value <= bound]  # fmt: skip
            tell(
                item,
                "failed" if wrong else "ok",
                seconds=time.perf_counter() - begin,
                shape=str(shape_of(case)),
                reason="; ".join(wrong),
                **{name: value for name, (value, _) in errors.items()},
                **{f"{name}_bound": bound for name, (_, bound) in errors.items()},
            )
    if plan == "gluon" and device == "cuda":
        served()


def served() -> None:
    """Tells whether plan "gluon" ran its own kernels: where it cannot, the fused ones stand in."""
    from roma_kernels.linear_logprob.gluon import dlogits, forward

    start("gluon, its own kernels")
    functions = {id(x): x for module in (forward, dlogits) for x in vars(module).values()}
    found = [
        x for x in functions.values()
        if any(cache[0] for cache in getattr(x, "device_caches", {}).values())
    ]  # fmt: skip
    tell(
        "gluon, its own kernels",
        "ok" if len(found) >= 2 else "failed",
        kernels=len(found),
        reason="" if len(found) >= 2 else "forward and dlogits did not both run",
    )


@contextlib.contextmanager
def planned(plan: str) -> Iterator[str]:
    """The back end that a plan belongs to, with the plan in force."""
    if plan not in PLANS:
        yield plan
        return
    from roma_kernels.linear_logprob.triton import tuning

    with tuning.override(f"plan={plan}"):
        yield "triton"


Errors = dict[str, tuple[float, float]]
"""Of each quantity: what it is off by, and what it may be off by."""


def head(case: Case, backend: str, device: str) -> Errors:
    """linear_logprob, forward and backward, with a random upstream gradient."""
    made = data.make(shape_of(case), device)
    rows, weight, labels = made.rows, made.weight, made.labels
    generator = torch.Generator(device).manual_seed(1)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    options: dict[str, Any] = {}
    slopes = [normal(len(labels)), normal(len(labels)) if case.options else None]
    if case.options:
        bias = normal(case.vocab).to(case.dtype)
        tau = 0.5 + torch.rand(len(labels), generator=generator, device=device)
        options = {"bias": bias, "softcap": 20.0, "temperature": tau}
    leaves = [x.detach().clone().requires_grad_() for x in (rows, weight)]
    got = roma.linear_logprob(*leaves, labels, **options, entropy=case.options, backend=backend)
    outputs = [x for x in (got.logp, got.entropy) if x is not None]
    torch.autograd.backward(outputs, [s.to(o.dtype) for s, o in zip(slopes, outputs, strict=False)])  # type: ignore[union-attr]
    want, plain = (
        _lines(rows, weight, labels, slopes, options, dtype)
        for dtype in (torch.float64, torch.float32)
    )
    errors = _logp_errors(got.logp.detach(), plain, want, case.views + 1)
    if got.entropy is not None and want.entropy is not None and plain.entropy is not None:
        off, allowed = (_largest(x, want.entropy) for x in (got.entropy.detach(), plain.entropy))
        errors["entropy_max"] = (off, 2 * allowed + 8 * _EPS32 * want.largest)
    spread = errors["entropy_max"][1] if case.options else 0.0  # its error is a part of dz's
    found = _gradient_errors([x.grad for x in leaves], plain, want, case.dtype)
    return errors | {name: (off, bound + spread) for name, (off, bound) in found.items()}


def loss(case: Case, backend: str, device: str) -> Errors:
    """roma_loss, forward and backward."""
    made = data.make(shape_of(case), device)
    views, batch = case.views, (case.sequences, case.length)
    rows, weight, labels = made.rows, made.weight, made.labels
    nothing = [torch.zeros(len(labels), device=device), None]
    want, plain = (
        _lines(rows, weight, labels, nothing, {}, dtype) for dtype in (torch.float64, torch.float32)
    )
    options = loss_options(case, want.logp.view(views + 1, *batch)[0].float())
    values, slopes = [], []
    for found in (want, plain):
        leaf = found.logp.double().view(views + 1, *batch).requires_grad_()
        value = _loss(leaf, options)
        slopes.append(torch.autograd.grad(value, leaf)[0].flatten())
        values.append(float(value.detach()))
    leaves = [x.detach().clone().requires_grad_() for x in (made.states, weight)]
    states = leaves[0].view(views + 1, *batch, -1)
    out = roma.roma_loss(
        states[0], states[1:], leaves[1], made.tokens.view(batch), **options, backend=backend
    )
    out.loss.backward()
    right, eager = (
        _lines(rows, weight, labels, [g.float(), None], {}, dtype)
        for g, dtype in zip(slopes, (torch.float64, torch.float32), strict=True)
    )
    counted = options["mask"].flatten().repeat(views + 1)
    got = torch.cat([out.logp.detach()[None], out.view_logp.detach()]).flatten()
    got = torch.where(counted, got.double(), want.logp)  # a token that is not counted has none
    spread = float((slopes[0].abs() * (plain.logp.double() - want.logp).abs()).sum())
    allowed = 2 * spread + 8 * _EPS32 * max(1.0, abs(values[0]))
    grads = [leaves[0].grad.flatten(0, 1), leaves[1].grad]
    logp = _logp_errors(got, plain, want, views + 1)
    signs = torch.sign(torch.randn(slopes[0].shape, generator=torch.Generator().manual_seed(3)))
    nudged = want.logp + logp["logp_rms"][1] * signs.to(want.logp)
    leaf = nudged.view(views + 1, *batch).requires_grad_()
    moved = _relative(torch.autograd.grad(_loss(leaf, options), leaf)[0].flatten(), slopes[0])
    return {
        "loss": (abs(float(out.loss.detach()) - values[0]), allowed),
        **logp,
        **{
            name: (off, bound + moved)
            for name, (off, bound) in _gradient_errors(grads, eager, right, case.dtype).items()
        },
    }


def _lines(
    rows: Tensor,
    weight: Tensor,
    labels: Tensor,
    slopes: list[Tensor | None],
    options: dict[str, Any],
    dtype: torch.dtype,
) -> Found:
    """The head as one would write it, in float64, or with products as a careful user has them."""
    exact = dtype == torch.float64
    kept = torch.float64 if exact else weight.dtype
    head = weight.to(kept)
    dweight = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
    logp, entropy, dstates, largest = [], [], [], 0.0
    for first in range(0, len(rows), _ROWS):
        part = slice(first, first + _ROWS)
        states = rows[part].to(kept)
        z = _product(states, head.T, dtype).requires_grad_()
        y, h, size = _tail(z, labels[part], {**options, "part": part})
        total = (y * slopes[0][part].to(dtype)).sum()  # type: ignore[index]
        if slopes[1] is not None:
            total = total + (h * slopes[1][part].to(dtype)).sum()
        dz = torch.autograd.grad(total, z)[0].to(kept)
        largest = max(largest, size)
        dstates.append(_product(dz, head, dtype).to(kept))
        dweight += _product(dz.T, states, dtype)
        logp.append(y.detach())
        entropy.append(h.detach())
    ends = torch.cat(entropy) if slopes[1] is not None else None
    return Found(torch.cat(logp), ends, torch.cat(dstates), dweight.to(kept), largest)


def _tail(z: Tensor, labels: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, float]:
    """Log-prob and entropy from bare products, and the largest logit on the way."""
    largest = float(z.detach().abs().max())
    if "bias" in options:
        z = z + options["bias"].to(z.dtype)
        z = options["softcap"] * torch.tanh(z / options["softcap"])
        z = z / options["temperature"][options["part"]].to(z.dtype)[:, None]
    largest = max(largest, float(z.detach().abs().max()))
    log_p = torch.log_softmax(z, 1)
    return log_p.gather(1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(1), largest


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    if left.dtype == dtype:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=dtype)
    return left.to(dtype) @ right.to(dtype)


def loss_options(case: Case, clean: Tensor) -> dict[str, Any]:
    """Half of the sequences right, advantages of both signs, a policy that has moved a little."""
    device = clean.device
    generator = torch.Generator(device).manual_seed(2)
    numbers = torch.arange(case.sequences, device=device)
    noise = torch.randn(clean.shape, generator=generator, device=device)
    mask = torch.ones(clean.shape, dtype=torch.bool, device=device)
    mask[0, case.length // 2 + 1 :] = False
    return {
        "mask": mask,
        "advantages": torch.where(numbers % 2 == 0, 1.0, -1.0),
        "correct": numbers % 2 == 0,
        "old_logp": clean + 0.02 * noise,
        "aux_view": numbers % case.views if case.views else None,
        "config": roma.RomaConfig() if case.views else roma.RomaConfig(lambda_inv=0.0),
    }


def _loss(logp: Tensor, options: dict[str, Any]) -> Tensor:
    if len(logp) > 1:
        return plain_loss(logp[0], logp[1:], **options)
    # Without views only the clean term is left: the loss of one view that weighs nothing.
    config = replace(options["config"], lambda_aux=0.0)
    first = torch.zeros(len(logp[0]), dtype=torch.long, device=logp.device)
    return plain_loss(logp[0], logp, **{**options, "config": config, "aux_view": first})


def _logp_errors(got: Tensor, plain: Found, want: Found, per_token: int) -> Errors:
    rounding = 2 * _EPS32 * want.largest
    off, eager = (x.double() - want.logp for x in (got, plain.logp))
    errors = {
        "logp_max": (float(off.abs().max()), 2 * float(eager.abs().max()) + rounding),
        "logp_rms": (_rms(off), 2 * _rms(eager) + rounding),
    }
    if per_token > 1:
        gaps = [(x := e.view(per_token, -1))[1:] - x[0] for e in (off, eager)]
        errors["gap_rms"] = (_rms(gaps[0]), 2 * _rms(gaps[1]) + rounding)
    return errors


def _gradient_errors(
    got: list[Tensor | None], plain: Found, want: Found, dtype: torch.dtype
) -> Errors:
    errors, rounding = {}, 2 * _EPS32 * want.largest
    for name, mine, eager, right in (
        ("dhidden", got[0], plain.dstates, want.dstates),
        ("dweight", got[1], plain.dweight, want.dweight),
    ):
        bound = 2 * _relative(eager, right) + torch.finfo(dtype).eps / 2 + rounding
        errors[name] = (math.inf if mine is None else _relative(mine, right), bound)
    return errors


def _relative(got: Tensor, want: Tensor) -> float:
    size = float(want.norm())
    return float((got.double() - want).norm()) / size if size else float(got.double().norm())


def _largest(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).abs().max())


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def shape_of(case: Case) -> data.Shape:
    """Of its data."""
    return data.Shape(case.sequences * case.length, case.views, case.depth, case.vocab, case.dtype)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("level", choices=list(CASES))
    parser.add_argument("plan")
    parser.add_argument("device", choices=["cpu", "cuda"])
    main(**vars(parser.parse_args()))
