"""What `roma eval` refuses before it reads a model."""

from pathlib import Path
from typing import Any

import pytest

from roma.evaluate.run import run_eval
from roma.rewards import load_reward
from roma.views import load_levels


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_new_tokens": 0}, r"^max_new_tokens \(--max-tokens\): expected at least 1, got 0"),
        ({"batch_size": 0}, "^batch_size: expected at least 1, got 0"),
        ({"answers": 0}, "^answers: expected at least 1, got 0"),
        ({"temperature": 0.0}, "^temperature: expected a number above 0, got 0.0; leave it out"),
        ({"temperature": float("inf")}, "^temperature: expected a number above 0, got inf"),
        (
            {"temperature": 0.001, "engine": "vllm"},
            "^temperature: expected at least 0.01 with engine=vllm, got 0.001",
        ),
        ({"score": "mth"}, "^reward: expected builtin, exact, math or file.py:function, got 'mth'"),
        ({"score": "judge"}, "^reward: .*got 'judge'; a judge is `roma bench-vlm`'s"),
        ({"score": "no.py:f"}, "^reward: expected an existing file, got no.py"),
        ({"device": "meta"}, "^device: expected a device that holds values"),
        ({"out": "FILE"}, "^out: expected a folder, got the file"),
        ({"level_table": "FILE"}, "expected YAML, got an error"),
    ],
)
def test_before_the_model(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    photo.write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    given = {name: photo if value == "FILE" else value for name, value in options.items()}
    with pytest.raises((ValueError, FileExistsError, FileNotFoundError), match=said):
        run_eval("no model", "no data", **given)


def test_a_reward_in_a_file_of_another_name(tmp_path: Path) -> None:
    (tmp_path / "reward.txt").write_text("def f(rows): return []\n")
    with pytest.raises(ValueError, match=r"^reward: expected a \.py file, or a module by name"):
        load_reward(f"{tmp_path / 'reward.txt'}:f")
    with pytest.raises(ValueError, match="expected YAML, got an error"):
        (tmp_path / "levels.yaml").write_bytes(b"\xff\xfe\x89PNG")
        load_levels(tmp_path / "levels.yaml")
