"""Run as a program, without Triton's interpreter: which launches `bench.compiled` would miss.

Prints a JSON object: chip → the launches of drawn calls that are not among those it compiles.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor

import roma
from bench.compiled.cases import FORMS, calls
from bench.compiled.chips import CHIPS
from bench.compiled.launches import recorded
from roma_kernels.linear_logprob.triton import tuning


def drawn_head(draw: random.Random) -> None:
    """`linear_logprob` as a trainer calls it."""
    rows, depth = draw.choice((1, 7, 64, 65, 200)), draw.choice((65, 72, 100, 128, 256))
    vocab = draw.choice((1, 16, 1000, 5000))
    dtype = draw.choice((torch.bfloat16, torch.bfloat16, torch.float16, torch.float32))
    given = {name: draw.random() < 0.5 for name in ("bias", "temperature", "softcap", "entropy")}
    if dtype == torch.float16:  # of which the plain and the hardest are compiled
        given = dict.fromkeys(given, draw.random() < 0.5)
    hidden = torch.ones(rows, depth, dtype=dtype).requires_grad_(draw.random() < 0.8)
    head = torch.ones(vocab, depth, dtype=dtype).requires_grad_()
    found = roma.linear_logprob(
        hidden,
        head,
        torch.zeros(rows, dtype=torch.int64),
        bias=torch.zeros(vocab, dtype=dtype) if given["bias"] else None,
        temperature=torch.ones(rows) if given["temperature"] else 0.7,
        softcap=20.0 if given["softcap"] else None,
        entropy=given["entropy"],
        workspace=draw.choice((None, 1)),
        backend="triton",
    )
    (found.logp.sum() + (found.entropy.sum() if given["entropy"] else 0)).backward()


def drawn_loss(draw: random.Random) -> None:
    """`roma_loss` as a trainer calls it."""
    views, depth, vocab = draw.choice((0, 1, 2, 3, 4, 8, 16)), draw.choice((72, 128)), 1000
    lengths = [draw.randrange(1, 40) for _ in range(draw.randrange(1, 6))]
    packed, tokens = draw.random() < 0.5, max(lengths)
    shape = (sum(lengths),) if packed else (len(lengths), tokens)
    mask = torch.ones(shape, dtype=torch.bool)
    if not packed:
        mask = torch.arange(tokens) < torch.tensor(lengths)[:, None]
    over = draw.choice(("sequence", "token", "batch", "mean"))
    ends = torch.tensor([0, *lengths]).cumsum(0)
    view_states = torch.ones(views, *shape, depth, dtype=torch.bfloat16)
    rows = None
    if draw.random() < 0.5:  # all pairs, one view after another
        size, starts = (
            (len(mask), ends[:-1]) if packed else (len(lengths), torch.arange(len(lengths)))
        )
        view_states, rows = view_states.flatten(0, 1), torch.arange(views)[:, None] * size + starts
    # Other objectives are compiled with four views.
    form = draw.choice(({}, *FORMS)) if views == 4 else {}
    reference = "ref_unbiased" in form
    roma.roma_loss(
        torch.ones(*shape, depth, dtype=torch.bfloat16).requires_grad_(),
        view_states.requires_grad_(),
        torch.ones(vocab, depth, dtype=torch.bfloat16).requires_grad_(),
        torch.zeros(shape, dtype=torch.int64),
        mask=mask,
        advantages=torch.ones(len(lengths)),
        correct=torch.ones(len(lengths), dtype=torch.bool),
        ref_logp=torch.zeros(shape) if reference else None,
        aux_view=torch.zeros(len(lengths), dtype=torch.int64) if views else None,
        rollout_weight=torch.ones(shape) if form and draw.random() < 0.5 else None,
        cu_seqlens=ends.int() if packed else None,
        view_rows=rows,
        config=roma.RomaConfig(
            worst_over=over, lambda_inv=float(views > 0), ref_coef=0.1 * reference, **form
        ),
        backend="triton",
    ).loss.backward()


def drawn(plan: str, seed: int) -> Iterator[Callable[[], None]]:
    """Calls under a plan."""
    for number in range(60):
        draw = random.Random(f"{seed} {number}")

        def call(draw: random.Random = draw, number: int = number) -> None:
            with tuning.override(f"plan={plan}"):
                (drawn_loss if number % 3 == 0 else drawn_head)(draw)

        yield call


def unmultiplied(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    """In place of torch.mm, whose numbers decide no launch and take a quarter of the time."""
    assert a.shape[1] == b.shape[0]
    return out if out is not None else a.new_zeros(len(a), b.shape[1])


def main() -> None:
    torch.set_num_threads(1)
    missed: dict[str, list[str]] = {}
    with mock.patch("torch.mm", unmultiplied):
        for name in ("sm_80", "sm_90", "gfx942"):
            target = CHIPS[name].target
            known = set(recorded(name, target, calls(name, every=True)))
            plans = ("triton", "vendor", *(["gluon"] if name == "sm_90" else []))
            found = {
                launch
                for plan in plans
                for launch in recorded(name, target, drawn(plan, len(missed)))
            }
            missed[name] = sorted(f"{x.label}: {x.variant}" for x in found - known)
    print(json.dumps(missed))


if __name__ == "__main__":
    main()
