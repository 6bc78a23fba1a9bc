"""Views that a user's function makes: other prompts, other images; the same completion."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers import Qwen3VLForConditionalGeneration as Qwen3VL

from examples.trl import tiny
from roma.integrations.trl import RomaGRPOConfig, RomaGRPOTrainer

ASK = (
    "which way do the stripes run",
    "say which way they run",
    "do they run down",
    "the stripes are which way",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.model(tmp_path_factory.mktemp("tiny"))


class Kept(RomaGRPOTrainer):
    """Keeps the inputs of the loss, and what its one forward gave."""

    def _compute_loss(self, model, inputs):
        self.inputs = inputs
        self.loss = super()._compute_loss(model, inputs)
        return self.loss

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        look = self._look
        made = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if look is not None:
            self.look = look
        return made


def options(tmp_path, **given):
    plain = {
        "output_dir": str(tmp_path),
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 4,
        "max_steps": 1,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "shuffle_dataset": False,
    }
    return RomaGRPOConfig(**{**plain, **given})


def text_model(folder):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, padding_side="left")
    tokenizer.chat_template = tiny.TEMPLATE
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **sizes,
    )
    return Qwen3ForCausalLM(config), tokenizer


def asked(text):
    return [{"role": "user", "content": text}]


def paraphrased(row, views, step):
    return [{**row, "prompt": asked(text)} for text in ASK[1 : 1 + views]]


def test_paraphrased_prompts_of_a_text_model(folder, tmp_path):
    model, tokenizer = text_model(folder)
    rows = Dataset.from_dict({"prompt": [asked(ASK[0])] * 4, "answer": list(tiny.PATTERNS)})
    trainer = Kept(
        model=model,
        processing_class=tokenizer,
        reward_funcs=lambda completions, **_: [float(i % 2) for i in range(len(completions))],
        train_dataset=rows,
        view_fn=paraphrased,
        args=options(tmp_path, num_views=3, log_completions=True),
    )
    before = {name: x.detach().clone() for name, x in model.named_parameters()}
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["roma/penalty_worst"] > 0 and log["roma/has_views"] == 1
    assert {f"roma/penalty/view_{k}" for k in range(3)} <= set(log)
    # What the one forward gave is what each prompt gives alone, without padding.
    model.load_state_dict(before)
    ids, mask = trainer.inputs["completion_ids"], trainer.inputs["completion_mask"].bool()
    assert len(trainer.look.pairs) >= 12  # half of eight are right, three views each
    for (view, row), got in zip(trainer.look.pairs, trainer.look.pair_logp, strict=True):
        completion = ids[row][mask[row]]
        prompt = torch.as_tensor(trainer._tokenize_prompts([asked(ASK[1 + view])])[0][0])
        logits = model(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
        alone = logits.double().log_softmax(-1).gather(-1, completion[:, None])[:, 0]
        # Positions are counted from the padding: rotary angles of fp32 differ in the last digits.
        torch.testing.assert_close(got[mask[row]].double(), alone, rtol=0, atol=2e-5)


def test_a_view_fn_that_degrades_images_is_what_the_trainer_does_itself(folder, tmp_path):
    """At the model's resolution: 48 × 64 is a multiple of the patches."""
    seen = {}

    def run(**given):
        trainer = Kept(
            model=Qwen3VL.from_pretrained(folder),
            processing_class=tiny.processor(folder),
            reward_funcs=lambda completions, **_: [float(i % 2) for i in range(len(completions))],
            train_dataset=tiny.stripes(4),
            args=options(tmp_path, view_seed=3),
            **given,
        )
        if "view_fn" not in given:
            pixels = trainer._looks.maker.pixels

            def remembered(rows, pairs):
                made = pixels(rows, pairs)
                grids = [rows.grid[row : row + 1] for _, row in pairs]
                images = trainer._looks.maker.format.images(made, torch.cat(grids))
                for (view, row), image in zip(pairs, images, strict=True):
                    seen[rows.images[row][0].numpy().tobytes(), view] = image.numpy()
                return made

            trainer._looks.maker.pixels = remembered
        trainer.train()
        return trainer

    own = run()

    def degraded(row, views, step):
        clean = np.asarray(row["images"][0]).tobytes()
        blank = np.zeros((48, 64, 3), np.uint8)  # of a view that the first run had no use for
        images = [Image.fromarray(seen.get((clean, k), blank)) for k in range(views)]
        return [{**row, "images": [image]} for image in images]

    other = run(view_fn=degraded)
    assert set(own.look.pairs) >= {(k, b) for b in range(8) for k in range(2) if own_right(own, b)}
    drawn = {pair: x for pair, x in zip(own.look.pairs, own.look.pair_logp, strict=True)}
    for pair, x in zip(other.look.pairs, other.look.pair_logp, strict=True):
        if pair in drawn:
            torch.testing.assert_close(x, drawn[pair], rtol=0, atol=1e-5)
    assert len(seen) >= 4


def own_right(trainer, row):
    return bool(trainer.inputs["roma_correct"][row])


def test_a_row_may_have_no_views(folder, tmp_path):
    model, tokenizer = text_model(folder)
    rows = Dataset.from_dict({"prompt": [asked(ASK[0]), asked(ASK[1])] * 2})
    trainer = Kept(
        model=model,
        processing_class=tokenizer,
        reward_funcs=lambda completions, **_: [float(i % 2) for i in range(len(completions))],
        train_dataset=rows,
        view_fn=lambda row, views, step: (
            None if row["prompt"] == asked(ASK[1]) else paraphrased(row, views, step)
        ),
        args=options(tmp_path),
    )
    trainer.train()
    assert trainer.state.log_history[0]["roma/has_views"] == 0.5
    seen = trainer.look.has_views
    assert {row for _, row in trainer.look.pairs} <= set(seen.nonzero()[:, 0].tolist())


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda row, views, step: [row], "view_fn: expected 2 rows, num_views, got 1 rows"),
        (lambda row, views, step: [{"text": ""}] * 2, "view_fn: expected rows with a prompt"),
        (lambda row, views, step: ["a", "b"], "view_fn: expected rows with a prompt, got str"),
        (lambda row, views, step: row, "view_fn: expected a list of 2 rows, or None, got dict"),
        (lambda row, views, step: [{"prompt": "a"}] * 2, "view_fn, prompt: expected a list"),
        ("views", "view_fn: expected a function, got str"),
    ],
)
def test_a_view_fn_that_returns_something_else_is_refused_at_once(folder, tmp_path, made, message):
    model, tokenizer = text_model(folder)
    with pytest.raises(ValueError, match=message):
        RomaGRPOTrainer(
            model=model,
            processing_class=tokenizer,
            reward_funcs=lambda completions, **_: [1.0] * len(completions),
            train_dataset=Dataset.from_dict({"prompt": [asked(ASK[0])] * 4}),
            view_fn=made,
            args=options(tmp_path),
        )


def test_a_view_fn_may_make_more_views_than_a_pool_has(folder, tmp_path):
    model, tokenizer = text_model(folder)
    trainer = RomaGRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=lambda completions, **_: [float(i % 2) for i in range(len(completions))],
        train_dataset=Dataset.from_dict({"prompt": [asked(ASK[0])] * 4}),
        view_fn=lambda row, views, step: [
            {**row, "prompt": asked(ASK[k % 4])} for k in range(views)
        ],
        args=options(tmp_path, num_views=6, view_pool=None),
    )
    trainer.train()
    assert "roma/penalty/view_5" in trainer.state.log_history[0]
