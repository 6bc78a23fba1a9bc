"""One call of a kernel with a product, as the op makes it, and float64 for a sample of its rows.

    forward    peak, total and target (and moment) of each row: the log-prob from them
    dlogits    dz [A, columns] of one tile of the vocabulary, as wide as the backward's

A result counts only if its sample agrees with float64: no error above twice what the vendor's
product with fp32 sums and plain PyTorch lose, and a rounding. What a kernel did not write is NaN.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from bench import data
from roma_kernels.linear_logprob import triton_backend
from roma_kernels.linear_logprob.rows import Active, Head, Rows

SAMPLE = 128
_COLUMNS = 16_384
_EPS32 = torch.finfo(torch.float32).eps


class Size(NamedTuple):
    """Rows, hidden size, vocabulary; the columns of a tile of dlogits."""

    rows: int
    depth: int
    vocab: int
    columns: int

    def __str__(self) -> str:
        """In the journal."""
        return f"R={self.rows} D={self.depth} V={self.vocab}"


def size_of(role: str, device: str, rows: int | None = None, *, small: bool = False) -> Size:
    """The size at which a role is timed: that of a 4B policy's head on a GPU.

    `small`: one that compiles the same kernel, quickly made, so that many processes share a GPU.
    """
    if device == "cpu":
        return Size(rows or 20, 64, 320, 192)
    few = role.startswith("few")
    if small:
        return Size(64 if few else 300, 4096, 32_768, 32_768)
    rows = rows or (64 if few else 8192)
    return Size(rows, 4096, 151_936, 32_768 if rows > 4096 else 131_072)


class Work:
    """A kernel's inputs at a size, for one role."""

    def __init__(self, kernel: str, role: str, device: str, size: Size) -> None:
        """`kernel`: "forward" or "dlogits"; `role`: which tile of the table it takes."""
        self.kernel, self.size = kernel, size
        # Interpreted, products in bf16 are wrong as Triton ships it.
        dtype = torch.float16 if device == "cpu" else torch.bfloat16
        made = data.make(data.Shape(size.rows, 0, size.depth, size.vocab, dtype), device)
        weight = made.weight
        if role == "unaligned":  # rows that nothing reads 16 bytes at a time
            weight = weight.new_empty(size.vocab, size.depth + 4)[:, : size.depth].copy_(weight)
        self._entropy = role.startswith("options")
        self._rows = Rows(made.rows, None, made.tokens, None, None, None)
        self._head = Head(weight, None, 1.0, None, 0)
        self._chosen = torch.linspace(0, size.rows - 1, min(SAMPLE, size.rows)).long().to(device)
        self._truth()
        if kernel == "dlogits":
            self._active = self._upstream()
            self._tile = self._head.part(slice(0, min(size.columns, size.vocab)), dtype)

    @property
    def flop(self) -> float:
        """Of its product."""
        columns = len(self._tile.weight) if self.kernel == "dlogits" else self.size.vocab
        return 2.0 * self.size.rows * self.size.depth * columns

    def run(self) -> Tensor:
        """The call that is timed: sums [3 or 4, R], or dz."""
        if self.kernel == "dlogits":
            return triton_backend.KERNELS.dlogits(self._active, self._tile)
        sums = torch.zeros(
            4 if self._entropy else 3, self.size.rows, device=self._rows.hidden.device
        )
        triton_backend.KERNELS.sweep(self._rows, self._head, sums)
        return sums

    def held(self) -> str:
        """Calls once; why its sample is wrong, or ""."""
        with unwritten_is_nan():
            got = self.run()
        if self.kernel == "forward":
            peak, total, target = got[:3, self._chosen].double()
            logp, rounding = target - peak - total.log(), 2 * _EPS32 * self._largest
            wrong = _compare("logp", logp, self._logp, self._plain_logp, rounding)
            if self._entropy and not wrong:
                h = peak + total.log() - got[3, self._chosen].double() / total
                wrong = _compare("entropy", h, self._h, self._plain_h, 4 * rounding)
            return wrong
        columns, rows = len(self._tile.weight), self._chosen
        dtype = got.dtype
        want, plain = (self._dz(double, columns) for double in (True, False))
        rounding = torch.finfo(dtype).eps * float(want.abs().max())
        return _compare("dz", got[rows].double(), want, plain.to(dtype).double(), rounding)

    def _logits(self, exact: bool, first: int, last: int) -> Tensor:
        """Of the sample, in float64, or by the vendor's product with fp32 sums."""
        states, weight = self._rows.hidden[self._chosen], self._head.weight[first:last]
        if exact:
            return states.double() @ weight.double().T
        if states.is_cuda:
            return torch.mm(states, weight.T, out_dtype=torch.float32).double()
        return (states.float() @ weight.float().T).double()

    def _truth(self) -> None:
        found = []
        for exact in (True, False):
            parts, target = [], torch.zeros(len(self._chosen), dtype=torch.float64)
            target = target.to(self._chosen.device)
            largest, moments = 0.0, []
            for first in range(0, self.size.vocab, _COLUMNS):
                z = self._logits(exact, first, first + _COLUMNS)
                largest = max(largest, float(z.abs().max()))
                label = self._rows.tokens[self._chosen] - first
                inside = (label >= 0) & (label < z.shape[1])
                at = z.gather(1, label.clamp(0, z.shape[1] - 1)[:, None])[:, 0]
                target = torch.where(inside, at, target)
                lse = z.logsumexp(1)
                parts.append(lse)
                moments.append((z * (z - lse[:, None]).exp()).sum(1))
            lse = torch.stack(parts).logsumexp(0)
            shares = (torch.stack(parts) - lse).exp()
            entropy = lse - (shares * torch.stack(moments)).sum(0)
            found.append((target - lse, lse, entropy, largest))
        self._logp, self._lse, self._h, self._largest = found[0]
        self._plain_logp, _, self._plain_h, _ = found[1]

    def _upstream(self) -> Active:
        """Every row active; log-sum-exp and entropy of all of them from the forward itself."""
        sums = torch.zeros(4, self.size.rows, device=self._rows.hidden.device)
        triton_backend.KERNELS.sweep(self._rows, self._head, sums)
        lse = sums[0] + sums[1].log()
        generator = torch.Generator(lse.device).manual_seed(4)
        g, e = (torch.randn(lse.shape, generator=generator, device=lse.device) for _ in range(2))
        lse[self._chosen] = self._lse.float()
        entropy = lse - sums[3] / sums[1]
        entropy[self._chosen] = self._h.float()
        self._g, self._e = g[self._chosen].double(), e[self._chosen].double()
        return Active(
            rows=torch.arange(self.size.rows, device=lse.device), out_of=self.size.rows,
            num_active=None, states=self._rows.hidden, tokens=self._rows.tokens, row_scale=None,
            lse=lse, entropy=entropy if self._entropy else None, dlogp=g,
            dentropy=e if self._entropy else None, loss_scale=None,
        )  # fmt: skip

    def _dz(self, exact: bool, columns: int) -> Tensor:
        z = self._logits(exact, 0, columns)
        log_p = z - self._lse.float().double()[:, None]
        slope = self._g[:, None].expand_as(z)
        if self._entropy:
            slope = slope + self._e[:, None] * (log_p + self._h.float().double()[:, None])
        dz = -log_p.exp() * slope
        label = self._rows.tokens[self._chosen]
        inside = (label < columns).double()
        return dz.scatter_add(1, label.clamp(max=columns - 1)[:, None], (self._g * inside)[:, None])


def _compare(name: str, got: Tensor, want: Tensor, plain: Tensor, rounding: float) -> str:
    """Why `got` is wrong, by its largest and its mean error; "" if it is not."""
    measures: dict[str, Callable[[Tensor], float]] = {
        "largest": lambda x: float(x.abs().max()),
        "rms": lambda x: float(x.square().mean().sqrt()),
    }
    for what, measure in measures.items():
        off, bound = measure(got - want), 2 * measure(plain - want) + 2 * rounding
        if not off <= bound:
            return f"{what} error of {name} {off:.2e} exceeds {bound:.2e}"
    return ""


@contextmanager
def unwritten_is_nan() -> Iterator[None]:
    """Inside, torch.empty holds NaN: freed memory may have a right result of an earlier call."""
    enabled, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
