"""The loss and its kernels, for any trainer; needs torch alone.

    from roma_kernels.roma_loss.api import roma_loss
    from roma_kernels.linear_logprob.api import linear_logprob

`import roma` offers the same names. Nothing here knows a model, a trainer or a view.
"""

from importlib.metadata import PackageNotFoundError, version

DISTRIBUTION = "roma-vlm"
"""What `pip` calls the two packages `roma` and `roma_kernels`."""

try:
    __version__ = version(DISTRIBUTION)
except PackageNotFoundError:  # a bare checkout on PYTHONPATH, as on a benchmark machine
    __version__ = "0+checkout"
