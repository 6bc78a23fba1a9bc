"""What tells a checkpoint of another model from one of this."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from roma.train.saved.manifest import FORMAT, MODEL
from roma_kernels.errors import fail

_VOLATILE = ("transformers_version", "dtype", "torch_dtype", "use_cache")


class Identifiable(Protocol):
    """The parts of a policy that say which model it is."""

    @property
    def model(self) -> nn.Module:
        """The Hugging Face module, with `.config` and the class method `.from_pretrained`."""

    @property
    def has_adapters(self) -> bool:
        """Whether adapters learn, and the weights beneath them do not."""

    @property
    def processor(self) -> Any:
        """Holds the tokenizer as `.tokenizer`."""


def write_identity(folder: Path, policy: Identifiable) -> None:
    """Writes model.json: class, configuration, vocabulary, shapes and frozen parameters."""
    (folder / MODEL).write_text(json.dumps(_identity(policy), indent=1))


def check_same_model(path: Path, policy: Identifiable) -> None:
    """Refuses the checkpoint of another model.

    Raises:
        ValueError: it is one; the message says what differs.
    """
    there, here = json.loads((path / MODEL).read_text()), _identity(policy)
    pairs = [("architecture", there["architecture"], here["architecture"])]
    # A newer transformers has further keys: only the common ones are compared.
    common = here["config"].keys() & there["config"].keys()
    pairs += [(key, there["config"][key], here["config"][key]) for key in sorted(common)]
    pairs.append(("vocabulary (hash)", there["vocabulary"], here["vocabulary"]))
    names = dict.fromkeys((*here["parameters"], *there["parameters"]))
    pairs += [
        (f"shape of {name}", there["parameters"].get(name), here["parameters"].get(name))
        for name in names
    ]
    if "frozen" in there:
        kinds = {True: "frozen", False: "trained"}
        frozen = [set(of["frozen"]) for of in (there, here)]
        both = (name for name in here["parameters"] if name in there["parameters"])
        pairs += [(name, *(kinds[name in those] for those in frozen)) for name in both]
    else:  # of an earlier version
        trained = len(here["parameters"]) - len(here["frozen"])
        pairs.append(("number of trained parameters", _trained(path), trained))
    differing = [pair for pair in pairs if pair[1] != pair[2]]
    if not differing:
        return
    what, was, now = differing[0]
    more = f", and {len(differing) - 1} more" if len(differing) > 1 else ""
    got = f"another: {what} is {was} in the checkpoint and {now} here{more}"
    remedy = "resume with the model it was made from, or choose another trainer.out"
    if ".lora_" in what:
        remedy = "give worker.actor.lora as it was, or choose another trainer.out"
    fail(str(path), "a checkpoint of this model", got, remedy)


def _identity(policy: Identifiable) -> dict[str, Any]:
    config: Any = policy.model.config
    vocabulary = json.dumps(policy.processor.tokenizer.get_vocab(), sort_keys=True)
    parameters = dict(policy.model.named_parameters())
    return {
        "format": FORMAT,
        "architecture": type(policy.model).__name__,
        "config": dict(_flat(json.loads(config.to_json_string(use_diff=False)))),
        "vocabulary": hashlib.sha256(vocabulary.encode()).hexdigest()[:12],
        # ZeRO-3 leaves empty tensors in their places, which know their shapes.
        "parameters": {
            name: list(getattr(value, "ds_shape", value.shape))
            for name, value in parameters.items()
        },
        "frozen": [name for name, value in parameters.items() if not value.requires_grad],
    }


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values, without those that do not describe the model."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        elif name not in _VOLATILE and not name.startswith("_"):
            yield prefix + name, value


def _trained(path: Path) -> int:
    """Number of parameters that a checkpoint's optimizer holds."""
    saved = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
    return sum(len(group["params"]) for group in saved["optimizer"]["param_groups"])
