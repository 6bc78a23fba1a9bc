"""DeepSpeed's ZeRO, stages 1 to 3, with options from a JSON of its own."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from roma.train import ranks
from roma.train.engine.base import Engine
from roma.train.engine.state import MOMENTS
from roma_kernels.errors import fail

T = TypeVar("T")
OURS = (
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
    *("gradient_clipping", "optimizer", "scheduler", "fp16", "bf16", "torch_autocast"),
)
"""Keys of DeepSpeed's that the trainer's configuration decides."""


class Zero(Engine):
    """Moments sharded over the ranks, from stage 2 on gradients too, at stage 3 weights too.

    Args:
        given: the arguments of `Engine`.
        stage: 1, 2 or 3.
        options: a JSON of DeepSpeed's, or None.

    Raises:
        ValueError: DeepSpeed is missing or too old, or the JSON has what the configuration decides.
    """

    def __init__(self, *given: Any, stage: int, options: str | None = None) -> None:
        """Initialises DeepSpeed."""
        self.stage, self.options = stage, read_options(options, stage)
        super().__init__(*given)

    @property
    def sharded(self) -> bool:  # type: ignore[override]  # by the stage
        """Whether a rank holds a part of the weights alone."""
        return self.stage == 3

    def wrap(self) -> None:
        """Stage 3 shards now, a weight at a time; DeepSpeed wraps once it has the optimizer."""
        deepspeed = _deepspeed()
        model = self.policy.model
        self._config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": self.actor.max_grad_norm,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "torch_autocast": {"enabled": self.dtype == "bfloat16", "dtype": "bfloat16"},
            **self.options,
            "zero_optimization": {
                "stage": self.stage,
                **self.options.get("zero_optimization", {}),
            },
        }
        if self.stage < 3:
            model.to(self.device)
            return
        deepspeed.zero.Init(
            module=model, config_dict_or_path=self._config, mem_efficient_linear=False
        )
        for buffer in model.buffers():
            buffer.data = buffer.to(self.device)

    def make_optimizer(self) -> Any:
        """Hands module and optimizer to DeepSpeed."""
        self.ds, optimizer, *_ = _deepspeed().initialize(
            model=self.door,
            optimizer=super().make_optimizer(),
            config=self._config,
            dist_init_required=False,
        )
        return optimizer  # DeepSpeed's, around ours

    def forward(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Inside of the engine's forward a weight that is read is gathered first."""
        found: T = self.ds(function, *args, **kwargs)
        return found

    def backward(self, loss: Tensor) -> None:
        """DeepSpeed's own."""
        self.ds.backward(loss)

    def reduced_once(self) -> AbstractContextManager[Any]:
        """One reduction, where gradients are whole on each rank anyway."""
        return self.ds.coalesce_grad_reduction() if self.stage == 1 else nullcontext()

    def last(self, is_last: bool) -> None:
        """From stage 2 on each backward reduces, into shards."""
        if self.stage > 1:
            self.ds.set_gradient_accumulation_boundary(is_last)

    def clip_and_step(self) -> float:
        """DeepSpeed clips, steps and forgets the gradients."""
        self.ds.step()
        return float(self.ds.get_global_grad_norm())

    def whole(self, weight: Tensor) -> Tensor:
        """Gathered from the ranks at stage 3."""
        if self.stage < 3:
            return weight.detach()
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight]):
            return weight.detach().clone()

    @torch.no_grad()
    def put(self, weight: nn.Parameter, whole: Tensor) -> None:
        """The weight, and the fp32 copy that DeepSpeed steps."""
        import deepspeed
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        whole = whole.to(self.device)
        if self.stage == 3:
            if weight.requires_grad:
                safe_set_local_fp32_param(weight, self._own(weight, whole))
            with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
                weight.copy_(whole)
        else:
            if weight.requires_grad:
                safe_set_full_fp32_param(weight, whole)
            weight.copy_(whole)

    def moment(self, weight: nn.Parameter, name: str) -> Tensor | None:
        """Gathered from the ranks."""
        from deepspeed.utils import safe_get_full_optimizer_state

        if not self.version:
            return None
        found: Tensor = safe_get_full_optimizer_state(weight, name)
        return found

    def put_moments(self, weight: nn.Parameter, moments: dict[str, Tensor], steps: int) -> None:
        """This rank's shards."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        self._begin(steps)
        for name in MOMENTS:
            whole = moments[name].to(self.device)
            if self.stage == 3:
                safe_set_local_optimizer_state(weight, self._own(weight, whole), name)
            else:
                safe_set_full_optimizer_state(weight, whole, name)

    def _begin(self, steps: int) -> None:
        """The optimizer's state, which is empty before its first step."""
        inner: Any = self.optimizer
        flat = (
            inner.fp32_partitioned_groups_flat
            if self.stage == 3
            else inner.single_partition_of_fp32_groups
        )
        for part in flat:
            state = inner.optimizer.state[part]
            for name in MOMENTS:
                if name not in state:
                    state[name] = torch.zeros_like(part)
            state["step"] = torch.tensor(float(steps))
        if self.stage < 3:
            inner._lazy_init_hp_params_optimizer_state()

    def _own(self, weight: Any, whole: Tensor) -> Tensor:
        """This rank's part of a tensor, padded as DeepSpeed pads it."""
        size = weight.ds_tensor.numel()
        flat = whole.float().flatten()
        padded = nn.functional.pad(flat, (0, size * ranks.ranks() - flat.numel()))
        return padded[ranks.rank() * size :][:size]


def read_options(path: str | None, stage: int) -> dict[str, Any]:
    """DeepSpeed's options of a file, checked against what the configuration decides."""
    if path is None:
        return {}
    name = "trainer.deepspeed_config"
    if not Path(path).is_file():
        fail(name, "a JSON file", f"nothing at {path!r}", "check the path")
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        fail(name, "a JSON file", f"{path} ({error})", "correct it there")
    if not isinstance(found, dict):
        fail(name, "a JSON object", type(found).__name__, "correct it there")
    for key in OURS:
        if key in found and found[key] != "auto":
            remedy = "the trainer's configuration decides that; remove the key"
            fail(f"{name}, {key}", "no such key", repr(found[key]), remedy)
    given = found.get("zero_optimization", {}).get("stage", stage)
    if given != stage:
        remedy = "leave it out, or change trainer.engine"
        fail(f"{name}, zero_optimization.stage", str(stage), str(given), remedy)
    return {key: value for key, value in found.items() if key not in OURS}


def _deepspeed() -> Any:
    try:
        import deepspeed
    except ImportError:
        fail("trainer.engine", "DeepSpeed installed", "none", "pip install 'deepspeed>=0.19.8'")
    if not hasattr(deepspeed.DeepSpeedEngine, "coalesce_grad_reduction"):
        got = f"deepspeed {deepspeed.__version__}"
        remedy = "pip install -U deepspeed"
        fail("trainer.engine", "deepspeed 0.19.8 or newer", got, remedy)
    return deepspeed
