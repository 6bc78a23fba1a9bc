"""Hidden states and a head that resemble a language model's, drawn from a seed.

Gaussian states and heads give logits of one size and a flat softmax. On these a wrong kernel hardly
shows, and a filter of small probabilities has nothing to filter. So here

* the spectrum of states and head falls like i^(-1/4): a few directions matter more than the rest,
* the head's rows have log-normal lengths, and a common direction shifts all logits,
* each state points towards one entry, drawn from Zipf's law, by an amount that differs from token
  to token: most tokens are nearly certain, some are not,
* tokens are sampled from the softmax of the clean states, as a policy samples them,
* a view's states are the clean ones, each changed by 1 %.

`describe` gives statistics of the data, and a run's table shows them. `--states file.pt` takes the
states of a real model: a dict of "hidden" [N, D] and "weight" [V, D], written by torch.save.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SHIFT = 0.01  # relative change of a view's states


@dataclass(frozen=True)
class Shape:
    """N tokens on K views, hidden size D, vocabulary V."""

    tokens: int
    views: int
    depth: int
    vocab: int
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        """Its name in the live table."""
        kind = str(self.dtype).removeprefix("torch.")
        return f"N={self.tokens} K={self.views} D={self.depth} V={self.vocab} {kind}"


@dataclass(frozen=True)
class Case:
    """States [K+1, N, D], clean ones first, a head [V, D] and sampled tokens [N]."""

    shape: Shape
    states: Tensor
    weight: Tensor
    tokens: Tensor

    @property
    def rows(self) -> Tensor:
        """[(K+1)·N, D]."""
        return self.states.flatten(0, 1)

    @property
    def labels(self) -> Tensor:
        """[(K+1)·N]."""
        return self.tokens.repeat(self.shape.views + 1)


def load(file: str, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """States [N, D] and head [V, D] from a file.

    Raises:
        ValueError: the file holds something else.
    """
    found = torch.load(file, map_location=device, weights_only=True)
    if not isinstance(found, dict) or not {"hidden", "weight"} <= set(found):
        raise ValueError(f'{file}: expected a dict of "hidden" [N, D] and "weight" [V, D]')
    hidden, weight = found["hidden"], found["weight"]
    if not (hidden.ndim == weight.ndim == 2 and hidden.shape[1] == weight.shape[1]):
        sizes = f"hidden {list(hidden.shape)}, weight {list(weight.shape)}"
        raise ValueError(f"{file}: expected hidden [N, D] and weight [V, D], got {sizes}")
    return hidden, weight


def make(shape: Shape, device: str, *, seed: int = 0, states: str = "") -> Case:
    """The case of a shape, drawn from `seed`; or with the rows and head of the file `states`."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    if states:
        clean, weight = load(states, device)
        clean = clean[: shape.tokens].float()
    else:
        clean, weight = _draw(shape, normal, generator)
    moved = [clean * (1 + SHIFT * normal(*clean.shape)) for _ in range(shape.views)]
    every = torch.stack([clean, *moved]).to(shape.dtype)
    weight = weight.to(shape.dtype)
    tokens = torch.cat(
        [_sample(rows @ weight.T.to(rows.dtype), generator) for rows in every[0].split(256)]
    )
    return Case(shape, every, weight, tokens)


def _draw(shape: Shape, normal, generator: torch.Generator) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    depth = shape.depth
    spectrum = torch.arange(1, depth + 1, device=generator.device).float() ** -0.25
    spectrum *= (depth / spectrum.square().sum()).sqrt()
    lengths = torch.exp(0.15 * normal(shape.vocab, 1))
    common = normal(depth) / depth**0.5
    weight = lengths * normal(shape.vocab, depth) * spectrum / depth**0.5
    weight += 0.3 * common
    uniform = torch.rand(shape.tokens, generator=generator, device=generator.device)
    # The entry, by Zipf's law over the vocabulary, and how certain of it each token is.
    target = (shape.vocab**uniform).long().clamp(max=shape.vocab) - 1
    sure = math.log(shape.vocab) + 6 + 2.5 * normal(shape.tokens, 1)
    states = normal(shape.tokens, depth) * spectrum.flip(0)
    states += sure * weight[target] / weight[target].square().sum(1, keepdim=True)
    states -= 10 * common
    return states, weight


def _sample(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One token from each row's softmax."""
    p = torch.softmax(logits.float(), 1)
    return torch.multinomial(p, 1, generator=generator)[:, 0]


@torch.no_grad()
def describe(case: Case, rows: int = 256) -> dict[str, float]:
    """Entropies in nats and sizes of the logits of the first clean rows."""
    logits = case.states[0, :rows].float() @ case.weight.float().T
    logp = torch.log_softmax(logits, 1)
    entropy = -(logp.exp() * logp).sum(1)
    quantiles = torch.quantile(entropy, torch.tensor([0.5, 0.9], device=entropy.device))
    return {
        "entropy_mean": float(entropy.mean()),
        "entropy_p50": float(quantiles[0]),
        "entropy_p90": float(quantiles[1]),
        "logit_max": float(logits.abs().max()),
        "logit_std": float(logits.std()),
        "top_p": float(logp.amax(1).exp().mean()),
    }
