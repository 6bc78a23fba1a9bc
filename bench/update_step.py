"""One update of a small Qwen3-VL: what ROMA's views add to GRPO's clean pass.

    grpo       the clean pass alone
    roma       clean pass and K views in one graph, one backward
    two-pass   GRPO's loss and backward, then those of the auxiliary loss and the penalty: half of
               the activations alive at a time, the clean pass computed twice

The gradients of every weight must agree between the two forms of ROMA.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.gate import Errors, Wrong
from bench.measure import Run
from bench.providers import OURS
from bench.variants import Variant

APART = 1e-5  # of a gradient's norm; on a CPU 4e-7 was measured: fp32 sums in another order
PROMPTS, ROLLOUTS = 4, 4


class UpdateStepBench:
    """P·G rollouts of T = tokens / (P·G) tokens each, on K views."""

    flop = 0.0
    names: Sequence[str] = (OURS, "grpo", "two-pass")

    def __init__(self, variant: Variant, device: str) -> None:
        """The demo's model, untrained."""
        self.variant = variant
        self.device = device
        self.errors: dict[str, Errors] = {}
        self._made: tuple[Any, Any] | None = None

    @property
    def yardstick(self) -> Run:
        """A product of 1024 × 1024 in fp32, twenty times."""
        square = torch.ones(1024, 1024, device=self.device)

        def run() -> None:
            for _ in range(20):
                torch.mm(square, square)

        return run

    def package(self, name: str) -> str:
        """The package of an implementation: this one for all three."""
        return OURS

    def run(self, name: str) -> Run:
        """One update's gradients; raises Wrong."""
        policy, batch = self._model()
        passes = self._passes(name, batch)

        def run() -> None:
            policy.zero_grad()
            for policy_loss, part in passes:
                policy_loss(part, part.totals()).loss.backward()

        if name == "two-pass":
            self._hold(policy, run)
        return run

    def describe(self) -> dict[str, float]:
        """No columns of a head."""
        return {}

    def _passes(self, name: str, batch: Any) -> list[tuple[Any, Any]]:
        from roma import RomaConfig
        from roma.train.update import PolicyLoss

        policy, _ = self._model()
        config = RomaConfig(worst_over=self.variant.worst_over)
        clean = PolicyLoss(policy, config)
        alone = batch.without_views()
        if name == "grpo":
            return [(clean, alone)]
        if name == "two-pass":
            return [(clean, alone), (PolicyLoss(policy, replace(config, main=None)), batch)]
        return [(PolicyLoss(policy, config), batch)]

    def _hold(self, policy: Any, run: Run) -> None:
        grads = []
        for one in (self.run(OURS), run):
            one()
            grads.append([x.grad.clone() for x in policy.parameters() if x.grad is not None])
        for number, (joint, split) in enumerate(zip(*grads, strict=True)):
            if not float((joint - split).norm()) <= APART * float(joint.norm()) + 1e-9:
                raise Wrong(f"the gradient of weight {number} is not that of one pass")

    def _model(self) -> tuple[Any, Any]:
        if self._made is None:
            self._made = self._make()
        return self._made

    def _make(self) -> tuple[Any, Any]:
        import numpy as np

        from roma import RomaConfig
        from roma.data import DIGIT_WORDS
        from roma.models.qwen_vl import Policy
        from roma.models.small import build_small_vlm
        from roma.train.batch import UpdateBatch
        from roma.train.update import PolicyLoss

        with tempfile.TemporaryDirectory() as folder:
            build_small_vlm(Path(folder), words=DIGIT_WORDS)
            policy = Policy.load(Path(folder)).to(self.device).eval()
        drawn = np.random.default_rng(0)
        images = [drawn.integers(0, 256, (1, 32, 64, 3), dtype=np.uint8) for _ in range(PROMPTS)]
        prompts = policy.encode_prompts(["<image> sum ?"] * PROMPTS, [list(x) for x in images])
        views = [
            policy.view_pixels(
                prompts, [[image // (2 + k) for image in own] for own in prompts.images]
            )
            for k in range(self.variant.views)
        ]
        generator = torch.Generator().manual_seed(0)
        rows = PROMPTS * ROLLOUTS
        size = (rows, self.variant.tokens // rows)
        numbers = torch.arange(rows)
        # Words only: an image's placeholder among the tokens would ask for an image.
        words = policy.processor.tokenizer.convert_tokens_to_ids(list(DIGIT_WORDS))
        drawn_words = torch.randint(len(words), size, generator=generator)
        batch = UpdateBatch(
            prompts=prompts,
            view_pixels=views,
            group=numbers // ROLLOUTS,
            tokens=torch.tensor(words)[drawn_words],
            mask=torch.ones(size, dtype=torch.bool),
            advantages=torch.randn(rows, generator=generator),
            correct=numbers < self.variant.right * rows,
            aux_view=torch.randint(max(self.variant.views, 1), (rows,), generator=generator),
            old_logp=None,
        )
        # Near the policy's own, so that no ratio is clipped and both passes have a gradient.
        old_logp = PolicyLoss(policy, RomaConfig()).score(batch).logp
        noise = torch.randn(size, generator=generator).to(old_logp.device)
        return policy, replace(batch, old_logp=old_logp + 0.02 * noise)
