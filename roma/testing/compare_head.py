"""One call of linear_logprob held to the oracle: what the tests of the head share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from roma.testing import oracle, tensors, tolerance
from roma.testing.candidate import Backend, on
from roma.testing.matrix_unit import MatrixUnit
from roma.testing.strategies import HeadSpec
from roma_kernels.linear_logprob.api import linear_logprob
from roma_kernels.linear_logprob.reference import HeadReference


def run_oracle(
    inputs: dict, upstream: dict[str, Tensor], dtype: torch.dtype
) -> tuple[HeadReference, dict]:
    """The oracle on flattened rows; gradients of Σ upstream·output by hidden, weight and bias."""
    d = inputs["hidden"].shape[-1]
    leaves = {
        "hidden": inputs["hidden"].reshape(-1, d).to(dtype).requires_grad_(),
        "weight": inputs["weight"].to(dtype).requires_grad_(),
    }
    if inputs["bias"] is not None:
        leaves["bias"] = inputs["bias"].to(dtype).requires_grad_()
    temperature = inputs["temperature"]
    out = oracle.head(
        leaves["hidden"],
        leaves["weight"],
        inputs["tokens"].reshape(-1),
        bias=leaves.get("bias"),
        temperature=temperature.reshape(-1) if isinstance(temperature, Tensor) else temperature,
        softcap=inputs["softcap"],
        dtype=dtype,
    )
    total = sum(
        (g.reshape(-1).to(dtype) * getattr(out, name)).sum() for name, g in upstream.items()
    )
    grads = torch.autograd.grad(total, list(leaves.values()))
    return out, dict(zip(leaves, grads, strict=True))


def draw_upstream(spec: HeadSpec, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random gradients for logp and, if asked for, entropy; about a third of the rows get none."""
    g = tensors.generator(spec.seed + 1)
    active = torch.rand(spec.shape, generator=g) < 0.7
    names = ["logp", "entropy"] if spec.entropy else ["logp"]
    return {name: (torch.randn(spec.shape, generator=g) * active).to(dtype) for name in names}


def call(
    inputs: dict[str, Any], spec: HeadSpec, backend: Backend, *, frozen: tuple[str, ...] = ()
) -> tuple[Any, dict[str, Tensor]]:
    """Call linear_logprob on fresh leaves; returns its output and the leaves."""
    leaves = {
        name: inputs[name].detach().requires_grad_(name not in frozen)
        for name in ("hidden", "weight", "bias")
        if inputs[name] is not None
    }
    out = on(linear_logprob, backend)(
        leaves["hidden"],
        leaves["weight"],
        inputs["tokens"],
        bias=leaves.get("bias"),
        temperature=inputs["temperature"],
        softcap=inputs["softcap"],
        entropy=spec.entropy,
    )
    return out, leaves


def backward(out, upstream: dict[str, Tensor], **how) -> None:
    """Backward from the outputs named in upstream."""
    torch.autograd.backward([getattr(out, n) for n in upstream], list(upstream.values()), **how)


def row_scale(inputs: dict) -> Tensor | float:
    """1/τ, per row if τ is."""
    t = inputs["temperature"]
    return 1 / t.reshape(-1).double() if isinstance(t, Tensor) else 1 / t


def check_against_oracle(
    spec: HeadSpec,
    backend: Backend,
    frozen: tuple[str, ...] = (),
    unit: MatrixUnit | None = None,
) -> None:
    """Values and gradients of one call, each with got, want, eager and derived noise.

    `unit` is what multiplies bf16 and fp16 numbers, if their sums are not rounded to nearest.
    """
    inputs = spec.make()
    accumulate = tolerance.accumulator(spec.dtype)
    upstream = draw_upstream(spec, accumulate)
    want, want_grad = run_oracle(inputs, upstream, torch.float64)
    eager, eager_grad = run_oracle(inputs, upstream, accumulate)
    got, leaves = call(inputs, spec, backend, frozen=frozen)

    flat = inputs["hidden"].reshape(-1, spec.d)
    scale = row_scale(inputs)
    noise = tolerance.logp_noise(want, flat, inputs["weight"], scale, spec.dtype, unit)
    for name in ("logp", "lse", "entropy"):
        value = getattr(got, name)
        if name == "entropy" and not spec.entropy:
            assert value is None, "entropy: nobody asked for it, expected None"
            continue
        shape = inputs["hidden"].shape[:-1]
        assert value.shape == shape, f"{name}: expected {list(shape)}, got {list(value.shape)}"
        tolerance.check(
            name,
            value.reshape(-1),
            getattr(want, name),
            getattr(eager, name),
            dtype=accumulate,
            noise=noise,
        )

    backward(got, upstream)
    dz = tolerance.dlogits(
        want,
        inputs["tokens"].reshape(-1),
        upstream["logp"].reshape(-1),
        upstream["entropy"].reshape(-1) if spec.entropy else 0.0,
        0.0,
        noise,
        scale=scale,
        softcap=spec.softcap,
        dtype=spec.dtype,
    )
    noises = {
        "hidden": tolerance.dhidden_noise(dz, inputs["weight"], spec.dtype),
        "weight": tolerance.dweight_noise(dz, flat, spec.dtype),
        "bias": tolerance.dweight_noise(dz, torch.ones(len(flat), 1), spec.dtype)[:, 0],
    }
    for name, leaf in leaves.items():
        if name in frozen:
            assert leaf.grad is None, f"{name} is frozen"
            continue
        assert leaf.grad is not None, f"{name} got no gradient"
        tolerance.check(
            f"d{name}",
            leaf.grad.reshape(want_grad[name].shape),
            want_grad[name],
            eager_grad[name],
            dtype=leaf.dtype,
            noise=noises[name],
        )


def score(inputs: dict[str, Any], backend: Backend, **changes: Any) -> Any:
    """linear_logprob on the inputs of a HeadSpec."""
    return on(linear_logprob, backend)(**(inputs | changes))


def truth(inputs: dict[str, Any], dtype: torch.dtype = torch.float64) -> HeadReference:
    """The oracle on the same inputs, whose rows have one leading dimension."""
    return oracle.head(**inputs, dtype=dtype)


def row_noise(inputs: dict[str, Any], want: HeadReference) -> Tensor:
    """Rounding error of logp and lse at temperature 1."""
    return tolerance.logp_noise(
        want, inputs["hidden"], inputs["weight"], 1.0, inputs["hidden"].dtype
    )
