"""VGPO's weights in a run, made while the rollouts are scored: no hidden states are kept."""

from dataclasses import asdict

from torch import Tensor

from roma.advantages import vgpo
from roma.advantages.base import OptionalInput
from roma.train.batch import UpdateBatch
from roma.train.config.methods import VgpoConfig
from roma.train.refine.sampled import Metrics, Sampled
from roma.train.scoring import Read, Scores


class Vgpo:
    """Weights by how much a token's hidden state is like those of the image's tokens.

    A prompt's rollouts are scored by the same call of the model, so that its group is whole there.
    A rollout without a reward is no part of it.

    Args:
        options: of the method.
    """

    needs: frozenset[OptionalInput] = frozenset()
    wants_masked = False

    def __init__(self, options: VgpoConfig) -> None:
        """Keeps them."""
        self.options = asdict(options)

    def reader(self, sampled: Sampled) -> Read | None:
        """The weights [b, T] of whole prompts; advantages in the batch are 1, or 0 if it failed."""
        del sampled
        return self._weights

    def _weights(self, part: UpdateBatch, hidden: Tensor, image: Tensor) -> Tensor:
        taken = part.advantages != 0
        states, mask, group = image[part.group], part.mask, part.group
        if taken.all():
            return vgpo.weights(hidden, states, mask, group, **self.options)
        found = mask.double()
        if taken.any():
            found[taken] = vgpo.weights(
                hidden[taken], states[taken], mask[taken], group[taken], **self.options
            )
        return found

    def __call__(self, sampled: Sampled, scores: Scores) -> tuple[Tensor, Metrics]:
        """Weights [B, T]; no metrics."""
        del sampled
        assert scores.read is not None  # `reader`
        return scores.read, {}
