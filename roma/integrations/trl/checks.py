"""What is checked before the first step: TRL's version and signatures, the data, the model."""

import inspect
from collections.abc import Mapping
from typing import Any

from roma.integrations.guard import check_parameters, check_version, refuse_unsloth, require
from roma_kernels.errors import fail

LOW, HIGH = "1.15", "1.16"

FIELDS = (  # what _get_per_token_logps_and_entropies takes, but for the tokens themselves
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)

# What is overridden or relied on, with the parameters as they were when it was tested.
_SIGNATURES = {
    "_compute_loss": ["model", "inputs"],
    "_calculate_rewards": ["inputs", "prompts", "completions", "completion_ids_list"],
    "_generate": ["prompts"],
    "_generate_and_score_completions": ["inputs"],
    "_tokenize_prompts": ["prompts"],
    "_get_per_token_logps_and_entropies": [
        "model",
        "input_ids",
        "attention_mask",
        "logits_to_keep",
        "batch_size",
        "compute_entropy",
        "compute_aux_loss",
        *FIELDS,
    ],
}
_HEAD = ["model", "temperature", "cast_lm_head_to_fp32", "outputs"]


def check_installed() -> None:
    """Checks that TRL is there, of a version that was tested.

    Raises:
        ImportError: it is not installed. ValueError: another version.
    """
    require("trl", "trl>=1.15,<1.17")
    check_version("trl", LOW, HIGH)


def check_trl() -> None:
    """Checks everything that `RomaGRPOTrainer` overrides or calls.

    Raises:
        ValueError: the version is outside the range, a signature moved, or Unsloth is loaded.
    """
    check_installed()
    from trl import GRPOTrainer
    from trl.trainer import grpo_trainer, utils

    refuse_unsloth(GRPOTrainer)
    for name, expected in _SIGNATURES.items():
        method = getattr(GRPOTrainer, name, None)
        if method is None:
            fail(f"trl.GRPOTrainer.{name}", "a method", "none of that name", _other_version())
        check_parameters(method, expected, f"trl.GRPOTrainer.{name}")
    if not hasattr(grpo_trainer, "add_fused_lm_head"):
        got = "none of that name"
        fail("trl.trainer.grpo_trainer.add_fused_lm_head", "a function", got, _other_version())
    check_parameters(utils.add_fused_lm_head, _HEAD, "trl.trainer.utils.add_fused_lm_head")


def _other_version() -> str:
    return f"install trl {LOW} or {HIGH}"


def check_data(arguments: Mapping[str, Any]) -> None:
    """Checks that the rows can have views, where views are made of images.

    Args:
        arguments: of GRPOTrainer, by name.

    Raises:
        ValueError: the dataset has no column of images, and nothing else can bring some.
    """
    elsewhere = ("tools", "environment_factory", "rollout_func")
    columns = getattr(arguments.get("train_dataset"), "column_names", None)
    if not columns or any(arguments.get(name) for name in elsewhere):
        return
    if not {"image", "images"} & set(columns):
        remedy = "name it images, give a view_fn, or set num_views=0"
        got = "the columns " + ", ".join(columns)
        fail("train_dataset", "a column image or images", got, remedy)


def check_view_fn(arguments: Mapping[str, Any]) -> None:
    """Checks that a view_fn sees the prompts that the model sees.

    Args:
        arguments: of GRPOTrainer, by name.

    Raises:
        ValueError: an environment writes into the prompts, after the dataset.
    """
    if arguments.get("environment_factory"):
        got, remedy = "both", "leave the view_fn out: images then have degraded views"
        fail("view_fn, environment_factory", "one of the two", got, remedy)


def image_processor(trainer: Any) -> Any:
    """The image processor of a trainer.

    Raises:
        ValueError: it has none.
    """
    found = getattr(trainer.processing_class, "image_processor", None)
    if found is None:
        got = f"{type(trainer.processing_class).__name__}, which takes text alone"
        remedy = "train a vision-language model, give a view_fn, or set num_views=0"
        fail("processing_class", "a processor with an image_processor", got, remedy)
    return found


def accuracy_index(name: str | None, names: list[str]) -> int:
    """Which reward function tells whether an answer is right.

    Raises:
        ValueError: none has that name.
    """
    if name is None:
        return 0
    if name not in names:
        remedy = "correct accuracy_reward, or give a correct_fn"
        fail("accuracy_reward", "one of " + ", ".join(names), repr(name), remedy)
    return names.index(name)


def check_flags(flags: Any, count: int) -> None:
    """Checks what a correct_fn returned.

    Raises:
        ValueError: no list of `count` booleans (0 and 1 are taken for such).
    """
    remedy = "return True or False for each completion"
    if not isinstance(flags, (list, tuple)) and not hasattr(flags, "tolist"):
        fail("correct_fn", f"a list of {count} booleans", type(flags).__name__, remedy)
    if len(flags) != count:
        fail("correct_fn", f"{count} booleans", str(len(flags)), remedy)
    for flag in flags.tolist() if hasattr(flags, "tolist") else flags:
        if flag not in (True, False):
            fail("correct_fn", "booleans", repr(flag), remedy)


def bound(init: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call, by name; those that were not given are left out."""
    given = inspect.signature(init).bind_partial(None, *args, **kwargs).arguments
    return {name: value for name, value in given.items() if name != "self"}
