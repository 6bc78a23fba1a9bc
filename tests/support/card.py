"""Calls and data for the tests of a card: everything is drawn, and stays, on one device."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from torch import Tensor

import roma
from roma.testing import candidate, compare_whole

PUBLIC = {f.__name__: f for f in (roma.linear_logprob, roma.roma_loss, roma.roma_loss_from_logp)}


def there(name: str, device: str, **how: Any) -> Any:
    """A public function on a device, for tensors that come from the CPU and go back."""
    return candidate.on_device(
        functools.partial(PUBLIC[name], **{"backend": "triton"} | how), device
    )


def moved(case: dict[str, Any], device: str) -> dict[str, Any]:
    """The case on a device, with fresh leaves."""
    there = {n: x.to(device) if isinstance(x, Tensor) else x for n, x in case.items()}
    return compare_whole.on_leaves(there)


def draw(
    device: str, *, views: int, sequences: int, length: int, depth: int, vocab: int, **fields: Any
) -> dict[str, Any]:
    """Arguments of roma_loss, bf16: logits of standard deviation 5.3, views moved by 1 %.

    Every position counts; the first half of the sequences is right, the advantages are ±1.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    shape = (sequences, length)
    clean = normal(*shape, depth) * (5.3 / depth**0.5)
    moved = [clean * (1 + 0.01 * normal(*clean.shape)) for _ in range(views)]
    sequence = torch.arange(sequences, device=device)
    return {
        "hidden": clean.bfloat16(),
        "view_hidden": torch.stack(moved).bfloat16(),
        "weight": normal(vocab, depth).bfloat16(),
        "tokens": torch.randint(vocab, shape, generator=generator, device=device),
        "bias": None,
        "mask": torch.ones(shape, dtype=torch.bool, device=device),
        "advantages": 1.0 - 2 * (sequence % 2),
        "correct": sequence < (sequences + 1) // 2,
        "aux_view": sequence % max(views, 1),
        "config": roma.RomaConfig(log_ratio_clamp=100.0),
        **fields,
    }


def run(case: dict[str, Any], **how: Any) -> tuple[Any, list[Tensor]]:
    """The whole loss, and its gradients by all leaves that there are."""
    function = functools.partial(roma.roma_loss, **{"backend": "triton"} | how)
    out = compare_whole.call(case, function)
    leaves = [case[name] for name in compare_whole.LEAVES if case[name] is not None]
    return out, list(torch.autograd.grad(out.loss, leaves))


@contextmanager
def watched() -> Iterator[list[str]]:
    """Names of the kernels that Triton compiles, or brings to the device, inside the block."""
    seen: list[str] = []
    runtime = triton.knobs.runtime

    def compiled(*, repr: str, **_: Any) -> None:
        seen.append(f"compiled {repr}")

    def loaded(module: Any, function: Any, name: str, *_: Any) -> None:
        seen.append(f"loaded {name}")

    before = runtime.jit_post_compile_hook
    runtime.jit_post_compile_hook = compiled
    runtime.kernel_load_start_hook.add(loaded)
    try:
        yield seen
    finally:
        runtime.jit_post_compile_hook = before
        runtime.kernel_load_start_hook.remove(loaded)


@contextmanager
def launched(**kernels: Any) -> Iterator[set[str]]:
    """Which of some kernels are launched inside the block, by the names given here."""
    seen: set[str] = set()
    hooks = {name: lambda *_, name=name, **__: seen.add(name) for name in kernels}
    for name, kernel in kernels.items():
        kernel.pre_run_hooks.append(hooks[name])
    try:
        yield seen
    finally:
        for name, kernel in kernels.items():
            kernel.pre_run_hooks.remove(hooks[name])
