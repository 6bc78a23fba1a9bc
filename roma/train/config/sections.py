"""The sections of the trainer's configuration: data, algorithm, worker, trainer.

A string below a field says what it means: `roma train --list-keys` prints them.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from roma.train.config.losses import ControlConfig, DvrpConfig, PapoConfig
from roma.train.config.methods import MssrConfig, NoisyRolloutConfig, SrpoConfig, VgpoConfig
from roma.train.config.schema import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
    Share,
)
from roma.train.config.views import AttackConfig
from roma_kernels.roma_loss.config import RomaConfig

Logger = Literal["console", "file", "tensorboard", "wandb", "trackio"]


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
    format_prompt: str | None = None
    """File of a Jinja template of the prompt, in which `content` is the question; null: the
    question alone."""
    plain_think_tokens: bool | None = None
    """Encode <think> and </think> as plain text. Qwen3-VL has them as tokens of their own, which
    its Instruct models have never learnt: with those, a format reward stays 0. null: unless the
    model's chat template writes them, as a Thinking model's does."""
    max_response_length: PositiveInt = 2048
    """Longest completion, tokens; a longer one is cut there."""
    rollout_batch_size: PositiveInt = 512
    """Prompts per step."""
    seed: NonNegativeInt = 0
    """Seed of the order of the training rows."""


@dataclass(frozen=True, kw_only=True)
class ViewsConfig:
    """Sub-section `algorithm.views`: the degraded views of a training image."""

    pool: Literal["seen", "unseen", "extra", "masking", "adversarial"] = "seen"
    """Pool of corruptions to draw from. To train on "unseen" makes its evaluation meaningless.
    "masking" has one, patch_mask, so that k is 1. "adversarial" (ours): K attacks on the policy,
    made after the rollouts; a level is an eps."""
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
    target_divergence: PositiveFloat | None = None
    """Continuous search (ours): divergence that each view is to have, nats, mean over a question's
    right rollouts, or all if none is right; its level in 0..max_level is found by bisection. null:
    levels are drawn."""
    search_steps: PositiveInt = 5
    """Tries of that search, each a forward pass over the K views."""
    attack: AttackConfig = field(default_factory=AttackConfig)
    """Options of attacked views."""
    gate_quantile: Share | None = None
    """Legibility gate (ours): a view of a right rollout whose divergence is above this quantile of
    those of the steps before, 0..1, is left out of the penalty: on it the answer may no longer be
    read. null: none, or the bound of roma.gate_bound."""


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig:
    """Section `algorithm`: advantages, views and the loss."""

    adv_estimator: Literal["grpo", "dr_grpo", "rloo", "mssr"] = "grpo"
    """Advantage of a rollout: over its group (MATH.md section 3); "mssr": over its question's
    tracked value, with one rollout a question."""
    mssr: MssrConfig = field(default_factory=MssrConfig)
    """Options of "mssr"."""
    reweight: Literal["none", "srpo", "vgpo"] = "none"
    """Weights of a rollout's tokens (MATH.md section 4), a factor of any advantage: "srpo": by what
    a token owes to the image or to the text that was read off it; "vgpo": by how much its hidden
    state is like the image's."""
    srpo: SrpoConfig = field(default_factory=SrpoConfig)
    """Options of "srpo"."""
    vgpo: VgpoConfig = field(default_factory=VgpoConfig)
    """Options of "vgpo"."""
    view_mode: Literal["none", "roma", "rollout", "noisy_rollout", "papo", "dvrp"] = "roma"
    """"roma": rollouts on clean images, K views of each image in the loss. "none": no views.
    "rollout": naive augmentation, rollouts and loss on one degraded image. "noisy_rollout": some
    rollouts on one degraded image, the loss on the clean one. "papo": one view with black patches
    in the loss. "dvrp": one degraded view and one with black patches. All but "roma" ignore
    lambda_inv and lambda_aux, and views.k."""
    noisy_rollout: NoisyRolloutConfig = field(default_factory=NoisyRolloutConfig)
    """Options of "noisy_rollout"."""
    papo: PapoConfig = field(default_factory=PapoConfig)
    """Options of "papo"."""
    dvrp: DvrpConfig = field(default_factory=DvrpConfig)
    """Options of "dvrp"."""
    views: ViewsConfig = field(default_factory=ViewsConfig)
    aux_view: Literal["rollout", "prompt"] = "rollout"
    """Who draws the view of the auxiliary loss: each rollout, or each prompt for all its rollouts,
    which is cheaper."""
    penalised: Literal["right", "every"] = "right"
    """Rollouts that the penalty is on. "right": those with a right answer, the paper's mask.
    "every": all that have a reward, the ablation without the mask; views.candidates, searches,
    attacks, gate_quantile, control and the metrics of the penalty then go by them, too. (Its
    denominator is roma.penalty_over: of "all" rollouts, or of those that it is on.)"""
    roma: RomaConfig = field(default_factory=RomaConfig)
    """Options of the loss. `temperature` defaults to the rollout's, `max_length` of "dr_grpo" to
    data.max_response_length."""
    control: ControlConfig = field(default_factory=ControlConfig)
    """What moves roma.lambda_inv from step to step, if anything."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Sub-section `worker.actor.lora`: adapters of low rank, trained in place of the weights."""

    rank: PositiveInt | None = None
    """r: rank of the adapters; null: none, the weights themselves are trained."""
    alpha: PositiveFloat = 32.0
    """The adapters' product is scaled by alpha / rank."""
    targets: tuple[str, ...] = (
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    )
    """Linear layers of the text model that get one, by name; the head cannot."""


@dataclass(frozen=True, kw_only=True)
class ActorConfig:
    """Sub-section `worker.actor`: the policy and its optimizer (AdamW)."""

    model_path: str
    """Folder of a Qwen3-VL in Hugging Face form, such as `roma.models.small` writes."""
    freeze_vision: bool = False
    """Keep the weights of the vision tower fixed."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters."""
    gradient_checkpointing: bool = False
    """Keep each layer's input alone and run the layer again in the backward pass: a third more
    time, a fraction of the activations."""
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
class VllmConfig:
    """Sub-section `worker.rollout.vllm`: the engine, which shares the trainer's GPU."""

    memory: Annotated[float, Range(above=0, high=1)] = 0.4
    """Share of the GPU's memory for weights and cache while sampling."""
    sleep: bool = True
    """Give that memory back while the policy learns; false on a CPU, always."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the engine's weights; "auto": the model's own."""
    max_sequences: PositiveInt | None = None
    """Completions that are sampled at once; null: vLLM's default."""


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Sub-section `worker.rollout`: sampling of completions."""

    name: Literal["hf", "vllm"] = "hf"
    """Engine: transformers' generate on the policy itself, or vLLM beside it."""
    vllm: VllmConfig = field(default_factory=VllmConfig)
    """Options of vLLM."""
    weight: Literal["none", "truncate", "mask"] = "none"
    """Correction where the sampler's log-probs differ from the policy's: each token's losses are
    multiplied by w = exp(policy - sampler), "truncate": at most weight_cap; "mask": 0 outside
    1/weight_cap to weight_cap."""
    weight_cap: Annotated[float, Range(above=1)] = 2.0
    """Bound of the correction."""
    weight_level: Literal["token", "sequence"] = "token"
    """Whose ratio w is: the token's own, or the product over its rollout."""
    off_policy: PositiveFloat | None = None
    """Nats a token: a rollout with A < 0 whose mean of sampler - policy is above it is left out of
    both losses, as one that the policy would not sample. null: none is."""
    n: PositiveInt = 5
    """G: rollouts per prompt."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature; the loss divides the logits by it too."""


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """Sub-section `worker.reward.judge`: a language model behind an OpenAI-compatible address."""

    url: str | None = None
    """Address, such as http://localhost:8000/v1."""
    model: str | None = None
    """Name of the model there; null: the only one that it serves."""
    key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; it may be unset."""
    timeout_s: PositiveFloat = 60.0
    """Longest wait for an answer, s."""
    retries: NonNegativeInt = 2
    """Further tries after a failed call."""
    prompt: str | None = None
    """File of a Jinja template of the question to the judge, with {{ problem }}, {{ ground_truth }}
    and {{ response }}; null: the package's own."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Sub-section `worker.reward`."""

    function: str = "builtin"
    """"builtin" compares boxed answers as text and numbers, "exact" as text alone, "math" as
    mathematics (math-verify), "judge" asks a language model; `file.py:function` names one with
    EasyR1's signature."""
    timeout_s: PositiveFloat = 10.0
    """Longest time that a rollout's reward may take, s; the builtin has none."""
    on_error: Literal["mark", "stop"] = "mark"
    """What a reward does that raises, hangs or returns nonsense: "mark" leaves its rollout out of
    the learning, counts and logs it; "stop" ends the run."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    """Options of "judge"."""
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
    best_metric: str | None = None
    """Metric of which the checkpoint with the highest value is kept too, such as val/accuracy;
    null: none."""
    val_freq: NonNegativeInt = 0
    """Steps between validations; 0: none."""
    val_batches: PositiveInt | None = None
    """Batches of `data.rollout_batch_size` rows per validation; null: the whole set."""
    logger: tuple[Literal["console", "file", "tensorboard", "wandb", "trackio"], ...] = (
        "console",
        "file",
    )
    """Destinations of metrics; "file" is metrics.jsonl in `out`."""
    project_name: str = "roma"
    """Project in W&B and Trackio."""
    experiment_name: str | None = None
    """Run in W&B and Trackio; null: the name of the run folder."""
    engine: Literal["auto", "single", "ddp", "zero1", "zero2", "zero3", "fsdp2"] = "auto"
    """What holds weights, gradients and optimizer. "single": one process. "ddp": each rank has all
    of them. "zero1", "zero2", "zero3": DeepSpeed's stages. "fsdp2": PyTorch's own sharding. "auto":
    single for one process, fsdp2 for several."""
    deepspeed_config: str | None = None
    """JSON of DeepSpeed's own options, such as offloading; batch sizes, precision and optimizer are
    this configuration's. null: none."""
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
