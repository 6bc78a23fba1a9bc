"""From rewards to advantages: an estimator, then the weights of a sibling method."""

from roma.train.refine.chain import Advantages
from roma.train.refine.group import ByGroup, advantages_of
from roma.train.refine.sampled import Sampled

__all__ = ["Advantages", "ByGroup", "Sampled", "advantages_of"]
