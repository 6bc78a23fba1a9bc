"""What `roma bench-vlm` refuses before it loads anything, and without lmms-eval."""

import json
from pathlib import Path
from typing import Any

import pytest

from roma.cli import main
from roma.evaluate.lmms_eval.asked import Asked
from roma.evaluate.lmms_eval.benchmark import PAPER


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tasks": []}, "^--tasks: expected some, or --suite paper, got none"),
        ({"suite": "papre"}, "^--suite: expected paper, got 'papre'"),
        ({"pools": ["sen"]}, "^pools: .* did you mean 'seen'"),
        (
            {"pools": ["clean", "adversarial"]},
            "^--pools: .* got 'adversarial'; `roma eval` attacks",
        ),
        ({"levels": [9]}, "^levels: expected 1 to 5, .* got 9"),
        ({"engine": "vlm"}, '^--engine: expected "hf" or "vllm", got \'vlm\''),
        ({"engine": "vllm", "device": "cpu"}, "^--device: expected none with --engine vllm"),
        ({"engine": "vllm", "base": "llava_hf"}, "^--base: expected none with --engine vllm"),
        ({"limit": 0}, "^--limit: expected at least 1, got 0"),
        ({"max_tokens": 0}, "^--max-tokens: expected at least 1, got 0"),
        ({"batch_size": 0}, "^--batch-size: expected at least 1, got 0"),
        ({"judge": "rule"}, r"^--judge: expected none, rules, or an http\(s\) address, got 'rule'"),
        ({"judge": "http://localhost:8000/v1"}, "^--judge-model: expected a model of the judge's"),
        (
            {"judge": "rules", "judge_model": "m"},
            "^--judge-model: expected none with --judge rules",
        ),
        ({"judge": "rules", "metrics": {"mmstar": "x"}}, "^--metric: expected none with --judge r"),
        ({"model_args": {"level": "3"}}, "^--model-args: .* got level; give it as an option"),
    ],
)
def test_what_does_not_fit(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Asked("OWNER/NAME", **({"tasks": ["mmstar"]} | options))


def test_a_folder_that_is_not_there_and_a_second_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for model in ("./model", "/no/model", "runs/x/actor", "model"):
        with pytest.raises(ValueError, match=r"^MODEL: expected a folder in Hugging Face form"):
            Asked(model, suite="paper")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"^processes: expected one, got 2"):
        Asked("OWNER/NAME", suite="paper")


def test_without_lmms_eval_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["bench-vlm", "OWNER/NAME", "--suite", "paper", "--out", str(tmp_path / "x")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "pip install '.[train,views,math,lmms]' in a clone" in said
    assert not (tmp_path / "x").exists()


def test_the_suite_and_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A judge's address and key are no settings; its model and how it is asked are."""
    monkeypatch.setenv("ROMA_JUDGE_API_KEY", "secret")
    made = [
        Asked("OWNER/NAME", suite="paper", judge=f"http://{host}:1/v1", judge_model="m").settings(
            []
        )
        for host in ("one", "two")
    ]
    assert made[0] == made[1] and made[0]["judge"]["model"] == "m"
    text = json.dumps(made)
    assert "secret" not in text and "http" not in text
    asked = Asked("OWNER/NAME", suite="paper", tasks=["mmstar", "chartqa_reasoning"])
    assert asked.names == [*PAPER, "mmstar"] and len(PAPER) == 7
    assert len(asked.cells) == len(made[0]["cells"]) == 28
    assert made[0]["cells"][1]["parameter"] > 0  # what a level does stands there
    assert asked.settings([])["judge"] == {"by": "none"}
