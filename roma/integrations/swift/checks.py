"""What is refused before training: an untested swift, and settings that would go wrong."""

import inspect
import sys
from dataclasses import fields
from typing import Any

from roma.integrations.guard import check_parameters, check_version, refuse_unsloth, require
from roma_kernels.errors import fail

# What is overridden or called, with the parameters it was written for.
_METHODS = {
    "_compute_loss_and_metrics": ["model", "model_inputs", "grpo_batch"],
    "_get_per_token_logps_and_entropies": [
        "model",
        "model_inputs",
        "grpo_batch",
        "compute_entropy",
        "origin_data",
    ],
    "_get_per_token_logps_and_entropies_single": [
        "model",
        "model_inputs",
        "grpo_batch",
        "compute_entropy",
    ],
    "_postprocess_batch": ["samples", "batch_encoded_inputs"],
    "_get_rollout_is_correction": [
        "old_per_token_logps",
        "rollout_per_token_logps",
        "completion_mask",
    ],
    "split_by_mini_batches": ["samples"],
    "old_policy": [],
    "log": ["logs", "start_time"],
}
_BATCH = (
    "completion_mask",
    "truncated_mask",
    "old_per_token_logps",
    "advantages",
    "num_items_in_batch",
)
_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo")


def check_swift() -> None:
    """Refuses a swift that was not tested, and a process that trains with Megatron or Unsloth.

    Raises:
        ImportError: swift is not installed.
        ValueError: what is wrong, in one line.
    """
    require("swift", "ms-swift==4.6.0")
    check_version("ms-swift", "4.6", "4.6")
    for name in ("swift.megatron", "swift.ray.megatron"):
        if name in sys.modules:
            remedy = "start `swift rlhf`; for Megatron drop the plug-in"
            fail("trainer", "swift's GRPOTrainer, the one with views", name, remedy)
    stock = require("swift.rlhf_trainers.grpo_trainer", "ms-swift==4.6.0")
    refuse_unsloth(stock.GRPOTrainer)
    for name, expected in _METHODS.items():
        where = f"swift's GRPOTrainer.{name}"
        method = inspect.getattr_static(stock.GRPOTrainer, name, None)
        if method is None:
            remedy = "use a version of ms-swift that was tested"
            fail(where, "a method", "none", remedy)
        check_parameters(method, expected, where)
    check_parameters(
        stock.get_even_process_data, ["trainer", "global_data"], "swift's get_even_process_data"
    )
    known = {field.name for field in fields(stock.GRPOBatch)}
    missing = [name for name in _BATCH if name not in known]
    if missing:
        remedy = "use a version of ms-swift that was tested"
        fail("swift's GRPOBatch", f"the fields {', '.join(_BATCH)}", f"no {missing[0]}", remedy)


def check_settings(trainer: Any) -> None:
    """Refuses settings under which views would be wrong or were not tested.

    Args:
        trainer: swift's GRPOTrainer, built.

    Raises:
        ValueError: the first setting that does not fit.
    """
    args, template = trainer.args, trainer.template
    if not trainer.is_multimodal:
        remedy = "train a vision-language model, or set num_views=0"
        fail("model", "one that takes images", type(trainer.model).__name__, remedy)
    refused = {
        "padding_free": template.padding_free,
        "packing": getattr(args, "packing", False) or getattr(template, "packing", False),
        "sequence_parallel_size": template.sequence_parallel_size > 1
        and template.sequence_parallel_size,
        "use_liger_kernel": trainer.use_liger_loss,
        "multi_turn_scheduler": getattr(args, "multi_turn_scheduler", None),
        "use_gym_env": trainer.use_gym_env,
        "chord_sft_dataset": trainer.chord_sft_iterator is not None,
        "teacher_model": trainer._has_teacher_explicit(),
    }
    for name, value in refused.items():
        if value:
            got = f"{value!r}"
            remedy = f"leave --{name} out, or set num_views=0 in ROMA_OPTIONS"
            fail(name, "its default, the only one that views were tested with", got, remedy)
    if trainer.loss_type not in _LOSSES:
        expected, got = "one of " + ", ".join(_LOSSES), repr(trainer.loss_type)
        fail("loss_type", expected, got, "choose one of them, or set num_views=0 in ROMA_OPTIONS")


def accuracy_index(names: list[str], given: list[Any], wanted: str | int) -> int:
    """The column of the rewards that says whether an answer is right.

    Args:
        names: the class name of each reward, as swift logs it.
        given: what --reward_funcs had; as many, or fewer where reward models follow.
        wanted: a place, or one of either kind of name.

    Raises:
        ValueError: there is no such reward, or more than one.

    Example:
        >>> accuracy_index(["MathAccuracy", "Format"], ["accuracy", "format"], "format")
        1
    """
    text = str(wanted)
    if text.lstrip("-").isdigit():
        found = [int(text)] if 0 <= int(text) < len(names) else []
    else:
        keys = [{name} for name in names]
        for key, own in zip(keys, given, strict=False):
            key.add(str(own))
        found = [place for place, key in enumerate(keys) if text in key]
    if len(found) != 1:
        expected = f"one of the rewards {', '.join(names)}, or its place, from 0"
        fail("accuracy_reward", expected, repr(wanted), "set ROMA_ACCURACY_REWARD to one of them")
    return found[0]
