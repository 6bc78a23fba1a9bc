"""The configuration: what a file and `a.b=c` make of each other, and what a slip in either gets."""

# ruff: noqa: E501 - one message a line reads best

from dataclasses import dataclass
from pathlib import Path

import pytest

from roma.train.config import Config, changed_options, dump, from_dict, load_config, to_dict
from roma.train.config.schema import explain, keys
from roma_kernels.roma_loss.config import RomaConfig

REQUIRED = ["data.train_files=train.parquet", "worker.actor.model_path=model"]
CONFIGS = [
    Path(__file__).parents[2] / "configs" / f"{name}.yaml"
    for name in ("demo", "qwen3vl_4b", "qwen3vl_8b")
]


def load(*overrides: str) -> Config:
    """A configuration with what must be given, and `overrides`."""
    return load_config(None, [*REQUIRED, *overrides])


def test_defaults_are_those_of_the_loss() -> None:
    config = load()
    assert config.algorithm.roma == RomaConfig()
    assert config.trainer.logger == ("console", "file")
    assert config.worker.actor.lr == 1e-6


def test_file_then_overrides(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "data: {train_files: a}\nworker:\n  actor: {model_path: m, lr: 3e-4}\ntrainer:\n"
    )
    config = load_config(path, ["data.train_files=b", "worker.actor.betas=[0.9, 0.98]"])
    assert config.data.train_files == "b"
    assert config.worker.actor.lr == 3e-4  # plain YAML 1.1 would read the text "3e-4"
    assert config.worker.actor.betas == (0.9, 0.98)


@pytest.mark.parametrize("text", ["5e-7", "1E-6", "+2e3", "1.5e-6", "1.0e-6", "1"])
def test_numbers_in_every_spelling(text: str) -> None:
    assert load(f"worker.actor.lr={text}").worker.actor.lr == float(text)


def test_null_empties_an_optional_key() -> None:
    config = load(
        "trainer.save_limit=null", "algorithm.roma.main=null", "algorithm.roma.dual_clip="
    )
    assert config.trainer.save_limit is None
    assert config.algorithm.roma.main is None
    assert config.algorithm.roma.dual_clip is None


def test_value_may_hold_an_equals_sign() -> None:
    assert load("trainer.out=runs/lr=1e-4").trainer.out == "runs/lr=1e-4"


def test_what_the_file_says_once_holds_for_the_loss_too() -> None:
    config = load(
        "worker.rollout.temperature=0.7",
        "data.max_response_length=64",
        "algorithm.roma.aggregation=dr_grpo",
    )
    assert config.algorithm.roma.temperature == 0.7
    assert config.algorithm.roma.max_length == 64


def test_dump_loads_back_equal(tmp_path: Path) -> None:
    config = load("worker.actor.lr=2.5e-7", "algorithm.roma.aggregation=dr_grpo", "data.limit=7")
    path = tmp_path / "config.yaml"
    path.write_text(dump(config))
    assert load_config(path) == config
    assert from_dict(to_dict(config)) == config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configs_of_the_repository_load(path: Path) -> None:
    assert load_config(path).algorithm.view_mode == "roma"


SLIPS = {
    # a slip -> what its message must hold
    "worker.actor.weight_decya=0": "worker.actor.weight_decya: expected a key of worker.actor, got an "
    "unknown one; did you mean worker.actor.weight_decay?",
    "algorithm.roma.lamda_inv=1": "did you mean algorithm.roma.lambda_inv?",
    "algoritm.adv_estimator=grpo": "did you mean algorithm?",
    "worker.lr=1": "did you mean worker.actor.lr?",
    "zzz=1": "zzz: expected a key of the configuration, got an unknown one; it has data, algorithm",
    "worker.actor.lr=fast": "worker.actor.lr: expected a number > 0, got the text 'fast'",
    "worker.actor.lr=0": "worker.actor.lr: expected a number > 0, got 0",
    "worker.actor.lr=.nan": "worker.actor.lr: expected a number > 0, got nan",
    "worker.actor.lr=true": "worker.actor.lr: expected a number > 0, got true",
    "trainer.total_steps=1.5": "trainer.total_steps: expected a whole number ≥ 1, got 1.5",
    "data.skip_broken=1": "data.skip_broken: expected true or false, got 1",
    "trainer.out=7": "trainer.out: expected text, got 7",
    "trainer.out=": "trainer.out: expected text, got nothing (null)",
    "trainer.logger=console": "trainer.logger: expected a list like [a, b], each one of console, file",
    "trainer.logger=[consol]": "trainer.logger[0]: expected one of console, file, tensorboard, wandb",
    "worker.actor.betas=[0.9]": "worker.actor.betas: expected a list of 2 like [a, b], each a number",
    "worker.actor.betas=[0.9, 1.2]": "worker.actor.betas[1]: expected a number ≥ 0 and ≤ 1, got 1.2",
    "worker.reward.strict_end=3": "worker.reward.strict_end: expected true or false, got 3",
    "algorithm.views=3": "algorithm.views: expected a section (KEY: VALUE lines), got 3; its keys are",
    "algorithm.roma=[1]": "algorithm.roma: expected a section (KEY: VALUE lines), got the list [1]",
    "algorithm=3": "algorithm: expected a section",
    "algorithm.roma.penalty_ratio=up": "algorithm.roma.penalty_ratio: expected one of view/clean",
    "algorithm.roma.lambda_inv=null": "algorithm.roma.lambda_inv: expected a number, got nothing (null)",
    "algorithm.roma.lambda_inv=-1": "algorithm.roma.lambda_inv: expected a finite number ≥ 0",
    "algorithm.roma.temperature=2": "expected worker.rollout.temperature = 1, got 2; leave it out",
    "worker.actor.mini_batch_size=100": "expected a divisor of data.rollout_batch_size = 512, got 100",
    "algorithm.views.candidates=1": "expected at least algorithm.views.k = 2, got 1; draw",
    "algorithm.roma.ref_coef=0.1": "algorithm.roma.ref_coef: expected 0 without worker.actor.lora",
    "algorithm.roma.aux_old=view": "algorithm.roma.aux_old: expected clean, got view; roma.roma_loss",
    "worker.actor.micro_batch_size=8": "it is worker.actor.micro_batch_tokens now, in tokens",
    "worker.actor.update=single": "worker.actor.update: expected one of auto, joint, lean, two_pass",
    "trainer.val_freq=5": "trainer.val_freq: expected 0 without data.val_files, got 5",
    "total_steps": "override 'total_steps': expected SECTION.KEY=VALUE",
    "data.limit={": "override 'data.limit={': expected YAML",
    "data.train_files.x=1": "expected data.train_files to be a section, got the text 'train.parquet'",
}


@pytest.mark.parametrize("override", SLIPS)
def test_a_slip_names_the_key_and_the_remedy(override: str) -> None:
    with pytest.raises(ValueError) as caught:
        load(override)
    assert SLIPS[override] in str(caught.value)


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        (
            "adv_estimator=mssr",
            "entropy_coef=0 entropy=full",
            "mssr.entropy: expected sampled with",
        ),
        (
            "adv_estimator=mssr",
            "entropy_coef=0 entropy_divisor=3",
            "mssr.entropy_divisor: expected",
        ),
        (
            "view_mode=noisy_rollout",
            "anneal=false steepness=9",
            "noisy_rollout.steepness: expected",
        ),
    ],
)
def test_an_option_of_a_part_that_is_off_is_refused(method: str, options: str, said: str) -> None:
    name = method.partition("=")[2]
    given = [f"algorithm.{method}", *(f"algorithm.{name}.{option}" for option in options.split())]
    given += ["worker.rollout.n=1"] * (name == "mssr")
    load(*given[:2], *given[3:])
    with pytest.raises(ValueError, match=rf"^algorithm\.{said}"):
        load(*given)


def test_two_passes_need_a_worst_view_of_a_sequence() -> None:
    load("worker.actor.update=two_pass", "algorithm.roma.worst_over=batch")
    with pytest.raises(ValueError, match=r"algorithm.roma.worst_over: expected sequence or batch"):
        load("worker.actor.update=two_pass", "algorithm.roma.worst_over=token")


def test_a_mini_batch_left_out_is_the_whole_batch() -> None:
    assert load("data.rollout_batch_size=48").worker.actor.mini_batch_size == 48
    given = load("data.rollout_batch_size=48", "worker.actor.mini_batch_size=16")
    assert given.worker.actor.mini_batch_size == 16


def test_options_of_the_builtin_reward_do_not_vanish() -> None:
    assert load("worker.reward.function=my.py:score").worker.reward.function == "my.py:score"
    with pytest.raises(
        ValueError, match="format_weight and strict_end are options of the package's own"
    ):
        load("worker.reward.function=my.py:score", "worker.reward.format_weight=0.5")


def test_rloo_needs_a_group() -> None:
    with pytest.raises(ValueError, match=r"worker\.rollout\.n: expected at least 2 with rloo"):
        load("algorithm.adv_estimator=rloo", "worker.rollout.n=1")


@pytest.mark.parametrize("missing", ["data.train_files", "worker.actor.model_path"])
def test_a_missing_key_is_named(missing: str) -> None:
    given = [override for override in REQUIRED if not override.startswith(missing)]
    with pytest.raises(ValueError, match=f"{missing}: expected text, got nothing; add it"):
        load_config(None, given)


def test_a_key_given_twice(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("data:\n  seed: 1\n  seed: 2\n")
    with pytest.raises(ValueError, match=r"seed: expected each key once, got it again in line 3"):
        load_config(path)


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"config: expected a YAML file, got '.*none\.yaml'"
    ):
        load_config(tmp_path / "none.yaml")
    path = tmp_path / "list.yaml"
    path.write_text("- a\n- b\n")
    with pytest.raises(ValueError, match=r"list\.yaml: expected sections .*, got the list"):
        load_config(path)
    path.write_text("data: [")
    with pytest.raises(ValueError, match=r"list\.yaml: expected YAML"):
        load_config(path)


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n\x00\xff", b"data: \x00", b"data: [\na: }"])
def test_a_file_that_is_no_yaml_gets_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"photo\.png") as caught:
        load_config(path)
    assert "YAML" in str(caught.value) and "\n" not in str(caught.value)


def test_changed_options(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    config = load("worker.actor.lr=1e-6", "trainer.out=one")
    path.write_text(dump(config) + "\nfuture: {key: 3}\n")
    assert changed_options(path, config) == {}
    changed = load(
        "worker.actor.lr=2e-6",
        "worker.actor.betas=[0.9, 0.98]",
        "algorithm.roma.dual_clip=null",
        "trainer.out=two",
        "trainer.resume=one/global_step_1",
    )
    assert changed_options(path, changed) == {
        "algorithm.roma.dual_clip": (3.0, None),
        "worker.actor.betas": ([0.9, 0.999], [0.9, 0.98]),
        "worker.actor.lr": (1e-6, 2e-6),
    }


@dataclass(frozen=True)
class Documented:
    """A section whose fields are explained in three ways.

    Some prose, with a colon: here.

    Attributes:
        first: One line.
        second (int | None): Two lines, of which the other one
            goes on: here.

        third: After a blank line.

    Example:
        first: not a field.
    """

    first: int = 1
    """Not this one."""
    second: int | None = None
    third: float = 0.5
    fourth: bool = True
    """Below the field,
    on two lines."""


def test_meanings_stand_in_the_docstring_or_below_the_field() -> None:
    assert {entry.key: entry.meaning for entry in explain(Documented)} == {
        "first": "One line.",
        "second": "Two lines, of which the other one goes on: here.",
        "third": "After a blank line.",
        "fourth": "Below the field, on two lines.",
    }


def test_config_type_is_the_trainers() -> None:
    """What `--list-keys` explains is what `load_config` builds."""
    leaves = {entry.key for entry in explain(Config)}
    assert leaves <= set(keys(Config))
    assert all(entry.meaning for entry in explain(Config))
