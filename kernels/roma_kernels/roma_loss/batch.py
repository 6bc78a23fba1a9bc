"""From the padded [B, T] or packed [N] form to counted tokens only, with every check on the way."""

from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from roma_kernels.arguments import FLOATS, check_dtype, check_shape, check_tensor, check_values
from roma_kernels.errors import fail
from roma_kernels.linear_logprob.rows import packed_places
from roma_kernels.roma_loss.config import RomaConfig

Count = float | Tensor


@dataclass(frozen=True)
class Layout:
    """Where the counted tokens stand in [B, T] or [N], flattened, and the sequence of each.

    n is the number of counted tokens, or, where only the device knows that (`known`), the number of
    all tokens: the counted ones then stand in front, and what stands behind has no meaning.
    """

    shape: torch.Size  # (B, T) or (N,)
    letters: str  # "[B, T]" or "[N]"
    counted: Tensor  # [n] int64
    sequence: Tensor  # [n] int64
    lengths: Tensor  # [B] int64
    known: Tensor | None  # 0-dim int64

    @property
    def sequences(self) -> int:
        """B."""
        return len(self.lengths)

    @property
    def valid(self) -> Tensor:
        """[n] bool: which of the n are counted tokens."""
        numbers = torch.arange(len(self.counted), device=self.counted.device)
        return numbers < (len(numbers) if self.known is None else self.known)

    def pack(self, tokens: Tensor) -> Tensor:
        """[..., B, T] or [..., N] to [..., n]."""
        lead = tokens.shape[: tokens.ndim - len(self.shape)]
        return tokens.reshape(*lead, self.shape.numel()).index_select(-1, self.counted)

    def unpack(self, tokens: Tensor, fill: float) -> Tensor:
        """[..., n] back to [..., B, T] or [..., N]."""
        lead, size = tokens.shape[:-1], self.shape.numel()
        # One place more, for what has no meaning.
        places = self.counted if self.known is None else self.counted.where(self.valid, size)
        flat = tokens.new_full((*lead, size + 1), fill).index_copy_(-1, places, tokens)
        return flat[..., :size].reshape(*lead, *self.shape)


def layout_of(
    name: str,
    like: Tensor,
    features: int,
    mask: Tensor,
    cu_seqlens: Tensor | None,
    *,
    wait: bool,
) -> Layout:
    """The layout of a batch; `like` is its argument `name`, with 0 or 1 axes of features.

    `wait`: whether to wait for the device to learn how many tokens count.
    """
    check_tensor(name, like)
    letters, ndim = ("[B, T]", 2) if cu_seqlens is None else ("[N]", 1)
    if like.ndim != ndim + features:
        expected = f"{letters[:-1]}, D]" if features else letters
        given = "not given (padded form)" if cu_seqlens is None else "given (packed form)"
        got = str(list(like.shape))
        fail(
            name,
            f"{expected}, because cu_seqlens is {given}",
            got,
            "reshape it or use the other form",
        )
    shape = like.shape[:ndim]
    check_tensor("mask", mask, like=like)
    check_dtype("mask", mask, (torch.bool,))
    check_shape("mask", mask, (letters, shape))
    flat = mask.reshape(-1)
    counted = flat.nonzero()[:, 0] if wait else packed_places(flat)
    known = None if wait else flat.sum()
    if cu_seqlens is None:
        return Layout(shape, letters, counted, counted // max(shape[1], 1), mask.sum(1), known)
    check_tensor("cu_seqlens", cu_seqlens, like=like)
    check_dtype("cu_seqlens", cu_seqlens, (torch.int32,))
    remedy = "pass torch.cumsum of the lengths with a 0 in front, as int32"
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
        fail("cu_seqlens", "[B+1] with B ≥ 1", str(list(cu_seqlens.shape)), remedy)
    ends = torch.stack([cu_seqlens[0] == 0, cu_seqlens[-1] == shape[0]])
    check_values(
        torch.cat([cu_seqlens[1:] >= cu_seqlens[:-1], ends]),
        lambda: (
            f"cu_seqlens: expected offsets from 0 to N = {shape[0]} that never decrease, got "
            f"{cu_seqlens.tolist()}; {remedy}"
        ),
    )
    sequence = torch.searchsorted(cu_seqlens.contiguous(), counted, right=True) - 1
    before = torch.nn.functional.pad(flat.cumsum(0), (1, 0))[cu_seqlens.long()]
    return Layout(shape, letters, counted, sequence, before.diff(), known)


@dataclass(frozen=True)
class Targets:
    """The constants of the loss as the caller gave them; shapes as in `roma.roma_loss`."""

    advantages: Tensor
    correct: Tensor
    old_logp: Tensor
    ref_logp: Tensor | None
    aux_view: Tensor | None
    view_old_logp: Tensor | None
    total_sequences: Count | None
    total_tokens: Count | None
    total_correct: Count | None

    def pack(
        self, layout: Layout, name: str, views: int, dtype: torch.dtype, config: RomaConfig
    ) -> dict[str, Any]:
        """Checks and packs them: all fields of a `PackedBatch` but logp and view_logp.

        `name` is the argument that holds the K = `views` views.
        """
        if views == 0 and config.lambda_inv > 0:
            expected = f"K ≥ 1 views, because lambda_inv = {config.lambda_inv:g} > 0"
            fail(name, expected, "K = 0", "pass views, or RomaConfig(lambda_inv=0)")
        return dict(
            old_logp=_logp("old_logp", self.old_logp, layout, dtype),
            ref_logp=self._reference(layout, dtype, config),
            view_old_logp=self._view_old(layout, dtype, config),
            advantages=self._advantages(layout, dtype),
            sequence=layout.sequence,
            lengths=layout.lengths,
            correct=_per_sequence("correct", self.correct, layout, torch.bool),
            aux_view=self._aux_view(layout, views),
            total_sequences=_count(
                "total_sequences", self.total_sequences, layout.sequences, layout, dtype, smallest=1
            ),
            total_tokens=_count(
                "total_tokens", self.total_tokens, layout.lengths.sum(), layout, dtype
            ),
            total_correct=_count(
                "total_correct", self.total_correct, self.correct.sum(), layout, dtype
            ),
        )

    def _advantages(self, layout: Layout, dtype: torch.dtype) -> Tensor:
        given, per_sequence = self.advantages, (layout.sequences,)
        check_tensor("advantages", given, like=layout.counted)
        check_dtype("advantages", given, FLOATS)
        check_shape("advantages", given, ("[B]", per_sequence), (layout.letters, layout.shape))
        by_token = given[layout.sequence] if given.shape == per_sequence else layout.pack(given)
        bad = ~torch.isfinite(by_token) & layout.valid
        check_values(
            ~bad,
            lambda: (
                f"advantages: expected finite numbers on counted positions, got "
                f"{by_token[bad][0].item()} in sequence {int(layout.sequence[bad][0])}; "
                "a group of one, or of equal rewards, has advantage 0"
            ),
        )
        return by_token.detach().to(dtype)

    def _reference(self, layout: Layout, dtype: torch.dtype, config: RomaConfig) -> Tensor | None:
        if self.ref_logp is not None:
            return _logp("ref_logp", self.ref_logp, layout, dtype)
        if config.ref_coef > 0 and config.main is not None:
            _missing(
                "ref_logp", layout, f"ref_coef = {config.ref_coef:g} > 0", "RomaConfig(ref_coef=0)"
            )
        return None

    def _aux_view(self, layout: Layout, views: int) -> Tensor | None:
        if self.aux_view is None:
            return None
        sampled = _per_sequence("aux_view", self.aux_view, layout, torch.int64)
        check_values(
            (sampled >= 0) & (sampled < views),
            lambda: (
                f"aux_view: expected view indices in 0..K-1 with K = {views}, got "
                f"{sampled.tolist()}; draw them with torch.randint(K, (B,))"
            ),
        )
        return sampled

    def _view_old(self, layout: Layout, dtype: torch.dtype, config: RomaConfig) -> Tensor | None:
        if config.aux_old == "clean" or self.aux_view is None:
            return None
        if self.view_old_logp is None:
            _missing("view_old_logp", layout, 'aux_old = "view"', 'RomaConfig(aux_old="clean")')
        return _logp("view_old_logp", self.view_old_logp, layout, dtype)


def _per_sequence(name: str, value: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    check_tensor(name, value, like=layout.counted)
    check_dtype(name, value, (dtype,))
    check_shape(name, value, ("[B]", (layout.sequences,)))
    return value


def _logp(name: str, value: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    check_tensor(name, value, like=layout.counted)
    check_dtype(name, value, FLOATS)
    check_shape(name, value, (layout.letters, layout.shape))
    return layout.pack(value).detach().to(dtype)


def _count(
    name: str,
    given: Count | None,
    own: Count,
    layout: Layout,
    dtype: torch.dtype,
    smallest: int = 0,
) -> Tensor:
    value = own if given is None else given
    device = layout.counted.device
    if isinstance(value, Tensor):
        count = value.detach().to(device, dtype)
    else:  # not as_tensor, which copies from the host
        count = torch.full((), value, dtype=dtype, device=device)
    if given is None:
        return count
    expected, remedy = f"a number ≥ {smallest} or a 0-dim tensor", "pass the count over all shards"
    if count.ndim:
        fail(name, expected, str(list(count.shape)), remedy)
    check_values(
        (count >= smallest) & torch.isfinite(count),
        lambda: f"{name}: expected {expected}, got {count.item():g}; {remedy}",
    )
    return count


def _missing(name: str, layout: Layout, because: str, otherwise: str) -> NoReturn:
    expected = f"{layout.letters} = {list(layout.shape)}, because {because}"
    fail(name, expected, "None", f"pass it, or {otherwise}")
