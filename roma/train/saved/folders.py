"""The checkpoints of a run folder: which is the newest, the best, the one to resume from."""

import json
import math
import pickle
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from roma.train.ranks import rank
from roma.train.saved.agree import on_first
from roma.train.saved.manifest import MANIFEST, PARTS, damage, is_unverified, sync
from roma_kernels.errors import fail

TRACKER = "checkpoint_tracker.json"


def latest(out: str | Path) -> Path | None:
    """The newest checkpoint of a run folder, not verified; None if there is none.

    It is the one that the tracker names, or else the one of the highest step.
    """
    found, _ = _candidates(Path(out))
    return found[0] if found else None


def starting_point(out: str | Path, resume: str) -> Path | None:
    """The checkpoint to resume from, all of its files verified; None: start anew.

    Every rank calls, and all get the same one. With "auto" a damaged checkpoint is said on stderr,
    one line each, and the one before it is tried.

    Args:
        out: `trainer.out`.
        resume: `trainer.resume`: "auto", "never" or the path of a checkpoint.

    Raises:
        ValueError: the path is no checkpoint, or a damaged one; or with "auto" all are damaged.
    """
    if resume == "never":
        return None
    if resume != "auto":
        path = Path(resume)
        on_first(lambda: _check_parts(path))
        if (wrong := damage(path)) is not None:
            remedy = "resume from another one with trainer.resume=PATH"
            fail(str(path), "a whole checkpoint", f"a damaged one ({wrong})", remedy)
        _say_unverified(path)
        return path
    out = Path(out)
    found, note = on_first(lambda: _look(out))
    if note:
        _say(note)
    damaged: dict[Path, str] = {}
    for path in found:
        wrong = damage(path)
        if wrong is None:
            for other, why in damaged.items():
                _say(f"{other} is damaged ({why}): {path.name} is taken")
            _say_unverified(path)
            return path
        damaged[path] = wrong
    if damaged:
        newest, why = next(iter(damaged.items()))
        got = f"{len(damaged)} damaged, the newest one {newest.name} ({why})"
        remedy = "put the file back, or start anew with trainer.resume=never"
        fail(str(out), "a whole checkpoint", got, remedy)
    return None


def step_of(path: Path) -> int:
    """The step after which a checkpoint was saved."""
    step: int = state_of(path)["step"]
    return step


def state_of(path: Path) -> dict[str, Any]:
    """The `state` that was saved."""
    state: dict[str, Any] = torch.load(path / "trainer.pt", map_location="cpu", weights_only=True)
    return state


def steps_in(out: Path) -> list[int]:
    """Steps with a checkpoint in `out`, ascending."""
    names = (re.fullmatch(r"global_step_(\d+)", path.name) for path in out.iterdir())
    return sorted(int(match[1]) for match in names if match)


def best(out: Path, step: int, metric: str, state: Mapping[str, Any]) -> tuple[int, float] | None:
    """Step and value of the best checkpoint up to `step`, whose own state is given.

    The highest value is the best, the later one of equals; None if none has the metric.
    """
    states = {old: _state_if_whole(out / f"global_step_{old}") for old in steps_in(out)}
    states = {old: of for old, of in states.items() if old < step} | {step: state}
    values = ((of.get("metrics", {}).get(metric, math.nan), at) for at, of in states.items())
    known = [(float(value), at) for value, at in values if not math.isnan(value)]
    if not known:
        return None
    value, at = max(known)
    return at, value


def prune(out: Path, step: int, keep: int, spared: set[Path]) -> None:
    """Deletes all but the last `keep` checkpoints up to `step` and the spared ones.

    Later steps belong to the run from which this one branched off: they are kept.
    """
    spared = {path.resolve() for path in spared}
    for old in [other for other in steps_in(out) if other <= step][:-keep]:
        path = out / f"global_step_{old}"
        if path.resolve() in spared:
            continue
        hidden = out / f".{path.name}.deleted"  # a run that is killed leaves no half of one
        path.rename(hidden)
        _remove(hidden)


def sweep(out: Path) -> None:
    """Removes what a run that was killed left; the folder that it was replacing goes back."""
    for hidden in out.glob(".global_step_*"):
        path = out / hidden.stem.removeprefix(".")
        if hidden.suffix == ".replaced" and not path.exists():
            hidden.rename(path)
        elif hidden.suffix in (".partial", ".replaced", ".deleted"):
            _remove(hidden)
    sync(out)


def _remove(hidden: Path) -> None:
    """A folder of which a file is in use stays on some network file systems: no reason to stop."""
    try:
        shutil.rmtree(hidden)
    except OSError as error:
        _say(f"{hidden} stays: {error}")


def _look(out: Path) -> tuple[list[Path], str | None]:
    if out.is_dir() and any(out.glob(".global_step_*.replaced")):
        sweep(out)
    return _candidates(out)


def _candidates(out: Path) -> tuple[list[Path], str | None]:
    """Checkpoints to try, in this order, and what is to be said of the tracker."""
    if not out.is_dir():
        return [], None
    tracker, steps = out / TRACKER, steps_in(out)[::-1]
    note = None
    if not tracker.exists():
        note = f"{tracker} is missing: the newest checkpoint is looked for" if steps else None
    else:
        try:
            last = int(json.loads(tracker.read_text())["last_global_step"])
        except (OSError, ValueError, KeyError, TypeError):
            note = f"{tracker} is damaged: the newest checkpoint is looked for"
        else:
            if last not in steps:
                note = f"{tracker} names global_step_{last}, which is missing: one before is taken"
            before = [step for step in steps if step <= last]
            if not before:
                others = ", ".join(f"global_step_{step}" for step in steps) or "none"
                remedy = f"resume from one that is there ({others}) with trainer.resume=PATH"
                fail(str(tracker), f"global_step_{last} beside it", "no such folder", remedy)
            steps = before
    if note and not steps:
        fail(str(tracker), "JSON with last_global_step", "something else", "delete it")
    return [out / f"global_step_{step}" for step in steps], note


def _check_parts(path: Path) -> None:
    missing = [part for part in PARTS if not (path / part).exists()]
    if missing and not (path / MANIFEST).exists():
        remedy = "give the path of a global_step_N folder"
        fail("checkpoint", f"a folder with {missing[0]}", str(path), remedy)


def _say_unverified(path: Path) -> None:
    if rank() == 0 and is_unverified(path):
        _say(f"{path} is of an earlier version and has no {MANIFEST}: its files are not verified")


def _say(line: str) -> None:
    if rank() == 0:
        print(line, file=sys.stderr)


def _state_if_whole(path: Path) -> Mapping[str, Any]:
    """Of a checkpoint that may be damaged, which has no value then."""
    try:
        return state_of(path)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
        return {}
