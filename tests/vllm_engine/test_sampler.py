"""vLLM's own engine on a CPU: what it reads, what it samples, what it says of it."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.small_model import mixed_prompts
from vllm_engine.model import mismatch, trainer_logits

from roma.rollout.hf import generate

# The bar for fp32; 2.4e-6 was measured.
CLOSE = 1e-4


def asked(**changed):
    given = {"group_size": 4, "max_new_tokens": 12, "temperature": 1.0, "seed": 0}
    return given | changed


@pytest.fixture(scope="module")
def prompts(engine):
    """Of different lengths: one image, two of different grids, one larger, none."""
    policy = engine[0].policy
    three = mixed_prompts(policy)
    problems = ["<image> sum ?", "left <image> right <image> larger ?", "so <image> larger sum ?"]
    made = policy.encode_prompts([*problems, "larger sum"], [*three.images, []])
    assert made.first_image == [0, 1, 3, 4, 4]
    return made


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.5])
def test_log_probs_are_the_trainers(engine, prompts, temperature):
    source, sampler = engine
    made = sampler.sample(prompts, **asked(temperature=temperature))
    assert made.tokens.shape[0] == 16 and made.logp.dtype == torch.float32
    assert mismatch(source.policy, prompts, made, temperature) < CLOSE
    # Log-probs at another temperature, or of another token, do not pass.
    assert mismatch(source.policy, prompts, made, temperature * 1.01) > 10 * CLOSE
    moved = replace(made, logp=made.logp.roll(1, -1))
    assert mismatch(source.policy, prompts, moved, temperature) > 10 * CLOSE


def test_they_are_of_the_whole_vocabulary_though_marks_are_never_sampled(engine, prompts):
    """As vLLM reports them they are of the rest alone, here a twentieth too probable."""
    source, sampler = engine
    made = sampler.sample(prompts, **asked(group_size=64, max_new_tokens=8))
    assert made.mask.sum() > 1000
    assert not (torch.isin(made.tokens, torch.tensor(sampler.suppressed)) & made.mask).any()
    logp = trainer_logits(source.policy, prompts, made).log_softmax(-1)
    rest = 1 - logp[..., sampler.suppressed].exp().sum(-1)
    as_reported = replace(made, logp=made.logp - rest.log())
    assert mismatch(source.policy, prompts, made, 1.0) < CLOSE
    assert mismatch(source.policy, prompts, as_reported, 1.0) > 100 * CLOSE


def test_tokens_come_from_the_whole_distribution(engine, prompts):
    """First tokens of 2000 completions: none of 35 counts is 4.5 standard deviations off."""
    source, sampler = engine
    count, temperature = 2000, 0.5
    one = prompts.select([1])
    drawn = asked(group_size=count, max_new_tokens=1, temperature=temperature)
    made = sampler.sample(one, **drawn)
    logits = trainer_logits(source.policy, one, made)[0, 0]
    logits[sampler.suppressed] = -torch.inf
    seen = made.tokens[:, 0].bincount(minlength=len(logits)).double()

    def worst(probability):
        inside = probability > 0
        expected = count * probability[inside]
        return float(
            ((seen[inside] - expected) / (expected * (1 - probability[inside])).sqrt()).abs().max()
        )

    assert worst((logits / temperature).double().softmax(-1)) < 4.5
    assert worst(logits.double().softmax(-1)) > 4.5  # another temperature is seen
    top = logits.topk(20).indices
    kept = torch.full_like(logits, -torch.inf).scatter(0, top, logits[top])
    assert seen[kept == -torch.inf].sum() > 0  # nothing was cut off


def test_equal_seeds_give_equal_tokens(engine, prompts):
    _, sampler = engine
    first, again, other = (sampler.sample(prompts, **asked(seed=seed)) for seed in (5, 5, 6))
    assert torch.equal(first.tokens, again.tokens) and torch.equal(first.logp, again.logp)
    assert not torch.equal(first.tokens, other.tokens)
    rows = first.tokens.view(4, 4, -1)
    assert len({tuple(row.tolist()) for row in rows[0]}) == 4  # completions of a prompt differ
    alone = sampler.sample(prompts.select([0]), **asked(seed=5))
    width = alone.tokens.shape[1]
    assert torch.equal(first.tokens[:4, :width], alone.tokens)  # whatever is beside it


def test_equal_prompts_have_seeds_of_their_own(engine, prompts):
    """Neighbours that shared some would share completions: of 8 × 12 tokens none are equal."""
    sampler = engine[1]
    made = sampler.sample(prompts.select([3, 3]), **asked(group_size=8))
    rows = {tuple(row.tolist()) for row in made.tokens.masked_fill(~made.mask, -1)}
    assert len(rows) == 16


def test_no_global_generator_moves(engine, prompts):
    _, sampler = engine
    state = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    sampler.sample(prompts, **asked())
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1:] == (random.getstate(), str(np.random.get_state()))


def test_greedy_answers_are_those_of_transformers(engine, prompts):
    source, sampler = engine
    made = sampler.sample(prompts, **asked(group_size=1, temperature=None))
    expected = generate(source.policy, prompts, max_new_tokens=12, temperature=None)
    assert made.logp is None
    assert torch.equal(made.mask, expected.mask) and torch.equal(made.finished, expected.finished)
    assert torch.equal(made.tokens[made.mask], expected.tokens[made.mask])


def test_completions_end_as_those_of_transformers_do(engine, prompts):
    """The end token counts; a completion without one has the whole budget."""
    _, sampler = engine
    made = sampler.sample(prompts, **asked(group_size=64))
    lengths = made.mask.sum(-1)
    last = made.tokens.gather(1, lengths[:, None] - 1)[:, 0]
    ended = torch.isin(last, torch.tensor(sampler.ends))
    assert torch.equal(ended, made.finished) and ended.any() and not ended.all()
    assert (lengths[~ended] == 12).all()
    ends = torch.isin(made.tokens, torch.tensor(sampler.ends)) & made.mask
    assert torch.equal(ends.sum(-1), ended.long())


def test_vllm_runs_outside_of_autocast(engine, prompts, monkeypatch):
    """A trainer in bf16 calls it inside; the engine has a dtype of its own."""
    _, sampler = engine
    inner, seen = sampler.llm.wait_for_completion, []

    def noted(*args, **kwargs):
        seen.append(torch.is_autocast_enabled("cpu"))
        return inner(*args, **kwargs)

    monkeypatch.setattr(sampler.llm, "wait_for_completion", noted)
    with torch.autocast("cpu", torch.bfloat16):
        sampler.sample(prompts, **asked())
    assert seen == [False]


def test_an_image_of_another_size_is_named(engine, prompts):
    """As if vLLM's processor had resized it."""
    _, sampler = engine
    larger = [[np.zeros((64, 64, 3), np.uint8)], *prompts.images[1:]]
    with pytest.raises(ValueError, match=r"prompt 0: expected the trainer's \d+ tokens, got \d+"):
        sampler.sample(replace(prompts, images=larger), **asked())
    turned = [[prompts.images[0][0].swapaxes(0, 1).copy()], *prompts.images[1:]]  # as many tokens
    grids = r"prompt 0: expected image grids \[\[1, 4, 8\]\], got vLLM's \[\[1, 8, 4\]\]"
    with pytest.raises(ValueError, match=grids):
        sampler.sample(replace(prompts, images=turned), **asked())
    assert sampler.sample(prompts, **asked()).mask.any()  # and the engine still works


def test_what_does_not_fit_is_refused(engine, prompts):
    _, sampler = engine
    with pytest.raises(ValueError, match=r"temperature: expected at least 0\.01, got 0\.001"):
        sampler.sample(prompts, **asked(temperature=0.001))
    with pytest.raises(ValueError, match=r"max_new_tokens: expected .* 512 tokens, got \d+ \+ 500"):
        sampler.sample(prompts, **asked(max_new_tokens=500))
