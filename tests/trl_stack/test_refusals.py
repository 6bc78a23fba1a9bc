"""What a wrong set-up gets: one line that names the remedy, before the first step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import AutoTokenizer, CLIPImageProcessorPil, Qwen3VLForConditionalGeneration
from trl import GRPOConfig, GRPOTrainer

from examples.trl import tiny
from roma.integrations.trl import RomaGRPOConfig, RomaGRPOTrainer, checks, record


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.model(tmp_path_factory.mktemp("tiny"))


def options(tmp_path, **given):
    quiet = {"report_to": "none", "use_cpu": True, "bf16": False, "output_dir": str(tmp_path)}
    return RomaGRPOConfig(
        **{**quiet, "per_device_train_batch_size": 4, "num_generations": 4, **given}
    )


def build(folder, tmp_path, **given):
    settings = given.pop("options", {})
    arguments = {
        "model": Qwen3VLForConditionalGeneration.from_pretrained(folder),
        "processing_class": tiny.processor(folder),
        "reward_funcs": tiny.accuracy,
        "train_dataset": tiny.stripes(4),
        "args": options(tmp_path, **settings),
    }
    return RomaGRPOTrainer(**{**arguments, **given})


def test_a_set_up_that_fits_is_taken(folder, tmp_path):
    build(folder, tmp_path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"num_views": 5},
            "num_views: expected at most 4, the corruptions of view_pool 'seen', got 5",
        ),
        ({"view_pool": "bad"}, "view_pool: expected"),
        ({"num_views": -1}, "num_views: expected a whole number, 0 or more"),
        ({"lambda_inv": -1.0}, "lambda_inv: expected a finite number ≥ 0"),
        ({"worst_over": "rollout"}, "worst_over: expected one of"),
        ({"view_update": "two_pass"}, "view_update: expected 'lean' or 'joint'"),
        ({"view_max_level": 9.0}, "view_max_level: expected above 0"),
    ],
)
def test_an_option_out_of_range_is_refused_when_it_is_set(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        options(tmp_path, **given)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (None, "correct_fn: expected a list of 4 booleans, got NoneType"),
        (True, "correct_fn: expected a list of 4 booleans, got bool"),
        ([None] * 4, "correct_fn: expected booleans, got None"),
        (["False"] * 4, "correct_fn: expected booleans, got 'False'"),
        ([0.2, 1, 1, 1], "correct_fn: expected booleans, got 0.2"),
        ([True] * 3, "correct_fn: expected 4 booleans, got 3"),
    ],
)
def test_flags_that_are_no_booleans_are_refused(made, message):
    with pytest.raises(ValueError, match=message):
        checks.check_flags(made, 4)
    checks.check_flags(np.array([True, False, True, True]), 4)
    checks.check_flags([1, 0, True, 0.0], 4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_views_on_a_gpu_that_is_not_there_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="view_device: expected 'cpu', as there is no GPU"):
        build(folder, tmp_path, options={"view_device": "cuda"})


def test_a_pool_is_needed_where_no_function_makes_the_views(folder, tmp_path):
    with pytest.raises(ValueError, match="view_pool: expected 'seen', 'unseen' or 'extra'"):
        build(folder, tmp_path, options={"view_pool": None})


@pytest.mark.parametrize("name", ["roma/correct", "roma/has_views"])
def test_a_run_in_which_roma_does_nothing_is_told(folder, tmp_path, monkeypatch, caplog, name):
    monkeypatch.setattr(record, "_PATIENCE", 2)
    blank = {"train_dataset": tiny.stripes(4).map(lambda row: {"images": []})}
    given = {"reward_funcs": lambda completions, **_: [0.1] * len(completions)}
    build(
        folder,
        tmp_path,
        options={"max_steps": 2, "logging_steps": 1},
        **(given if name == "roma/correct" else blank),
    ).train()
    assert f"{name} was 0 in 2 steps" in caplog.text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"delta": 0.9}, "dual_clip: expected a finite number > 1"),
        ({"epsilon": 1.5}, "clip_low: expected a number ≤ 1"),
    ],
)
def test_a_clip_range_that_the_view_loss_refuses_is_told_when_the_trainer_is_built(
    folder, tmp_path, given, message
):
    with pytest.raises(ValueError, match=message):
        build(folder, tmp_path, options=given)


def test_data_without_images_are_refused(folder, tmp_path):
    text = tiny.stripes(4).remove_columns("images")
    with pytest.raises(ValueError, match="train_dataset: expected a column image or images"):
        build(folder, tmp_path, train_dataset=text)
    build(folder, tmp_path, train_dataset=text, options={"num_views": 0})


def test_a_tokenizer_alone_is_refused(folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    with pytest.raises(ValueError, match="processing_class: expected a processor with an image"):
        build(folder, tmp_path, processing_class=tokenizer)


class Warm(CLIPImageProcessorPil):
    """Brighter towards the right: a value is no function of its pixel."""

    def normalize(self, image, *args, **kwargs):
        made = super().normalize(image, *args, **kwargs)
        return made + np.linspace(0, 0.1, made.shape[-1], dtype=made.dtype)


class Cut(CLIPImageProcessorPil):
    """Another grid than the image's."""

    def __call__(self, *args, **kwargs):
        made = super().__call__(*args, **kwargs)
        made["pixel_values"] = made["pixel_values"][..., :-1]
        return made


@pytest.mark.parametrize("kind", [Warm, Cut])
def test_a_processor_that_cannot_be_undone_is_refused(folder, tmp_path, kind):
    processor = tiny.processor(folder)
    processor.image_processor = kind()
    with pytest.raises(ValueError, match=f"image processor {kind.__name__}: expected pixel_val"):
        build(folder, tmp_path, processing_class=processor)


def test_an_adapter_on_the_head_is_refused(folder, tmp_path):
    for targets in (["q_proj", "lm_head"], "lm_head", r".*\.(q_proj)|lm_head"):
        with pytest.raises(ValueError, match="lm_head"):  # TRL's own message
            build(folder, tmp_path, peft_config=LoraConfig(target_modules=targets))


def test_a_model_without_a_head_is_refused(folder, tmp_path):
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder)
    model.lm_head = torch.nn.Sequential(torch.nn.Linear(96, 4), torch.nn.Linear(4, 20))
    with pytest.raises(ValueError, match="head"):
        build(folder, tmp_path, model=model)


def test_trls_own_options_are_refused(folder, tmp_path):
    plain = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    with pytest.raises(ValueError, match="args: expected a RomaGRPOConfig, got GRPOConfig"):
        build(folder, tmp_path, args=plain)


def test_the_name_of_the_accuracy_reward_must_be_one(folder, tmp_path):
    with pytest.raises(ValueError, match="accuracy_reward: expected one of accuracy, got 'right'"):
        build(folder, tmp_path, options={"accuracy_reward": "right"})


def test_a_version_outside_the_range_is_refused(monkeypatch):
    import importlib.metadata

    found = importlib.metadata.version
    for other in ("1.14.2", "1.17.0"):
        monkeypatch.setattr(
            importlib.metadata, "version", lambda name, v=other: v if name == "trl" else found(name)
        )
        with pytest.raises(ValueError, match=f"trl: expected version 1.15 to 1.16.*{other}"):
            checks.check_trl()


def test_a_signature_that_moved_is_named(monkeypatch):
    def moved(self, model, batch):
        raise AssertionError

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", moved)
    with pytest.raises(ValueError, match=r"GRPOTrainer\._compute_loss.*inputs"):
        checks.check_trl()
    monkeypatch.delattr(GRPOTrainer, "_compute_loss")
    with pytest.raises(ValueError, match=r"_compute_loss: expected a method"):
        checks.check_trl()


def test_unsloth_is_refused(monkeypatch, folder, tmp_path):
    import sys
    import types

    monkeypatch.setitem(sys.modules, "unsloth", types.ModuleType("unsloth"))
    with pytest.raises(ValueError, match="unsloth"):
        build(folder, tmp_path)


def test_a_correct_fn_of_another_length_is_refused(folder, tmp_path):
    trainer = build(folder, tmp_path, correct_fn=lambda **_: [True], options={"max_steps": 1})
    with pytest.raises(ValueError, match="correct_fn: expected 4 booleans, got 1"):
        trainer.train()
