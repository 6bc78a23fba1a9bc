"""The ten traps of losses over a large vocabulary, each of which has bitten a known project.

1 to 4, in the soft-max and its sums.

Every test holds the back end to the rule and then shows that it would have noticed: the faulty form
stands in the test, small and in plain PyTorch, and the same comparison must refuse it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from roma.testing import compare_head, strategies, tolerance
from roma.testing.strategies import HeadSpec


def hold(inputs: dict[str, Any], backend: str, faulty: dict[str, Tensor]) -> None:
    """The back end's logp and lse pass; each faulty one named in `faulty` is refused."""
    want, eager = compare_head.truth(inputs), compare_head.truth(inputs, torch.float32)
    got = compare_head.score(inputs, backend)
    how = {"dtype": torch.float32, "noise": compare_head.row_noise(inputs, want)}
    for name in ("logp", "lse"):
        tolerance.check(name, getattr(got, name), getattr(want, name), getattr(eager, name), **how)
    for name, wrong in faulty.items():
        assert tolerance.refuses(name, wrong, getattr(want, name), getattr(eager, name), **how), (
            f"faulty {name} passed"
        )


@pytest.mark.parametrize("v", [1, 2, 127, 129, 255, 257, 1023, 2049])
def test_1_padded_lanes_do_not_count(v: int, backend: str) -> None:
    """V just off a multiple of a block, logits far below 0: one lane of exp(0) would own it all."""
    inputs = HeadSpec(shape=(5,), v=v, difficulty="below_zero").make()
    logits = inputs["hidden"] @ inputs["weight"].T
    padded = torch.nn.functional.pad(
        logits, (0, 128 - v % 128)
    )  # the fault: the tail's logits are 0, not -∞
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
    """Why it stayed hidden for months.

    With equal weights and logits near 0 a padded lane changes lse by log(128/127).
    """
    uniform = HeadSpec(shape=(5,), v=127, difficulty="zero_rows").make()
    error = math.log(128 / 127)
    assert error < 1e-2
    hold(
        uniform, backend, {"lse": torch.full((5,), math.log(128))}
    )  # and yet this comparator sees it


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_2_logits_stay_in_float32(dtype: torch.dtype, backend: str) -> None:
    """Half-precision inputs, float32 logits.

    The error stays a thousand times below that of rounded logits.
    """
    inputs = HeadSpec(shape=(17,), d=33, v=257, dtype=dtype).make()
    rounded = (inputs["hidden"].float() @ inputs["weight"].float().T).to(dtype).float()  # the fault
    lse = torch.logsumexp(rounded, dim=1)
    hold(
        inputs,
        backend,
        {"lse": lse, "logp": rounded.gather(1, inputs["tokens"][:, None])[:, 0] - lse},
    )


@pytest.mark.parametrize("dtype", strategies.DTYPES)
def test_2_logp_is_never_positive(dtype: torch.dtype, backend: str) -> None:
    """Target logit and lse from one accumulator: logp ≤ 0 to the last bit where p ≈ 1."""
    inputs = HeadSpec(shape=(257,), d=33, v=129, dtype=dtype, difficulty="peaked_tail").make()
    assert bool((compare_head.score(inputs, backend).logp <= 0).all())
    # The fault: the target logit from a product of its own, summed in another order.
    hidden, weight = inputs["hidden"].float(), inputs["weight"].float()
    target = (hidden.flip(1) * weight[inputs["tokens"]].flip(1)).cumsum(dim=1)[:, -1]
    assert bool((target - torch.logsumexp(hidden @ weight.T, dim=1) > 0).any())


def test_3_chunks_accumulate_in_float32(backend: str) -> None:
    """DW over 2048 rows in bfloat16: one rounding at the end, not one per chunk."""
    spec = HeadSpec(shape=(2048,), d=8, v=65, dtype=torch.bfloat16)
    inputs, upstream = spec.make(), {"logp": torch.ones(2048)}
    want, want_grad = compare_head.run_oracle(inputs, upstream, torch.float64)
    _, eager_grad = compare_head.run_oracle(inputs, upstream, torch.float32)
    noise = compare_head.row_noise(inputs, want)
    dz = tolerance.dlogits(
        want, inputs["tokens"], upstream["logp"], 0.0, 0.0, noise, scale=1.0, softcap=None,
        dtype=spec.dtype
    )  # fmt: skip
    how = {
        "dtype": torch.bfloat16,
        "noise": tolerance.dweight_noise(dz, inputs["hidden"], spec.dtype),
    }
    out, leaves = compare_head.call(inputs, spec, backend)
    out.logp.backward(upstream["logp"])
    tolerance.check(
        "dweight", leaves["weight"].grad, want_grad["weight"], eager_grad["weight"], **how
    )

    faulty = torch.zeros(65, 8, dtype=torch.bfloat16)
    for rows in torch.arange(2048).split(2):  # the fault: 1024 chunks, each sum rounded to bfloat16
        faulty += (dz.value[rows].float().T @ inputs["hidden"][rows].float()).bfloat16()
    assert tolerance.refuses("dweight", faulty, want_grad["weight"], eager_grad["weight"], **how)


def test_4_strides_past_two_to_the_31(tmp_path: Path, backend: str) -> None:
    """Row 2 of hidden and of W begins 2^31 elements into its storage; a sparse file holds it."""
    inputs = HeadSpec(shape=(3,), d=8, v=3).make()
    wide = {}
    for name in ("hidden", "weight"):
        flat = np.memmap(tmp_path / name, np.float32, "w+", shape=(2**31 + 8,))
        wide[name] = torch.from_numpy(flat).as_strided((3, 8), (2**30, 1)).copy_(inputs[name])
    # The fault: an offset of 32 bits wraps around, and row 2 is row 0.
    wrapped = compare_head.score(inputs | {"hidden": inputs["hidden"][[0, 1, 0]]}, "reference")
    hold(inputs | wide, backend, {"logp": wrapped.logp, "lse": wrapped.lse})
    grads = []
    for case in (inputs, inputs | wide):
        out, leaves = compare_head.call(case, HeadSpec(shape=(3,)), backend)
        out.logp.sum().backward()
        grads.append(leaves)
    for name in ("hidden", "weight"):
        off = (grads[0][name].grad - grads[1][name].grad).abs().max()
        assert off <= tolerance.many(float(grads[0][name].grad.abs().max()))


@pytest.mark.gpu
def test_4_more_than_two_to_the_31_logits() -> None:
    """Row·V passes 2^31 in the last rows.

    Their values and the last column of dW must still be right.
    """
    rows, v, d = 2**16 + 8, 2**15 + 1, 8
    spec = HeadSpec(shape=(rows,), d=d, v=v)
    inputs = {n: x.cuda() if isinstance(x, Tensor) else x for n, x in spec.make().items()}
    out, leaves = compare_head.call(inputs, spec, "auto")
    upstream = torch.zeros(rows, device="cuda")
    upstream[-4:] = 1.0
    out.logp.backward(upstream)
    last = {n: x.detach().cpu() if isinstance(x, Tensor) else x for n, x in inputs.items()}
    last |= {"hidden": last["hidden"][-4:], "tokens": last["tokens"][-4:]}
    ones = {"logp": torch.ones(4)}
    want, want_grad = compare_head.run_oracle(last, ones, torch.float64)
    eager, eager_grad = compare_head.run_oracle(last, ones, torch.float32)
    noise = compare_head.row_noise(last, want)
    tolerance.check(
        "logp", out.logp[-4:].cpu(), want.logp, eager.logp, dtype=torch.float32, noise=noise
    )
    dz = tolerance.dlogits(
        want, last["tokens"], ones["logp"], 0.0, 0.0, noise, scale=1.0, softcap=None,
        dtype=torch.float32
    )  # fmt: skip
    spread = tolerance.dweight_noise(dz, last["hidden"], torch.float32)
    tolerance.check(
        "dweight",
        leaves["weight"].grad.cpu(),
        want_grad["weight"],
        eager_grad["weight"],
        dtype=torch.float32,
        noise=spread,
    )
    # The fault: an offset kept in 32 bits is negative.
    assert (rows - 1) * v > torch.iinfo(torch.int32).max
