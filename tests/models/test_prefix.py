"""Packed groups against a row per rollout: log-probs and all gradients, every model claimed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import prefix
from support.prefix import Case, Score

from roma.models.prefix import share_prompts
from roma.models.qwen_vl import Policy
from roma.rollout.hf import generate

EXACT = 1e-12  # of a gradient's norm; 4e-15 was measured, the smallest planted error is 1e-2

# Norms of errors of the same size, over 42 log-probs or more, differ by 1/√(2·42) = 11 % each, so
# that 1.5 is three standard deviations of their ratio; 0.87 to 1.26 were measured, and 13 for a
# position off by one under bf16.
NO_WORSE = 1.5

TEXT: dict[str, dict[str, Any]] = {
    "Llama": {"num_key_value_heads": 1},
    "Qwen2": {"num_key_value_heads": 2},
    "Qwen3": {"num_key_value_heads": 4, "head_dim": 16, "tie_word_embeddings": True},
}
FAMILIES = ("qwen3", "qwen2.5")
LAYOUTS = [
    # problems, groups, lengths of completions, views
    ("padded", "whole", "ragged", 1),
    ("padded", "views", "ragged", 4),
    ("padded", "single", "ragged", 0),
    ("padded", "views", "one", 1),
    ("text among images", "views", "ragged", 2),
    ("text alone", "whole", "full", 1),
    ("equal", "views", "full", 2),
]


class Pair:
    """A model that shares prompts and the same one as transformers loads it, in fp64 and fp32."""

    def __init__(self, shared: Any, plain: Any) -> None:
        """Keeps both, and makes the fp64 ones."""
        self.shared, self.plain = shared, plain
        self.shared64, self.plain64 = (copy.deepcopy(x).double() for x in (shared, plain))


@pytest.fixture(scope="module", params=FAMILIES)
def vision(request: pytest.FixtureRequest) -> Pair:
    path = prefix.vision_folder(request.param)
    return Pair(Policy.load(path), prefix.plain(path))


@pytest.fixture(scope="module", params=TEXT)
def text(request: pytest.FixtureRequest) -> Pair:
    plain = prefix.text_model(request.param, **TEXT[request.param])
    shared = copy.deepcopy(plain)
    share_prompts(shared)
    return Pair(shared, plain)


def assert_exact(found: Score, expected: Score) -> None:
    name, off = found.off(expected)
    assert off <= EXACT, name


@pytest.mark.parametrize(("problems", "groups", "lengths", "views"), LAYOUTS)
def test_groups_are_rows(
    vision: Pair, problems: str, groups: str, lengths: str, views: int
) -> None:
    case = prefix.image_case(vision.shared64, problems, groups, lengths, views)
    with prefix.exact(vision.shared64, vision.plain64):
        assert_exact(prefix.packed(vision.shared64, case), prefix.rows(vision.plain64, case))


@pytest.mark.parametrize("lengths", ["ragged", "one", "full"])
@pytest.mark.parametrize("groups", ["whole", "single"])
def test_groups_of_text_are_rows(text: Pair, groups: str, lengths: str) -> None:
    case = prefix.text_case(groups, lengths)
    with prefix.exact(text.shared64, text.plain64):
        assert_exact(prefix.packed(text.shared64, case), prefix.rows(text.plain64, case))


def completions(policy: Policy, case: Case) -> Score:
    """The policy's own rows: padded, a call for each variant."""
    assert case.batch
    sources = [case.batch.pixel_values, *case.views]
    made: dict[tuple[int, int], torch.Tensor] = {}
    for variant, pixels in enumerate(sources):
        own = [r for v, r in case.pairs if v == variant]
        features = policy.image_features(pixels, case.batch.grids)
        tokens, lengths = case.tokens[own], case.lengths[own]
        mask = torch.arange(prefix.T) < lengths[:, None]
        prompts = torch.tensor(own) // prefix.PER_PROMPT
        hidden = policy.completion_hidden(case.batch, features, prompts, tokens, mask)
        made |= {(variant, r): hidden[i, : lengths[i]] for i, r in enumerate(own)}
    return prefix.scored(policy.model, case, torch.cat([made[pair] for pair in case.pairs]))


def test_the_policys_rows_are_rows(vision: Pair) -> None:
    case = prefix.image_case(vision.shared64, "padded", "views", "ragged", 4)
    with prefix.exact(vision.shared64, vision.plain64):
        assert_exact(completions(vision.shared64, case), prefix.rows(vision.plain64, case))


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_as_precise_as_rows(vision: Pair, autocast: bool) -> None:
    """Against fp64, an error no larger than that of transformers' rows in the same arithmetic."""
    case, case64 = (
        prefix.image_case(policy, "padded", "views", "ragged", 4)
        for policy in (vision.shared, vision.shared64)
    )
    with prefix.exact(vision.plain64):
        exact = prefix.rows(vision.plain64, case64)
    theirs = prefix.rows(vision.plain, case, autocast=autocast).shares(exact)

    def ratios(case: Case) -> list[float]:
        mine = prefix.packed(vision.shared, case, autocast=autocast).shares(exact)
        return [a / b for a, b in zip(mine, theirs, strict=True)]

    assert max(ratios(case)) <= NO_WORSE
    assert min(ratios(prefix.later(case))) > 5 * NO_WORSE


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_text_is_as_precise_as_rows(text: Pair, autocast: bool) -> None:
    case = prefix.text_case("whole", "ragged")
    with prefix.exact(text.plain64):
        exact = prefix.rows(text.plain64, case)
    theirs, mine = (
        score(model, case, autocast=autocast).shares(exact)
        for score, model in ((prefix.rows, text.plain), (prefix.packed, text.shared))
    )
    assert all(a <= NO_WORSE * b for a, b in zip(mine, theirs, strict=True))


def test_checkpointed_in_training_mode(vision: Pair) -> None:
    case = prefix.image_case(vision.shared64, "padded", "views", "ragged", 2)
    policy = copy.deepcopy(vision.shared64).train()
    policy.model.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    calls: list[int] = []
    layer = policy.model.model.language_model.layers[0].self_attn
    layer.register_forward_hook(lambda *_: calls.append(1))
    with prefix.exact(policy, vision.plain64):
        assert_exact(prefix.packed(policy, case), prefix.rows(vision.plain64, case))
    assert len(calls) == 2  # once more in the backward


@torch.no_grad()
def test_generation_is_that_of_the_plain_model(vision: Pair) -> None:
    """Greedy, bit for bit; of prompts padded and of no image, too."""
    for problems in ("padded", "text among images", "text alone"):
        case = prefix.image_case(vision.shared, problems, "whole", "full", 0)
        assert case.batch and case.batch.padded
        policies = (vision.shared, Policy(vision.plain, vision.shared.processor))
        assert [p.shares_prompts for p in policies] == [True, False]
        options = {"group_size": 2, "max_new_tokens": 6, "temperature": 1.0, "seed": 1}
        mine, theirs = (generate(policy, case.batch, **options) for policy in policies)
        assert torch.equal(mine.tokens, theirs.tokens)
