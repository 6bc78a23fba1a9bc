"""Degraded views of images, by NVIDIA DALI: same size, same type, noise without a state.

    spec, = sample("seen", 1, key=(0, step, row_id))
    view, = degrade_batch([image], [spec], [seed_for(0, step, row_id, 0)])

Importing this loads no DALI: the first image degraded does.
"""

import roma.namesake  # noqa: F401 - an ImportError if another `roma` is in the way
from roma.views.batch import degrade, degrade_batch
from roma.views.corruptions import ADVERSARIAL, CORRUPTIONS, Corruption, Parameter, load_levels
from roma.views.sample import ViewSpec, sample, sample_attacks, seed_for

__all__ = [
    "ADVERSARIAL",
    "CORRUPTIONS",
    "Corruption",
    "Parameter",
    "ViewSpec",
    "degrade",
    "degrade_batch",
    "load_levels",
    "sample",
    "sample_attacks",
    "seed_for",
]
