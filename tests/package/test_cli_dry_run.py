"""`roma train --dry-run`: what it prints, and the arguments that go with it alone."""

import sys
from pathlib import Path

import pytest
from support import small_model

from roma import cli


def test_a_dry_run_loads_no_trainer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "roma.train.trainer", None)  # importing it fails
    root = small_model.folder()
    run = [f"data.train_files={root / 'data'}@train", f"worker.actor.model_path={root / 'model'}"]
    small = ["data.rollout_batch_size=4", "trainer.total_steps=3", "trainer.dtype=float32"]
    plan = ["--dry-run", "--ranks", "2", "--tflops", "0.5", "--response-tokens", "7"]
    assert cli.main(["train", *run, *small, *plan]) == 0
    text = capsys.readouterr().out
    assert text.startswith("data:\n") and "total_steps: 3\n" in text
    assert "engine: fsdp2, 2 ranks\n" in text and "answers of 7 tokens, given\n" in text
    assert "steps: 3 of 4 prompts and 20 answers" in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ranks", "2"], "--ranks: expected --dry-run beside it, got none"),
        (["--dry-run", "--ranks", "0"], "--ranks: expected a number > 0, got 0"),
        (["--dry-run", "--tflops", "-1"], "--tflops: expected a number > 0, got -1"),
        (["--dry-run", "--right", "2"], "--right: expected a share, 0 to 1, got 2"),
        (
            ["--dry-run", "--prompt-tokens", "9", "--image-tokens", "9"],
            "--image-tokens: expected fewer than --prompt-tokens = 9, got 9",
        ),
    ],
)
def test_arguments_of_a_dry_run(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"roma: {said}; ")


def test_overrides_may_stand_behind_options() -> None:
    given = ["train", "run.yaml", "--dry-run", "--ranks", "8", "a.b=c", "--tflops", "300", "d.e=f"]
    options = cli.parser().parse_args(cli._in_order(given))
    assert options.config == ["run.yaml", "a.b=c", "d.e=f"]
    assert options.dry_run and options.ranks == 8 and options.tflops == 300
    assert cli._in_order(["views", "a=b", "--list"]) == ["views", "a=b", "--list"]
    assert cli._in_order(["--local_rank=1", "train", "a=b"]) == ["--local_rank=1", "train", "a=b"]
