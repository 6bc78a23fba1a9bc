"""`roma eval --engine vllm` finds what `--engine hf` finds, and goes on where it was cut."""

import json
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from vllm_engine.model import folder

from roma.data import write_digits
from roma.evaluate.record import Record, read_rows
from roma.evaluate.run import run_eval

DIFFERENT = ("engine", "device", "versions")


def evaluate(data: Path, out: Path, **options: Any) -> dict[str, Any]:
    given = {"pools": ["clean", "seen"], "levels": [1], "max_new_tokens": 6} | options
    return run_eval(folder(), f"{data}@test", out=out, console=Console(file=StringIO()), **given)


@pytest.mark.slow
def test_both_engines_find_the_same(tmp_path):
    write_digits(tmp_path / "data", train=2, val=2, test=6)
    found = {}
    for engine in ("hf", "vllm"):
        out = tmp_path / engine
        found[engine] = evaluate(tmp_path / "data", out, engine=engine, batch_size=4)
    texts = [(tmp_path / engine / "answers.jsonl").read_text() for engine in found]
    assert texts[0] == texts[1] and len(texts[0]) > 300
    assert [found[engine]["engine"] for engine in found] == ["hf", "vllm"]
    assert found["vllm"]["versions"]["vllm"]
    common = [{k: v for k, v in each.items() if k not in DIFFERENT} for each in found.values()]
    assert common[0] == common[1]


@pytest.mark.slow
def test_several_answers_are_sampled_from_one_distribution_and_go_on(tmp_path, monkeypatch):
    """Of many short answers the two engines' first tokens are equally frequent."""
    write_digits(tmp_path / "data", train=2, val=2, test=8)
    options = {"answers": 64, "max_new_tokens": 1, "pools": ["clean"]}
    counts = []
    for engine in ("hf", "vllm"):
        evaluate(tmp_path / "data", tmp_path / engine, engine=engine, batch_size=3, **options)
        rows = list(read_rows(tmp_path / engine / "answers.jsonl"))
        assert [len(row.texts) for row in rows] == [64] * 8
        counts.append([text for row in rows for text in row.texts])
    words = sorted({*counts[0], *counts[1]})
    seen = np.array([[own.count(word) for word in words] for own in counts])
    # Two samples of one distribution: Pearson's statistic is near its degrees of freedom.
    free = len(words) - 1
    statistic = ((seen[0] - seen[1]) ** 2 / seen.sum(0)).sum()
    assert free > 4 and statistic < free + 5 * (2 * free) ** 0.5

    add, turns = Record.add, iter(range(100))

    def interrupted(self, new):
        if next(turns) == 1:
            add(self, new[:1])
            raise KeyboardInterrupt
        add(self, new)

    monkeypatch.setattr(Record, "add", interrupted)
    cut = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path / "data", cut, engine="vllm", batch_size=3, **options)
    monkeypatch.undo()
    evaluate(tmp_path / "data", cut, engine="vllm", batch_size=3, **options)
    whole = tmp_path / "vllm"
    assert (cut / "answers.jsonl").read_text() == (whole / "answers.jsonl").read_text()
    assert json.loads((cut / "eval.json").read_text()) == json.loads(
        (whole / "eval.json").read_text()
    )
