"""`roma eval` that is cut goes on: the same files, whatever happened, and nothing asked twice."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support import killed_answers, small_model

from roma.evaluate import figures
from roma.evaluate.record import Record, Row, read_rows
from roma.evaluate.run import run_eval
from roma.models.qwen_vl import Policy

FILES = ("settings.json", "answers.jsonl", "eval.json", "eval.md")
SEVERAL = {"answers": 2, "temperature": 1.5}
ATTACKED = {"pools": ["masking", "clean", "adversarial"], "levels": [1], "attack_steps": 1}


def evaluate(out: Path, **options: Any) -> str:
    """8 questions at 3 cells or more, in batches of 3; what it says."""
    root, said = small_model.folder(), io.StringIO()
    given = {"pools": ["clean", "masking"], "levels": [1, 2], "batch_size": 3, "max_new_tokens": 4}
    given |= {"model": root / "model", "data": f"{root / 'data'}@val", "device": "cpu"} | options
    run_eval(given.pop("model"), given.pop("data"), out=out, console=Console(file=said), **given)
    return said.getvalue()


def files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def test_killed_ten_times_gives_the_same_bytes(tmp_path: Path) -> None:
    """In the midst of a batch, which then is on disk in part."""
    here = Path(__file__).parents[1]
    path = {"PYTHONPATH": os.pathsep.join([str(here), *sys.path]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "support.killed_answers", str(tmp_path)]
    ran = subprocess.run(command, env=os.environ | path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    *left, ended, whole = [int(line) for line in ran.stdout.split()]
    assert ended == whole == killed_answers.COUNT * len(killed_answers.CELLS)
    assert left == sorted(left) and 0 < left[4] < left[9] < whole and len(left) == 10
    assert any(rows % killed_answers.BATCH for rows in left)  # in the midst of a batch
    for file in ("answers.jsonl", "settings.json"):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


class Cut(BaseException):
    """Ends a run as Ctrl-C does."""


@pytest.mark.parametrize("options", [SEVERAL, ATTACKED], ids=["several", "attacked"])
def test_interrupted_it_goes_on_with_what_is_missing(
    tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "save", lambda figure, path: path)  # drawing it takes a second
    whole, cut = tmp_path / "whole" / "run", tmp_path / "cut" / "run"
    evaluate(whole, **options)
    settings = json.loads((whole / "settings.json").read_text())
    assert settings["temperature"] == options.get("temperature")
    rows = list(read_rows(whole / "answers.jsonl"))
    assert len(rows) == 8 * len({row.cell for row in rows})
    add, turns = Record.add, iter(range(2, 100))

    def interrupted(self: Record, new: Sequence[Row]) -> None:
        if self.path.is_relative_to(cut) and next(turns) % 3 == 0:
            add(self, new[: len(new) // 2])  # as if the rest had not come to the disk
            raise Cut
        add(self, new)

    monkeypatch.setattr(Record, "add", interrupted)
    for _ in range(2):
        with pytest.raises(Cut):
            evaluate(cut, **options)
        assert not (cut / "eval.json").exists()
    monkeypatch.setattr(Record, "add", add)
    there = len(Record(cut, json.loads((cut / "settings.json").read_text())))
    assert f"{there} of {len(rows)} answers were there already" in evaluate(cut, **options)
    assert files(cut) == files(whole)


def test_a_finished_folder_says_its_table_again_and_begins_anew_where_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = evaluate(tmp_path)
    made, plot = files(tmp_path), (tmp_path / "eval.png").read_bytes()
    load, loads = Policy.load, []

    def counted(*args: Any, **options: Any) -> Policy:
        loads.append(args)
        return load(*args, **options)

    monkeypatch.setattr(Policy, "load", counted)
    again = evaluate(tmp_path, model=f"{small_model.folder() / 'model'}/")
    assert again.startswith("24 of 24 answers were there already") and not loads
    assert again.splitlines()[1:] == first.splitlines()[-len(again.splitlines()) + 1 :]
    assert files(tmp_path) == made and (tmp_path / "eval.png").read_bytes() == plot
    monkeypatch.setattr(figures, "save", lambda figure, path: path)
    (tmp_path / "answers.jsonl").write_text("another's\n")
    assert "were there already" not in evaluate(tmp_path, overwrite=True)
    assert len(loads) == 1 and files(tmp_path) == made
    assert not (tmp_path / "eval.png").exists()  # it was of other answers


def test_a_folder_of_other_settings_is_refused_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "save", lambda figure, path: path)
    evaluate(tmp_path)
    made = files(tmp_path)
    table = tmp_path / "levels.yaml"
    table.write_text("patch_mask: {levels: [0.3, 0.5]}\n")
    prompt = tmp_path / "prompt.jinja"
    prompt.write_text("{{ content }} Box it.")
    load = Policy.load
    monkeypatch.setattr(Policy, "load", None)
    for options, said in (
        ({"seed": 1}, "seed = 0 there and 1 here"),
        ({"limit": 7}, "questions = 8 there and 7 here"),
        ({"format_prompt": prompt}, "format_prompt = None there and '.*prompt.jinja' here"),
        ({"levels": [1]}, "patch_mask L2 there alone"),
        ({"level_table": table}, "level_table = None there and '.*levels.yaml' here"),
        ({"temperature": 1.0}, "decoding = 'greedy' there and 'sampled' here"),
        ({"batch_size": 4}, "batch_size = 3 there and 4 here"),
        ({"max_new_tokens": 5}, "max_new_tokens = 4 there and 5 here"),
        ({"score": "exact"}, "reward = 'builtin' there and 'exact' here"),
    ):
        with pytest.raises(ValueError, match=f"^out: expected a new folder, or one .*got {said}"):
            evaluate(tmp_path, **options)
    assert files(tmp_path) == made
    monkeypatch.setattr(Policy, "load", load)
    own = {"level_table": table, "limit": 1, "pools": ["masking"], "format_prompt": prompt}
    evaluate(tmp_path / "own", **own)
    prompt.write_text("{{ content }} Box it!")
    with pytest.raises(ValueError, match=r"format_fingerprint = '.*' there and '.*' here"):
        evaluate(tmp_path / "own", **own)
    prompt.write_text("{{ content }} Box it.")
    table.write_text("patch_mask: {levels: [0.3, 0.6]}\n")
    with pytest.raises(ValueError, match=r"got patch_mask L2 = 0\.5 there and 0\.6 here"):
        evaluate(tmp_path / "own", **own)
