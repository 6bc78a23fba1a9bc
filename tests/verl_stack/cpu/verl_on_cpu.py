"""A platform of verl's for a CPU, which it does not have: tests name it in VERL_PLATFORM.

Its name is "cpu" to torch and gloo; VERL_ENGINE_DEVICE=cuda lets verl find its FSDP engine, which
is registered for GPUs alone, and runs here as it is under FSDP2.
"""

from contextlib import nullcontext
from types import SimpleNamespace

import torch
from verl.plugin.platform.platform_cuda import PlatformCUDA
from verl.plugin.platform.platform_manager import PlatformRegistry


def _nothing(*_args, **_named) -> int:
    return 0


class _Module(SimpleNamespace):
    def __getattr__(self, name: str):
        return getattr(torch.cpu, name)


@PlatformRegistry.register("cpu")
class PlatformCPU(PlatformCUDA):
    """torch.cpu in the place of torch.cuda."""

    device_name = "cpu"
    vendor_name = "none"
    device_module = _Module(
        max_memory_allocated=_nothing,
        max_memory_reserved=_nothing,
        memory_allocated=_nothing,
        memory_reserved=_nothing,
        mem_get_info=lambda *_: (0, 0),
        empty_cache=_nothing,
        get_device_name=lambda *_: "cpu",
        get_device_capability=lambda *_: (None, None),
    )

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return True

    def current_device(self):
        return "cpu"

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index) -> None: ...

    def synchronize(self, device_index=None) -> None: ...

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None: ...

    def empty_cache(self) -> None: ...

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "ROMA_TEST_VISIBLE_DEVICES"

    def ray_resource_name(self) -> str:
        return "CPU"

    def ray_resource_options(self, num_gpus: float) -> dict[str, float]:
        return {"num_cpus": num_gpus}

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def nvtx_range(self, msg: str):
        return nullcontext()

    def profiler_start(self) -> None: ...

    def profiler_stop(self) -> None: ...

    def cudart(self) -> None: ...
