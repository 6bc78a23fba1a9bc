"""Our head beside TRL's: the same fields, and the same five steps of TRL's own trainers."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
import trl.trainer.utils
from datasets import Dataset
from support import heads
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from roma.integrations.lm_head import fused_head, patch_lm_head, trl_uses_our_head
from roma.testing import count_products

CLOSE = 1e-5
"""Of log-probs and entropies up to 20 nats in fp32: a few roundings of half a place, 1e-6 each."""
WORDS = [f"w{i}" for i in range(heads.VOCAB - 3)]
STEPS = 5


@pytest.fixture(autouse=True)
def theirs() -> Iterator[None]:
    """TRL's own head before and after each test."""
    with trl_uses_our_head():
        pass
    yield
    with trl_uses_our_head():
        pass


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi", "gemma3", "cohere", "granite"])
def test_fields_are_trls(family, temperature):
    inputs, given = heads.batch(), heads.upstream((3, 8))
    ours, other = heads.model(family), heads.model(family)
    fused_head(ours, temperature, False, heads.OUTPUTS)
    trl.trainer.utils.add_fused_lm_head(other, temperature, False, heads.OUTPUTS)
    assert not hasattr(other.forward, "roma_settings")
    got, _ = heads.fused(ours, inputs, given)
    want, _ = heads.fused(other, inputs, given)
    for name in ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=CLOSE, atol=CLOSE)
    assert torch.equal(got.is_top1, want.is_top1)
    for name in ("dhidden", "dweight", "dbias"):
        mine, right = getattr(got, name), getattr(want, name)
        if right is not None:
            atol = CLOSE * float(right.abs().max())
            torch.testing.assert_close(mine, right, rtol=CLOSE, atol=atol)
    a, b = (m(**inputs, fused_lm_head=True) for m in (ours, other))
    assert type(a) is type(b) and a.keys() == b.keys()
    assert torch.equal(a.label_mask, b.label_mask)
    torch.testing.assert_close(a.loss, b.loss, rtol=CLOSE, atol=0)


def test_fields_are_trls_with_images():
    from support.small_model import mixed_prompts, plain_inputs, policy

    found = []
    for head in (fused_head, trl.trainer.utils.add_fused_lm_head):
        loaded = policy()
        inputs = plain_inputs(loaded, mixed_prompts(loaded))
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        head(loaded.model, 0.7, False, heads.OUTPUTS)
        found.append(loaded.model(**inputs, labels=labels, fused_lm_head=True))
    for name in ("loss", *heads.OUTPUTS):
        mine, right = (getattr(output, name).float() for output in found)
        torch.testing.assert_close(mine, right, rtol=CLOSE, atol=CLOSE)


def tokenizer() -> PreTrainedTokenizerFast:
    """A word, a token."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def sentences(count: int, words: int, seed: int) -> list[str]:
    """Of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(WORDS), (count, words), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in row[: 2 + n % words]) for n, row in enumerate(picks)]


def _words(completions: list[str], **_: Any) -> list[float]:
    """A reward that differs within a group."""
    return [float(sum(map(ord, text)) % 7) for text in completions]


# Learning rates so that five steps move the weights by 0.1 to 30 % of their norm: less proves
# little of a gradient, more enlarges what is a rounding in the first of them.
KINDS = {
    "sft": ("SFTTrainer", "SFTConfig", {"max_length": 16}),
    "dpo": ("DPOTrainer", "DPOConfig", {"beta": 0.5, "loss_type": "sigmoid"}),
    "wpo": ("DPOTrainer", "DPOConfig", {"beta": 0.5, "use_weighting": True, "learning_rate": 5.0}),
    "kto": ("KTOTrainer", "KTOConfig", {"beta": 0.5}),
    "grpo": ("GRPOTrainer", "GRPOConfig", {"num_generations": 2, "max_completion_length": 6}),
    "rloo": (
        "RLOOTrainer",
        "RLOOConfig",
        {"num_generations": 2, "max_completion_length": 6, "learning_rate": 2e-3},
    ),
}


def rows(kind: str) -> Dataset:
    """Twenty of them."""
    prompts, chosen, rejected = (sentences(20, 6, seed) for seed in range(3))
    columns: dict[str, Any] = {"prompt": prompts}
    if kind == "sft":
        columns["completion"] = chosen
    if kind in ("dpo", "wpo"):
        columns |= {"chosen": chosen, "rejected": rejected}
    if kind == "kto":
        columns |= {"completion": chosen, "label": [i % 2 == 0 for i in range(20)]}
    return Dataset.from_dict(columns)


def trainer(kind: str, model: Any, out: Path) -> Any:
    """Of plain SGD, so that a step is the gradient's size and not its sign."""
    name, config, own = KINDS[kind]
    own = {"learning_rate": 0.05} | own
    args = getattr(trl, config)(
        output_dir=str(out),
        per_device_train_batch_size=4,
        max_steps=STEPS,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        seed=3,
        disable_tqdm=True,
        **own,
    )
    more = {"reward_funcs": _words} if kind in ("grpo", "rloo") else {}
    return getattr(trl, name)(
        model=model, args=args, train_dataset=rows(kind), processing_class=tokenizer(), **more
    )


def loaded(out: Path, family: str = "llama") -> Any:
    """From a folder: a trainer reads its reference model there."""
    heads.model(family).save_pretrained(out / family)
    return AutoModelForCausalLM.from_pretrained(out / family)


def trained(kind: str, out: Path, family: str = "llama") -> tuple[Any, list[Tensor], Any]:
    """The trainer after five steps, its first weights, and the products that our head did."""
    model = loaded(out, family)
    before = [w.detach().clone() for w in model.parameters()]
    with count_products() as count:
        run = trainer(kind, model, out)
        run.train()
    return run, before, count


def norm(weights: list[Tensor]) -> float:
    """Of all of them together."""
    return float(torch.cat([w.detach().double().flatten() for w in weights]).norm())


@pytest.mark.parametrize(
    ("kind", "family"),
    [*((kind, "llama") for kind in KINDS), *((kind, "cohere") for kind in KINDS if kind != "wpo")],
)
def test_five_equal_steps(kind, family, tmp_path):
    stock, before, none = trained(kind, tmp_path / "stock", family)
    with trl_uses_our_head():
        ours, _, some = trained(kind, tmp_path / "ours", family)
    assert not none.rows("forward", heads.VOCAB) and some.rows("dhidden", heads.VOCAB)
    a, b = ([w.detach() for w in run.model.parameters()] for run in (ours, stock))
    moved = norm([x - y for x, y in zip(b, before, strict=True)])
    apart = norm([x - y for x, y in zip(a, b, strict=True)])
    # Five gradients of a relative error of 1e-6 each, which later steps see and may enlarge; a
    # term that is missing would be of the size of what was moved. WPO's weights are exponentials of
    # sums over a sequence of log p − log Σp², each off by some 1e-5.
    close = 1e-4 if kind == "wpo" else 1e-5
    assert apart <= close * moved + 1e-7 * norm(b), (apart, moved, norm(b))
    assert 1e-3 * norm(b) <= moved <= 0.3 * norm(b), (moved, norm(b))
    assert len(stock.state.log_history) == len(ours.state.log_history) >= STEPS
    for mine, theirs in zip(ours.state.log_history, stock.state.log_history, strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            if not any(word in name for word in ("time", "runtime", "per_second", "step_")):
                assert mine[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name


def test_a_patched_model_keeps_its_head(tmp_path):
    model = patch_lm_head(heads.model("llama"), backend="torch", workspace=1 << 20)
    run = trainer("sft", model, tmp_path)
    settings = run.model.forward.roma_settings
    assert settings.outputs == ("log_probs", "entropy", "is_top1")  # what the trainer asks for
    assert (settings.backend, settings.workspace) == ("torch", 1 << 20)
    with count_products() as count:
        run.train()
    assert count.rows("forward", heads.VOCAB)
    plain = trainer("sft", heads.model("llama"), tmp_path)
    assert not hasattr(plain.model.forward, "roma_settings")


@pytest.mark.parametrize("kind", KINDS)
def test_every_trainer_takes_it_and_gives_it_back(kind, tmp_path):
    with trl_uses_our_head():
        ours = trainer(kind, loaded(tmp_path), tmp_path)
    assert ours.model.forward.roma_settings.outputs[0] == "log_probs"
    if kind in ("dpo", "kto"):
        assert ours.ref_model.forward.roma_settings
    assert not hasattr(trainer(kind, loaded(tmp_path), tmp_path).model.forward, "roma_settings")


def test_modules_that_are_imported_later_have_it(monkeypatch):
    name = "trl.trainer.sft_trainer"
    with trl_uses_our_head():
        monkeypatch.delitem(importlib.import_module("sys").modules, name)
        later = importlib.import_module(name)
        model = heads.model("llama")
        later.add_fused_lm_head(model, outputs=("log_probs",))
        assert model.forward.roma_settings
