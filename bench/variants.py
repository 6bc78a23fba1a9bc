"""What is measured: `Variant`, one line of a plan, and the plans by preset and device."""

import itertools
import json
from dataclasses import asdict, dataclass, replace

import torch

from bench.data import Shape
from bench.layout import Layout

VIEWS = (
    *("gaussian_noise", "gaussian_blur", "jpeg", "downscale", "mix"),
    *("motion_blur", "salt_and_pepper", "speckle", "posterize", "pixelate"),
)
HEAD = ("linear_logprob", "roma_loss")  # ops with a large head
# Batches of the update step: two prompts, eight rollouts each, and for smoke less.
HEADLINE = Layout(prompts=2, rollouts=8, completion=128, prompt=384, image=256)
QUICK = Layout(prompts=2, rollouts=8, completion=32, prompt=96, image=64)
SMALL = Layout(prompts=2, rollouts=2, completion=4, prompt=16, image=8, layers=2)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Variant:
    """One timing of all providers."""

    op: str
    """"linear_logprob", "view_loss", "roma_loss", "update_step" or "views"."""
    phase: str
    """"forward", or "both": forward and backward."""
    tokens: int
    views: int
    depth: int
    vocab: int
    dtype: str = "bf16"
    active: float = 1.0
    """linear_logprob: share of the rows with an upstream gradient."""
    right: float = 0.5
    """The loss: share of right rollouts."""
    worst_over: str = "sequence"
    what: str = ""
    """views: a corruption, or "mix"; there tokens are images, and depth their side in pixels.
    update_step: the batch (update_step.Layout); there depth is the model's width."""
    states: str = ""
    """A file of states and a head (`data.load`), or "": they are drawn."""
    among: str = "all"
    """"all" providers; "few" or the "core" of them (ops.AMONG); "card": all and our plans.
    update_step: "all", "few" or "packed" (update_step.names_of)."""

    @property
    def memory(self) -> bool:
        """Whether memory is measured where each candidate takes a process for it, on a CPU."""
        dense = self.phase == "both" and self.active == 1
        return self.among == "all" and self.op in (*HEAD, "update_step") and dense

    @property
    def shape(self) -> Shape:
        """The shape of its data."""
        return Shape(self.tokens, self.views, self.depth, self.vocab, DTYPES[self.dtype])

    @property
    def line(self) -> str:
        """The variant as JSON, for the process that measures memory."""
        return json.dumps(asdict(self))

    def __str__(self) -> str:
        """Its name in the live table."""
        if self.op == "views":
            return f"views, {self.what}, {self.tokens} images of {self.depth}×{self.depth}"
        if self.op == "update_step":
            half = f"{self.right:.0%} right, K={self.views}"
            return f"update_step of a Qwen3-VL of width {self.depth}, {self.what}, {half}"
        what = {"forward": "forward", "both": "forward + backward"}[self.phase]
        if self.op == "linear_logprob" and self.phase == "both":
            what += f", {self.active:.0%} of the rows active"
        if self.op != "linear_logprob":
            what += f", {self.right:.0%} right, worst over {self.worst_over}"
        return f"{self.op}, {what}, {self.shape}" + (f", {self.states}" if self.states else "")


def on_states(
    variants: list[Variant], file: str, rows: int, depth: int, vocab: int
) -> list[Variant]:
    """The variants with a head, at a file's depth and vocabulary, with at most its rows."""
    found = [
        replace(v, states=file, tokens=min(v.tokens, rows), depth=depth, vocab=vocab)
        for v in variants
        if v.op in HEAD
    ]
    return list(dict.fromkeys(found))


def plan(preset: str, device: str) -> list[Variant]:
    """The variants of a preset on a device type."""
    if preset == "smoke":
        size = {"tokens": 16, "views": 2, "depth": 64, "vocab": 1000}
        return [
            Variant("linear_logprob", "both", **size),
            Variant("view_loss", "both", **size),
            Variant("roma_loss", "both", **size),
            _update(SMALL, 2, width=64, vocab=1000, among="few"),
            Variant("views", "both", 4, 1, 64, 0, what="mix"),
        ]
    if preset == "card":
        return _on_a_card(device)
    if preset == "update":
        return _updates()
    if preset == "views":
        return [
            Variant("views", "both", images, 1, side, 0, what=what)
            for images, side in ((16, 448), (4, 1024))
            for what in VIEWS
        ]
    if device == "cuda":
        return _on_gpu(preset)
    base = {"tokens": 128, "views": 4, "depth": 512, "vocab": 32_768}
    found = [
        Variant("linear_logprob", "forward", **base),
        *(Variant("linear_logprob", "both", **base, active=a) for a in (1.0, 0.5, 0.25, 0.1)),
        Variant("view_loss", "both", **base | {"tokens": 16_384}),
        Variant("roma_loss", "both", **base),
        *_around(base),
        _update(QUICK, 4, width=96, among="few"),
        Variant("views", "both", 16, 1, 448, 0, what="mix"),
        Variant("views", "both", 4, 1, 1024, 0, what="mix"),
    ]
    if preset == "full":
        found += _scaling(base, tokens=(32, 64, 256, 512), vocab=(8_192, 65_536, 151_936))
        found += [
            Variant("linear_logprob", "forward", **base, dtype="fp32", among="few"),
            Variant("linear_logprob", "both", **base, dtype="fp32", active=0.5, among="few"),
            Variant("roma_loss", "both", **base, dtype="fp32", among="few"),
        ]
        large = {"tokens": 512, "views": 4, "depth": 1024, "vocab": 151_936}
        found += [
            Variant("linear_logprob", "forward", **large, among="core"),
            Variant("roma_loss", "both", **large, among="core"),
        ]
    return found


def _on_gpu(preset: str) -> list[Variant]:
    base = {"tokens": 4096, "views": 4, "depth": 4096, "vocab": 151_936}
    found = [
        Variant("linear_logprob", "forward", **base | {"views": 0, "tokens": 16_384}),
        *(
            Variant("linear_logprob", "both", **base | {"views": 0, "tokens": 16_384}, active=a)
            for a in (1.0, 0.5, 0.25, 0.1)
        ),
        Variant("view_loss", "both", **base | {"tokens": 65_536}),
        Variant("roma_loss", "both", **base | {"tokens": 1024}),
    ]
    if preset in ("paper", "full"):
        sizes = itertools.product((1024, 4096, 16_384), (2, 4, 8))
        found += [
            Variant("roma_loss", "both", **base | {"tokens": n, "views": k}, among="few")
            for n, k in sizes
        ]
    if preset == "full":
        found += _around(base | {"tokens": 1024})
        found += _scaling(base, tokens=(256, 1024, 16_384), vocab=(32_768, 262_144))
    return found


def _on_a_card(device: str) -> list[Variant]:
    """What decides, for minutes on one GPU of 78 GiB: the most valuable first; small on a CPU."""
    most, few, depth, vocab = (
        (4096, 1024, 4096, 151_936) if device == "cuda" else (64, 16, 64, 1000)
    )

    def loss(tokens: int, worst_over: str = "sequence") -> Variant:
        return Variant(
            "roma_loss", "both", tokens, 4, depth, vocab, worst_over=worst_over, among="card"
        )

    def head(phase: str, tokens: int, active: float = 1.0) -> Variant:
        return Variant(
            "linear_logprob", phase, tokens, 0, depth, vocab, active=active, among="card"
        )

    return [
        loss(most),
        head("forward", 4 * most),
        head("both", 4 * most),
        loss(few),
        head("both", 4 * most, 0.25),
        head("forward", most),
        head("forward", few),
        head("forward", few // 16),
        loss(most, "token"),
    ]


def _update(
    layout: Layout,
    views: int,
    *,
    width: int = 192,
    vocab: int = 1024,
    right: float = 0.5,
    among: str = "all",
) -> Variant:
    return Variant(
        "update_step", "both", layout.tokens, views, width, vocab, "fp32", right=right,
        what=str(layout), among=among,
    )  # fmt: skip


def _updates() -> list[Variant]:
    """The headline with its K, one option changed at a time, prompts, and packed tokens."""
    proportions = [(64, 32, 256), (128, 64, 128), (256, 192, 64), (512, 256, 64)]
    packed = Layout(prompts=1, rollouts=8, completion=32, prompt=64, image=32, layers=2)
    return [
        *(_update(HEADLINE, k) for k in (4, 0, 1, 2, 8)),
        *(_update(HEADLINE, 4, right=r, among="few") for r in (0.0, 1.0)),
        *(
            _update(replace(HEADLINE, **{option: True}), k, among="few")
            for option in ("ragged", "checkpointed")
            for k in (2, 4)
        ),
        *(
            _update(replace(HEADLINE, prompt=p, image=i, completion=t), 4, among="few")
            for p, i, t in proportions
        ),
        *(
            _update(replace(packed, prompts=p), 4, width=96, vocab=256, among="packed")
            for p in (1, 3, 8, 27, 84)
        ),
    ]


def _around(base: dict[str, int]) -> list[Variant]:
    """One option changed at a time, with fewer providers."""
    return [
        *(Variant("roma_loss", "both", **base | {"views": k}, among="few") for k in (0, 1, 2, 8)),
        *(Variant("roma_loss", "both", **base, right=r, among="few") for r in (0.0, 1.0)),
        Variant("roma_loss", "both", **base, worst_over="token", among="few"),
    ]


def _scaling(
    base: dict[str, int], *, tokens: tuple[int, ...], vocab: tuple[int, ...]
) -> list[Variant]:
    """One axis changed at a time."""
    depth = (base["depth"] // 2, base["depth"] * 2)
    changes = [("tokens", tokens), ("vocab", vocab), ("depth", depth)]
    return [
        Variant("roma_loss", "both", **base | {axis: size}, among="few")
        for axis, sizes in changes
        for size in sizes
    ]
