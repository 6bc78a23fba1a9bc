"""The calls that a user can make, as far as they decide what Triton compiles.

That is: dtypes, which options there are, whether rows are few or many, K, the plan, and what is a
multiple of 16: addresses, strides, sizes. All sizes are small, so a call takes milliseconds.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

from roma_kernels.linear_logprob.api import linear_logprob
from roma_kernels.linear_logprob.triton import tuning
from roma_kernels.roma_loss.api import roma_loss
from roma_kernels.roma_loss.config import PenaltyRatio, RomaConfig, WorstOver

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
VOCAB = 4099  # odd, and of several tiles of the backward

OPTIONS = ("bias", "softcap", "entropy", "row_temperature")
ALL = frozenset(OPTIONS)
# What the loss's own kernels are compiled for: options of a call.
FORMS: tuple[dict[str, Any], ...] = (
    {"ratio_level": "sequence"},
    {"ratio_level": "sequence", "ref_unbiased": True},
    {"ref_unbiased": True},
    {"main": "cispo", "clip_high": 5.0},
    {"main": "cispo", "clip_high": 5.0, "ratio_level": "sequence"},
    {"main": "sapo"},
    {"main": "sapo", "ratio_level": "sequence"},
    {"main": "vespo"},
)
LAYOUTS = {
    "even": "rows of a multiple of 16, at aligned addresses",
    "depth of 8": "rows of a multiple of 8 and not of 16: the least that a descriptor takes",
    "odd": "odd rows: no two begin at like addresses",
    "off": "addresses off by one element",
    "head off": "the head's alone: a slice of a flat buffer",
    "states apart": "the states' rows lie in wider ones",
    "transposed": "the head stored as [D, V]",
    "large": "storages over 2 GiB, which AMD's compiler tells apart",
}


@dataclass(frozen=True)
class Matrices:
    """Hidden states and a head."""

    states: torch.dtype = BF16
    weight: torch.dtype = BF16
    layout: str = "even"

    @property
    def depth(self) -> int:
        """D."""
        return {"depth of 8": 72, "odd": 65}.get(self.layout, 64)

    def hidden(self, *shape: int) -> Tensor:
        """[..., D]."""
        if self.layout == "states apart":
            return self._made((*shape, self.depth + 1), self.states, off=False)[..., :-1]
        return self._made((*shape, self.depth), self.states, self.layout == "off")

    def head(self) -> Tensor:
        """[V, D]."""
        if self.layout == "transposed":
            return self._made((self.depth, VOCAB), self.weight, off=False).T
        return self._made((VOCAB, self.depth), self.weight, self.layout in ("off", "head off"))

    def _made(self, shape: tuple[int, ...], dtype: torch.dtype, off: bool) -> Tensor:
        size = torch.Size(shape).numel()
        # Of a large storage no more is touched than of a small one.
        room = 2**31 // dtype.itemsize + 1 if self.layout == "large" else size + off
        return torch.empty(room, dtype=dtype)[off : size + off].zero_().view(shape)


@dataclass(frozen=True)
class Head:
    """A call of `linear_logprob` and its backward."""

    matrices: Matrices = Matrices()
    rows: int = 130
    options: frozenset[str] = frozenset()
    bias_dtype: torch.dtype | None = None

    def __call__(self) -> None:
        """Forward and backward."""
        entropy = "entropy" in self.options
        bias = torch.zeros(VOCAB, dtype=self.bias_dtype or self.matrices.weight)
        found = linear_logprob(
            self.matrices.hidden(self.rows).requires_grad_(),
            self.matrices.head().requires_grad_(),
            torch.zeros(self.rows, dtype=torch.int64),
            bias=bias if "bias" in self.options else None,
            temperature=torch.ones(self.rows) if "row_temperature" in self.options else 0.5,
            softcap=30.0 if "softcap" in self.options else None,
            entropy=entropy,
            workspace=1,  # the smallest tiles: the backward cuts the vocabulary
            backend="triton",
        )
        (found.logp.sum() + (found.entropy.sum() if found.entropy is not None else 0)).backward()


@dataclass(frozen=True)
class Loss:
    """A call of `roma_loss` and its backward."""

    matrices: Matrices = Matrices()
    views: int = 4
    sequences: int = 3
    tokens: int = 11
    bias: bool = False
    aux: bool = True
    weighed: bool = False
    workspace: int | None = None
    config: RomaConfig = RomaConfig(ref_coef=0.1)

    def __call__(self) -> None:
        """Forward and backward."""
        shape, aux = (self.sequences, self.tokens), self.aux and self.views > 0
        out = roma_loss(
            self.matrices.hidden(*shape).requires_grad_(),
            self.matrices.hidden(self.views, *shape).requires_grad_(),
            self.matrices.head().requires_grad_(),
            torch.zeros(shape, dtype=torch.int64),
            mask=torch.ones(shape, dtype=torch.bool),
            advantages=torch.ones(self.sequences),
            correct=torch.ones(self.sequences, dtype=torch.bool),
            ref_logp=torch.zeros(shape) if self.config.ref_coef else None,
            aux_view=torch.zeros(self.sequences, dtype=torch.int64) if aux else None,
            rollout_weight=torch.ones(shape) if self.weighed else None,
            bias=torch.zeros(VOCAB, dtype=self.matrices.weight) if self.bias else None,
            config=self.config,
            workspace=self.workspace,
            backend="triton",
        )
        out.loss.backward()


Call = Callable[[], None]
FEW, MANY = tuning.FEW_ROWS, 2 * tuning.FEW_ROWS + 2
PLAIN: frozenset[str] = frozenset()
BIAS, ENTROPY, SOFTCAP = (frozenset({option}) for option in ("bias", "entropy", "softcap"))


def calls(chip: str, *, every: bool) -> Iterator[Call]:
    """The calls whose launches are compiled for a chip.

    Args:
        chip: a chip of tuning.json.
        every: all combinations of options, layouts and numbers of rows (in fp16 none or all
            options), not only the plain ones and those that need the most registers.
    """
    layouts = [name for name in LAYOUTS if name != "large" or chip.startswith("gfx")]
    for call in (*_heads(layouts, every), *_losses(every)):
        yield partial(_planned, "triton", call)
    if chip == "sm_90":
        for call in _specialised_heads():
            yield partial(_planned, "gluon", call)
    # The row kernels see no matrix, the gathers before them do.
    for options, dtype in itertools.product(_options(every), (BF16, FP16, FP32)):
        for layout in ("even", "odd") if every else ("even",):
            call = Head(Matrices(dtype, dtype, layout), options=options)
            yield partial(_planned, "vendor", call)


def _planned(plan: str, call: Call) -> None:
    with tuning.override(f"plan={plan}"):
        call()


def _options(every: bool) -> Iterator[frozenset[str]]:
    if not every:
        yield from (PLAIN, ENTROPY, SOFTCAP, ALL)
        return
    for size in range(len(OPTIONS) + 1):
        yield from map(frozenset, itertools.combinations(OPTIONS, size))


def _heads(layouts: list[str], every: bool) -> Iterator[Call]:
    for dtype, layout, rows in itertools.product((BF16, FP16), layouts, (FEW, MANY)):
        matrices = Matrices(dtype, dtype, layout)
        # fp16 is the same code but for the type, and for the scale of a loss.
        for options in _options(every) if dtype == BF16 else (PLAIN, ALL):
            if every or _plain_or_hardest(matrices, rows, options):
                yield Head(matrices, rows, options)
        # The options that roma_loss has, with rows of K+1 images.
        for options, views in itertools.product((PLAIN, BIAS, SOFTCAP, BIAS | SOFTCAP), (0, 4, 15)):
            plain = options == PLAIN and layout == "even" and views == 4
            if dtype == BF16 and (every or plain):
                yield Loss(
                    matrices, views, 1, rows // (views + 1) + (rows == MANY), workspace=1,
                    bias="bias" in options,
                    config=_config(views=views, softcap=30.0 if "softcap" in options else None),
                )  # fmt: skip
    yield Head(options=ALL, bias_dtype=FP32)


def _plain_or_hardest(matrices: Matrices, rows: int, options: frozenset[str]) -> bool:
    """Whether a call is in the small choice."""
    if matrices.layout == "even":
        return matrices.states == BF16 or (rows == MANY and options in (PLAIN, ALL))
    return matrices.states == BF16 and rows == MANY and options in (PLAIN, ALL)


def _config(*, views: int, worst_over: WorstOver = "token", **options: Any) -> RomaConfig:
    return RomaConfig(lambda_inv=float(views > 0), worst_over=worst_over, **options)


def _specialised_heads() -> Iterator[Call]:
    options = (PLAIN, ENTROPY, ENTROPY | {"row_temperature"}, frozenset({"row_temperature"}))
    for layout, dtype, given in itertools.product(("even", "depth of 8"), (BF16, FP16), options):
        yield Head(Matrices(dtype, dtype, layout), options=given)
    yield Loss(tokens=MANY, workspace=1)


def _losses(every: bool) -> Iterator[Call]:
    """What the loss's own kernels depend on, and the gathers."""
    for over in get_args(WorstOver):
        yield Loss(config=RomaConfig(worst_over=over))
        if every:
            yield from _losses_over(over)
    for dtype, layout in itertools.product((BF16, FP16, FP32), ("even", "odd", "off")):
        for views, workspace in itertools.product((0, 4, 15), (None, 1)):
            if every or (views == 4 and layout == "even"):
                config = _config(worst_over="token", views=views)
                yield Loss(
                    Matrices(dtype, dtype, layout), views, config=config, workspace=workspace
                )
    yield Loss(bias=True, config=RomaConfig(worst_over="token", softcap=30.0))
    yield Loss(Matrices(BF16, FP32))
    for form in FORMS:
        yield Loss(config=RomaConfig(ref_coef=0.1, **form), weighed=True)
    yield Loss(config=RomaConfig(gate_bound=1.0))
    yield Loss(config=RomaConfig(entropy_coef=0.1))


def _losses_over(over: WorstOver) -> Iterator[Call]:
    for ratio, coefficient in itertools.product(get_args(PenaltyRatio), (0.0, 0.1)):
        yield Loss(config=RomaConfig(worst_over=over, penalty_ratio=ratio, ref_coef=coefficient))
    yield Loss(aux=False, config=RomaConfig(worst_over=over, main=None))
    for form, weighed, workspace in itertools.product(({}, *FORMS), (False, True), (None, 1)):
        config = RomaConfig(worst_over=over, ref_coef=0.1 * ("ref_unbiased" in form), **form)
        yield Loss(config=config, weighed=weighed, workspace=workspace)
    # Blocks of K are powers of two; K itself is told from 1 and from a multiple of 16. With a
    # workspace the log-probs of an image lie side by side, without one those of a token.
    for views, workspace in itertools.product((0, 1, 2, 4, 7, 15, 16, 32, 100), (None, 1)):
        config = _config(worst_over=over, views=views)
        yield Loss(views=views, config=config, workspace=workspace)
