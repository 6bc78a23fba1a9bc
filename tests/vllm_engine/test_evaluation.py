"""`roma eval --engine vllm` finds what `--engine hf` finds."""

from io import StringIO

import pytest
from rich.console import Console
from vllm_engine.model import folder

from roma.data import write_digits
from roma.evaluate.run import run_eval


@pytest.mark.slow
def test_both_engines_find_the_same(tmp_path):
    write_digits(tmp_path / "data", train=2, val=2, test=6)
    found = {}
    for engine in ("hf", "vllm"):
        found[engine] = run_eval(
            folder(),
            f"{tmp_path / 'data'}@test",
            pools=["clean", "seen"],
            levels=[1],
            out=tmp_path / engine,
            max_new_tokens=6,
            engine=engine,
            console=Console(file=StringIO()),
        )
    texts = [(tmp_path / engine / "answers.json").read_text() for engine in found]
    assert texts[0] == texts[1] and len(texts[0]) > 300
    assert [found[engine].pop("engine") for engine in ("hf", "vllm")] == ["hf", "vllm"]
    assert found["hf"] == found["vllm"]
