"""A patched model beside what people do to models: adapters, autocast, experts, compilation, FSDP.

Wherever a stock call gives the same numbers, it is the reference.
"""

from __future__ import annotations

import importlib.metadata
import sys
from typing import Any

import pytest
import torch
from support import heads
from support.heads import VOCAB
from torch import Tensor, nn

from roma.integrations.head_output import FusedHeadOutput
from roma.integrations.head_probe import Transform, read_transform
from roma.integrations.lm_head import patch_lm_head
from roma.testing import count_products, tolerance


def same(got: list[Tensor], want: list[Tensor]) -> None:
    """fp32 gradients by two orders of sums; a term that is missing is of the size of `want`."""
    for mine, theirs in zip(got, want, strict=True):
        size = float(theirs.abs().max())
        torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance.few(size) + 1e-7)


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    """By all weights that are trained."""
    weights = [w for w in model.parameters() if w.requires_grad]
    return list(torch.autograd.grad(loss, weights))


def lora(model: Any, **options: Any) -> Any:
    """Adapters that are not zero, as after some steps."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", **options)
    torch.manual_seed(0)
    made = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    return made.train()


@pytest.mark.parametrize("first", ["patch", "peft"])
def test_adapters_on_the_body(first):
    inputs = heads.batch()
    options = {"target_modules": ["q_proj", "v_proj"]}
    stock = lora(heads.model("llama"), **options)
    want = gradients(stock(**inputs).loss, stock)
    if first == "patch":
        model = lora(patch_lm_head(heads.model("llama")), **options)
    else:
        model = patch_lm_head(lora(heads.model("llama"), **options))
    loss = model(**inputs, fused_lm_head=True).loss
    same(gradients(loss, model), want)
    with model.disable_adapter():
        bare = model(**inputs, fused_lm_head=True).loss
    torch.testing.assert_close(bare, heads.model("llama")(**inputs).loss)
    assert abs(bare - loss) > 1e-3


def test_a_head_that_is_trained_as_a_whole():
    inputs, options = heads.batch(), {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}

    def made() -> Any:
        model = lora(heads.model("phi"), **options)
        with torch.no_grad():
            model.base_model.model.lm_head.modules_to_save.default.weight.mul_(1.5)
        return model

    stock = made()
    want = gradients(stock(**inputs).loss, stock)
    model = patch_lm_head(made())
    same(gradients(model(**inputs, fused_lm_head=True).loss, model), want)
    with model.disable_adapter(), torch.no_grad():
        loss = model(**inputs, fused_lm_head=True).loss
    torch.testing.assert_close(loss, heads.model("phi")(**inputs).loss)


@pytest.mark.parametrize("first", ["patch", "peft"])
def test_an_adapter_on_the_head_is_refused(first):
    model, options = heads.model("llama"), {"target_modules": ["q_proj", "lm_head"]}
    match = "a head without an adapter, got .*; leave the head out of target_modules"
    with pytest.raises(ValueError, match=match):
        if first == "patch":
            lora(patch_lm_head(model), **options)(**heads.batch(), fused_lm_head=True)
        else:
            patch_lm_head(lora(model, **options))


@pytest.mark.parametrize("stage", ["autocast", "weights"])
def test_bf16_keeps_fp32_logits(stage):
    """The head's inputs are rounded, as nn.Linear rounds them; its logits are not."""
    model, inputs = heads.model("llama"), heads.batch()
    if stage == "weights":
        model.bfloat16()
    patch_lm_head(model)
    seen: list[Tensor] = []
    model.base_model.register_forward_hook(lambda *x: seen.append(x[2].last_hidden_state))
    with torch.autocast("cpu", torch.bfloat16, enabled=stage == "autocast"):
        output = model(**inputs, fused_lm_head=True)
    output.loss.backward()
    hidden, weight = (x.detach().bfloat16().double() for x in (seen[0], model.lm_head.weight))
    z = hidden[:, :-1] @ weight.T
    labels = inputs["labels"][:, 1:]
    rows = [x.gather(-1, labels.clamp(min=0)[..., None])[..., 0] for x in (z.log_softmax(-1),)]
    want = rows[0] * (labels != -100)
    assert output.log_probs.dtype == torch.float32
    size = float(z.abs().max())
    error = float((output.log_probs.detach().double() - want).abs().max())
    bf16 = z.bfloat16().double().log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    rounded = float((bf16 * (labels != -100) - want).abs().max())
    assert error <= tolerance.few(size) < rounded / 100
    assert model.lm_head.weight.grad.dtype == model.lm_head.weight.dtype


def test_hidden_states_and_head_of_two_dtypes():
    model, inputs = heads.model("llama").bfloat16(), heads.batch()
    model.lm_head.float()
    patch_lm_head(model)
    output = model(**inputs, fused_lm_head=True)
    output.loss.backward()
    assert output.log_probs.dtype == model.lm_head.weight.grad.dtype == torch.float32
    assert model.model.layers[0].mlp.up_proj.weight.grad.any()


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe"])
def test_load_balancing_of_experts(name):
    import transformers

    config = getattr(transformers, f"{name}Config")(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_local_experts=4,
        num_experts_per_tok=2,
        router_aux_loss_coef=0.5,
    )
    torch.manual_seed(0)
    model, inputs = getattr(transformers, f"{name}ForCausalLM")(config).train(), heads.batch()
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][0, :2] = 0
    inputs["output_router_logits"] = True
    own = model(**inputs)
    want = gradients(own.loss, model)
    patch_lm_head(model)
    got = model(**inputs, fused_lm_head=True)
    torch.testing.assert_close(got.aux_loss, own.aux_loss)
    torch.testing.assert_close(got.loss, own.loss)
    same(gradients(got.loss, model), want)
    model.config.output_router_logits = True
    del inputs["output_router_logits"]
    assert model(**inputs, fused_lm_head=True).aux_loss is not None


@pytest.mark.parametrize("body", ["compiled", "checkpointed"])
def test_body_is_compiled_or_checkpointed(body):
    inputs = heads.batch()
    stock = heads.model("qwen3")
    want = gradients(stock(**inputs).loss, stock)
    model = patch_lm_head(heads.model("qwen3"))
    if body == "compiled":
        model.model.compile(backend="eager")
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    same(gradients(model(**inputs, fused_lm_head=True).loss, model), want)


def test_whole_model_is_compiled():
    inputs, stock = heads.batch(), heads.model("llama")
    want = gradients(stock(**inputs).loss, stock)
    model = torch.compile(patch_lm_head(heads.model("llama")), backend="eager")
    same(gradients(model(**inputs, fused_lm_head=True).loss, model), want)


def test_only_counted_rows_meet_the_head():
    model, inputs = patch_lm_head(heads.model("llama"), backend="torch"), heads.batch()
    with count_products() as count:
        log_probs = model(**inputs, fused_lm_head=True).log_probs
        log_probs[0, -2:].sum().backward()
    assert int((inputs["labels"][:, 1:] != -100).sum()) == 9
    assert count.rows("forward", VOCAB) == 9
    assert count.rows("dhidden", VOCAB) == count.rows("dweight", VOCAB) == 2
    model.lm_head.requires_grad_(False)
    with count_products() as count:
        model(**inputs, fused_lm_head=True).loss.backward()
    assert count.rows("dhidden", VOCAB) == 9 and count.rows("dweight", VOCAB) == 0


def test_images():
    from support.small_model import mixed_prompts, plain_inputs, policy

    loaded = policy()
    inputs = plain_inputs(loaded, mixed_prompts(loaded))
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    own = loaded.model(**inputs)
    want = gradients(own.loss, loaded.model)
    patch_lm_head(loaded.model)
    got = loaded.model(**inputs, fused_lm_head=True)
    torch.testing.assert_close(got.loss, own.loss)
    same(gradients(got.loss, loaded.model), want)


def test_a_cap_that_the_class_ignores():
    """Gemma 3 with images does not cap its logits, whatever its text configuration says."""
    import transformers

    text = transformers.Gemma3TextConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        final_logit_softcapping=3.0,
    )
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(
        text_config=text.to_dict(), vision_config=vision, mm_tokens_per_image=4
    )
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    inputs = heads.batch()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
        own = model(**inputs).loss
        capped = model.lm_head(model.model(inputs["input_ids"]).last_hidden_state)
    assert read_transform(model) == Transform()
    got = patch_lm_head(model)(**inputs, fused_lm_head=True)
    torch.testing.assert_close(got.loss, own)
    capped = (capped / 3).tanh()[:, :-1] * 3
    wrong = nn.functional.cross_entropy(capped.flatten(0, 1), inputs["labels"][:, 1:].flatten())
    assert abs(wrong - own) > 0.1  # so the test could fail


def test_without_trl(monkeypatch):
    real = importlib.metadata.version

    def lacks(name):
        if name == "trl":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", lacks)
    for name in [n for n in sys.modules if n.split(".")[0] == "trl"]:
        monkeypatch.delitem(sys.modules, name)
    model = patch_lm_head(heads.model("llama"), outputs=heads.OUTPUTS)
    assert not [n for n in sys.modules if n.split(".")[0] == "trl"]
    output = model(**heads.batch(), fused_lm_head=True)
    assert type(output) is FusedHeadOutput
    assert set(output) == {"loss", "label_mask", *heads.OUTPUTS}


class _Head(nn.Module):
    """Of the shapes that a refused model has."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        weight = torch.zeros(8, 4, dtype=torch.uint8 if kind == "quantised" else torch.float32)
        self.weight = nn.Parameter(weight, requires_grad=False)


def _refused(kind: str) -> Any:
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    if kind == "inside":
        config = transformers.BertConfig(**sizes, intermediate_size=32, is_decoder=True)
        return transformers.BertLMHeadModel(config)
    if kind == "encoder":
        config = transformers.T5Config(d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
        return transformers.T5ForConditionalGeneration(config)
    if kind == "module":
        return nn.Linear(3, 3)
    made = heads.model("llama")
    if kind == "quantised":
        made.lm_head = _Head(kind)
    if kind == "none":
        made = made.model
    return made


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("inside", "a head that is the model's own layer, got one inside another part"),
        ("encoder", "a decoder, got the encoder-decoder T5ForConditionalGeneration"),
        ("module", r"get_output_embeddings\(\) to give a head, got none of Linear"),
        ("none", r"get_output_embeddings\(\) to give a head, got none of LlamaModel"),
        ("quantised", "a linear head with a float weight .*; keep the head out of quantisation"),
    ],
)
def test_models_that_are_refused(kind, message):
    with pytest.raises(ValueError, match=f"^model: expected {message}"):
        patch_lm_head(_refused(kind))


def _strange(change: str) -> Any:
    """A Llama whose forward does what no configuration says."""
    import transformers
    from transformers.modeling_outputs import CausalLMOutput

    class Strange(transformers.LlamaForCausalLM):
        def forward(self, input_ids: Tensor, **kwargs: Any) -> CausalLMOutput:
            hidden = self.model(input_ids, **kwargs).last_hidden_state
            if change == "states":
                hidden = hidden / 2
            logits = self.lm_head(hidden)
            if change == "logits":
                logits = logits * 1.001
            if change == "twice":
                logits = logits + self.lm_head(hidden)
            if change == "fails":
                raise RuntimeError("it needs images")
            return CausalLMOutput(logits=logits)

    made = heads.model("llama")
    return Strange(made.config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("states", "a head that takes the body's hidden states as they are, got Strange"),
        ("logits", r".*whose logits \[-60.0, 60.0\] become \[-60.06, 60.06\]"),
        ("twice", "a forward that calls its head once"),
        ("fails", ".*RuntimeError from Strange.forward: it needs images"),
    ],
)
def test_forwards_that_are_refused(change, message):
    model = _strange(change)
    before = dict(model._modules)
    with pytest.raises(ValueError, match=f"^model: expected {message}"):
        patch_lm_head(model)
    assert model._modules == before and "forward" not in model.__dict__
    assert read_transform(_strange("nothing")) == Transform()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature: expected a finite number > 0"),
        ({"outputs": ("logits",)}, "outputs: expected names among log_probs, entropy"),
        ({"outputs": "entropy"}, "outputs: .*; give a tuple of names"),
        ({"backend": "cuda"}, "backend: expected one of auto"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        patch_lm_head(heads.model("llama"), **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"labels": None}, r"labels: expected ids \[B, S\] with fused_lm_head=True, got None"),
        ({"logits_to_keep": 2}, "logits_to_keep: .*; mask with labels of −100 instead"),
        (
            {"labels": torch.zeros(3, 4).long()},
            r"labels: expected \[B, S\] = \[3, 9\], got \[3, 4\]",
        ),
        ({"labels": torch.full((3, 9), VOCAB)}, "tokens: expected ids in 0..96"),
    ],
)
def test_calls_that_are_refused(call, message):
    model = patch_lm_head(heads.model("llama"))
    with pytest.raises(ValueError, match=message):
        model(**heads.batch() | call, fused_lm_head=True)
    assert "forward" not in model.lm_head.__dict__
