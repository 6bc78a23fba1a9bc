"""One update of a small Qwen3-VL, forward and backward: ROMA's forms, GRPO, and TRL's own step.

    grpo         the clean image; a row and a vision pass for each rollout, as TRL and EasyR1 run it
    trl          the same by TRL: `GRPOTrainer._compute_loss` on the same weights and tokens
    grpo shared  the clean image; a prompt once for all its rollouts
    joint        clean image and K views for every rollout, a row each, vision shared
    lean rows    only the pairs that can matter, a row each
    roma         only the pairs that can matter, a prompt once for all its rollouts
    two-pass     the same; views of right rollouts scored first, without a graph
    mssr …       steps of other methods, with what they score beside the update (methods.py)

Times are ratios to `grpo` here. A form is refused if its gradients are not those of `joint`, those
of GRPO's forms if they are not those of `joint` without views.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bench.gate import Errors, Wrong
from bench.measure import Check, Run
from bench.providers import OURS
from bench.variants import Variant
from roma_kernels import DISTRIBUTION

if TYPE_CHECKING:
    from bench.update_step.count import Counted

APART = 1e-5
"""Of the norm of all gradients: fp32 sums in another order. The most that was seen in
bench/results/cpu-update.csv is 1.2e-6; a view that is not the worst moves them by 0.01 or more."""
TRL = "trl"


@dataclass(frozen=True)
class Candidate:
    """How a candidate runs the batch."""

    update: str
    """Of `PolicyLoss`."""
    views: bool = True
    share: bool = False
    """A prompt once for all its rollouts."""
    apart: bool = False
    """A vision pass for each rollout."""


CANDIDATES = {
    "grpo": Candidate("joint", views=False, apart=True),
    "grpo shared": Candidate("lean", views=False, share=True),
    "joint": Candidate("joint"),
    "lean rows": Candidate("lean"),
    OURS: Candidate("lean", share=True),
    "two-pass": Candidate("two_pass", share=True),
}
METHODS = ("mssr", "srpo", "vgpo", "papo", "dvrp", "pgd")
"""Candidates of methods.py."""
METHODS_VIEWS = 2
"""The K with which they stand in a row: the most views that one of them has."""
PACKED = (OURS, "grpo", "two-pass")
"""Candidates of the variants whose `among` is "packed"."""


def names_of(variant: Variant) -> list[str]:
    """Its candidates."""
    names = ["grpo", TRL, *(name for name in CANDIDATES if name != "grpo")]
    if not variant.views:
        return [n for n in names if n == TRL or not CANDIDATES[n].views]
    if variant.among == "few":
        return [n for n in names if n != "lean rows"]
    if variant.among == "packed":
        return [n for n in names if n in PACKED]
    return names + (list(METHODS) if variant.views == METHODS_VIEWS else [])


class UpdateStepBench:
    """P prompts with G rollouts each, on K views."""

    flop = 0.0

    def __init__(self, variant: Variant, device: str, hold: bool = True) -> None:
        """`hold`: whether gradients are compared, and calls counted, before they are timed."""
        from bench.update_step.made import make

        self.variant = variant
        self.errors: dict[str, Errors] = {}
        self._hold = hold
        self._found: dict[str, dict[str, str]] = {}
        self._folder = TemporaryDirectory()
        self._made = make(variant, Path(self._folder.name), device)
        self._references: dict[bool | str, list[Tensor]] = {}

    @cached_property
    def yardstick(self) -> Run:
        """A product of 1024 × 1024 in fp32, twenty times."""
        square = torch.ones(1024, 1024, device=self._made.policy.device)

        def run() -> None:
            for _ in range(20):
                torch.mm(square, square)

        return run

    def package(self, name: str) -> str:
        """TRL's is TRL."""
        return "trl" if name == TRL else DISTRIBUTION

    def run(self, name: str) -> Run:
        """One update's gradients; raises Wrong, and Unavailable without TRL."""
        if name in METHODS:
            return self._method(name)
        views = name != TRL and CANDIDATES[name].views
        call, weights = self._trl() if name == TRL else self._ours(CANDIDATES[name])
        return self._timed(name, call, weights, views)

    def _timed(
        self, name: str, call: Callable[[], None], weights: list[Tensor], like: bool | str
    ) -> Run:
        """`like`: whose gradients it must have, `_reference`'s."""

        def run() -> Check | None:
            call()
            if not self._hold:
                _forget(weights)  # so that they count as memory of each call
                return None
            return lambda: self._held(name, weights, like)

        if self._hold:
            self._reference(like)
            from bench.update_step.count import counted

            found = counted(call, weights)
            self._held(name, weights, like)
            self._found[name] |= self._counts(name, found)
        return run

    def describe(self) -> dict[str, float]:
        """No columns of a head."""
        return {}

    def columns(self, name: str) -> dict[str, str]:
        """Work of one call, counted and predicted, what it saves; its gradients' error."""
        return self._found[name]

    def _ours(self, how: Candidate) -> tuple[Callable[[], None], list[Tensor]]:
        from bench.update_step.made import one_row_each
        from roma import RomaConfig
        from roma.train.update import PolicyLoss

        policy = self._made.policy
        batch = self._made.batch if how.views else self._made.batch.without_views()
        if how.apart:
            batch = one_row_each(batch)
        config = RomaConfig(worst_over=self.variant.worst_over)
        loss = PolicyLoss(policy, config, update=how.update, share_prompt=how.share)
        totals = batch.totals()
        weights: list[Tensor] = list(policy.parameters())

        def call() -> None:
            _forget(weights)
            loss(batch, totals).loss.backward()

        return call, weights

    def _trl(self) -> tuple[Callable[[], None], list[Tensor]]:
        from bench.update_step.trl_step import TrlStep

        step = TrlStep(self._made)
        return step.run, step.weights(self._made.policy)

    def _method(self, name: str) -> Run:
        from bench.update_step.methods import Methods
        from roma import RomaConfig

        found = Methods(self._made, RomaConfig(worst_over=self.variant.worst_over)).of(name)
        weights: list[Tensor] = list(self._made.policy.parameters())
        found.reference()
        self._references[name] = [_gradient(weight).clone() for weight in weights]
        return self._timed(name, found.step, weights, name)

    def _reference(self, like: bool | str) -> list[Tensor]:
        """Gradients of the row-wise form that runs everything: with views, without, a method's."""
        if like not in self._references:
            call, weights = self._ours(Candidate("joint", views=bool(like)))
            call()
            self._references[like] = [_gradient(weight).clone() for weight in weights]
        return self._references[like]

    def _held(self, name: str, weights: Sequence[Tensor], like: bool | str) -> None:
        off = whole = 0.0
        for weight, want in zip(weights, self._reference(like), strict=True):
            off += float((_gradient(weight) - want).double().square().sum())
            whole += float(want.double().square().sum())
        apart = (off / whole) ** 0.5
        self._found.setdefault(name, {})["dweight"] = f"{apart:.2e}"
        if not apart <= APART:
            raise Wrong(f"its gradients are off by {apart:.1e} of their norm")

    def _counts(self, name: str, found: "Counted") -> dict[str, str]:
        from bench.update_step.predicted import of_batch

        counts = {
            "executed_gflop": f"{found.flop / 1e9:.4g}",
            "saved_mib": f"{found.saved / 2**20:.4g}",
        }
        if name in METHODS:
            return counts
        predicted = of_batch(self._made, name)
        return counts | {
            "predicted_gflop": f"{predicted.total / 1e9:.4g}",
            "packed_tokens": f"{predicted.tokens:.0f}",
        }


def _gradient(weight: Tensor) -> Tensor:
    return torch.zeros_like(weight) if weight.grad is None else weight.grad


def _forget(weights: Sequence[Tensor]) -> None:
    for weight in weights:
        weight.grad = None
