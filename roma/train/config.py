"""The trainer's configuration: YAML sections data, algorithm, worker, trainer, and `a.b=c` on top.

Nothing is guessed: a key that no section knows, a value of the wrong type and one out of range are
errors that name the full dotted key. Paths are relative to the folder the command runs in.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from roma.train.schema import Range, apply_override, build, check_keys, parse_yaml, show
from roma_kernels.errors import fail
from roma_kernels.roma_loss.config import RomaConfig

Count = Annotated[int, Range(low=1)]
Natural = Annotated[int, Range(low=0)]
Positive = Annotated[float, Range(above=0)]
NonNegative = Annotated[float, Range(low=0)]
Share = Annotated[float, Range(low=0, high=1)]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Section `data`: what is asked, and how much of it a step takes."""

    train_files: str
    """Training set: parquet, jsonl, a Hugging Face dataset on disk, or `folder@split` of them."""
    val_files: str | None = None
    """Validation set in the same forms; null for none."""
    prompt_key: str = "problem"
    """Column of the question, one "<image>" in it per image."""
    answer_key: str = "answer"
    """Column of the right answer, text."""
    image_key: str = "images"
    """Column of the images, a list of paths or of {bytes, path}."""
    image_dir: str | None = None
    """Folder that relative image paths start from; null: that of the file."""
    limit: Count | None = None
    """Only the first so many training rows; null for all."""
    skip_broken: bool = False
    """Leave out rows that cannot be read, and say so; false: such a row is an error."""
    max_response_length: Count = 2048
    """Completion budget, tokens."""
    rollout_batch_size: Count = 512
    """Prompts per step."""
    seed: Natural = 0
    """Seed of the order of the training rows."""


@dataclass(frozen=True, kw_only=True)
class ViewsConfig:
    """Sub-section `algorithm.views`: the degraded views of a training image."""

    pool: Literal["seen", "unseen", "extra"] = "seen"
    """Corruptions drawn from. After training on "unseen", evaluating on it says nothing."""
    k: Count = 2
    """K: views per prompt, of K distinct corruptions."""
    max_level: Positive = 2.0
    """Strongest level drawn; 0 is the clean image, 1 and up are the levels of the table."""
    strength: Literal["uniform", "strong"] = "uniform"
    """Level = max_level·u or max_level·√u, u uniform in 0..1."""
    level_table: str | None = None
    """YAML file with other levels, for images far from 224 pixels; null: the own ones."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where DALI makes them; "cuda": on the policy's GPU, between its passes. Not run yet."""
    ramp_steps: Natural = 0
    """Curriculum (ours): over so many steps max_level is reached linearly, from nearly 0; 0: from
    the first step on."""
    candidates: Count | None = None
    """Adversarial choice (ours): so many views are drawn, scored without a graph, and of each
    prompt the K kept on which the policy diverges most over right rollouts; null: K are drawn."""


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig:
    """Section `algorithm`: advantages, views and the loss."""

    adv_estimator: Literal["grpo", "dr_grpo", "rloo"] = "grpo"
    """Group advantage (MATH.md section 3)."""
    view_mode: Literal["none", "roma", "rollout"] = "roma"
    """"roma": clean rollouts, the loss sees K views of each image. "none": no views. "rollout":
    naive augmentation, rollouts on a degraded image. In the last two both lambdas count as 0."""
    views: ViewsConfig = field(default_factory=ViewsConfig)
    roma: RomaConfig = field(default_factory=RomaConfig)
    """Options of the loss. Left out, `temperature` is that of the rollout, and `max_length` of
    "dr_grpo" is the response budget."""


@dataclass(frozen=True, kw_only=True)
class ActorConfig:
    """Sub-section `worker.actor`: the policy and its optimizer (AdamW)."""

    model_path: str
    """Folder in Hugging Face form: a Qwen3-VL, or the small one that `roma demo` makes."""
    freeze_vision: bool = False
    """Whether the vision tower keeps its weights."""
    lr: Positive = 1e-6
    """Peak learning rate."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """Decay rates of AdamW's two moments."""
    weight_decay: NonNegative = 0.01
    """Decoupled weight decay."""
    schedule: Literal["constant", "linear"] = "constant"
    """After the warm-up: the peak rate throughout, or linearly down to 0 at the last step."""
    warmup_steps: Natural = 0
    """Optimizer steps over which the rate rises linearly from 0."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled down to this norm, L2 over all parameters."""
    mini_batch_size: Count = 512
    """Prompts per optimizer step, a divisor of `data.rollout_batch_size`; left out: all of them."""
    micro_batch_size: Count = 8
    """Completions per forward and backward; memory only, the loss does not depend on it."""
    ppo_epochs: Count = 1
    """Passes over the rollouts of a step."""


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Sub-section `worker.rollout`: sampling of completions."""

    name: Literal["hf"] = "hf"
    """Engine: transformers' generate."""
    n: Count = 5
    """G: rollouts per prompt."""
    temperature: Positive = 1.0
    """Sampling temperature; the loss divides its logits by the same."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Sub-section `worker.reward`."""

    function: str = "builtin"
    """"builtin" compares boxed answers; or `file.py:function` with EasyR1's signature."""
    format_weight: Share = 0.1
    """Of "builtin": overall = (1 - w)·accuracy + w·format."""
    strict_end: bool = True
    """Of "builtin": only a response that ends right after its box is accurate."""


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """Section `worker`: policy, sampler and reward."""

    actor: ActorConfig
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Section `trainer`: how long, where, and what is written."""

    total_steps: Count = 200
    """Steps, each of `data.rollout_batch_size` prompts."""
    out: str = "runs/train"
    """Run folder: config.yaml, metrics.jsonl, global_step_N/."""
    resume: str = "auto"
    """"auto": from the newest checkpoint in `out`, if any; "never"; or the path of one."""
    seed: Natural = 0
    """Run seed: sampling and views. (The order of rows has `data.seed`.)"""
    save_freq: Natural = 0
    """Steps between checkpoints; 0: only after the last step."""
    save_limit: Count | None = 2
    """Checkpoints kept, the newest; null for all."""
    val_freq: Natural = 0
    """Steps between validations; 0 for none."""
    val_batches: Count | None = None
    """Batches of `data.rollout_batch_size` rows per validation; null for the whole set."""
    logger: tuple[Literal["console", "file", "tensorboard", "wandb"], ...] = ("console", "file")
    """Where metrics go; "file" is metrics.jsonl in `out`."""
    project_name: str = "roma"
    """Project in W&B."""
    experiment_name: str | None = None
    """Run in W&B; null: the name of the run folder."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """"auto": a GPU if torch sees one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the passes through the model; bfloat16 means autocast. Parameters and logits stay fp32:
    an update of 1e-6 would be rounded away in bfloat16."""
    threads: Count | None = None
    """CPU threads of torch; null: torch's own choice."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything `roma train` needs to know."""

    data: DataConfig
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    worker: WorkerConfig
    trainer: TrainerConfig = field(default_factory=TrainerConfig)


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
        loaded = parse_yaml(Path(path).read_text(encoding="utf-8"), str(path))
        if not isinstance(loaded, dict):
            fail(str(path), "sections (data: …)", show(loaded), "see configs/ for examples")
        tree = loaded
    for override in overrides:
        apply_override(tree, override)
    return from_dict(tree)


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
    # What is left out follows from what the rest of the file says.
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


def _check_together(config: Config) -> None:
    """What no single key can tell."""
    prompts, mini = config.data.rollout_batch_size, config.worker.actor.mini_batch_size
    if prompts % mini:
        expected = f"a divisor of data.rollout_batch_size = {prompts}"
        fail("worker.actor.mini_batch_size", expected, str(mini), "correct one of the two")
    views = config.algorithm.views
    if views.candidates is not None and views.candidates < views.k:
        got, remedy = str(views.candidates), "draw at least as many as are kept"
        fail("algorithm.views.candidates", f"at least algorithm.views.k = {views.k}", got, remedy)
    rollout, roma = config.worker.rollout, config.algorithm.roma
    if config.algorithm.adv_estimator == "rloo" and rollout.n == 1:
        remedy = "it averages a prompt's other rollouts"
        fail("worker.rollout.n", "at least 2 with rloo", "1", remedy)
    if roma.temperature != rollout.temperature:
        expected = f"worker.rollout.temperature = {rollout.temperature:g}"
        remedy = "leave it out, it follows the rollout's"
        fail("algorithm.roma.temperature", expected, f"{roma.temperature:g}", remedy)
    reward = config.worker.reward
    alone = dataclasses.replace(reward, function="builtin")
    if reward.function != "builtin" and alone != RewardConfig():
        remedy = "format_weight and strict_end are options of the builtin; remove them"
        fail("worker.reward.function", "builtin beside its options", reward.function, remedy)
    if config.trainer.val_freq and config.data.val_files is None:
        got = str(config.trainer.val_freq)
        fail("trainer.val_freq", "0 without data.val_files", got, "name a validation set")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
