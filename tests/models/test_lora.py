"""Adapters on the text model: where they stand, the base below them, what is saved and read."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import adapters, prefix, small_model
from transformers import AutoModelForImageTextToText

from roma.models.export import merged_weights, save, write_model
from roma.models.lora import TARGETS, add_adapters, factors, layers
from roma.models.qwen_vl import Policy
from roma.rollout.hf import generate

FAMILIES = ("qwen3", "qwen2.5")
FILES = ("adapter_config.json", "adapter_model.safetensors")


def logits(policy: Policy, model: torch.nn.Module) -> torch.Tensor:
    prompts = small_model.mixed_prompts(policy)
    policy.model.model.rope_deltas = None
    return model(**small_model.plain_inputs(policy, prompts)).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_stand_in_the_text_model_alone(family: str) -> None:
    policy = adapters.adapted(family)
    layout = policy.model.config.text_config.num_hidden_layers
    found = layers(policy.model)
    assert len(found) == layout * len(TARGETS) and policy.has_adapters
    assert all(name.startswith("model.language_model.layers.") for name in found)
    trained = {name for name, weight in policy.named_parameters() if weight.requires_grad}
    own = {f"model.{name}.lora_{x}.default.weight" for name in found for x in "AB"}
    assert trained == own and policy.vision_is_frozen
    assert all(w.dtype == torch.float32 for layer in found.values() for w in factors(layer))
    # The model is the transformers model that it was.
    plain = Policy.load(prefix.vision_folder(family))
    assert type(policy.model) is type(plain.model) and policy.shares_prompts
    assert torch.equal(policy.head_weight, plain.head_weight)


def test_targets_that_the_tower_has_too_reach_the_text_model_alone() -> None:
    """Qwen2.5-VL's tower has a gate_proj in each block."""
    policy = adapters.adapted("qwen2.5", targets=["gate_proj"])
    tower = [name for name, _ in policy.model.model.visual.named_modules() if "gate_proj" in name]
    assert tower and len(layers(policy.model)) == 2
    assert all("language_model" in name for name in layers(policy.model))


def test_the_seed_alone_draws_a() -> None:
    state = torch.get_rng_state()
    one, same, other = (small_model.policy() for _ in range(3))
    add_adapters(one, rank=3, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    add_adapters(same, rank=3, seed=1)
    add_adapters(other, rank=3, seed=2)
    torch.set_rng_state(state)
    for layer, twin, third in zip(
        *(layers(p.model).values() for p in (one, same, other)), strict=True
    ):
        (a, b), (a2, _), (a3, _) = (factors(x) for x in (layer, twin, third))
        assert torch.equal(a, a2) and not torch.equal(a, a3) and not b.any()


@torch.no_grad()
def test_the_reference_is_the_base_bit_for_bit() -> None:
    policy, base = adapters.adapted(), small_model.policy()
    batch = adapters.batch_of(base)
    expected = adapters.PolicyLoss(base, adapters.RomaConfig()).score(batch).logp
    loss = adapters.PolicyLoss(policy, adapters.RomaConfig())
    learnt = loss.score(batch).logp
    with policy.reference():
        assert torch.equal(loss.score(batch).logp, expected)
        with policy.reference():
            pass
        assert torch.equal(loss.score(batch).logp, expected)
    assert torch.equal(loss.score(batch).logp, learnt)
    assert (learnt - expected).abs().max() > 1e-2
    prompts = small_model.mixed_prompts(policy)
    options = {"group_size": 2, "max_new_tokens": 6, "temperature": 1.0, "seed": 1}
    with policy.reference():
        assert torch.equal(
            generate(policy, prompts, **options).tokens, generate(base, prompts, **options).tokens
        )


def test_the_reference_ends_with_an_exception_and_builds_no_graph() -> None:
    policy = adapters.adapted()
    kept = factors(next(iter(layers(policy.model).values())))[0]
    kept.requires_grad_(False)
    before = {name: w.requires_grad for name, w in policy.named_parameters()}
    learnt = logits(policy, policy.model)
    with pytest.raises(KeyError), policy.reference():
        assert not logits(policy, policy.model).requires_grad
        raise KeyError
    assert torch.equal(logits(policy, policy.model), learnt) and learnt.requires_grad
    assert {name: w.requires_grad for name, w in policy.named_parameters()} == before
    with (
        pytest.raises(ValueError, match=r"policy.reference\(\): expected a policy with adapters"),
        small_model.policy().reference(),
    ):
        pass


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_loads_in_transformers_and_in_peft(family: str, tmp_path: Path) -> None:
    from peft import PeftModel

    policy = adapters.adapted(family)
    before = copy.deepcopy(policy.state_dict())
    policy.save_pretrained(tmp_path)
    after = policy.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    base = AutoModelForImageTextToText.from_pretrained(prefix.vision_folder(family)).eval()
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter")
    with torch.no_grad():
        mine = logits(policy, policy.model)
        assert torch.equal(logits(policy, theirs), mine)
        with theirs.disable_adapter():
            assert (logits(policy, theirs) - mine).abs().max() > 0.1
    bits = zip(merged.parameters(), theirs.merge_and_unload().parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in bits)


@torch.no_grad()
def test_merging_loses_no_more_than_adding(tmp_path: Path) -> None:
    """Both round each product once; 1.00 was measured, 400 for factors rounded to bf16."""
    policy = adapters.adapted()
    policy.save_pretrained(tmp_path)
    exact64, rounded = copy.deepcopy(policy).double(), copy.deepcopy(policy)
    with prefix.exact(exact64):
        exact = logits(exact64, exact64.model)
    for layer in layers(rounded.model).values():
        for weight in factors(layer):
            weight.copy_(weight.bfloat16())
    merged = (AutoModelForImageTextToText.from_pretrained(tmp_path).eval(), rounded.model)
    adding, merging, wrong = (
        float((logits(policy, model).double() - exact).square().mean().sqrt())
        for model in (policy.model, *merged)
    )
    assert merging <= 2 * adding and wrong > 20 * adding


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_is_as_transformers_writes_it(family: str, tmp_path: Path) -> None:
    """Names, bits, configurations; of a policy with new adapters, which change nothing, too."""
    model, policy, adapted = (Policy.load(prefix.vision_folder(family)) for _ in range(3))
    add_adapters(adapted, rank=2)
    model.model.save_pretrained(tmp_path / "theirs")
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    for mine in (policy, adapted):
        folder = tmp_path / str(mine.has_adapters)
        mine.save_pretrained(folder)
        found = load_file(folder / "model.safetensors")
        assert found.keys() == theirs.keys()
        assert all(torch.equal(found[name], theirs[name]) for name in theirs)
        for file in ("config.json", "generation_config.json"):
            assert (folder / file).read_text() == (tmp_path / "theirs" / file).read_text()
        assert (folder / "adapter").exists() == mine.has_adapters


def test_where_weights_are_sharded_one_rank_writes(tmp_path: Path) -> None:
    """The others make the same weights whole, in the same order."""
    policy = adapters.adapted()
    asked: list[list[int]] = []

    def whole(weight: torch.Tensor) -> torch.Tensor:
        asked[-1].append(id(weight))
        return weight.detach()

    for write in (True, False):
        asked.append([])
        save(policy, tmp_path / str(write), whole=whole, write=write)
    assert asked[0] == asked[1] and len(asked[0]) == len(policy.state_dict()) + 28
    assert (tmp_path / "True" / "adapter").exists() and not (tmp_path / "False").exists()


def test_a_run_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    policy = adapters.adapted()
    policy.save_pretrained(tmp_path)
    again = small_model.policy()
    add_adapters(again, rank=adapters.RANK, alpha=adapters.ALPHA, seed=5)
    again.load_adapters(tmp_path)
    pairs = zip(policy.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_adapters_of_another_form_or_base_are_refused(tmp_path: Path) -> None:
    policy = adapters.adapted()
    policy.save_pretrained(tmp_path)

    def read(said: str, *, base: Path | None = None, **options: object) -> None:
        other = Policy.load(base or small_model.folder() / "model")
        add_adapters(other, **({"rank": adapters.RANK, "alpha": adapters.ALPHA} | options))
        with pytest.raises(ValueError, match=said):
            other.load_adapters(tmp_path)

    # The merged model as the base would have the adapters twice.
    read(r"q_proj.weight: expected this policy's, .* got another base's; set", base=tmp_path)
    read(r"alpha / r = 1.5 there and 8 here", alpha=32.0)
    read(r"has rank 4 there and 8 here", rank=8, alpha=12.0)
    read(r"down_proj.* there and not here", targets=["q_proj"])
    # An entry that another base has off by ten times what two roundings of it are.
    weight = policy.model.model.language_model.layers[0].mlp.up_proj.base_layer.weight
    policy.load_adapters(tmp_path)
    with torch.no_grad():
        weight[3, 5] += 40 * 1.2e-7 * weight.abs().max()
    with pytest.raises(ValueError, match=r"0.mlp.up_proj.weight: .* another base's"):
        policy.load_adapters(tmp_path)
    with pytest.raises(ValueError, match="expected a policy with adapters to read them into"):
        small_model.policy().load_adapters(tmp_path)
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"a folder with adapter_model.safetensors"):
        policy.load_adapters(tmp_path)


def test_merged_weights_are_one_copy_at_a_time() -> None:
    policy = adapters.adapted()
    adapted = {f"{name}.weight" for name in layers(policy.model)}
    storages = {w.untyped_storage().data_ptr() for w in policy.parameters()}
    asked = []

    def whole(weight: torch.Tensor) -> torch.Tensor:
        asked.append(weight)
        return weight.detach()

    count = 0
    for name, weight in merged_weights(policy, whole=whole):
        assert len(asked) == (3 if name in adapted else 1) and not weight.requires_grad
        assert (weight.untyped_storage().data_ptr() in storages) == (name not in adapted)
        asked.clear()
        count += 1
    plain = [name for name, _ in merged_weights(small_model.policy())]
    assert count == len(plain) == len({*plain})
    assert [name for name, _ in merged_weights(policy)] == plain


def test_a_shared_weight_is_written_once_and_tied_again(tmp_path: Path) -> None:
    config = small_model.policy().model.config
    config.tie_word_embeddings = True
    config.text_config.tie_word_embeddings = True
    torch.manual_seed(0)
    from transformers import Qwen3VLForConditionalGeneration

    model = Qwen3VLForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "base")
    processor = small_model.policy().processor
    processor.save_pretrained(tmp_path / "base")
    policy = Policy.load(tmp_path / "base")
    add_adapters(policy, rank=2)
    policy.save_pretrained(tmp_path / "saved")
    names, before = (
        load_file(tmp_path / part / "model.safetensors").keys() for part in ("saved", "base")
    )
    assert names == before
    assert "lm_head.weight" not in names
    again = Policy.load(tmp_path / "saved")
    assert again.head_weight is again.model.get_input_embeddings().weight
    assert torch.equal(again.head_weight, model.lm_head.weight)


def test_files_of_weights_have_a_size(tmp_path: Path) -> None:
    policy = adapters.adapted()
    policy.model.save_pretrained(tmp_path, max_shard_size="400KB")  # an earlier save, of more files
    write_model(policy.model, tmp_path, merged_weights(policy), file_bytes=600_000)
    files = sorted(tmp_path.glob("*.safetensors"))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert {f.name for f in files} == {*index["weight_map"].values()} and len(files) > 2
    assert all(f.stat().st_size < 620_000 for f in files)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    for (name, weight), own in zip(merged_weights(policy), again.parameters(), strict=True):
        assert torch.equal(weight, own), name


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"targets": ["q_proj", "lm_head"]}, r"got 'lm_head'; leave it out: the fused loss reads"),
        ({"targets": ["embed_tokens"]}, r"got 'embed_tokens'; leave it out: the head may share"),
        ({"targets": ["qkv"]}, r"linear layers of the text model: down_proj, .* got 'qkv'"),
        ({"targets": "q_proj"}, r"lora.targets: expected a list of names, got 'q_proj'"),
        ({"targets": []}, r"lora.targets: expected a list of names"),
        ({"rank": 0}, r"lora.rank: expected at least 1, got 0"),
        ({"alpha": 0.0}, r"lora.alpha: expected a positive number, got 0.0"),
    ],
)
def test_what_wrong_adapters_get(options: dict[str, object], said: str) -> None:
    policy = small_model.policy()
    with pytest.raises(ValueError, match=said):
        add_adapters(policy, **({"rank": 2} | options))
    assert not policy.has_adapters and all(w.requires_grad for w in policy.parameters())


def test_adapters_are_added_once_and_need_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = adapters.adapted()
    with pytest.raises(ValueError, match="policy: expected one without adapters"):
        add_adapters(policy, rank=2)
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ImportError, match="lora: needs peft, which is not installed; pip install"):
        add_adapters(small_model.policy(), rank=2)


@torch.no_grad()
def test_adapters_on_a_bf16_base_are_fp32() -> None:
    policy = adapters.adapted(dtype=torch.bfloat16)
    found = layers(policy.model)
    assert all(w.dtype == torch.float32 for layer in found.values() for w in factors(layer))
    merged = dict(merged_weights(policy))
    assert {w.dtype for w in merged.values()} == {torch.bfloat16}
    name, layer = next(iter(found.items()))
    a, b = factors(layer)
    exact = layer.base_layer.weight.double() + 1.5 * b.double() @ a.double()
    # Half a step of bf16, and the fp32 sums before it.
    assert ((merged[f"{name}.weight"] - exact).abs() <= 0.51 * 2**-7 * exact.abs()).all()
