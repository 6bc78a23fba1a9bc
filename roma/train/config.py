"""The trainer's configuration: YAML sections data, algorithm, worker, trainer, and `a.b=c` on top.

An unknown key, a value of the wrong type and a value out of range are errors that name the full
dotted key. Paths are relative to the folder in which the command runs.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from roma.train.schema import Range, apply_override, build, check_keys, leaves, parse_yaml, show
from roma_kernels.errors import fail
from roma_kernels.roma_loss.config import RomaConfig

PositiveInt = Annotated[int, Range(low=1)]
NonNegativeInt = Annotated[int, Range(low=0)]
PositiveFloat = Annotated[float, Range(above=0)]
NonNegativeFloat = Annotated[float, Range(low=0)]
Share = Annotated[float, Range(low=0, high=1)]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Section `data`: the questions, and how many a step takes."""

    train_files: str
    """Training set: parquet, jsonl, a Hugging Face dataset on disk, or `folder@split` of them."""
    val_files: str | None = None
    """Validation set in the same forms; null: none."""
    prompt_key: str = "problem"
    """Column of the question, with one "<image>" per image."""
    answer_key: str = "answer"
    """Column of the right answer, text."""
    image_key: str = "images"
    """Column of the images, a list of paths or of {bytes, path}."""
    image_dir: str | None = None
    """Folder of relative image paths; null: the data file's own folder."""
    limit: PositiveInt | None = None
    """Number of training rows to use, the first ones; null: all."""
    skip_broken: bool = False
    """Skip rows that cannot be read and report each; false: such a row is an error."""
    max_response_length: PositiveInt = 2048
    """Longest completion, tokens; a longer one is cut there."""
    rollout_batch_size: PositiveInt = 512
    """Prompts per step."""
    seed: NonNegativeInt = 0
    """Seed of the order of the training rows."""


@dataclass(frozen=True, kw_only=True)
class ViewsConfig:
    """Sub-section `algorithm.views`: the degraded views of a training image."""

    pool: Literal["seen", "unseen", "extra"] = "seen"
    """Pool of corruptions to draw from. To train on "unseen" makes its evaluation meaningless."""
    k: PositiveInt = 2
    """K: views per prompt, each with another corruption."""
    max_level: PositiveFloat = 2.0
    """Highest level to draw; 0 is the clean image, 1 and up are the levels of the table."""
    strength: Literal["uniform", "strong"] = "uniform"
    """Distribution of the level: "uniform" is max_level·u, "strong" max_level·√u, with u uniform in
    0..1."""
    level_table: str | None = None
    """YAML file of levels, for images much smaller or larger than 224 pixels; null: the package's
    levels."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where DALI makes the views; "cuda" is the policy's GPU, shared with its passes (not yet tried
    on hardware)."""
    ramp_steps: NonNegativeInt = 0
    """Curriculum (ours): number of steps over which the highest level rises linearly to max_level;
    0: none."""
    candidates: PositiveInt | None = None
    """Adversarial choice (ours): number of views to draw and score per prompt; the K on which the
    policy diverges most over right rollouts are kept. null: K are drawn and all kept."""


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig:
    """Section `algorithm`: advantages, views and the loss."""

    adv_estimator: Literal["grpo", "dr_grpo", "rloo"] = "grpo"
    """Group advantage (MATH.md section 3)."""
    view_mode: Literal["none", "roma", "rollout"] = "roma"
    """"roma": rollouts on clean images, K views of each image in the loss. "none": no views.
    "rollout": naive augmentation, rollouts and loss on one degraded image. The last two ignore
    lambda_inv and lambda_aux."""
    views: ViewsConfig = field(default_factory=ViewsConfig)
    aux_view: Literal["rollout", "prompt"] = "rollout"
    """Who draws the view of the auxiliary loss: each rollout, or each prompt for all its rollouts,
    which is cheaper."""
    roma: RomaConfig = field(default_factory=RomaConfig)
    """Options of the loss. `temperature` defaults to the rollout's, `max_length` of "dr_grpo" to
    data.max_response_length."""


@dataclass(frozen=True, kw_only=True)
class ActorConfig:
    """Sub-section `worker.actor`: the policy and its optimizer (AdamW)."""

    model_path: str
    """Folder of a Qwen3-VL in Hugging Face form, such as `roma.models.small` writes."""
    freeze_vision: bool = False
    """Keep the weights of the vision tower fixed."""
    lr: PositiveFloat = 1e-6
    """Peak learning rate."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """Decay rates of AdamW's two moments."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay."""
    schedule: Literal["constant", "linear"] = "constant"
    """After the warm-up: the peak rate, or a linear decay to 0 at the last step."""
    warmup_steps: NonNegativeInt = 0
    """Number of optimizer steps over which the rate rises linearly from 0."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients of a larger norm, L2 over all parameters, are scaled down to it."""
    mini_batch_size: PositiveInt = 512
    """Prompts per optimizer step, a divisor of `data.rollout_batch_size`, which is the default."""
    micro_batch_tokens: PositiveInt = 16384
    """Most tokens of the text model per forward and backward, on clean images and views together. A
    prompt with all its rollouts stays whole, however large. Affects memory; the loss does not
    depend on it (but for roma.worst_over=batch, a maximum over a micro-batch)."""
    update: Literal["auto", "joint", "lean", "two_pass"] = "auto"
    """Form of the update, all with equal gradients. "joint": every rollout on every view. "lean":
    only the pairs that can matter. "two_pass": lean, but views are scored first, without a graph,
    and of a right rollout's views the worst alone is run again with one. "auto": lean or two_pass,
    by their predicted cost."""
    share_prompt: bool = True
    """Run a prompt once for all its rollouts; false: a row per rollout."""
    ppo_epochs: PositiveInt = 1
    """Passes over the rollouts of a step."""


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Sub-section `worker.rollout`: sampling of completions."""

    name: Literal["hf"] = "hf"
    """Engine; "hf" is transformers' generate."""
    n: PositiveInt = 5
    """G: rollouts per prompt."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature; the loss divides the logits by it too."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Sub-section `worker.reward`."""

    function: str = "builtin"
    """"builtin" compares boxed answers; `file.py:function` names one with EasyR1's signature."""
    format_weight: Share = 0.1
    """w of "builtin": overall = (1 - w)·accuracy + w·format."""
    strict_end: bool = True
    """Option of "builtin": only a response that ends right after its box is accurate."""


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """Section `worker`: policy, sampler and reward."""

    actor: ActorConfig
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Section `trainer`: how long, where, and what is written."""

    total_steps: PositiveInt = 200
    """Steps, each of `data.rollout_batch_size` prompts."""
    out: str = "runs/train"
    """Run folder, for config.yaml, metrics.jsonl and global_step_N/."""
    resume: str = "auto"
    """"auto": continue from the newest checkpoint in `out`, if any; "never": start anew; or the
    path of a checkpoint."""
    seed: NonNegativeInt = 0
    """Run seed, for sampling and views. (`data.seed` is that of the order of rows.)"""
    save_freq: NonNegativeInt = 0
    """Steps between checkpoints; 0: one, after the last step."""
    save_limit: PositiveInt | None = 2
    """Number of checkpoints to keep, the newest ones; null: all."""
    val_freq: NonNegativeInt = 0
    """Steps between validations; 0: none."""
    val_batches: PositiveInt | None = None
    """Batches of `data.rollout_batch_size` rows per validation; null: the whole set."""
    logger: tuple[Literal["console", "file", "tensorboard", "wandb"], ...] = ("console", "file")
    """Destinations of metrics; "file" is metrics.jsonl in `out`."""
    project_name: str = "roma"
    """W&B project."""
    experiment_name: str | None = None
    """W&B run; null: the name of the run folder."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """"auto": a GPU if torch sees one, else the CPU."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of matrix products; bfloat16 means autocast. Parameters and logits stay fp32, since
    bfloat16 would round an update of 1e-6 away."""
    threads: PositiveInt | None = None
    """CPU threads of torch; null: torch's default."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Configuration of `roma train`."""

    data: DataConfig
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    worker: WorkerConfig
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps per training step."""
        actor = self.worker.actor
        return actor.ppo_epochs * (self.data.rollout_batch_size // actor.mini_batch_size)


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
    for key, only in {"ref_coef": 0.0, "aux_old": "clean"}.items():
        if (value := getattr(roma, key)) != only:
            remedy = "roma.roma_loss takes the log-probs that it needs; the trainer has none yet"
            fail(f"algorithm.roma.{key}", str(only), str(value), remedy)
    if config.worker.actor.update == "two_pass" and roma.worst_over not in ("sequence", "batch"):
        expected = "sequence or batch with worker.actor.update=two_pass"
        remedy = "every view of a token needs a gradient; take update=lean"
        fail("algorithm.roma.worst_over", expected, roma.worst_over, remedy)
    if config.trainer.val_freq and config.data.val_files is None:
        got = str(config.trainer.val_freq)
        fail("trainer.val_freq", "0 without data.val_files", got, "name a validation set")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
