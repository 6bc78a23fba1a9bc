"""NVIDIA DALI's eager mode: loading it, its threads, and the way of images in and out of it.

Images go in and come out without a copy, of any sizes in one batch. On a CPU every job runs on a
thread of this module's own, with a DALI context of one thread: some of DALI's operators (JPEG) work
through a batch on one thread, and several jobs at once keep all of them busy.
"""

import ctypes
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.utils.dlpack import from_dlpack

Job = Callable[[], Any]


_loading = threading.Lock()


def dali() -> Any:
    """DALI's eager mode, imported on first use (which takes some seconds).

    Raises:
        ImportError: DALI is not installed.
    """
    with _loading:
        return _loaded()


@lru_cache(maxsize=1)
def _loaded() -> Any:
    try:
        import nvidia.dali.experimental.dynamic as ndd
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("nvidia"):
            raise
        remedy = "roma.views degrades images with NVIDIA DALI, which is not installed; "
        raise ImportError(remedy + "pip install 'roma[views]'", name=error.name) from error
    # DALI 2.4 sets up its codecs in the first JPEG of a process. Two threads at once fail there
    # every other time: "nvimgcodec decode failed".
    with ndd.EvalContext(num_threads=1):
        pixel = ndd.as_batch([torch.zeros(1, 1, 3, dtype=torch.uint8)], layout="HWC")
        ndd.jpeg_compression_distortion(pixel, quality=50, device="cpu").evaluate()
    return ndd


def run(jobs: Sequence[Job], others: Sequence[Job], device: torch.device) -> list[Any]:
    """The results of `jobs`, then of `others`, each in order.

    Args:
        jobs: calls of DALI or of compiled code: side by side on a CPU, on the current stream of a
            GPU.
        others: calls of PyTorch, which has threads of its own: here, meanwhile.
        device: of the images.
    """
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device)
        with dali().EvalContext(device_id=device.index, cuda_stream=stream):
            return [job() for job in (*jobs, *others)]
    if jobs:
        dali()  # imported here: what is missing is an error of this thread
    started = [_pool(torch.get_num_threads()).submit(job) for job in jobs]
    made = [job() for job in others]
    return [one.result() for one in started] + made


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "roma-views", initializer=_enter)


_contexts: list[Any] = []


def _enter() -> None:
    """A context of its own for this thread, for as long as it lives."""
    context = dali().EvalContext(num_threads=1)
    _contexts.append(context)
    context.__enter__()


def _forked() -> None:
    """A forked process starts threads of its own.

    It has contexts of its parent's, whose threads it has not: freeing one would wait for them, and
    end the process. They stay.
    """
    _pool.cache_clear()
    for context in _contexts:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(context))
    _contexts.clear()


os.register_at_fork(after_in_child=_forked)


def batch(images: Sequence[Tensor]) -> Any:
    """A DALI batch of images [H, W, C], without a copy."""
    return dali().as_batch(list(images), layout="HWC")


def images_of(made: Any) -> list[Tensor]:
    """The images of a DALI batch, without a copy; they keep its memory."""
    return [from_dlpack(image) for image in made.evaluate().tensors]


def per_image(values: ArrayLike, dtype: type) -> Any:
    """An argument of a DALI operator that has a value for each image."""
    import numpy as np

    return dali().as_batch(np.asarray(values, dtype=dtype))
