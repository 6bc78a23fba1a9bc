"""NoisyRollout: some of a prompt's rollouts are sampled on a degraded image, all as one group.

    rollouts of a prompt = [n − m on the clean image | m on the degraded one]

Log-probs and loss are on the clean image for all of them (arXiv 2504.13055; MATH.md section 5).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from roma.advantages.noisy_rollout import noise_share
from roma.rollout.base import Rollouts
from roma.train.config.sections import Config


@dataclass(frozen=True)
class Mix:
    """How a prompt's rollouts are shared out.

    Attributes:
        clean: rollouts on the clean image, at least 1.
        noisy: on the degraded one, at least 1.
    """

    clean: int
    noisy: int

    @classmethod
    def of(cls, config: Config) -> "Mix":
        """That of a run, whose options have been checked."""
        count, noisy = config.worker.rollout.n, config.algorithm.noisy_rollout.noisy
        noisy = count // 2 if noisy is None else noisy
        return cls(count - noisy, noisy)

    def is_noisy(self, group: Tensor) -> Tensor:
        """[B] bool of rollouts [B] in the order of their prompts."""
        place = torch.arange(len(group), device=group.device) % (self.clean + self.noisy)
        return place >= self.clean

    def joined(self, clean: Rollouts, noisy: Rollouts, *, pad: int) -> Rollouts:
        """One group of each prompt's clean and noisy rollouts, in this order.

        The features are those of the clean images. The sampler's log-probs are left out: those of
        noisy rollouts are of another image than is learnt from.

        Args:
            clean: of P prompts.
            noisy: of the same ones.
            pad: token for positions that do not count.
        """
        width = max(clean.tokens.shape[1], noisy.tokens.shape[1])

        def both(name: str, fill: int) -> Tensor:
            parts = []
            for rollouts, count in ((clean, self.clean), (noisy, self.noisy)):
                own: Tensor = getattr(rollouts, name)
                if own.ndim == 2:
                    wide = own.new_full((len(own), width), fill)
                    wide[:, : own.shape[1]] = own
                    own = wide
                parts.append(own.unflatten(0, (-1, count)))
            return torch.cat(parts, dim=1).flatten(0, 1)

        return Rollouts(
            tokens=both("tokens", pad),
            mask=both("mask", False),
            finished=both("finished", False),
            features=clean.features,
        )


def level_share(config: Config, step: int) -> float:
    """The share of `algorithm.views.max_level` that is left at a step of a run, 0..1."""
    options, total = config.algorithm.noisy_rollout, config.trainer.total_steps
    if not options.anneal:
        return 1.0
    return noise_share(step, total, steepness=options.steepness, midpoint=options.midpoint * total)
