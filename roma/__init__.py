"""A fused loss for reinforcement-learning vision-language models that keep reasoning on bad images.

    out = roma.roma_loss(hidden, view_hidden, head.weight, tokens, mask=..., advantages=...,
                         correct=..., old_logp=...)
    out.loss.backward()

Everything here needs torch alone. Views (`roma.views`), data, trainer and evaluation load what they
need when they are imported by name; `roma info` tells what is installed and which back end runs.
"""

from importlib.metadata import PackageNotFoundError, version

from roma.kernels.linear_logprob.api import TokenLogprobs, linear_logprob
from roma.kernels.view_loss.api import METRICS
from roma.kernels.view_loss.config import RomaConfig
from roma.loss import RomaLoss, roma_loss, roma_loss_from_logp, view_divergence

try:
    __version__ = version("roma")
except PackageNotFoundError:  # a bare checkout on PYTHONPATH, as on a benchmark machine
    __version__ = "0+checkout"

__all__ = [
    "METRICS",
    "RomaConfig",
    "RomaLoss",
    "TokenLogprobs",
    "linear_logprob",
    "roma_loss",
    "roma_loss_from_logp",
    "view_divergence",
]
