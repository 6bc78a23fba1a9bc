"""Checkpoints that survive a crash and a full disk, and refuse another model.

    out/checkpoint_tracker.json     {"last_global_step": N, "last_actor_path": "global_step_N/…"}
    out/global_step_N/actor/        the policy in Hugging Face form, a model of its own
    out/global_step_N/optimizer.pt  optimizer and learning-rate schedule
    out/global_step_N/trainer.pt    state of the trainer: the step
    out/global_step_N/model.json    identity of the model, to recognise a checkpoint of another one

The layout is EasyR1's. A checkpoint is written under a hidden name, synced to disk and renamed;
then the tracker is replaced, by a rename too. A save that is interrupted at any point leaves the
previous checkpoint valid.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from roma_kernels.errors import fail

TRACKER = "checkpoint_tracker.json"
_VOLATILE = ("transformers_version", "dtype", "torch_dtype", "use_cache")


class Checkpointable(Protocol):
    """The parts of a policy that saving and restoring need."""

    @property
    def model(self) -> nn.Module:
        """The Hugging Face module, with `.config` and the class method `.from_pretrained`."""

    @property
    def processor(self) -> Any:
        """Holds the tokenizer as `.tokenizer`."""

    def save_pretrained(self, folder: str | Path, /) -> None:
        """Writes model, tokenizer and processor in Hugging Face form."""


def save(
    out: str | Path,
    step: int,
    *,
    policy: Checkpointable,
    optimizer: Optimizer,
    scheduler: LRScheduler | None = None,
    state: Mapping[str, Any],
    keep: int | None = None,
) -> Path:
    """Writes `out/global_step_<step>`, updates the tracker and drops the oldest beyond `keep`.

    Args:
        out: the run folder; made if missing.
        step: number of training steps done. A checkpoint of the same step is replaced.
        policy: written by its `save_pretrained`, in Hugging Face form.
        optimizer: all of its state is saved.
        scheduler: likewise; may be None.
        state: tensors, numbers, strings, and lists, tuples and dicts of them, for `restore`.
        keep: number of checkpoints up to this step to keep, at least 1; None: all.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: it could not be written, for example because the disk is full. Earlier checkpoints
            are untouched, and the part that was written is deleted.
    """
    out, name = Path(out), f"global_step_{step}"
    out.mkdir(parents=True, exist_ok=True)
    for leftover in out.glob(".global_step_*.partial"):  # of a run that was killed
        shutil.rmtree(leftover)
    partial, replaced = out / f".{name}.partial", out / f".{name}.replaced"
    tracker = out / f".{TRACKER}.partial"
    try:
        _write(partial, policy, optimizer, scheduler, state)
        pointer = {"last_global_step": step, "last_actor_path": f"{name}/actor"}
        tracker.write_text(json.dumps(pointer, indent=2) + "\n")
        for path in (*partial.rglob("*"), partial, tracker):
            _sync(path)
        # Only renames from here on: they need no space.
        if (out / name).exists():
            (out / name).rename(replaced)
        partial.rename(out / name)
        tracker.replace(out / TRACKER)
        _sync(out)
    except (OSError, RuntimeError, SafetensorError) as error:
        if not _disk_is_full(error):
            raise
        earlier = latest(out)
        kept = f"{earlier.name} is untouched" if earlier else "there is no earlier one"
        remedy = "free some space, or lower trainer.save_limit, and resume"
        message = f"no space left for checkpoint {name} ({kept}); {remedy}"
        raise OSError(errno.ENOSPC, message, str(out)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if replaced.exists() and not (out / name).exists():
            replaced.rename(out / name)
        shutil.rmtree(replaced, ignore_errors=True)
        tracker.unlink(missing_ok=True)
    if keep is not None:
        # Later steps belong to the run from which this one branched off: they are kept.
        for old in [other for other in _steps(out) if other <= step][:-keep]:
            shutil.rmtree(out / f"global_step_{old}")
    return out / name


def latest(out: str | Path) -> Path | None:
    """The checkpoint that the tracker in `out` names; None if nothing was saved.

    Raises:
        ValueError: the tracker cannot be read, or names a checkpoint that does not exist.
    """
    tracker = Path(out) / TRACKER
    if not tracker.is_file():
        return None
    try:
        step = json.loads(tracker.read_text())["last_global_step"]
    except (ValueError, KeyError, TypeError):
        remedy = "delete it, or give trainer.resume=PATH"
        fail(str(tracker), "JSON with last_global_step", "something else", remedy)
    path = Path(out) / f"global_step_{step}"
    if not path.is_dir():
        others = ", ".join(f"global_step_{other}" for other in _steps(Path(out))) or "none"
        remedy = f"resume from one that is there ({others}) with trainer.resume=PATH"
        fail(str(tracker), f"global_step_{step} beside it", "no such folder", remedy)
    return path


def starting_point(out: str | Path, resume: str) -> Path | None:
    """The checkpoint to resume from, by `trainer.out` and `trainer.resume`; None: start anew.

    Raises:
        ValueError: as `latest`.
    """
    if resume == "auto":
        return latest(out)
    return None if resume == "never" else Path(resume)


def step_of(path: Path) -> int:
    """The step after which a checkpoint was saved.

    Raises:
        ValueError: `path` is no checkpoint.
    """
    _check_parts(path)
    state = torch.load(path / "trainer.pt", map_location="cpu", weights_only=True)
    step: int = state["step"]
    return step


def restore(
    path: str | Path,
    *,
    policy: Checkpointable,
    optimizer: Optimizer,
    scheduler: LRScheduler | None = None,
) -> dict[str, Any]:
    """Loads weights, optimizer and schedule from a checkpoint, in place, and returns its `state`.

    Raises:
        ValueError: `path` is no checkpoint, or one of another model; the message says what differs.
    """
    path = Path(path)
    _check_parts(path)
    saved = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
    _check_same_model(path, policy, optimizer, saved["optimizer"])
    weights = type(policy.model).from_pretrained(path / "actor")  # type: ignore[attr-defined]  # HF
    policy.model.load_state_dict(weights.state_dict())
    optimizer.load_state_dict(saved["optimizer"])
    if scheduler is not None:
        scheduler.load_state_dict(saved["scheduler"])
    state: dict[str, Any] = torch.load(path / "trainer.pt", map_location="cpu", weights_only=True)
    return state


def _check_parts(path: Path) -> None:
    for part in ("actor", "optimizer.pt", "trainer.pt", "model.json"):
        if not (path / part).exists():
            remedy = "give the path of a global_step_N folder"
            fail("checkpoint", f"a folder with {part}", str(path), remedy)


def _write(
    folder: Path,
    policy: Checkpointable,
    optimizer: Optimizer,
    scheduler: LRScheduler | None,
    state: Mapping[str, Any],
) -> None:
    (folder / "actor").mkdir(parents=True)
    policy.save_pretrained(folder / "actor")
    (folder / "model.json").write_text(json.dumps(_identity(policy), indent=1))
    schedule = None if scheduler is None else scheduler.state_dict()
    files = {
        "optimizer.pt": {"optimizer": optimizer.state_dict(), "scheduler": schedule},
        "trainer.pt": dict(state),
    }
    for name, content in files.items():
        # An open file: torch then keeps the cause of a failed write as the error's context.
        with (folder / name).open("wb") as file:
            torch.save(content, file)


def _sync(path: Path) -> None:
    """Waits until a file or folder is on the disk; a full disk may be noticed only here."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _disk_is_full(error: BaseException | None) -> bool:
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        if os.strerror(errno.ENOSPC) in str(error):  # safetensors sets no errno
            return True
        error = error.__cause__ or error.__context__
    return False


def _steps(out: Path) -> list[int]:
    """Steps with a checkpoint in `out`, ascending."""
    names = (re.fullmatch(r"global_step_(\d+)", path.name) for path in out.iterdir())
    return sorted(int(match[1]) for match in names if match)


def _identity(policy: Checkpointable) -> dict[str, Any]:
    """What distinguishes models: class, configuration, vocabulary, shapes of parameters."""
    config: Any = policy.model.config
    vocabulary = json.dumps(policy.processor.tokenizer.get_vocab(), sort_keys=True)
    return {
        "architecture": type(policy.model).__name__,
        "config": dict(_flat(json.loads(config.to_json_string(use_diff=False)))),
        "vocabulary": hashlib.sha256(vocabulary.encode()).hexdigest()[:12],
        "parameters": {name: list(value.shape) for name, value in policy.model.named_parameters()},
    }


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values, without those that do not describe the model."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        elif name not in _VOLATILE and not name.startswith("_"):
            yield prefix + name, value


def _check_same_model(
    path: Path, policy: Checkpointable, optimizer: Optimizer, saved_optimizer: Mapping[str, Any]
) -> None:
    there, here = json.loads((path / "model.json").read_text()), _identity(policy)
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
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    saved_sizes = [len(group["params"]) for group in saved_optimizer["param_groups"]]
    pairs.append(("number of trained parameters", saved_sizes, sizes))
    differing = [pair for pair in pairs if pair[1] != pair[2]]
    if not differing:
        return
    what, was, now = differing[0]
    more = f", and {len(differing) - 1} more" if len(differing) > 1 else ""
    got = f"another: {what} is {was} in the checkpoint and {now} here{more}"
    remedy = "resume with the model it was made from, or choose another trainer.out"
    fail(str(path), "a checkpoint of this model", got, remedy)
