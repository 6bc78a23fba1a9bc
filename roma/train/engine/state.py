"""What a resumed run needs beside the exported weights, whichever engine writes or reads it.

    optimizer-00000-of-00002.safetensors    exp_avg.NAME, exp_avg_sq.NAME of every trained weight,
    optimizer-00001-of-00002.safetensors    and NAME itself where the export has it merged

Whole fp32 tensors under the weights' names, spread over the ranks that write. So a run goes on
under another engine, or on another number of ranks.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from roma.models.qwen_vl import Policy
from roma.train import ranks
from roma_kernels.errors import fail

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Of AdamW."""
PATTERN = "optimizer-*-of-*.safetensors"
OLD = "optimizer.pt"
"""Of versions before the engines: the optimizer's own state of one process."""


class Stateful(Protocol):
    """What is read and set of an engine; every rank calls each of them."""

    policy: Policy
    trained: dict[str, nn.Parameter]
    version: int

    def whole(self, weight: Tensor, /) -> Tensor:
        """A weight in whole."""

    def put(self, weight: nn.Parameter, whole: Tensor, /) -> None:
        """Sets a weight."""

    def moment(self, weight: nn.Parameter, name: str, /) -> Tensor | None:
        """A moment of a weight, in whole."""

    def put_moments(self, weight: nn.Parameter, moments: dict[str, Tensor], steps: int, /) -> None:
        """Sets the moments of a weight."""


def save(engine: Stateful, folder: Path) -> None:
    """Writes this rank's file; a tensor is gathered by all and kept by one."""
    from safetensors.torch import save_file

    kept: dict[str, Tensor] = {}
    for number, (name, tensor) in enumerate(_state(engine)):
        if number % ranks.ranks() == ranks.rank():
            kept[name] = tensor.to("cpu", copy=True).contiguous()
    name = f"optimizer-{ranks.rank():05d}-of-{ranks.ranks():05d}.safetensors"
    save_file(kept, folder / name, metadata={"updates": str(engine.version)})


def _state(engine: Stateful) -> Iterator[tuple[str, Tensor]]:
    for name, weight in engine.trained.items():
        if engine.policy.has_adapters:
            yield name, engine.whole(weight)
        for moment in MOMENTS:
            found = engine.moment(weight, moment)
            if found is not None:
                yield f"{moment}.{name}", found


def load(engine: Stateful, folder: Path) -> None:
    """Sets weights of adapters, moments and the number of updates.

    Raises:
        ValueError: the files are not there, or are of other weights.
    """
    from safetensors import safe_open

    files = sorted(folder.glob(PATTERN))
    if not files:
        _load_old(engine, folder)
        return
    with ExitStack() as opened:
        where: dict[str, Any] = {}
        updates = 0
        for file in files:
            reader = opened.enter_context(safe_open(file, "pt"))
            updates = int(reader.metadata()["updates"])
            where.update(dict.fromkeys(reader.keys(), reader))
        for name, weight in engine.trained.items():
            names = [name] if engine.policy.has_adapters else []
            names += [f"{moment}.{name}" for moment in MOMENTS if updates]
            missing = next((key for key in names if key not in where), None)
            if missing:
                remedy = "resume with the model and the trained weights of that run"
                fail(str(folder), f"a tensor {missing}", "none", remedy)
            found = {key: where[key].get_tensor(key) for key in names}
            if name in found:
                engine.put(weight, found[name])
            if updates:
                moments = {moment: found[f"{moment}.{name}"] for moment in MOMENTS}
                engine.put_moments(weight, moments, updates)
    engine.version = updates


def _load_old(engine: Stateful, folder: Path) -> None:
    saved = torch.load(folder / OLD, map_location="cpu", weights_only=True)
    state = saved["optimizer"]["state"]
    for number, weight in enumerate(engine.trained.values()):
        if number in state:
            own = state[number]
            engine.put_moments(weight, {m: own[m] for m in MOMENTS}, int(own["step"]))
    engine.version = int(saved["scheduler"]["last_epoch"])
