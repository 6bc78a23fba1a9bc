"""The device that a policy is read onto, checked before its weights are read."""

import textwrap

import torch

from roma_kernels.errors import fail


def resolve_device(device: str | torch.device, *, name: str = "device") -> torch.device:
    """The device by name; "auto" is a GPU if torch sees one, else the CPU.

    Args:
        device: "auto", or what `torch.device` takes.
        name: what an error message calls it.

    Raises:
        ValueError: no such device, or none that this torch can use here.

    Example:
        >>> resolve_device("cpu")
        device(type='cpu')
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if str(device) == "meta":
        fail(name, "a device that holds values", "'meta'", "use cpu, or look at `roma info`")
    try:
        return torch.empty(0, device=device).device
    # What torch raises: for an unknown word, for a missing driver, and as built without CUDA.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = textwrap.shorten(str(error), 90, placeholder=" …")
        got = f"{str(device)!r} ({reason})"
        fail(name, "a device that torch can use here", got, "use cpu, or look at `roma info`")
