"""What `roma bench-vlm` refuses once it has read the tasks, and before it loads the model."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset

from roma.cli import main
from roma.evaluate.lmms_eval.suite import load_benchmarks

FUNCTIONS = """
def text(doc, lmms_eval_specific_kwargs=None): return doc["question"]
def nothing(doc): return []
def video(doc): return ["clip.mp4"]
def score(doc, results):
    part = {"part": 1.0} if doc["question"] == "Why?" else {}
    return part | {"words": {"text": results[0]}, "share": 0.5, "loss": 0.5}
def calls(doc, results):
    import urllib.request
    return {"share": float(urllib.request.urlopen("http://judge.invalid").read())}
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Any:
    """Writes a task of one question; returns its folder."""

    def write(**changes: Any) -> Path:
        file = tmp_path / "rows.parquet"
        rows = [{"question": word, "answer": "so"} for word in ("Why?", "When?")]
        Dataset.from_list(rows).to_parquet(str(file))
        place = tmp_path / "tasks"
        place.mkdir()
        (place / "own.py").write_text(FUNCTIONS)
        metrics = ["part", "words", "loss", "share"]
        config = {
            "task": "mine",
            "dataset_path": "parquet",
            "dataset_kwargs": {"data_files": {"test": str(file)}},
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": "!function own.text",
            "doc_to_visual": "!function own.nothing",
            "doc_to_target": "answer",
            "process_results": "!function own.score",
            "metric_list": [
                {"metric": name, "aggregation": "mean", "higher_is_better": name != "loss"}
                for name in metrics
            ],
        }
        text = yaml.safe_dump(config | changes).replace("'!function", "!function")
        (place / "mine.yaml").write_text(text.replace(".text'", ".text").replace("'", ""))
        return place

    return write


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "^mine: expected documents with images, got none with one"),
        ({"doc_to_visual": "!function own.video"}, "^mine, document 0: .*content of type 'video'"),
        ({"output_type": "loglikelihood"}, "^task mine: expected output_type generate_until"),
        ({"dataset_path": "OWNER/absent"}, "^data of task mine: expected to be had, got "),
    ],
)
def test_a_task_that_cannot_be_measured(changes: dict[str, Any], said: str, tasks: Any) -> None:
    with pytest.raises(ValueError, match=said) as error:
        load_benchmarks(["mine"], include_path=tasks(**changes))
    assert "\n" not in str(error.value)


def test_unknown_names(suite: Path) -> None:
    place = suite / "tasks"
    with pytest.raises(ValueError, match=r"^--tasks: .* got 'mmstar_reasonin'; did you mean 'mmst"):
        load_benchmarks(["mmstar_reasonin"], include_path=place)
    with pytest.raises(ValueError, match=r"^--metric: .* got 'mmstar'; one of mmstar_reasoning"):
        names = {"mmstar": "acc_score"}
        load_benchmarks(["mmstar_reasoning"], include_path=place, metrics=names)
    with pytest.raises(ValueError, match=r"^--include-path: expected a folder of task files"):
        load_benchmarks(["mmstar_reasoning"], include_path=place / "absent")


def test_from_the_command_line(
    suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench-vlm", str(suite / "model"), "--include-path", str(suite / "tasks")]
    words += ["--out", str(tmp_path / "out"), "--tasks", "mmstar_reasoning,nosuch_task"]
    assert main(words) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("roma: --tasks: ") and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model", "more", "said"),
    [
        (None, ["--base", "nope"], "roma: base: expected a chat model of lmms-eval, got 'nope'; "),
        (None, ["--base", "async_openai", "--model-args", "levle=3"], "roma: model_args: "),
        (None, ["--model-args", "resize=mdel"], 'roma: resize: expected "model", got '),
        ("suite/model", [], "roma: MODEL: expected a folder in Hugging Face form, or a name on "),
        ("suite/model", ["--base", "internvl_hf"], "roma: MODEL: expected a folder in Hugging "),
        ("suite/model", ["--engine", "vllm"], "roma: MODEL: expected a folder in Hugging Face "),
    ],
)
def test_a_model_or_base_that_is_not_there_leaves_no_file(
    model: str | None,
    more: list[str],
    said: str,
    suite: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["bench-vlm", model or str(suite / "model"), "--tasks", "mmstar_reasoning", *more]
    words += ["--include-path", str(suite / "tasks"), "--out", str(tmp_path / "out")]
    assert main(words) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(said) and (model or "") in line
    assert not (tmp_path / "out").exists()


def test_the_first_metric_that_is_a_share(tasks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one that is there for some questions alone, is no number, or is better when lower."""
    from roma.evaluate.lmms_eval import suite as module

    monkeypatch.setattr(module, "require_images", lambda *_: None)
    place = tasks()
    (found,) = load_benchmarks(["mine"], include_path=place, max_tokens=8)
    assert found.metric == "share"
    assert "right is what its metric share says, the first in 0..1" in found.notes
    kept = found.instance(0).arguments[2]
    assert (kept["max_new_tokens"], kept["do_sample"], kept["until"]) == (8, False, [])
    (one,) = load_benchmarks(["mine"], include_path=place, limit=1)
    assert (one.metric, one.size) == ("part", 1)  # of this question it is there
    for name in ("part", "words", "absent"):
        with pytest.raises(ValueError, match=rf"^task mine: .* as {name}, got none among part, wo"):
            load_benchmarks(["mine"], include_path=place, metrics={"mine": name})
    (loss,) = load_benchmarks(["mine"], include_path=place, metrics={"mine": "loss"})
    assert loss.metric == "loss"  # who names it knows


def test_rules_that_call_a_server(tasks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from roma.evaluate.lmms_eval import suite as module

    monkeypatch.setattr(module, "require_images", lambda *_: None)
    place = tasks(process_results="!function own.calls")
    with pytest.raises(ValueError, match=r"^task mine: expected rules that ask no server.*invalid"):
        load_benchmarks(["mine"], include_path=place)
    (found,) = load_benchmarks(["mine"], include_path=place, own_rules=False)  # --judge rules
    assert (found.metric, found.answered(1, "so").truths) == ("", ("so",))
