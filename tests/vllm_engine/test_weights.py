"""New weights reach vLLM whole, and nothing that older ones left is read."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.small_model import mixed_prompts
from vllm_engine.model import OPTIONS, Source, mismatch

from roma.rollout import make_sampler
from roma.rollout.vllm import VllmSampler

CLOSE = 1e-4
ASKED = {"group_size": 2, "max_new_tokens": 12, "temperature": 1.0, "seed": 0}


def long_prompt(policy):
    """An image of 256 tokens: vLLM keeps the keys of whole blocks, of 128 on a CPU."""
    image = torch.randint(256, (256, 256, 3), generator=torch.Generator().manual_seed(0))
    return policy.encode_prompts(["<image> sum ?"], [[image.to(torch.uint8).numpy()]])


def test_new_weights_give_new_tokens(engine):
    source, sampler = engine
    prompts = mixed_prompts(source.policy)
    before, asked = sampler.sample(prompts, **ASKED), source.asked
    sampler.sample(prompts, **ASKED)
    assert source.asked == asked  # the same version: nothing to take
    source.change(2)
    after = sampler.sample(prompts, **ASKED)
    assert source.asked == asked + 1
    assert mismatch(source.policy, prompts, after, 1.0) < CLOSE
    assert mismatch(source.policy, prompts, before, 1.0) > 100 * CLOSE
    assert not torch.equal(before.tokens, after.tokens)


@pytest.mark.parametrize("stale", ["prefix", "encoder"])
def test_a_stale_cache_would_be_seen(engine, monkeypatch, stale):
    """Keys and values of prompts, or features of images, that older weights left.

    The worker of this vLLM empties its features with new weights, and then the scheduler, which
    still counts on them, has to be told; in older ones neither was.
    """
    source, sampler = engine
    prompts = long_prompt(source.policy)
    sampler.sample(prompts, **ASKED)
    (worker,) = sampler.llm.collective_rpc(lambda worker: worker)
    for where, name in {
        "prefix": [(sampler.llm, "reset_prefix_cache")],
        "encoder": [
            (sampler.llm.llm_engine, "reset_encoder_cache"),
            (worker.model_runner, "reset_encoder_cache"),
        ],
    }[stale]:
        monkeypatch.setattr(where, name, lambda *_: True)
    source.change(3)
    made = sampler.sample(prompts, **ASKED)
    assert mismatch(source.policy, prompts, made, 1.0) > 10 * CLOSE
    monkeypatch.undo()
    sampler._reset_caches()
    made = sampler.sample(prompts, **ASKED)
    assert mismatch(source.policy, prompts, made, 1.0) < CLOSE


def test_only_the_vision_tower_changed(engine):
    """The features of an image that was seen before are made again."""
    source, sampler = engine
    prompts = mixed_prompts(source.policy)
    sampler.sample(prompts, **ASKED)
    with torch.no_grad():
        for weight in source.policy.model.model.visual.parameters():
            weight.mul_(1.2)
    source.version += 1
    made = sampler.sample(prompts, **ASKED)
    assert mismatch(source.policy, prompts, made, 1.0) < CLOSE


def test_sleep_discards_the_weights_and_waking_takes_them(engine, monkeypatch):
    """A CPU gives no memory back, but the order of the calls is the same."""
    source, sampler = engine
    prompts = mixed_prompts(source.policy)
    calls: list[str] = []

    def noted(name, inner):
        def call(*args, **kwargs):
            given = [str(x) for x in (*args, *kwargs.values()) if isinstance(x, list | int)]
            calls.append(" ".join([name, *given]))
            return inner(*args, **kwargs)

        return call

    for name in ("wake_up", "sleep", "collective_rpc", "reset_prefix_cache"):
        monkeypatch.setattr(sampler.llm, name, noted(name, getattr(sampler.llm, name)))
    monkeypatch.setattr(sampler, "sleeps", True)
    sampler.sample(prompts, **ASKED)
    asked, calls[:] = source.asked, []
    made = sampler.sample(prompts, **ASKED)  # of the same version
    order = ["wake_up ['weights']", "collective_rpc", "reset_prefix_cache", "wake_up ['kv_cache']"]
    assert calls == [*order, "sleep 2"] and source.asked == asked + 1
    assert mismatch(source.policy, prompts, made, 1.0) < CLOSE
    monkeypatch.undo()
    sampler.sample(prompts, **ASKED)
    assert not sampler.asleep


@pytest.mark.slow
@pytest.mark.parametrize("left_out", ["layers.1.self_attn.k_proj.weight", "visual.merger."])
def test_a_gap_is_named_and_the_engine_then_refuses(left_out):
    """vLLM itself would sample with memory that nobody wrote."""
    source = Source()
    sampler, prompts = source.sampler(), mixed_prompts(source.policy)
    sampler.sample(prompts, **ASKED)
    source.left_out = left_out
    source.change(1)
    with pytest.raises(ValueError, match=f"expected every weight of the model.*{left_out}"):
        sampler.sample(prompts, **ASKED)
    source.left_out = ""
    with pytest.raises(RuntimeError, match="an earlier call failed within vLLM"):
        sampler.sample(prompts, **ASKED)


@pytest.mark.slow
def test_a_head_that_is_the_embedding():
    """Its name may come, as from a state_dict, or not, as from a file."""
    source = Source(tied=True)
    source.change(1)
    sampler, prompts = source.sampler(), mixed_prompts(source.policy)
    assert mismatch(source.policy, prompts, sampler.sample(prompts, **ASKED), 1.0) < CLOSE
    source.left_out = "lm_head"
    source.change(2)
    assert mismatch(source.policy, prompts, sampler.sample(prompts, **ASKED), 1.0) < CLOSE


@pytest.mark.slow
def test_without_new_weights_it_has_the_folders():
    source = Source()
    sampler = VllmSampler(source.policy, weights=None, options=OPTIONS)
    prompts = mixed_prompts(source.policy)
    assert mismatch(source.policy, prompts, sampler.sample(prompts, **ASKED), 1.0) < CLOSE


@pytest.mark.slow
def test_the_configuration_names_it():
    source = Source()
    options = SimpleNamespace(name="vllm", vllm=OPTIONS)
    state = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    made = make_sampler(options, source.policy, weights=source.weights, version=lambda: 0)
    assert isinstance(made, VllmSampler)
    # vLLM seeds every global generator as it starts.
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1:] == (random.getstate(), str(np.random.get_state()))


@pytest.mark.slow
def test_bf16_with_logits_in_fp32():
    """What differs is the transformer's rounding: log-probs by hundredths, and no more."""
    source = Source()
    options = SimpleNamespace(**vars(OPTIONS) | {"dtype": "bfloat16"})
    sampler = VllmSampler(source.policy, weights=source.weights, version=lambda: 0, options=options)
    prompts = mixed_prompts(source.policy)
    found = mismatch(source.policy, prompts, sampler.sample(prompts, **ASKED), 1.0)
    assert 1e-4 < found < 0.2
