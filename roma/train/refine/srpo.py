"""SRPO's contrasts in a run: roles of decoded tokens, and the passes that score them without."""

import sys
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from roma.advantages import srpo
from roma.advantages.base import OptionalInput
from roma.models.processor import Processor
from roma.rollout.base import Rollouts
from roma.train import ranks
from roma.train.batch import UpdateBatch
from roma.train.config.methods import SrpoConfig
from roma.train.engine import Engine
from roma.train.refine.sampled import Metrics, Sampled
from roma.train.scoring import Read, Scores
from roma_kernels.errors import fail


class Srpo:
    """Weights by what a token owes to the image, or to the text that was read off it.

    Args:
        options: of the method.
        engine: of the policy: scores responses on blackened images, and without their perception.
        limit: tokens that a call of the model takes at most.
    """

    needs: frozenset[OptionalInput] = frozenset({"logp"})
    wants_masked = True

    def __init__(self, options: SrpoConfig, engine: Engine, limit: int) -> None:
        """Keeps all."""
        self.options, self._engine, self._limit = options, engine, limit
        self._pieces: dict[int, str] = {}
        self._warned = False

    def reader(self, sampled: Sampled) -> Read | None:
        """Hidden states are not read."""
        del sampled
        return None

    def __call__(self, sampled: Sampled, scores: Scores) -> tuple[Tensor, Metrics]:
        """Weights [B, T], and the share of responses whose tags cannot be read.

        Raises:
            ValueError: in the first step, none can be read.
        """
        rollouts, options = sampled.rollouts, self.options
        roles, unparsable = self.roles(rollouts)
        share = self._checked(sampled.step, unparsable)
        assert sampled.masked is not None  # `wants_masked`
        read = ~unparsable[:, None]
        masked = sampled.masked.result().applied_to(sampled.prompts)
        on_masked = replace(rollouts, features=None)
        corrupted = self._logp(replace(sampled, prompts=masked, rollouts=on_masked), read)
        blind = None
        if options.contrast == "blind":
            blind = self._logp(sampled, read & (roles != srpo.PERCEPTION))
        weights = srpo.weights(
            scores.logp,
            corrupted,
            blind,
            roles,
            rollouts.mask,
            tau=options.tau,
            clip=options.clip,
            limit=options.limit,
        )
        return weights, {"advantage/srpo_unparsable": share}

    def roles(self, rollouts: Rollouts) -> srpo.Roles:
        """Of each token, on the device of the rollouts."""
        tokens, mask = rollouts.tokens, rollouts.mask
        processor = self._engine.policy.processor
        # A Thinking model's template opens the reasoning in the prompt: a piece before the first.
        (opening,) = processor.decode(tokens[:1, :0], mask[:1, :0])
        before = [opening] if opening else []
        texts = [
            before + [self._piece(processor, token) for token in row[on].tolist()]
            for row, on in zip(tokens.cpu(), mask.cpu(), strict=True)
        ]
        found = srpo.roles(
            texts,
            perception=self.options.perception_tag,
            reasoning=self.options.reasoning_tag,
            length=tokens.shape[1] + len(before),
        )
        roles = found.roles[:, len(before) :].to(tokens.device)
        return srpo.Roles(roles, found.unparsable.to(tokens.device))

    def _piece(self, processor: Processor, token: int) -> str:
        if token not in self._pieces:
            text: str = processor.tokenizer.decode([token], skip_special_tokens=True)
            self._pieces[token] = text
        return self._pieces[token]

    def _logp(self, sampled: Sampled, kept: Tensor) -> Tensor:
        """[B, T] nats of the tokens that are kept, one after another; 0 for all others."""
        rollouts, group = sampled.rollouts, sampled.group
        kept = rollouts.mask & kept
        order = (~kept).long().argsort(dim=-1, stable=True)
        moved = replace(
            rollouts, tokens=rollouts.tokens.gather(1, order), mask=kept.gather(1, order)
        )
        batch = UpdateBatch.to_score(sampled.prompts, moved, group)
        score: Callable[..., Scores] = self._engine.policy_loss.score
        logp = self._engine.call(score, batch, limit=self._limit).logp
        return torch.zeros_like(logp).scatter(1, order, logp)

    def _checked(self, step: int, unparsable: Tensor) -> float:
        """The share of all ranks' responses that cannot be read; says if it is all of them."""
        counts = ranks.summed({"unparsable": int(unparsable.sum()), "all": len(unparsable)})
        share = counts["unparsable"] / counts["all"]
        if share < 1:
            self._warned = False
            return share
        first, second = (" … ".join(tag) for tag in self._tags())
        expected = f"responses with one {first} and one {second}"
        got = f"none of {counts['all']:g} in step {step}"
        remedy = (
            "ask for the tags in the prompt (data.format_prompt), or name those that the model "
            "writes (algorithm.srpo.perception_tag and .reasoning_tag)"
        )
        if step == 1:
            fail("algorithm.reweight=srpo", expected, got, remedy)
        if not self._warned and ranks.rank() == 0:
            line = f"algorithm.reweight=srpo: expected {expected}, got {got}; {remedy}"
            print(f"warning: step {step}: {line}", file=sys.stderr, flush=True)
        self._warned = True
        return share

    def _tags(self) -> tuple[tuple[str, str], tuple[str, str]]:
        return self.options.perception_tag, self.options.reasoning_tag
