"""Layers run again in the backward pass: the same gradients, and what is refused."""

from __future__ import annotations

import warnings

import pytest
import torch
from support import adapters, prefix, small_model
from support.adapters import gradients
from torch import nn

from roma.models.lora import factors, layers
from roma.models.qwen_vl import Policy
from roma.rollout.hf import generate

KINDS = ("whole", "frozen tower", "adapters")
NON_REENTRANT = {"use_reentrant": False}


def policy_of(kind: str, family: str = "qwen3") -> Policy:
    policy = (
        adapters.adapted(family)
        if kind == "adapters"
        else Policy.load(prefix.vision_folder(family))
    )
    if kind == "frozen tower":
        policy.model.model.visual.requires_grad_(False)
    return policy


def count_calls(policy: Policy) -> dict[str, int]:
    """Of an attention of the text model and of one of the tower."""
    model, found = policy.model.model, {"text": 0, "tower": 0}

    def count(name: str, part: nn.Module) -> None:
        def add(*_: object) -> None:
            found[name] += 1

        part.register_forward_hook(add)

    count("text", model.language_model.layers[0].self_attn)
    count("tower", model.visual.blocks[0].attn)
    return found


@pytest.mark.parametrize("share", [True, False], ids=["shared", "rows"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["qwen3", "qwen2.5"])
def test_gradients_are_the_same_bits(family: str, kind: str, share: bool) -> None:
    policy = policy_of(kind, family)
    form = {"update": "joint", "share_prompt": share}
    batch, calls = adapters.batch_of(policy), count_calls(policy)
    calls |= {"text": 0, "tower": 0}
    kept = gradients(policy, batch, **form)
    once = dict(calls)
    policy.checkpoint()
    assert policy.is_checkpointed and policy.model.training
    again = gradients(policy, batch, **form)
    assert again.keys() == kept.keys() and all(torch.equal(again[n], kept[n]) for n in kept)
    runs = {name: calls[name] - once[name] for name in calls}
    # A frozen tower has no graph, so nothing of it is run again.
    assert runs == {"text": 2 * once["text"], "tower": (1 + (kind == "whole")) * once["tower"]}


def test_embeddings_that_ask_for_a_gradient_would_learn_through_a_frozen_tower() -> None:
    """What transformers does by itself in a Qwen2.5-VL, and `checkpoint` undoes."""
    policy = policy_of("adapters", "qwen2.5")
    batch, calls = adapters.batch_of(policy), count_calls(policy)
    runs = []
    for enable in (
        lambda: policy.model.activation_checkpointing_enable(NON_REENTRANT) or policy.train(),
        policy.checkpoint,
    ):
        enable()
        calls["tower"] = 0
        gradients(policy, batch, update="joint")
        runs.append(calls["tower"])
    assert runs[0] == 2 * runs[1]


def test_rollouts_leave_it_on() -> None:
    policy = policy_of("adapters")
    policy.checkpoint()
    options = {"group_size": 2, "max_new_tokens": 4, "temperature": 1.0, "seed": 1}
    prompts = small_model.mixed_prompts(policy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # transformers would say that it drops the cache
        made = generate(policy, prompts, **options)
    assert torch.equal(made.tokens, generate(adapters.adapted(), prompts, **options).tokens)
    batch, calls = adapters.batch_of(policy), count_calls(policy)
    calls["text"] = 0
    gradients(policy, batch, update="joint")
    assert calls["text"] == 2


def test_the_reentrant_kind_is_refused_whoever_enabled_it() -> None:
    policy = policy_of("adapters")
    batch = adapters.batch_of(policy)
    with pytest.raises(ValueError, match="gradient checkpointing: expected reentrant=False, got T"):
        policy.checkpoint(reentrant=True)
    assert not policy.is_checkpointed
    for options in ({"use_reentrant": True}, {"preserve_rng_state": False}):  # torch's default
        policy.model.activation_checkpointing_enable(options)
        policy.train()
        said = r"expected use_reentrant=False, got another in model\..*; call policy.checkpoint\(\)"
        with pytest.raises(ValueError, match=said):
            gradients(policy, batch, update="lean")
    policy.checkpoint()
    assert gradients(policy, batch, update="lean")


def test_why_the_reentrant_kind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second layer of it, above embeddings without a gradient: half of the adapters learn."""
    monkeypatch.setattr("roma.models.checkpointing.check", lambda model: None)
    policy = policy_of("adapters")
    policy.model.activation_checkpointing_enable({"use_reentrant": True}, every_n_layers=2)
    policy.model.disable_input_require_grads()
    policy.train()
    batch = adapters.batch_of(policy)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = gradients(policy, batch, update="lean")
    assert len(found) == len(layers(policy.model))  # of twice as many factors


def test_eval_mode_is_refused_where_it_would_keep_everything() -> None:
    policy = policy_of("adapters")
    batch = adapters.batch_of(policy)
    policy.checkpoint()
    policy.eval()
    said = r"gradient checkpointing: expected training mode, got eval mode in model\..*; call"
    with pytest.raises(ValueError, match=said):
        gradients(policy, batch, update="lean")
    adapters.PolicyLoss(policy, adapters.RomaConfig()).score(batch)  # has no graph
    policy.train()
    assert gradients(policy, batch, update="lean")


def test_dropout_is_refused_by_name() -> None:
    policy = policy_of("whole")
    attention = policy.model.model.language_model.layers[1].self_attn
    attention.attention_dropout = 0.1
    with pytest.raises(ValueError, match=r"dropout of model.language_model.layers.1.self_attn: "):
        policy.checkpoint()
    assert not policy.is_checkpointed and not policy.model.training
    attention.attention_dropout = 0.0
    policy.model.model.dropout = nn.Dropout(0.2)
    with pytest.raises(ValueError, match=r"dropout of model.dropout: expected 0.* got 0.2"):
        policy.checkpoint()


def test_the_reference_of_a_checkpointed_policy() -> None:
    policy, base = policy_of("adapters"), policy_of("whole")
    policy.checkpoint()
    batch = adapters.batch_of(base)
    before = gradients(policy, batch, update="lean")
    score = adapters.PolicyLoss(policy, adapters.RomaConfig()).score
    with policy.reference():
        logp = score(batch).logp
    expected = adapters.PolicyLoss(base, adapters.RomaConfig()).score(batch).logp
    assert torch.equal(logp, expected)
    again = gradients(policy, batch, update="lean")
    assert all(torch.equal(again[name], value) for name, value in before.items())
    assert all(w.requires_grad for x in layers(policy.model).values() for w in factors(x))
