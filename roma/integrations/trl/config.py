"""`RomaGRPOConfig`: TRL's options and ROMA's."""

from dataclasses import dataclass, field, fields
from typing import Literal

from trl import GRPOConfig

from roma.integrations.options import RomaOptions
from roma_kernels.errors import fail


@dataclass
class RomaGRPOConfig(GRPOConfig):
    r"""TRL's GRPOConfig and the options of [`RomaGRPOTrainer`].

    This class includes only the parameters that are specific to ROMA. For all others see
    [`~trl.GRPOConfig`].

    Parameters:
        > Parameters that control the degraded views

        num_views (`int`, *optional*, defaults to `2`):
            Number of degraded views of each prompt's images (K). `0` switches ROMA off: the trainer
            is then TRL's.
        view_pool (`str`, *optional*, defaults to `"seen"`):
            Corruptions that the views are drawn from: `"seen"` (the four of the paper's training),
            `"unseen"` or `"extra"`. The views of a prompt are of distinct corruptions. `None` is
            for a `view_fn` that makes more views than a pool has corruptions.
        view_max_level (`float`, *optional*, defaults to `2.0`):
            Strongest level drawn, of 5.
        view_strength (`str`, *optional*, defaults to `"uniform"`):
            `"uniform"`: levels uniform in (0, `view_max_level`]. `"strong"`: most of them high.
        view_level_table (`str`, *optional*):
            YAML file with another table of levels.
        view_seed (`int`, *optional*, defaults to `0`):
            Seed of the draws. They depend on it, on the step and on the clean images alone, never
            on a global generator.
        view_device (`str`, *optional*, defaults to `"cpu"`):
            Where DALI makes the views: `"cpu"` or `"cuda"`.

        > Parameters that control the loss

        lambda_inv (`float`, *optional*, defaults to `1.0`):
            Weight of the penalty on the divergence of the worst view of a right rollout.
        lambda_aux (`float`, *optional*, defaults to `0.5`):
            Weight of the clipped loss on one sampled view of each rollout, with the clean
            advantages.
        penalty_ratio (`str`, *optional*, defaults to `"view/clean"`):
            Direction of the k3 estimate: `"view/clean"` (its mean is KL(clean ‖ view)) or
            `"clean/view"`.
        worst_over (`str`, *optional*, defaults to `"sequence"`):
            What shares one worst view: each `"sequence"`, each `"token"`, the whole `"batch"` of
            one call. With `"mean"` there is no maximum.
        penalty_over (`str`, *optional*, defaults to `"all"`):
            Denominator of the penalty: `"all"` sequences or the `"correct"` ones.
        clip_low (`float`, *optional*):
            Lower clip range of the loss on the sampled view. When not set, `epsilon` for the loss
            types that clip, and `0.2` for the others.
        clip_high (`float`, *optional*):
            Upper clip range of the loss on the sampled view. When not set, `epsilon_high` (or
            `epsilon`) for the loss types that clip, and `0.3` for the others.
        dual_clip (`float`, *optional*):
            Upper bound of the ratio for negative advantages, in the loss on the sampled view. When
            not set, `delta` for the loss types that clip, and `3.0` for the others.

        > Parameters that control what counts as a right rollout

        accuracy_reward (`str`, *optional*):
            Name of the reward function that tells whether the answer is right. When not set, the
            first one. With several reward functions name the one of accuracy: a mix with a format
            reward is not what the method wants.
        accuracy_threshold (`float`, *optional*, defaults to `0.5`):
            A rollout is right if that reward is above this.

        > Parameters that control the computation

        view_update (`str`, *optional*, defaults to `"lean"`):
            `"lean"`: only the pairs (view, rollout) that carry a gradient or take part in a maximum
            are run. `"joint"`: all of them. Loss and gradients are the same.
        share_prompts (`bool`, *optional*, defaults to `False`):
            Whether a prompt is run once for all its rollouts in a micro-batch, on the clean images
            and on each view. The gradient is the same up to rounding. It saves most where a
            micro-batch holds whole groups (`per_device_train_batch_size` a multiple of
            `num_generations`); TRL then shuffles groups, not rollouts. For models with full
            attention in every layer; changes their attention implementation.
        roma_lm_head (`bool`, *optional*, defaults to `True`):
            Whether log-probabilities come from `roma.linear_logprob` (fp32 logits, on every back
            end) or from TRL's own fused head.
    """

    num_views: int = field(
        default=2, metadata={"help": "Degraded views of each prompt's images; 0 switches ROMA off."}
    )
    view_pool: str | None = field(
        default="seen", metadata={"help": "Corruptions to draw from: seen, unseen or extra."}
    )
    view_max_level: float = field(default=2.0, metadata={"help": "Strongest level drawn, of 5."})
    view_strength: str = field(
        default="uniform",
        metadata={"help": "Spread of the levels.", "choices": ["uniform", "strong"]},
    )
    view_level_table: str | None = field(
        default=None, metadata={"help": "YAML file with another table of levels."}
    )
    view_seed: int = field(default=0, metadata={"help": "Seed of the views' draws."})
    view_device: str = field(
        default="cpu",
        metadata={"help": "Where DALI makes the views.", "choices": ["cpu", "cuda"]},
    )
    lambda_inv: float = field(
        default=1.0, metadata={"help": "Weight of the penalty on the worst view."}
    )
    lambda_aux: float = field(
        default=0.5, metadata={"help": "Weight of the clipped loss on a sampled view."}
    )
    penalty_ratio: str = field(
        default="view/clean",
        metadata={"help": "Direction of the k3 estimate.", "choices": ["view/clean", "clean/view"]},
    )
    worst_over: str = field(
        default="sequence",
        metadata={
            "help": "What shares one worst view; mean: no maximum.",
            "choices": ["sequence", "token", "batch", "mean"],
        },
    )
    penalty_over: str = field(
        default="all",
        metadata={"help": "Denominator of the penalty.", "choices": ["all", "correct"]},
    )
    clip_low: float | None = field(
        default=None, metadata={"help": "Lower clip range on the sampled view; else epsilon."}
    )
    clip_high: float | None = field(
        default=None, metadata={"help": "Upper clip range on the sampled view; else epsilon_high."}
    )
    dual_clip: float | None = field(
        default=None, metadata={"help": "Bound of the ratio for negative advantages; else delta."}
    )
    accuracy_reward: str | None = field(
        default=None,
        metadata={"help": "Reward function of right answers; else the first."},
    )
    accuracy_threshold: float = field(
        default=0.5, metadata={"help": "A rollout is right if that reward is above this."}
    )
    view_update: Literal["lean", "joint"] = field(
        default="lean",
        metadata={"help": "Pairs of view and rollout that are run: those that matter, or all."},
    )
    roma_lm_head: bool = field(
        default=True, metadata={"help": "Log-probs by roma.linear_logprob, or by TRL's own head."}
    )

    share_prompts: bool = field(
        default=False, metadata={"help": "Run a prompt once for all its rollouts."}
    )

    def __post_init__(self) -> None:
        """Checks ROMA's options after TRL's."""
        super().__post_init__()
        if self.share_prompts and not self.roma_lm_head:
            remedy = "leave it at True"
            fail("roma_lm_head", "True, because share_prompts is", "False", remedy)
        if self.view_update not in ("lean", "joint"):
            got, remedy = repr(self.view_update), "choose one of them"
            fail("view_update", "'lean' or 'joint'", got, remedy)
        self.roma_options()

    def roma_options(self) -> RomaOptions:
        """ROMA's options alone; every value is checked."""
        return RomaOptions(**{f.name: getattr(self, f.name) for f in fields(RomaOptions)})
