"""Bytes that a candidate's call takes beside its inputs, estimated before it runs.

R rows on a head [V, D], b bytes an element; A rows have a gradient, 0 in a forward alone. Each
formula has the tensors that are alive at the peak, with the gradients: b·(V·D + R·D). A tile of
logits is 4·R·V bytes in fp32. What is smaller than a row of the hidden states for every row is left
out. The test that holds these to measured peaks is in tests/package/test_bench.py.

A provider that is not here is taken for its gradients alone.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from bench.gate import ROWS as HELD
from bench.ops import ACTIVE
from bench.own import OWN
from bench.providers import OURS
from bench.variants import HEAD, Variant
from roma_kernels.linear_logprob.rows import GPU_WORKSPACE

SWEPT = 16_384  # rows that the Triton back end sweeps at a time
CPU_WORKSPACE = 16 * 2**20
TRL_TOKENS, TRL_COLUMNS = 4096, 32_768  # of its buffer, however few rows there are
LIGER_ROWS = 512


@dataclass(frozen=True)
class Size:
    """One call."""

    rows: int
    active: int
    depth: int
    vocab: int
    item: int
    """Bytes of an element of states and head."""
    cuda: bool

    @property
    def logits(self) -> int:
        """Bytes of all logits in fp32."""
        return 4 * self.rows * self.vocab

    @property
    def head(self) -> int:
        """Bytes of the head in fp32."""
        return 4 * self.vocab * self.depth

    @property
    def states(self) -> int:
        """Bytes of the states in fp32."""
        return 4 * self.rows * self.depth

    @property
    def upcast(self) -> int:
        """Bytes of head and states in fp32, if they are not in it already."""
        return 0 if self.item == 4 else self.head + self.states

    @property
    def gradients(self) -> int:
        """Bytes of the gradients, 0 in a forward alone."""
        return self.item * self.depth * (self.rows + self.vocab) if self.active else 0


def extra(name: str, size: Size, workspace: int | None = None) -> float:
    """Bytes of one call of a provider, forward or forward and backward."""
    if name in OWN or name.startswith(OURS):
        return _ours(size, workspace, plain=name == f"{OURS} torch")
    return _PEERS.get(name, _gradients)(size)


def _gradients(s: Size) -> float:
    return s.gradients


def _ours(s: Size, workspace: int | None, plain: bool) -> float:
    """Backward: the active rows' states and their fp32 gradients, and the tiles.

    The workspace holds a tile of dz and one of dW; a product that a library cannot widen makes its
    fp32 result first, as large as the tile of dW. In plain PyTorch there are the logits, log p and
    dz of a tile, all in fp32, and its part of the head.

    Forward: Triton leaves peak and total of each row for every 128 entries at least, and gathers
    the rows that it sweeps; a vendor's product leaves a chunk that is smaller than the workspace.
    On a CPU a tile of states is there twice, gathered and packed.
    """
    rows = min(s.rows, SWEPT)
    if s.cuda and not plain:
        forward = 8.0 * math.ceil(s.vocab / 128) * rows + s.item * rows * s.depth + 64 * 2**20
    else:
        forward = 2.0 * min(CPU_WORKSPACE, s.states) + min(CPU_WORKSPACE, s.logits)
    if not s.active:
        return forward
    room = workspace or (GPU_WORKSPACE if s.cuda and not plain else CPU_WORKSPACE)
    tiles = min(room, (4 if plain else s.item) * s.active * s.vocab + s.head)
    packed = s.active * s.depth * ((4 if plain else s.item) + 4)
    return max(forward, s.gradients + packed + (3 if plain else 2) * tiles)


def token_local(s: Size, workspace: int | None) -> float:
    """Ours where a token's coefficients depend on it alone: dW in fp32, then rounded.

    The workspace holds the logits and dz of a chunk; its states, and their gradients, are small.
    """
    room = workspace or GPU_WORKSPACE
    return s.gradients + s.head + min(room, s.rows * s.vocab * (4 + s.item)) + 2 * s.states


def _naive_fp32(s: Size) -> float:
    """Both in fp32, logits, log-softmax; backward: gather's gradient and dz beside the latter."""
    if not s.active:
        return max(s.upcast + s.logits, 2 * s.logits)
    products = s.logits + s.upcast + s.head + s.states + (s.gradients if s.upcast else 0)
    return max(s.upcast + 3 * s.logits, products)


def _naive(s: Size) -> float:
    """The logits rounded and in fp32, log-softmax; backward as above, dz rounded at last."""
    rounded = s.logits * s.item // 4
    if not s.active:
        return max((rounded if s.item < 4 else 0) + s.logits, 2 * s.logits)
    return max(3 * s.logits, rounded + s.logits, rounded + s.gradients)


def _compiled(s: Size) -> float:
    """Both in fp32, logits, dz; the rest is fused into the products' neighbours."""
    if not s.active:
        return s.upcast + s.logits
    products = s.logits + s.gradients + (s.upcast + s.head if s.upcast else 0)
    return max(s.upcast + 2 * s.logits, products)


def _kept(s: Size) -> float:
    """Logits in the inputs' dtype, and dz beside them or in their place."""
    rounded = s.logits * s.item // 4
    return max(2 * rounded, rounded + s.gradients) if s.active else rounded


def _torch_fused(s: Size) -> float:
    """Logits and log-softmax in the inputs' dtype; backward: both gradients beside the latter."""
    rounded = s.logits * s.item // 4
    return max(3 * rounded, rounded + s.gradients) if s.active else 2 * rounded


def _torch_chunked(s: Size) -> float:
    """Chunks of rows whose logits are as many as the states' elements, three in fp32.

    Where 16-bit products are slow, on a CPU, the head in fp32; backward dW, its sum and a part.
    """
    rows = 2 ** math.ceil(math.log2(max(s.rows / math.ceil(s.vocab / s.depth), 1.0)))
    tiles = 3 * 4 * min(rows, s.rows) * s.vocab
    heads = 0 if s.item == 4 or s.cuda else (4 if s.active else 1) * s.head
    return s.gradients + tiles + heads


def _by_rows(s: Size) -> float:
    """512 rows at a time: logits, probabilities, log-probs; backward six in fp32, or dW twice."""
    tile = 4 * min(s.rows, LIGER_ROWS) * s.vocab
    if not s.active:
        return 3 * tile
    weight = s.item * s.vocab * s.depth
    return s.gradients + max(6 * tile, 4.5 * tile + weight)


def _liger_cute(s: Size) -> float:
    """Dz of 1024 rows; three numbers of each row for every 256 entries."""
    partial = 12 * s.rows * math.ceil(s.vocab / 256)
    return s.gradients + partial + (s.item * min(s.rows, 1024) * s.vocab if s.active else 0)


def _verl(s: Size) -> float:
    """Three numbers of each row for every 1024 entries; dz of 9504 entries, a part of dh."""
    partial = 12 * s.rows * math.ceil(s.vocab / 1024)
    return s.gradients + partial + (s.item * s.rows * (9504 + s.depth) if s.active else 0)


def _cce(s: Size) -> float:
    """Logits stay on the chip: gradients, their locks, a few numbers a row."""
    return s.gradients + 32 * 2**20


def _trl(s: Size) -> float:
    """A buffer of 4096 rows × 32768 entries; fp32 gradients, then rounded.

    On a CPU its row kernel is plain PyTorch, seven tiles of fp32, and of the buffer only what is
    written takes memory.
    """
    tokens, columns = min(s.rows, TRL_TOKENS), min(s.vocab, TRL_COLUMNS)
    buffer = s.item * tokens * (TRL_COLUMNS if s.cuda else columns)
    tile = 0 if s.cuda else 4 * tokens * columns
    if not s.active:
        return buffer + 3 * tile
    return buffer + 7 * tile + s.head + s.states + s.gradients


_PEERS: dict[str, Callable[[Size], float]] = {
    "naive fp32": _naive_fp32,
    "naive": _naive,
    "compile": _compiled,
    "torch fused": _torch_fused,
    "torch chunked": _torch_chunked,
    "liger": _by_rows,
    "liger cute": _liger_cute,
    "cce": _cce,
    "cce exact": _cce,
    "cce compile": _kept,
    "trl": _trl,
    "trl rows": _kept,
    "verl": _verl,
    "verl chunked": _by_rows,
    "quack": _kept,
}


def needs(variant: Variant, name: str, device: str, active: int) -> float:
    """Bytes of a candidate: the comparison with float64 or a timed call, whichever takes more.

    Args:
        variant: what is measured.
        name: the candidate, " active" included.
        device: "cpu" or "cuda".
        active: rows with an upstream gradient.
    """
    if variant.op not in HEAD:
        return 0.0
    size = _size(variant, device, active)
    few = (variant.views + 1) * min(variant.tokens, HELD)
    base, workspace = _own(name)
    held = extra(base, replace(size, rows=few, active=few), workspace)
    return max(held, timed(variant, name, device, active))


def timed(variant: Variant, name: str, device: str, active: int) -> float:
    """Bytes of a timed call."""
    size, (base, workspace) = _size(variant, device, active), _own(name)
    ours = base.startswith(OURS)
    if name.endswith(ACTIVE):
        forward = extra(base, replace(size, active=0))
        again = extra(base, replace(size, rows=active))
        # Chosen states are copied, and their gradients written to zeros for all rows.
        return max(forward, again + size.item * size.depth * (size.rows + active))
    if not ours and active:
        size = replace(size, active=size.rows)  # a peer differentiates every row that it gets
    found = extra(base, size, workspace)
    local = variant.views <= 1 or variant.worst_over in ("token", "mean")
    if ours and variant.op == "roma_loss" and local:
        found = max(found, token_local(size, workspace))
    return found


def _size(variant: Variant, device: str, active: int) -> Size:
    rows, item = (variant.views + 1) * variant.tokens, variant.shape.dtype.itemsize
    return Size(rows, active, variant.depth, variant.vocab, item, device == "cuda")


def _own(name: str) -> tuple[str, int | None]:
    """A candidate's function, and the workspace that it is given."""
    base = name.removesuffix(ACTIVE)
    return base, OWN[base].workspace if base in OWN else None


def data(variant: Variant) -> float:
    """Bytes of a variant's data at the peak, which comes with the drawing or with float64.

    Drawn: three fp32 heads while one is scaled. Float64: the head, and its gradient, which is then
    kept in fp32. The states of all images are stacked in fp32 before they are rounded.
    """
    if variant.op not in HEAD:
        return 0.0
    item = variant.shape.dtype.itemsize
    head, rows = variant.vocab * variant.depth, (variant.views + 1) * variant.tokens
    states = rows * variant.depth
    held = min(rows, HELD * (variant.views + 1)) * variant.depth
    drawn = 3 * 4 * head + 2 * 4 * states
    float64 = (16 + 4) * head + (item + 4) * states + 3 * 8 * held + 4 * 64 * 8 * variant.vocab
    return float(item * (head + states) + max(drawn, float64 - 4 * states))
