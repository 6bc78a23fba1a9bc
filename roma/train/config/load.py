"""The trainer's configuration: YAML sections data, algorithm, worker, trainer, and `a.b=c` on top.

An unknown key, a value of the wrong type and a value out of range are errors that name the full
dotted key. Paths are relative to the folder in which the command runs.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from roma.train.config.check_losses import check_loss
from roma.train.config.check_methods import check_methods
from roma.train.config.check_views import check_views
from roma.train.config.schema import apply_override, build, check_keys, leaves, parse_yaml, show
from roma.train.config.sections import Config, RewardConfig
from roma_kernels.errors import fail
from roma_kernels.roma_loss.config import RomaConfig

__all__ = ["Config", "changed_options", "dump", "from_dict", "load_config", "to_dict"]


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Reads a configuration: the YAML file (if any), then each `a.b=c`, `c` read as YAML.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: bad YAML, an unknown key (the nearest one is suggested), a missing or bad value;
            the message names the dotted key.

    Example:
        >>> needed = ["data.train_files=train.parquet", "worker.actor.model_path=model"]
        >>> load_config(None, [*needed, "algorithm.roma.lambda_inv=3"]).algorithm.roma.lambda_inv
        3.0
    """
    tree: dict[str, Any] = {}
    if path is not None:
        if not Path(path).is_file():
            message = f"config: expected a YAML file, got {str(path)!r}; see configs/ for examples"
            raise FileNotFoundError(message)
        tree = _read(Path(path))
    for override in overrides:
        apply_override(tree, override)
    return from_dict(tree)


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        got = f"{str(path)!r}, which is not text"
        fail("config", "a YAML file", got, "see configs/ for examples")
    loaded = parse_yaml(text, str(path))
    if not isinstance(loaded, dict):
        fail(str(path), "sections (data: …)", show(loaded), "see configs/ for examples")
    return loaded


def from_dict(tree: Mapping[str, Any]) -> Config:
    """Builds and checks a configuration from nested dicts; errors as those of `load_config`."""
    check_keys(Config, tree)
    section = tree.get("algorithm")
    given = section.get("roma") if isinstance(section, dict) else None
    if isinstance(given, dict) and isinstance(section, dict):
        tree = {**tree, "algorithm": {**section, "roma": None}}
    else:
        given = {}
    config = build(Config, tree)
    # Defaults that depend on other keys.
    worker = config.worker
    if "mini_batch_size" not in tree["worker"]["actor"]:
        actor = dataclasses.replace(worker.actor, mini_batch_size=config.data.rollout_batch_size)
        worker = dataclasses.replace(worker, actor=actor)
    known: dict[str, Any] = {"temperature": config.worker.rollout.temperature}
    if given.get("aggregation") == "dr_grpo":
        known["max_length"] = config.data.max_response_length
    roma = build(RomaConfig, known | given, "algorithm.roma")
    algorithm = dataclasses.replace(config.algorithm, roma=roma)
    config = dataclasses.replace(config, algorithm=algorithm, worker=worker)
    _check_together(config)
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """Nested dicts and lists of plain values; `from_dict` takes them back."""
    plain: dict[str, Any] = _plain(dataclasses.asdict(config))
    return plain


def dump(config: Config) -> str:
    """The configuration as YAML, every key written out."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def changed_options(path: str | Path, config: Config) -> dict[str, tuple[Any, Any]]:
    """The options that differ between a run's config.yaml and a configuration: key -> (old, new).

    Left out are keys that only one of the two has, as another version of the package may write, and
    `trainer.out` and `trainer.resume`, which say where a run goes on and not how.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such file.
    """
    old, new = dict(leaves(_read(Path(path)))), dict(leaves(to_dict(config)))
    same = {"trainer.out", "trainer.resume"}
    return {
        key: (old[key], value)
        for key, value in new.items()
        if key in old and key not in same and old[key] != value
    }


def _check_together(config: Config) -> None:
    """Checks that concern more than one key."""
    prompts, mini = config.data.rollout_batch_size, config.worker.actor.mini_batch_size
    if prompts % mini:
        expected = f"a divisor of data.rollout_batch_size = {prompts}"
        fail("worker.actor.mini_batch_size", expected, str(mini), "correct one of the two")
    check_views(config.algorithm)
    check_methods(config)
    check_loss(config)
    rollout, roma = config.worker.rollout, config.algorithm.roma
    if roma.temperature != rollout.temperature:
        expected = f"worker.rollout.temperature = {rollout.temperature:g}"
        remedy = "leave it out, it follows the rollout's"
        fail("algorithm.roma.temperature", expected, f"{roma.temperature:g}", remedy)
    reward = config.worker.reward
    options = [(x.format_weight, x.strict_end) for x in (reward, RewardConfig())]
    if ":" in reward.function and options[0] != options[1]:
        remedy = "format_weight and strict_end are options of the package's own; remove them"
        fail("worker.reward.function", "builtin beside its options", reward.function, remedy)
    trainer = config.trainer
    if trainer.deepspeed_config and not trainer.engine.startswith("zero"):
        remedy = "choose a stage, or leave trainer.deepspeed_config out"
        fail("trainer.engine", "zero1, zero2 or zero3 with a JSON", trainer.engine, remedy)
    if roma.aux_old != "clean":
        remedy = "roma.roma_loss takes the log-probs that it needs; the trainer has none"
        fail("algorithm.roma.aux_old", "clean", roma.aux_old, remedy)
    if roma.ref_coef > 0 and config.worker.actor.lora.rank is None:
        expected = "0 without worker.actor.lora.rank"
        remedy = "the reference is the model without its adapters: set worker.actor.lora.rank"
        fail("algorithm.roma.ref_coef", expected, f"{roma.ref_coef:g}", remedy)
    if config.worker.actor.update == "two_pass" and roma.worst_over not in ("sequence", "batch"):
        expected = "sequence or batch with worker.actor.update=two_pass"
        remedy = "every view of a token needs a gradient; take update=lean"
        fail("algorithm.roma.worst_over", expected, roma.worst_over, remedy)
    best = config.trainer.best_metric or ""
    freq = config.trainer.val_freq
    if best.startswith("val/") and not (freq and config.trainer.save_freq % freq == 0):
        expected = "a divisor of trainer.save_freq with trainer.best_metric"
        remedy = "a checkpoint has the value of its own step alone"
        fail("trainer.val_freq", expected, str(freq), remedy)
    if config.trainer.val_freq and config.data.val_files is None:
        got = str(config.trainer.val_freq)
        fail("trainer.val_freq", "0 without data.val_files", got, "name a validation set")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
