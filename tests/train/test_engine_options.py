"""What an engine refuses, by name, before a model is wrapped."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import small_model
from support.small_run import config

from roma.models.qwen_vl import Policy
from roma.train import ranks
from roma.train.config import dump
from roma.train.engine import chosen
from roma.train.engine.zero import read_options
from roma.train.trainer import Trainer

DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
ENGINES = ("zero2", "zero3") if DEEPSPEED else ("fsdp2",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("[]", "deepspeed_config: expected a JSON object, got list"),
        ("{", r"deepspeed_config: expected a JSON file, got .*ds\.json"),
        ({"bf16": {"enabled": True}}, "deepspeed_config, bf16: expected no such key"),
        ({"train_batch_size": 8}, "train_batch_size: expected no such key, got 8"),
        ({"zero_optimization": {"stage": 2}}, r"zero_optimization\.stage: expected 3, got 2"),
    ],
)
def test_options_of_deepspeed(tmp_path: Path, options: object, message: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(options if isinstance(options, str) else json.dumps(options))
    with pytest.raises(ValueError, match=message):
        read_options(str(path), 3)


def test_options_that_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    given = {"zero_optimization": {"stage": 3, "overlap_comm": True}}
    path.write_text(json.dumps(given | {"train_batch_size": "auto"}))
    assert read_options(str(path), 3) == given
    assert read_options(None, 3) == {}
    with pytest.raises(ValueError, match="expected a JSON file, got nothing at"):
        read_options(str(tmp_path / "none.json"), 3)


def test_auto_depends_on_the_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    single = config(tmp_path, "trainer.engine=single")
    assert chosen(config(tmp_path)) == chosen(single) == "single"
    monkeypatch.setattr(ranks, "ranks", lambda: 3)
    assert chosen(config(tmp_path)) == "fsdp2"
    with pytest.raises(ValueError, match=r"trainer\.engine: expected one process, got 3 of them"):
        chosen(single)
    with pytest.raises(ValueError, match="mini_batch_size: expected a multiple of the 3 ranks"):
        Trainer(config(tmp_path, "trainer.engine=ddp"))


@pytest.mark.skipif(DEEPSPEED, reason="it is installed")
def test_without_deepspeed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected DeepSpeed installed, got none; pip install"):
        Trainer(config(tmp_path, "trainer.engine=zero2"))


def test_a_json_needs_a_stage(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"trainer\.engine: expected zero1, zero2 or zero3"):
        config(tmp_path, "trainer.deepspeed_config=ds.json")


def test_the_device_is_not_read_off_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """To read a weight is a collective under ZeRO-3, and a thread that makes views asks, too."""
    policy = small_model.policy()
    monkeypatch.setattr(Policy, "head_weight", property(lambda _: pytest.fail("it was read")))
    assert policy.device.type == "cpu"


def test_a_step_that_is_not_finite_is_left_out(tmp_path: Path) -> None:
    """In every engine, as DeepSpeed does it; and it is not counted."""
    trainer = Trainer(config(tmp_path))
    trainer.step = 1
    trainer.train_step()
    before = [weight.detach().clone() for weight in trainer.policy.parameters()]
    weight = next(iter(trainer.engine.trained.values()))
    weight.grad = torch.full_like(weight, torch.nan)
    assert math.isnan(trainer.engine.step())
    assert trainer.engine.version == 1
    for weight, old in zip(trainer.policy.parameters(), before, strict=True):
        assert torch.equal(weight, old) and weight.grad is None
    trainer.step = 2
    trainer.train_step()
    assert trainer.engine.version == 2


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_of_several_ranks_takes_one(tmp_path: Path, engine: str) -> None:
    """Without a launcher; DeepSpeed's: make test-deepspeed."""
    chosen = config(tmp_path / "out", f"trainer.engine={engine}", "trainer.total_steps=1")
    file = tmp_path / "run.yaml"
    file.write_text(dump(chosen))
    # A process of its own: DeepSpeed keeps the groups of one.
    subprocess.run([sys.executable, "-m", "roma", "train", str(file)], check=True, timeout=300)
    assert (tmp_path / "out" / "global_step_1" / "actor" / "config.json").is_file()
