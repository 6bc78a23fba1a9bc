"""The warp-specialised kernels, run from their own source on a simulated multiprocessor.

The launchers run as they are. `support/multiprocessor.py` says what its model sees and what not.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.gluon_cases import Case, check_dlogits, check_forward
from support.gluon_language import GL, SparseMemory
from support.gluon_source import Translator
from support.multiprocessor import Fault
from support.simulated_kernel import SimulatedKernel
from torch import Tensor

from roma.testing import compare_head, compare_whole
from roma.testing.strategies import HEAD_DIFFICULTIES, HeadSpec, LossSpec
from roma_kernels.linear_logprob.gluon import dlogits, forward, launch, schedule
from roma_kernels.linear_logprob.rows import Active, Head, Rows
from roma_kernels.linear_logprob.triton import tile
from roma_kernels.linear_logprob.triton.tuning import override

AGENTS = ("producer", "consumer 0", "consumer 1", "copies", "products")
CHECKS = {"forward": check_forward, "dlogits": check_dlogits}


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Sizes on both sides of every block's edge, and any order."""
    tokens = draw(st.sampled_from([1, 31, 32, 33, 64, 65, 100]))
    return Case(
        tokens=tokens,
        before=draw(st.sampled_from([0, 5])),
        views=draw(st.sampled_from([0, 1, 3])),
        vocab=draw(st.sampled_from([1, 63, 64, 65, 100, 127, 128, 129, 257])),
        # One block, fewer blocks than slots, as many, more; the last one ragged or not.
        depth=draw(st.sampled_from([8, 16, 24, 48, 64, 80, 168])),
        dtype=draw(st.sampled_from([torch.bfloat16, torch.float16])),
        options=draw(st.booleans()),
        counted=draw(st.sampled_from([None, 0, 1, tokens // 2, tokens, tokens + 5])),
        start=draw(st.sampled_from([0, 7])),
        stages=draw(st.sampled_from([2, 3, 4, 5])),
        group=draw(st.sampled_from([1, 2, 3])),
        programs=draw(st.sampled_from([1, 2, 3, 7])),
        order=tuple(draw(st.permutations(AGENTS))[: draw(st.integers(0, len(AGENTS)))]),
        seed=draw(st.integers(0, 99)),
    )


FEWER = settings(max_examples=max(settings.default.max_examples // 3, 1))


@FEWER
@given(cases())
@example(Case(tokens=1, views=1, vocab=1, depth=8, stages=2))
def test_forward(case: Case) -> None:
    check_forward(case)


@FEWER
@given(cases())
@example(Case(tokens=1, views=1, vocab=1, depth=8, stages=2))
def test_dlogits(case: Case) -> None:
    check_dlogits(case)


AS_LAUNCHED = Case(
    tokens=70, vocab=600, depth=200, stages=launch.STAGES, programs=5,
    blocks=(launch.BLOCK_V, launch.BLOCK_D),
)  # fmt: skip


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("stages", [2, launch.STAGES])
def test_as_launched(name: str, stages: int) -> None:
    """The launchers' own blocks, the last tile ragged, and the programs of a small GPU."""
    CHECKS[name](replace(AS_LAUNCHED, stages=stages))


def test_another_slot_would_not_fit() -> None:
    with pytest.raises(Fault, match="shared memory"):
        check_forward(replace(AS_LAUNCHED, stages=launch.STAGES + 1))


def test_one_slot_is_refused_and_would_hang() -> None:
    with pytest.raises(Fault, match="static assertion"):
        check_forward(Case(stages=1))
    with pytest.raises(Fault, match="deadlock"):
        check_forward(Case(stages=1), ("gl.static_assert(STAGES >= 2)", "pass"))


# Each agent goes first in one, last in another; and one by chance.
ORDERS = [(), *((*AGENTS[i:], *AGENTS[:i]) for i in range(len(AGENTS)))]

# What a planted error is, the source and what replaces it, and how it shows.
PLANTED = {
    "no arrival when a product has ended": (
        "pred=depth > 0)", "pred=False)", "deadlock",
    ),
    "no arrival for the last product": (
        "tile = warpgroup_mma_wait(num_outstanding=0, deps=(tile,))\n"
        "    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)",
        "tile = warpgroup_mma_wait(num_outstanding=0, deps=(tile,))",
        "deadlock",
    ),
    "an arrival too many": ("pred=depth > 0)", "pred=True)", "overwritten|passes"),
    "an arrival of one consumer counts": (
        "mbarrier.init(empty.index(slot), count=2)",
        "mbarrier.init(empty.index(slot), count=1)",
        "overwritten|before its copy",
    ),
    "the producer's phase is wrong": (
        "((step // STAGES) & 1) ^ 1)", "(step // STAGES) & 1)", "deadlock",
    ),
    "the consumers' phase is wrong": (
        "mbarrier.wait(full.index(slot), (step // STAGES) & 1)",
        "mbarrier.wait(full.index(slot), ((step // STAGES) & 1) ^ 1)",
        "never filled|before its copy",
    ),
    "a phase that does not turn": (
        "mbarrier.wait(full.index(slot), (step // STAGES) & 1)",
        "mbarrier.wait(full.index(slot), 0)",
        "passes",
    ),
    "steps forgotten between tiles": ("return tile, step", "return tile, 0 * step", "passes"),
    "a ring one slot short": (
        "hidden.dtype, [STAGES * 2,", "hidden.dtype, [STAGES * 2 - 1,", "index",
    ),
    "a producer that is a slot short": (
        "slot = step % STAGES\n            # A new",
        "slot = step % (STAGES - 1)\n            # A new",
        "passes",
    ),
    "a slot is free while its product runs": (
        "mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=depth > 0)\n",
        "mbarrier.arrive(empty.index(step % STAGES), count=1, pred=depth + BLOCK_D < D)\n",
        "overwritten",
    ),
    "two products outstanding": ("num_outstanding=1", "num_outstanding=2", "overwritten"),
    "no wait for the last product": ("num_outstanding=0", "num_outstanding=1", "used"),
    "fewer bytes than come": (
        "(2 * HALF + BLOCK_V) * BLOCK_D * 2", "(HALF + BLOCK_V) * BLOCK_D * 2",
        "before its copy",
    ),
    "more bytes than come": (
        "(2 * HALF + BLOCK_V) * BLOCK_D * 2", "(3 * HALF + BLOCK_V) * BLOCK_D * 2", "deadlock",
    ),
    "no fence": ("    fence_async_shared()\n", "", "fence"),
    "the halves exchanged": ("slot * 2 + half", "slot * 2 + 1 - half", "error"),
    "the next slice's rows": ("[row + HALF, depth]", "[row, depth]", "error"),
    "the next block's weights": ("[col, depth]", "[col, depth + BLOCK_D]", "a block at"),
    "columns beyond the vocabulary": ("if col + BLOCK_V > V:", "if col > V:", "total|dz"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_error_is_found(planted: str, name: str) -> None:
    """In whichever order things happen, and by what it is in some of them."""
    before, after, shows = PLANTED[planted]
    found = []
    for order in ORDERS:
        with pytest.raises((Fault, AssertionError)) as error:
            CHECKS[name](Case(counted=90, order=order), (before, after))
        found.append(str(error.value))
    assert any(re.search(shows, text) for text in found), found


# Errors that need a case of their own to show.
SPECIAL = {
    "a walk past the last row tile": (
        Case(tokens=200, group=3), "inside % height, inside // height",
        "inside % GROUP, inside // GROUP",
    ),
    "a last tile that lacks one column": (
        Case(vocab=127), "if col + BLOCK_V > V:", "if col + BLOCK_V - 1 > V:",
    ),
    "a token of the next slice taken for a target": (
        Case(), "(local < gl.minimum(BLOCK_V, V - col))", "(local < BLOCK_V)",
    ),
    "a tile that looks for no target": (Case(), "if found > 0:", "if found > 1:"),
    "registers that there are not": (Case(), "[REGISTERS, 24]", "[REGISTERS + 8, 24]"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("planted", SPECIAL)
def test_a_special_error_is_found(planted: str, name: str) -> None:
    case, *edit = SPECIAL[planted]
    CHECKS[name](case)
    with pytest.raises((Fault, AssertionError)):
        CHECKS[name](case, tuple(edit))


WIDE = 2**25  # entries of the vocabulary


@pytest.mark.parametrize("cast", [True, False])
def test_forward_beyond_32_bits(cast: bool) -> None:
    """Partial sums at offsets past 2³¹: the last tile of 20,000 rows and 33 million entries."""
    count, parts = 20_000, WIDE // launch.BLOCK_V
    rows = Rows(_zeros(count), None, torch.zeros(count, dtype=torch.int64), None, None, None)
    turns = parts * math.ceil(count / launch.BLOCK_R)
    memories = {name: SparseMemory(parts * count, np.float32) for name in ("peak_ptr", "total_ptr")}
    edits = [] if cast else [("gl.cast(vocab_tile, gl.int64) * R", "vocab_tile * R")]
    kernel = SimulatedKernel(
        forward._gluon_fwd_kernel, *edits, numbers=[turns - 1], instead=memories
    )
    blank = torch.empty(1, device="meta")
    with mock.patch.object(forward, "_gluon_fwd_kernel", kernel):

        def call() -> None:
            launch.sweep_tiles(
                (blank, blank, None, torch.zeros(count)), _zeros(count), rows,
                Head(_zeros(WIDE), None, 1.0, None, 0), first=0, multiprocessors=turns,
            )  # fmt: skip

        if not cast:
            with pytest.raises((Fault, FloatingPointError)):
                call()
            return
        call()
    last = range(count // launch.BLOCK_R * launch.BLOCK_R, count)
    assert memories["total_ptr"].values == {(parts - 1) * count + row: 256.0 for row in last}


def _zeros(rows: int) -> Tensor:
    return torch.zeros(1, 8, dtype=torch.bfloat16).expand(rows, 8)


@pytest.mark.parametrize("cast", [True, False])
def test_dlogits_beyond_32_bits(cast: bool) -> None:
    """A dz of 200 rows of 33 million columns: its last tile lies past 2³¹."""
    count = 200
    vectors = torch.zeros(4, count)
    active = Active(
        torch.arange(count), count, None, _zeros(count), torch.zeros(count, dtype=torch.int64),
        None, vectors[0], None, vectors[1], None, None,
    )  # fmt: skip
    turns = WIDE // launch.BLOCK_V * 2
    memory = SparseMemory(count * WIDE, torch.bfloat16)
    edits = [] if cast else [("gl.cast(rows, gl.int64)[:, None]", "rows[:, None]")]
    kernel = SimulatedKernel(
        dlogits._gluon_dlogits_kernel, *edits, numbers=[turns - 1], instead={"dz_ptr": memory}
    )
    dz = torch.empty(count, WIDE, device="meta", dtype=torch.bfloat16)
    with mock.patch.object(dlogits, "_gluon_dlogits_kernel", kernel):
        head = Head(_zeros(WIDE), None, 1.0, None, 0)
        if not cast:
            with pytest.raises(Fault, match="an access"):
                launch.dlogits(dz, active, head, multiprocessors=turns)
            return
        launch.dlogits(dz, active, head, multiprocessors=turns)
    cols = range(WIDE - launch.BLOCK_V, WIDE)
    want = {row * WIDE + col for row in range(launch.BLOCK_R, count) for col in cols}
    assert memory.values.keys() == want


@pytest.mark.parametrize("group", [1, 2, 16])
def test_tiles_are_walked_as_the_triton_kernels_walk_them(group: int) -> None:
    mine = Translator({"gl": GL}).kernel(schedule.tile_at)
    other = Translator({"tl": GL}).kernel(tile._tile_at)
    for row_tiles, vocab_tiles in itertools.product((1, 2, 15, 16, 17, 40), (1, 3, 7)):
        turns = [
            tuple(map(int, mine.at_once(turn, row_tiles, vocab_tiles, group)))
            for turn in range(row_tiles * vocab_tiles)
        ]
        assert sorted(turns) == list(itertools.product(range(row_tiles), range(vocab_tiles)))
        assert turns == [
            tuple(map(int, other.at_once(turn, row_tiles, vocab_tiles, group)))
            for turn in range(row_tiles * vocab_tiles)
        ]


def test_what_the_kernels_cannot_take_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    states, weight = torch.zeros(4, 64).bfloat16(), torch.zeros(9, 64).bfloat16()

    def reason(chip="sm_90", states=states, weight=weight, bias=False, softcap=False) -> str:
        return launch.supports(chip, states, weight, bias=bias, softcap=softcap)

    assert reason() == ""
    assert "sm_100" in reason("sm_100")
    assert "float32" in reason(states=states.float())
    assert "bias" in reason(bias=True) and "softcap" in reason(softcap=True)
    for odd in (torch.zeros(9, 68).bfloat16()[:, :64], torch.zeros(64, 9).bfloat16().T):
        assert "copy engine" in reason(weight=odd)
    monkeypatch.setattr(launch.triton, "__version__", "3.10.0")
    assert "3.10.0" in reason()


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Plan "gluon", with simulated kernels, which must have run."""
    names = {forward: "_gluon_fwd_kernel", dlogits: "_gluon_dlogits_kernel"}
    kernels = []
    for module, name in names.items():
        kernels.append(SimulatedKernel(getattr(module, name)))
        monkeypatch.setattr(module, name, kernels[-1])
    with override("plan=gluon chip=sm_90"):
        yield
    assert all(kernel.memories for kernel in kernels)


@pytest.mark.usefixtures("plan")
@pytest.mark.parametrize("difficulty", HEAD_DIFFICULTIES)
def test_the_plan_against_the_oracle(difficulty: str) -> None:
    """The whole operator, forward and backward, with the simulated kernels in it."""
    for i, dtype in enumerate((torch.bfloat16, torch.float16)):
        spec = HeadSpec(
            shape=(150,), d=64, v=300, difficulty=difficulty, dtype=dtype, entropy=bool(i),
            temperature=("one", "rows")[i],
        )  # fmt: skip
        compare_head.check_against_oracle(spec, "triton")


@pytest.mark.usefixtures("plan")
def test_the_plan_in_the_loss() -> None:
    """Clean rows and views side by side, and a gradient of some of them alone."""
    spec = LossSpec(b=3, t=30, k=2, d=64, v=300, dtype=torch.bfloat16)
    compare_whole.check_against_oracle(spec, "triton")
