"""A patched model against float64, its own logits and its own loss; TRL takes no part."""

from __future__ import annotations

import copy
import importlib.metadata
import inspect
import math
from typing import Any

import pytest
import torch
from support import heads
from support.heads import FAMILIES, OUTPUTS, Heads

from roma.integrations import head_fields, lm_head
from roma.integrations.head_probe import Transform, read_transform
from roma.integrations.lm_head import fused_head, patch_lm_head
from roma.testing import tolerance

FP32 = torch.finfo(torch.float32).eps


def compare(got: Heads, want: Heads, eager: Heads) -> None:
    """Each field and gradient: may be off by twice what plain fp32 is, and by its own rounding."""
    # A logit is a sum of 32 products: its error is about eps·|z|. z_y and lse are rounded at their
    # own size, and |z| is at most the largest |logp| and the lse, which is about log V.
    size = float(want.log_probs.abs().max()) + math.log(heads.VOCAB)
    for name in ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits"):
        values = (getattr(x, name) for x in (got, want, eager))
        tolerance.check(name, *values, dtype=torch.float32, noise=FP32 * size)
    assert torch.equal(got.is_top1, want.is_top1)
    for name in ("dhidden", "dweight", "dbias"):
        found, right, plain = (getattr(x, name) for x in (got, want, eager))
        if right is None:
            assert found is None
            continue
        # The error of the row's lse is shared by its V terms: eps·size of each dz.
        noise = FP32 * size * float(right.abs().max()) / 2
        tolerance.check(name, found, right, plain, dtype=torch.float32, noise=noise)


def three(model: Any, family: str, temperature: float) -> tuple[Heads, Heads, Heads]:
    """A patched model's results, float64's and plain fp32's from the same hidden states."""
    inputs = heads.batch()
    given = heads.upstream((3, 8))
    got, hidden = heads.fused(model, inputs, given)
    head, labels = model.get_output_embeddings(), inputs["labels"]
    how = {"family": family, "temperature": temperature}
    want, eager = (
        heads.plain(hidden, head, labels, given, dtype=dtype, **how)
        for dtype in (torch.float64, torch.float32)
    )
    return got, want, eager


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_float64(family, temperature):
    model = heads.model(family)
    patch_lm_head(model, temperature=temperature, outputs=OUTPUTS)
    found = FAMILIES[family]
    assert read_transform(model) == Transform(found.scale, found.softcap)
    compare(*three(model, family, temperature))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_oracle_is_the_model(family):
    # So that family and oracle do not agree on a formula that the model does not follow.
    model, inputs = heads.model(family), heads.batch()
    logits = model(input_ids=inputs["input_ids"]).logits[:, :-1]
    want = logits.log_softmax(-1).gather(-1, inputs["labels"][:, 1:, None].clamp(min=0))[..., 0]
    patch_lm_head(model)
    got = model(**inputs, fused_lm_head=True)
    assert torch.equal(got.label_mask, inputs["labels"][:, 1:] != -100)
    # Two fp32 sums in different orders; the next family is 1e-2 off (below).
    torch.testing.assert_close(got.log_probs, want * got.label_mask, rtol=1e-5, atol=1e-5)
    assert not got.log_probs[~got.label_mask].any()


def test_small_tiles_give_the_same_fields(monkeypatch):
    monkeypatch.setattr(head_fields, "_ROWS", 2)
    monkeypatch.setattr(head_fields, "_COLUMNS", 16)
    model = patch_lm_head(heads.model("gemma3"), outputs=OUTPUTS, workspace=1)
    compare(*three(model, "gemma3", 1.0))


class _CapAfterTemperature(Transform):
    """s·tanh(z/(s·τ)): the cap is applied to what the temperature has scaled."""

    def arguments(self, temperature: float) -> dict[str, float | None]:
        assert self.softcap is not None
        cap = self.softcap * temperature / self.scale
        return {"temperature": temperature**2 / self.scale, "softcap": cap}


@pytest.mark.parametrize(
    ("family", "planted"),
    [
        ("cohere", Transform()),
        ("granite", Transform(4.0)),
        ("hyperclovax", Transform(0.5)),
        ("falcon_h1", Transform()),
        ("gemma3", Transform()),
        ("gemma3", Transform(1.0, 3.03)),
        ("gemma3", _CapAfterTemperature(1.0, 3.0)),
    ],
)
def test_a_wrong_transform_is_seen(family, planted, monkeypatch):
    monkeypatch.setattr(lm_head, "read_transform", lambda model: planted)
    model = patch_lm_head(heads.model(family), temperature=0.7, outputs=OUTPUTS)
    with pytest.raises(AssertionError):
        compare(*three(model, family, 0.7))


@pytest.mark.parametrize("field", ["log_probs", "dhidden", "dweight"])
def test_the_bounds_bite(field):
    model = patch_lm_head(heads.model("llama"), outputs=OUTPUTS)
    got, want, eager = three(model, "llama", 1.0)
    value = getattr(got, field)
    place = value.abs().argmax()
    value.view(-1)[place] *= 1 + 2e-4  # a hundred times less than rounding the logits to bf16
    with pytest.raises(AssertionError):
        compare(got, want, eager)


@pytest.mark.parametrize("columns", [2048, 16, 1])
def test_top1_where_it_is_close(columns, monkeypatch):
    """Labels that are the largest logit, an equal one behind it, and the two that follow."""
    monkeypatch.setattr(head_fields, "_COLUMNS", columns)
    model = heads.model("llama")
    weight = model.get_output_embeddings().weight
    with torch.no_grad():
        weight[1::2] = weight[:-1:2]  # pairs of equal logits: the first of two is the likeliest
    ids = heads.batch()["input_ids"]
    logits = model(input_ids=ids).logits[:, :-1]
    ranks = logits.argsort(dim=-1, descending=True, stable=True)
    patch_lm_head(model, outputs=OUTPUTS, workspace=1)
    for rank in range(4):
        labels = torch.cat([ids[:, :1], ranks[..., rank]], dim=1)
        got = model(input_ids=ids, labels=labels, fused_lm_head=True)
        assert got.is_top1.all() == (rank == 0) and got.is_top1.any() == (rank == 0)


def test_top1_forms_logits_for_rows_in_doubt_only(monkeypatch):
    rows = []
    tiles = head_fields._tiles
    monkeypatch.setattr(head_fields, "_tiles", lambda s, r: rows.append(len(r)) or tiles(s, r))
    model = heads.model("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)  # tokens are nearly certain
    ids = heads.batch()["input_ids"]
    labels = torch.cat([ids[:, :1], model(input_ids=ids).logits.argmax(-1)[:, :-1]], dim=1)
    patch_lm_head(model, outputs=("log_probs", "is_top1"))
    likely = model(input_ids=ids, labels=labels, fused_lm_head=True)
    unlikely = model(input_ids=ids, labels=ids, fused_lm_head=True)
    assert likely.is_top1.all() and likely.entropy is None
    p = likely.log_probs.exp()
    assert rows[0] <= int((p < 0.51).sum()) < 12  # of 24
    assert rows[1] < 12 and int(unlikely.is_top1.sum()) <= rows[1] + int((p > 0.5).sum())


@pytest.mark.parametrize("items", [None, 7, torch.tensor(7)])
@pytest.mark.parametrize("shifted", [False, True])
def test_loss_is_the_models_own(shifted, items):
    model, inputs = heads.model("llama"), heads.batch()
    more = {} if items is None else {"num_items_in_batch": items}
    if shifted:
        labels = inputs.pop("labels")
        more["shift_labels"] = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    own_inputs = {**inputs, **more} | ({"labels": labels} if shifted else {})
    own = model(**own_inputs).loss
    want = torch.autograd.grad(own, list(model.parameters()))
    patch_lm_head(model)
    output = model(**inputs, **more, fused_lm_head=True)
    assert output.log_probs.shape == ((3, 9) if shifted else (3, 8))
    torch.testing.assert_close(output.loss, own)
    got = torch.autograd.grad(output.loss, list(model.parameters()))
    for mine, theirs in zip(got, want, strict=True):
        size = float(theirs.abs().max())
        torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance.few(size))


def test_tied_embeddings_get_both_gradients():
    model, inputs = heads.model("llama", tie_word_embeddings=True), heads.batch()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    (want,) = torch.autograd.grad(model(**inputs).loss, [model.lm_head.weight])
    patch_lm_head(model)
    loss = model(**inputs, fused_lm_head=True).loss
    (got,) = torch.autograd.grad(loss, [model.lm_head.weight])
    bound = tolerance.few(float(want.abs().max()))
    torch.testing.assert_close(got, want, rtol=0, atol=bound)


def test_no_label_is_a_differentiable_zero():
    model = patch_lm_head(heads.model("phi"), outputs=OUTPUTS)
    ids = heads.batch()["input_ids"]
    output = model(input_ids=ids, labels=torch.full_like(ids, -100), fused_lm_head=True)
    assert output.loss == 0 and not output.label_mask.any()
    (output.loss + output.entropy.sum()).backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and not weight.grad.any(), name


def test_other_calls_are_the_models_own():
    model, inputs = heads.model("qwen3").eval(), heads.batch()
    signature = inspect.signature(model.forward)
    want, mark = model(**inputs), torch.ones_like(inputs["input_ids"])
    ids = {"input_ids": inputs["input_ids"], "attention_mask": mark}
    tokens = model.generate(**ids, max_new_tokens=4, do_sample=False)
    patch_lm_head(model)
    assert inspect.signature(model.forward) == signature
    got = model(**inputs)
    assert torch.equal(got.logits, want.logits) and torch.equal(got.loss, want.loss)
    assert torch.equal(model.generate(**ids, max_new_tokens=4, do_sample=False), tokens)


def test_a_second_patch_replaces_the_first():
    model, inputs = heads.model("llama"), heads.batch()
    patch_lm_head(model, temperature=2.0, outputs=("log_probs", "entropy"))
    warm = model(**inputs, fused_lm_head=True)
    first = model.forward.__func__
    patch_lm_head(model)
    assert model.forward.__func__ is not first and first not in _chain(model)
    cold = model(**inputs, fused_lm_head=True)
    assert cold.entropy is None and not torch.equal(cold.log_probs, warm.log_probs)
    assert torch.equal(model(**inputs).logits, type(model).forward(model, **inputs).logits)


def _chain(model: Any) -> list[Any]:
    """Functions that the patched forward calls."""
    found, forward = [], model.forward
    while forward is not None:
        found.append(getattr(forward, "__func__", forward))
        forward = getattr(forward, "roma_before", None)
    return found[1:]


def test_a_copy_has_its_own_weights():
    model, inputs = patch_lm_head(heads.model("llama")), heads.batch()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight.zero_()
    uniform = other(**inputs, fused_lm_head=True)
    logits = other(**inputs).logits
    assert not logits.any()
    want = -math.log(heads.VOCAB) * uniform.label_mask
    torch.testing.assert_close(uniform.log_probs, want)
    assert model(**inputs, fused_lm_head=True).loss > uniform.loss


def test_trls_signature():
    model, inputs = heads.model("llama"), heads.batch()
    assert fused_head(model, 0.5, True, ("log_probs", "entropy")) is None
    got = model(**inputs, fused_lm_head=True)
    patch_lm_head(model, temperature=0.5, outputs=("log_probs", "entropy"))
    want = model(**inputs, fused_lm_head=True)
    assert torch.equal(got.log_probs, want.log_probs) and torch.equal(got.entropy, want.entropy)


def test_a_folder_called_trl_is_no_trl(tmp_path, monkeypatch):
    """An example's folder on the path, and no such package installed."""
    (tmp_path / "trl").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    found = importlib.metadata.version

    def version(name):
        if name == "trl":
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    patch_lm_head(heads.model("llama"))


def test_an_option_given_to_the_call_is_refused():
    model, ids = patch_lm_head(heads.model("llama")), torch.tensor([[1, 2, 3]])
    with pytest.raises(ValueError, match="temperature: expected nothing in a call"):
        model(input_ids=ids, labels=ids, fused_lm_head=True, temperature=3.0)
