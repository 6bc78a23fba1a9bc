"""What a run takes, before it runs: memory a rank, part by part, FLOP, tokens, time.

Nothing is loaded but the model's config.json, whose weights are made without memory, and the text
and a few images of the data. docs/METRICS.md says what is counted and what is left out.
"""

from roma.train.estimate.activations import Options, activations, casts
from roma.train.estimate.page import page
from roma.train.estimate.run import Assumed, Estimate, estimate
from roma.train.estimate.states import Parameters, states
from roma.train.estimate.work import MicroBatch

__all__ = [
    "Assumed",
    "Estimate",
    "MicroBatch",
    "Options",
    "Parameters",
    "activations",
    "casts",
    "estimate",
    "page",
    "states",
]
