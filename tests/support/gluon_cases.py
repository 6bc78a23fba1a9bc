"""Calls of the warp-specialised kernels' launchers, simulated and compared with float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
from support.simulated_kernel import SimulatedKernel
from torch import Tensor

from roma.testing import tolerance
from roma_kernels.linear_logprob.gluon import dlogits, forward, launch
from roma_kernels.linear_logprob.rows import Active, Head, Rows


@dataclass(frozen=True)
class Case:
    """A call of a launcher, the blocks, and an order in which things happen."""

    tokens: int = 100
    """Of this launch."""
    before: int = 0
    """Tokens of an earlier launch."""
    views: int = 1
    vocab: int = 90
    depth: int = 40
    dtype: torch.dtype = torch.bfloat16
    options: bool = True
    """Entropy, a temperature by token, fp16's loss scale."""
    counted: int | None = None
    """Tokens that are computed, of all; None: every one, and the kernel is not told."""
    start: int = 7
    """The first token id of the slice of the vocabulary; ids reach beyond both of its ends."""
    stages: int = 3
    group: int = 2
    programs: int = 2
    blocks: tuple[int, int] = (64, 16)
    order: tuple[str, ...] = ()
    seed: int = 0

    def made(self) -> tuple[Rows, Head, Tensor]:
        """Rows, a head and the states of this launch's rows."""
        draw, tokens = torch.Generator().manual_seed(self.seed), self.before + self.tokens
        rows = self.tokens * (self.views + 1)
        states = torch.randn(rows, self.depth, generator=draw).to(self.dtype)
        weight = torch.randn(self.vocab, self.depth, generator=draw).to(self.dtype)
        scale = 0.5 + torch.rand(tokens, generator=draw)
        made = Rows(
            hidden=states.new_empty(tokens, self.depth),
            view_hidden=states.new_empty(self.views, tokens, self.depth),
            tokens=torch.randint(self.vocab + 2 * self.start, (tokens,), generator=draw),
            row_scale=scale if self.options else None,
            index=None,
            num_tokens=None if self.counted is None else torch.tensor(self.counted),
        )
        return made, Head(weight, None, 0.7, None, self.start), states


def simulated(module, name: str, case: Case, *edits: tuple[str, str]):
    """A kernel in its module's place, with the case's blocks, and what replaces it."""
    kernel = SimulatedKernel(getattr(module, name), *edits, order=case.order, seed=case.seed)
    patch = mock.patch.multiple(launch, BLOCK_V=case.blocks[0], BLOCK_D=case.blocks[1])
    return kernel, mock.patch.object(module, name, kernel), patch


def _by_row(case: Case, rows: Rows, head: Head) -> tuple[Tensor, Tensor]:
    """1/τ [R, 1], and the token [R] as the slice of the vocabulary counts."""
    scale = torch.full((len(rows.tokens),), head.scale)
    if rows.row_scale is not None:
        scale = rows.row_scale
    scale, token = (
        x[case.before :].repeat_interleave(rows.per_token) for x in (scale, rows.tokens)
    )
    return scale[:, None], token - case.start


def check_forward(case: Case, *edits: tuple[str, str]) -> None:
    """Sums of every tile and targets against float64; each stored once, and nothing else."""
    rows, head, states = case.made()
    count, block = len(states), case.blocks[0]
    parts = math.ceil(case.vocab / block)
    peaks, totals, moments = torch.full((3, parts, count), torch.nan)
    targets = torch.zeros(count)
    kernel, patched, blocks = simulated(forward, "_gluon_fwd_kernel", case, *edits)
    with patched, blocks:
        launch.sweep_tiles(
            (peaks, totals, moments if case.options else None, targets), states, rows, head,
            first=case.before * rows.per_token, multiprocessors=case.programs,
            stages=case.stages, group=case.group,
        )  # fmt: skip
    known = case.tokens if case.counted is None else case.counted - case.before
    counted = min(max(known, 0), case.tokens) * rows.per_token
    scale, token = _by_row(case, rows, head)
    inside = (token >= 0) & (token < case.vocab) & (torch.arange(count) < counted)

    def oracle(dtype: torch.dtype) -> list[Tensor]:
        z = (states.to(dtype) @ head.weight.to(dtype).T) * scale
        found = z.gather(1, token.clamp(0, case.vocab - 1)[:, None])[:, 0] * inside
        filled = torch.nn.functional.pad(z, (0, parts * block - case.vocab), value=-torch.inf)
        filled = filled.view(count, parts, block).permute(1, 0, 2)[:, :counted]
        peak = filled.amax(2)
        weights = (filled - peak[:, :, None]).exp()
        return [peak, weights.sum(2), (weights * filled.nan_to_num(neginf=0.0)).sum(2), found]

    got = [peaks[:, :counted], totals[:, :counted], moments[:, :counted], targets]
    for name, mine, want, eager in zip(
        ("peak", "total", "moment", "target"), got, oracle(torch.float64), oracle(torch.float32),
        strict=True,
    ):  # fmt: skip
        if name != "moment" or case.options:
            noise = tolerance.few(want.abs())
            tolerance.check(name, mine, want, eager, dtype=torch.float32, noise=noise)
    for name, memory in kernel.memories.items():
        if name in ("peak_ptr", "total_ptr", "moment_ptr"):
            stored, beyond = np.split(memory.stored, [parts * count])
            stored = stored.reshape(parts, count)
            assert (stored[:, :counted] == 1).all(), f"{name}: not stored once"
            assert not stored[:, counted:].any() and not beyond.any(), f"{name}: stored beyond"
    stored = kernel.memories["target_ptr"].stored
    assert (stored == inside.numpy()).all(), "target: not stored once"


def check_dlogits(case: Case, *edits: tuple[str, str]) -> None:
    """Dz against float64, zeros up to a multiple of 64 columns, and nothing else stored."""
    rows, head, states = case.made()
    count, draw = len(states), torch.Generator().manual_seed(case.seed + 1)
    scale, token = _by_row(case, rows, head)
    logits = (states.double() @ head.weight.double().T) * scale
    dlogp, dentropy = torch.randn(2, count, generator=draw)
    lse = logits.logsumexp(1)  # of a slice: the whole vocabulary's would be more
    entropy = lse - (logits.softmax(1) * logits).sum(1)
    active = Active(
        rows=torch.arange(count), out_of=count, num_active=None, states=states,
        tokens=token + case.start, row_scale=scale[:, 0] if case.options else None,
        lse=lse.float(), entropy=entropy.float() if case.options else None, dlogp=dlogp,
        dentropy=dentropy if case.options else None,
        loss_scale=torch.tensor(8.0) if case.options else None,
    )  # fmt: skip
    padded = math.ceil(case.vocab / 64) * 64
    whole = torch.full((count, padded + 64), torch.nan, dtype=case.dtype)
    kernel, patched, blocks = simulated(dlogits, "_gluon_dlogits_kernel", case, *edits)
    with patched, blocks:
        launch.dlogits(
            whole[:, : case.vocab], active, head,
            multiprocessors=case.programs, stages=case.stages, group=case.group,
        )  # fmt: skip

    def oracle(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Dz, and the size of the terms that it is the sum of."""
        z = (states.to(dtype) @ head.weight.to(dtype).T) * scale
        log_p = z - lse.to(dtype)[:, None]
        p = log_p.exp()
        g, e = dlogp.to(dtype)[:, None], dentropy.to(dtype)[:, None] * case.options
        target = (token[:, None] == torch.arange(case.vocab)).to(dtype)
        dz = g * (target - p) - e * p * (log_p + entropy.to(dtype)[:, None])
        size = g.abs() * (target + p) + e.abs() * p * (z.abs() + lse.abs()[:, None])
        factor = scale * (8 if case.options else 1)
        pads = (0, padded - case.vocab)
        return torch.nn.functional.pad(dz * factor, pads), size * factor

    want, size = oracle(torch.float64)
    eager = oracle(torch.float32)[0].to(case.dtype)
    got = whole[:, :padded]
    tolerance.check("dz", got, want, eager, dtype=case.dtype, noise=tolerance.few(size))
    assert (got[:, case.vocab :] == 0).all(), "dz: columns beyond the vocabulary are not zero"
    stored = kernel.memories["dz_ptr"].stored.reshape(count, padded + 64)
    assert (stored[:, :padded] == 1).all(), "dz: not stored once"
    assert (stored[:, padded:] == 0).all(), "dz: stored beyond its columns"
