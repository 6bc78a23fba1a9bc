"""Shared prompts as transformers has them: registered, once, for models that can, never silent."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import prefix, small_model
from transformers import AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from roma.models.prefix import ATTENTION, Group, pack, share_prompts, shares_prompts
from roma.models.qwen_vl import Policy
from roma.train.update import PolicyLoss
from roma_kernels.roma_loss.config import RomaConfig

PADDED = torch.tensor([[0, 0, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])


@pytest.fixture(scope="module")
def plain() -> Any:
    return prefix.text_model("Qwen3", num_key_value_heads=2, head_dim=16)


@pytest.fixture(scope="module")
def shared(plain: Any) -> Any:
    made = copy.deepcopy(plain)
    share_prompts(made)
    return made


@torch.no_grad()
def test_padded_rows_are_those_of_sdpa(plain: Any, shared: Any) -> None:
    """Bit for bit, at every token that is one."""
    got, want = (m(PADDED, attention_mask=MASK).logits[MASK.bool()] for m in (shared, plain))
    assert torch.equal(got, want)


@torch.no_grad()
def test_without_a_mask_function_padding_would_be_ignored(
    plain: Any, shared: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ATTENTION in AttentionMaskInterface().valid_keys()
    monkeypatch.delitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, ATTENTION)
    got, want = (m(PADDED, attention_mask=MASK).logits[MASK.bool()] for m in (shared, plain))
    assert float((got - want).abs().max()) > 1e-2


@pytest.mark.parametrize("family", ["text", "qwen3", "qwen2.5"])
def test_generation_is_that_of_sdpa(plain: Any, shared: Any, family: str) -> None:
    """Padded prompts, sampled, with every step's logits, bit for bit."""
    models, inputs = [shared, plain], {"input_ids": PADDED, "attention_mask": MASK}
    if family != "text":
        path = prefix.vision_folder(family)
        policy = Policy.load(path)
        models = [policy.model, prefix.plain(path)]
        inputs = small_model.plain_inputs(policy, small_model.mixed_prompts(policy))
    options = {"max_new_tokens": 8, "do_sample": True, "return_dict_in_generate": True}
    made = []
    for model in models:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made.append(model.generate(**inputs, **options, output_logits=True))
    assert torch.equal(made[0].sequences, made[1].sequences)
    assert all(torch.equal(a, b) for a, b in zip(made[0].logits, made[1].logits, strict=True))


def packed_inputs() -> dict[str, Any]:
    case = prefix.text_case("whole", "ragged")
    return pack(case.prompts, case.tokens, case.lengths, case.groups).inputs()


@torch.no_grad()
@pytest.mark.parametrize("other", ["sdpa", "eager", "flex_attention"])
def test_a_packed_row_fails_in_other_attention(shared: Any, other: str) -> None:
    """Its rollouts would see one another. Flex compiles first, and finds no mask to read."""
    model = copy.deepcopy(shared)
    model.set_attn_implementation(other)
    with pytest.raises(Exception, match=r"size of tensor|index is out of bounds"):
        model(**packed_inputs())
    if other != "flex_attention":
        one = pack([torch.tensor([5])], PADDED, torch.tensor([1, 1]), [Group(0, 0, (0,))])
        with pytest.raises(RuntimeError, match=r"size|shape"):
            model(**one.inputs())


def test_another_attention_at_recompute_fails(shared: Any) -> None:
    """Checkpointing reads the attention's name again in the backward."""
    model = copy.deepcopy(shared).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    states = model.model(**packed_inputs(), use_cache=False).last_hidden_state
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError):
        states.sum().backward()


@pytest.mark.parametrize("family", ["qwen3", "qwen2.5"])
def test_the_name_is_set_once_and_not_saved(family: str, tmp_path: Path) -> None:
    policy = Policy.load(prefix.vision_folder(family))
    assert policy.shares_prompts
    share_prompts(policy.model)  # again changes nothing
    config = policy.model.config
    assert config.text_config._attn_implementation == ATTENTION
    assert config.vision_config._attn_implementation == config._attn_implementation == "sdpa"
    for part in policy.model.modules():
        if hasattr(part, "config") and hasattr(part, "q_proj"):
            assert part.config is config.text_config
    policy.save_pretrained(tmp_path)
    assert ATTENTION not in (tmp_path / "config.json").read_text()
    assert json.loads((tmp_path / "config.json").read_text())["text_config"]
    assert not shares_prompts(prefix.plain(tmp_path))


def test_a_cache_that_is_not_turned_off_changes_nothing(shared: Any) -> None:
    with torch.no_grad():
        with_cache, without = (
            shared(**packed_inputs(), use_cache=use).logits for use in (True, False)
        )
    assert torch.equal(with_cache, without)


def test_a_compiled_model_is_the_same(shared: Any) -> None:
    """In pieces: indices are made outside of its graphs. No kernels are made here."""
    torch._dynamo.reset()
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    model = torch.compile(shared.model, backend=backend)
    with torch.no_grad():
        expected = shared.model(**packed_inputs(), use_cache=False).last_hidden_state
        for _ in range(2):
            found = model(**packed_inputs(), use_cache=False).last_hidden_state
            assert torch.equal(found, expected)
    assert graphs


def test_dropout_is_refused_by_name() -> None:
    model = prefix.text_model("Qwen2", num_key_value_heads=2, attention_dropout=0.1)
    share_prompts(model)
    model(**packed_inputs())
    with pytest.raises(ValueError, match=r"attention dropout: expected 0, .* got 0\.1"):
        model.train()(**packed_inputs())


def test_a_window_that_the_configuration_hides_is_refused_by_name() -> None:
    """Mistral's has no list of layers."""
    model = prefix.text_model("Mistral", num_key_value_heads=2, sliding_window=4)
    share_prompts(model)
    with pytest.raises(ValueError, match=r"sliding_window: expected none, .* got 4; give each"):
        model(**packed_inputs())


# Layers that carry more, or less, from token to token than causal attention over all of them:
# unrefused, these would be wrong without a word, by 2e-2 (Jamba) to 2 (Llama 4) of a state near 1.
OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "Gemma2": ({"head_dim": 16}, "sliding_attention"),
    "Qwen2": (
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
        "sliding_attention",
    ),
    "Qwen3Next": (
        {
            "num_experts": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
        "linear_attention",
    ),
    "Jamba": ({"num_experts": 2}, "linear_attention|mamba"),
}


@pytest.mark.parametrize("family", OTHERS)
def test_other_layers_are_refused_by_name(family: str) -> None:
    options, word = OTHERS[family]
    model = prefix.text_model(family, **options)
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=f"{family}ForCausalLM with .*({word}).* layers"):
        share_prompts(model)
    assert model.config._attn_implementation == before and not shares_prompts(model)


def test_a_recurrence_is_refused(shared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(shared), "_is_stateful", True)
    with pytest.raises(ValueError, match="Qwen3ForCausalLM with recurrent layers; give each"):
        share_prompts(copy.deepcopy(shared))


def test_a_model_with_attention_of_its_own_cannot() -> None:
    model = prefix.text_model("Falcon")
    assert not model._can_set_attn_implementation()
    with pytest.raises(ValueError, match=r"asks transformers' registry .* got FalconForCausalLM"):
        share_prompts(model)
    assert not shares_prompts(model)


def test_a_policy_that_cannot_has_a_row_per_rollout(monkeypatch: pytest.MonkeyPatch) -> None:
    """`test_a_model_that_cannot_share_says_so` has the trainer's line."""
    path = prefix.vision_folder("qwen3")
    model = type(prefix.plain(path))
    monkeypatch.setattr(model, "_can_set_attn_implementation", classmethod(lambda cls: False))
    policy = Policy.load(path)
    assert not policy.shares_prompts and not PolicyLoss(policy, RomaConfig()).share_prompt
