"""What sampling engines share: the completions that they return, and the call that makes them."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from roma.models.prompts import ImageFeatures, PromptBatch


@dataclass(frozen=True)
class Rollouts:
    """G completions of each of P prompts; rows p·G to p·G + G − 1 belong to prompt p."""

    tokens: Tensor  # [P·G, T] int64, padded on the right
    mask: Tensor  # [P·G, T] bool, True = counts; the end token counts
    finished: Tensor  # [P·G] bool: ended by an end token, not by the budget
    # [P·G, T] fp32, nats at the sampling temperature; None where the engine reports none.
    logp: Tensor | None = None
    # Of the prompts' images, under the weights that sampled; None where the engine keeps none.
    features: ImageFeatures | None = None


class Sampler(Protocol):
    """An engine that samples completions from the policy."""

    def sample(
        self,
        prompts: PromptBatch,
        *,
        group_size: int,
        max_new_tokens: int,
        temperature: float | None,
        seed: int,
    ) -> Rollouts:
        """Samples `group_size` completions of each prompt.

        What a trainer relies on, whichever the engine:

        * The weights are the policy's at the time of the call; an engine with a copy of its own
          updates it first.
        * Tokens come from the full distribution at `temperature`, without top-k or top-p, so that
          log-probs at the same temperature are those of the sampler.
        * Image and video tokens are never sampled: teacher forcing could not score a completion
          that holds one.
        * `seed` is the only source of randomness, and torch's global generators keep their state.

        Args:
            prompts: P prompts. An engine may read the images as `pixel_values` and `grids`, or as
                `images` at model resolution: both hold the same pictures.
            group_size: G, completions per prompt.
            max_new_tokens: budget of a completion, tokens.
            temperature: > 0, or None for greedy decoding.
            seed: of the sampling.

        Returns:
            Rollouts on the device of `prompts`.
        """


@runtime_checkable
class Closeable(Protocol):
    """A sampler with an engine of its own, which is ended before the run."""

    def close(self) -> None:
        """Ends it; it cannot sample any more."""
