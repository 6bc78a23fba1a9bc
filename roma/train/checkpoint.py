"""Checkpoints that survive a crash, a full disk and a damaged file, and refuse another model.

    out/checkpoint_tracker.json     {"last_global_step": N, "last_actor_path": "global_step_N/…"}
    out/global_step_N/actor/        the policy in Hugging Face form, a model of its own
    out/global_step_N/optimizer*    what else the engine needs to go on
    out/global_step_N/trainer.pt    state of the trainer: the step, its metrics
    out/global_step_N/model.json    identity of the model, to recognise a checkpoint of another one
    out/global_step_N/manifest.json size and SHA-256 of every other file

The layout is EasyR1's. A checkpoint is written under a hidden name by all ranks, synced to disk and
renamed; then the tracker is replaced, by a rename too. A save that is interrupted at any point
leaves the previous checkpoint valid. Before anything of a checkpoint is used, all of its files are
compared with the manifest; with `trainer.resume=auto` a damaged one is passed over.
"""

import errno
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from roma.models.export import check_base
from roma.train.ranks import rank, ranks
from roma.train.saved import manifest
from roma.train.saved.agree import disk_is_full, on_all, on_first
from roma.train.saved.folders import (
    TRACKER,
    best,
    latest,
    prune,
    starting_point,
    state_of,
    step_of,
    sweep,
)
from roma.train.saved.identity import Identifiable, check_same_model, write_identity
from roma_kernels.errors import fail

__all__ = [
    "TRACKER",
    "Resumable",
    "latest",
    "restore",
    "save",
    "starting_point",
    "step_of",
    "write_tensors",
]


class Resumable(Protocol):
    """What saving and restoring need of an engine; every rank calls each of them."""

    def save(self, folder: Path, /) -> None:
        """Writes what resuming needs beside the exported weights."""

    def load(self, folder: Path, /) -> None:
        """Takes back what `save` wrote."""

    def export(self, folder: Path, /) -> None:
        """Writes the policy in Hugging Face form, on rank 0, into a folder that is there."""

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Those of the policy's model, by name."""

    def put(self, weight: nn.Parameter, whole: Tensor, /) -> None:
        """Sets a weight."""

    def whole(self, weight: Tensor, /) -> Tensor:
        """A weight in whole."""


def save(
    out: str | Path,
    step: int,
    *,
    engine: Resumable,
    policy: Identifiable,
    state: Mapping[str, Any],
    keep: int | None = None,
    best_of: str | None = None,
    resumed_from: Path | None = None,
) -> Path:
    """Writes `out/global_step_<step>`, updates the tracker and drops the oldest beyond `keep`.

    Every rank calls, and if one fails all raise.

    Args:
        out: the run folder, the same one for all ranks; made if missing.
        step: number of training steps done. A checkpoint of the same step is replaced.
        engine: its `save` writes into the checkpoint, its `export` into `actor/`.
        policy: which model it is.
        state: tensors, numbers, strings, and lists, tuples and dicts of them, for `restore`; that
            of rank 0 is written. "metrics", if given, are those of the step, by name.
        keep: number of checkpoints up to this step to keep, at least 1; None: all.
        best_of: a name in `state["metrics"]`; the checkpoint with its highest value is kept too,
            and named in the tracker. Those saved without such a value do not count.
        resumed_from: the checkpoint from which this run goes on; it is not dropped.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: it could not be written, for example because the disk is full. Earlier checkpoints
            are untouched, and the part that was written is deleted.
        ValueError: a rank does not see the folder of rank 0.
    """
    out, name = Path(out), f"global_step_{step}"
    partial = out / f".{name}.partial"
    pointer: dict[str, Any] = {"last_global_step": step, "last_actor_path": f"{name}/actor"}
    try:
        on_first(lambda: _prepare(out, partial))
        on_all(lambda: _see(partial))
        # One after the other: both gather weights, so that none may begin where one has failed.
        on_all(lambda: engine.save(partial))
        on_all(lambda: engine.export(partial / "actor"))
        on_first(lambda: _write(partial, policy, state))
        sizes = on_first(lambda: manifest.files_of(partial))
        own = manifest.share(sizes, rank(), ranks())
        measured = on_all(lambda: manifest.measure(partial, own))
        files = {name: entry for part in measured for name, entry in part.items()}
        if best_of is not None:
            pointer |= on_first(lambda: _best_pointer(out, step, best_of, state))
        on_first(lambda: _publish(out, step, partial, files, pointer))
    except (OSError, RuntimeError, SafetensorError) as error:
        if not disk_is_full(error):
            raise
        earlier = latest(out)
        kept = f"{earlier.name} is untouched" if earlier else "there is no earlier one"
        remedy = "free some space, or lower trainer.save_limit, and resume"
        message = f"no space left for checkpoint {name} ({kept}); {remedy}"
        raise OSError(errno.ENOSPC, message, str(out)) from error
    finally:
        if rank() == 0:
            _clean(out, name)
    if keep is not None:
        spared = {resumed_from} if resumed_from else set()
        if "best_global_step" in pointer:
            spared.add(out / f"global_step_{pointer['best_global_step']}")
        on_first(lambda: prune(out, step, keep, spared))
    return out / name


def restore(path: str | Path, *, engine: Resumable, policy: Identifiable) -> dict[str, Any]:
    """Loads a checkpoint into an engine, in place, and returns its `state`; every rank calls.

    Args:
        path: from `starting_point`, which has verified its files.
        engine: what was saved is loaded by its `load`.
        policy: which model it is.

    Raises:
        ValueError: it is the checkpoint of another model, or its adapters are of another base; the
            message says what differs.
    """
    path, weights = Path(path), dict[str, Tensor]()

    def read() -> None:
        check_same_model(path, policy)
        if not policy.has_adapters:  # their base is the model's own, and the engine saves them
            model = type(policy.model).from_pretrained(path / "actor")  # type: ignore[attr-defined]
            weights.update((name, weight.detach()) for name, weight in model.named_parameters())

    on_all(read)  # before any of them gathers or spreads a weight
    for name in list(weights):
        engine.put(engine.parameters[name], weights.pop(name))
    engine.load(path)
    if policy.has_adapters:
        check_base(policy, path / "actor", whole=engine.whole)
    return state_of(path)


def write_tensors(path: Path, content: object) -> None:
    """`torch.save`, whose errors `save` can read.

    To an open file: torch then keeps the cause of a failed write as the error's context.
    """
    with path.open("wb") as file:
        torch.save(content, file)


def _prepare(out: Path, partial: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    sweep(out)
    (partial / "actor").mkdir(parents=True)


def _see(partial: Path) -> None:
    if not partial.is_dir():
        remedy = "all ranks write into one checkpoint: name a folder that they share"
        fail("trainer.out", "a folder that every rank sees", f"no {partial} on this rank", remedy)


def _write(partial: Path, policy: Identifiable, state: Mapping[str, Any]) -> None:
    write_identity(partial, policy)
    plain = {name: float(value) for name, value in state.get("metrics", {}).items()}
    write_tensors(partial / "trainer.pt", {**state, "metrics": plain})


def _best_pointer(out: Path, step: int, metric: str, state: Mapping[str, Any]) -> dict[str, Any]:
    found = best(out, step, metric, state)
    if found is None:
        return {}
    return {"best_global_step": found[0], "best_metric": metric, "best_value": found[1]}


def _publish(
    out: Path, step: int, partial: Path, files: manifest.Files, pointer: Mapping[str, Any]
) -> None:
    name, tracker = f"global_step_{step}", out / f".{TRACKER}.partial"
    manifest.write(partial, step, files)
    tracker.write_text(json.dumps(pointer, indent=2) + "\n")
    for path in (*(path for path in partial.rglob("*") if path.is_dir()), partial, tracker):
        manifest.sync(path)
    # Only renames from here on: they need no space.
    if (out / name).exists():
        (out / name).rename(out / f".{name}.replaced")
    partial.rename(out / name)
    manifest.sync(out)
    os.replace(tracker, out / TRACKER)
    manifest.sync(out)


def _clean(out: Path, name: str) -> None:
    """Leaves no part of a save, whether it came through or not."""
    shutil.rmtree(out / f".{name}.partial", ignore_errors=True)
    replaced = out / f".{name}.replaced"
    if replaced.exists() and not (out / name).exists():
        replaced.rename(out / name)
    shutil.rmtree(replaced, ignore_errors=True)
    (out / f".{TRACKER}.partial").unlink(missing_ok=True)
