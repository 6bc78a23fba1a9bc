"""Steps of other methods on the update step's batch: their scoring passes, and the update.

    mssr     rollouts scored, then GRPO with a prompt and an image for each rollout: it has one each
    srpo     rollouts scored on the image, on a view, and without a third of each; then GRPO shared
    vgpo     rollouts scored, weights from their hidden states; then GRPO shared
    papo     rollouts scored on one view; then GRPO shared, the term on its log-probs
    dvrp     the same with two views
    pgd      two views made against the policy in three steps; then ROMA's update

NoisyRollout's update is GRPO's. Features of clean images are there from sampling, as in a step of
the trainer. What a scoring pass yields is random here, and does not change what is run.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from bench.update_step.made import Made, one_row_each
from roma import RomaConfig
from roma.advantages import mssr, srpo, vgpo
from roma.train.batch import UpdateBatch
from roma.train.config.sections import AlgorithmConfig
from roma.train.config.views import AttackConfig
from roma.train.contrast import Contrast
from roma.train.update import PolicyLoss
from roma.train.views.attack import perturb
from roma.train.views.probe import Probe

EPS = 4.0  # 8-bit levels
VIEWS = 2
Learn = Callable[[], UpdateBatch]
"""Makes the batch that the update learns from: scoring passes, attacks."""


@dataclass(frozen=True)
class MethodStep:
    """A step, and the form that its gradients are compared with."""

    step: Callable[[], None]
    reference: Callable[[], None]


class Methods:
    """The steps of one batch.

    Args:
        made: model and batch; with two views at least.
        config: of the loss.
    """

    def __init__(self, made: Made, config: RomaConfig) -> None:
        """Keeps both."""
        self._policy, self._batch, self._config = made.policy, made.batch, config
        self._contrasts = {
            name: Contrast.of(AlgorithmConfig(view_mode=name))  # type: ignore[arg-type]
            for name in ("papo", "dvrp")
        }
        self._learn: dict[str, Learn] = {
            "mssr": self._mssr,
            "srpo": self._srpo,
            "vgpo": self._vgpo,
            "papo": lambda: self._with_views(1),
            "dvrp": lambda: self._with_views(2),
            "pgd": self._attacked,
        }

    def of(self, name: str) -> MethodStep:
        """A step by its name."""
        learn, fast = self._learn[name], self._loss("lean", name, share=name != "mssr")
        slow, batch = self._loss("joint", name, share=False), learn()
        return MethodStep(lambda: self._update(fast, learn()), lambda: self._update(slow, batch))

    def _loss(self, update: str, name: str, *, share: bool) -> PolicyLoss:
        contrast = self._contrasts.get(name)
        return PolicyLoss(
            self._policy, self._config, update=update, share_prompt=share, contrast=contrast
        )

    def _update(self, loss: PolicyLoss, batch: UpdateBatch) -> None:
        for weight in self._policy.parameters():
            weight.grad = None
        loss(batch, batch.totals()).loss.backward()

    @cached_property
    def _scored(self) -> UpdateBatch:
        """The batch as the trainer scores it."""
        prompts = self._batch.prompts
        with torch.no_grad():
            features = self._policy.image_features(prompts.pixel_values, prompts.grids)
        return replace(self._batch.without_views(), clean_features=features)

    @cached_property
    def _scorer(self) -> PolicyLoss:
        return PolicyLoss(self._policy, self._config)

    def _mssr(self) -> UpdateBatch:
        batch = one_row_each(self._batch.without_views())
        entropy = mssr.sampled_entropy(self._scorer.score(batch).logp)
        shaped = mssr.shape_by_entropy(batch.advantages, entropy, batch.mask)
        return replace(batch, advantages=shaped)

    def _srpo(self) -> UpdateBatch:
        batch, mask = self._scored, self._batch.mask
        on_view = replace(
            batch,
            prompts=replace(batch.prompts, pixel_values=self._batch.view_pixels[0]),
            clean_features=None,
        )
        third = mask.shape[1] // 3
        roles = torch.full(mask.shape, srpo.REASONING, dtype=torch.int8, device=mask.device)
        roles[:, :third] = srpo.PERCEPTION
        blind = replace(batch, tokens=batch.tokens[:, third:], mask=mask[:, third:])
        logp, corrupted, without = (self._scorer.score(own).logp for own in (batch, on_view, blind))
        without = torch.nn.functional.pad(without, (third, 0))
        weighed = srpo.reweight(batch.advantages, logp, corrupted, without, roles, mask)
        return replace(self._batch.without_views(), advantages=weighed)

    def _vgpo(self) -> UpdateBatch:
        def read(part: UpdateBatch, hidden: Tensor, image: Tensor) -> Tensor:
            return vgpo.weights(hidden, image[part.group], part.mask, part.group)

        weights = self._scorer.score(self._scored, read=read).read
        assert weights is not None  # it was asked for
        advantages = (self._batch.advantages[:, None] * weights).to(self._batch.advantages)
        return replace(self._batch.without_views(), advantages=advantages)

    def _with_views(self, count: int) -> UpdateBatch:
        return replace(self._batch, view_pixels=self._batch.view_pixels[:count], aux_view=None)

    def _attacked(self) -> UpdateBatch:
        batch, count = self._batch, len(self._batch.prompts.images)
        right = batch.correct.view(count, -1)
        probe = Probe(self._scorer, self._scored, right, views=VIEWS)
        eps = [[EPS] * count] * VIEWS
        made = perturb(probe, eps, lambda view, prompt, _: 1000 * view + prompt, AttackConfig())
        pixels = [self._policy.view_pixels(batch.prompts, images) for images in made.images]
        aux = None if batch.aux_view is None else batch.aux_view % VIEWS
        return replace(batch, view_pixels=pixels, aux_view=aux)
