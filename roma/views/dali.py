"""NVIDIA DALI's eager mode: loading it, threads for it, and the way of images in and out of it.

Images go in and come out without a copy, of any sizes in one batch. On a CPU jobs run on threads of
this module's own, each with a DALI context of one thread: some of DALI's operators (JPEG) work
through a batch on one thread, and several jobs at once keep all of them busy.
"""

import ctypes
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

Job = Callable[[], list[Tensor]]

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
        raise ImportError(
            f"roma.views degrades images with NVIDIA DALI, which is not installed (no module "
            f"{error.name}); pip install 'roma-vlm[views]'",
            name=error.name,
        ) from error
    # DALI 2.4 sets up its codecs in the first JPEG of a process. Two threads at once fail there
    # every other time: "nvimgcodec decode failed".
    with _cpu_context(ndd, 1):
        pixel = ndd.as_batch([torch.zeros(1, 1, 3, dtype=torch.uint8)], layout="HWC")
        ndd.jpeg_compression_distortion(pixel, quality=50).evaluate()
    return ndd


def _cpu_context(ndd: Any, threads: int) -> Any:
    """A context that has nothing of a GPU, also where there is one: no CUDA context, no stream."""
    # DALI's own mark for "no stream yet"; without it a CPU's context would take a GPU's stream.
    nothing = getattr(ndd.EvalContext, "_default_context_stream_sentinel", None)
    with ndd.Device("cpu"):
        return ndd.EvalContext(num_threads=threads, cuda_stream=nothing)


# ----------------------------------------------------------------------------------------- threads


class _Workers(NamedTuple):
    """Threads that live as long as the process."""

    jobs: ThreadPoolExecutor
    pytorch: ThreadPoolExecutor  # one thread, which has PyTorch's own threads


_own = threading.local()  # of a worker: `threads` of its context, and the context once it is made
_kept: list[Any] = []


def _become(threads: int) -> None:
    _own.threads = threads


@lru_cache(maxsize=1)
def _workers() -> _Workers:
    return _Workers(
        ThreadPoolExecutor(os.cpu_count() or 1, "roma-views", _become, (1,)),
        ThreadPoolExecutor(1, "roma-views-pytorch", _become, (torch.get_num_threads(),)),
    )


def run(jobs: Sequence[Job], others: Sequence[Job], device: torch.device) -> list[list[Tensor]]:
    """The results of `jobs`, then of `others`, each in order.

    Args:
        jobs: calls of DALI or of compiled code: on a CPU torch.get_num_threads() of them side by
            side, on a GPU one after another on the current stream.
        others: calls of PyTorch, which has threads of its own: one after another, meanwhile.
        device: of the images.

    Raises:
        Exception: what the first failed job raised, after all have ended.
    """
    if device.type == "cuda":
        with _gpu_context(device):
            return [job() for job in (*jobs, *others)]
    made: dict[int, list[Tensor]] = {}

    def work(left: deque[tuple[int, Job]]) -> None:
        while True:
            try:
                number, job = left.popleft()
            except IndexError:
                return
            try:
                made[number] = job()
            except BaseException:
                left.clear()
                raise

    numbered = list(enumerate((*jobs, *others)))
    ours, theirs = deque(numbered[: len(jobs)]), deque(numbered[len(jobs) :])
    workers, threads = _workers(), min(torch.get_num_threads(), len(ours))
    started = [workers.jobs.submit(work, ours) for _ in range(threads)]
    if theirs:
        started.append(workers.pytorch.submit(work, theirs))
    wait(started)
    for one in started:
        one.result()
    return [made[number] for number, _ in numbered]


def _enter() -> None:
    """On a worker, a context of its own, for as long as it lives."""
    if hasattr(_own, "threads") and not hasattr(_own, "context"):
        context = _cpu_context(dali(), _own.threads)
        context.__enter__()
        _own.context = context
        _kept.append(context)


def _forked() -> None:
    """A forked process starts workers of its own.

    It has contexts of its parent's, whose threads it has not: freeing one would wait for them, and
    end the process. They stay. So PyTorch, too, can run on a thread that has threads.
    """
    global _loading
    _loading = threading.Lock()
    _workers.cache_clear()
    for context in _kept:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(context))
    _kept.clear()


os.register_at_fork(after_in_child=_forked)


# --------------------------------------------------------------------------------------------- GPU


class _DefaultStream:
    """CUDA's default stream: torch's number for it, 0, is none that DLPack takes; 1 is the same."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, 1


def _gpu_context(device: torch.device) -> Any:
    """A context on the current stream of a GPU, kept by this thread: operators are made once."""
    stream: Any = torch.cuda.current_stream(device)
    key = device.index, stream.cuda_stream
    contexts = _own.__dict__.setdefault("gpu", {})
    if key not in contexts:
        if not stream.cuda_stream:
            stream = _DefaultStream(device)
        contexts[key] = dali().EvalContext(device_id=device.index, cuda_stream=stream)
    return contexts[key]


# ------------------------------------------------------------------------------------------ images


def batch(images: Sequence[Tensor]) -> Any:
    """A DALI batch of images [H, W, C], without a copy."""
    if images[0].device.type == "cpu":
        _enter()
    return dali().as_batch(list(images), layout="HWC")


def images_of(made: Any) -> list[Tensor]:
    """The images of a DALI batch, without a copy; they keep its memory."""
    # DALI's own way out, which also knows pinned memory: torch's from_dlpack refuses it.
    return [image.torch() for image in made.evaluate().tensors]


def per_image(values: ArrayLike, dtype: type) -> Any:
    """An argument of a DALI operator that has a value for each image."""
    return dali().as_batch(np.asarray(values, dtype=dtype))
