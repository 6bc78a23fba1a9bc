"""Views of a step's images: drawn while the policy samples, or made against it afterwards."""

from roma.train.views.maker import Mode, ViewMaker, Views, by_corruption, hardest

__all__ = ["Mode", "ViewMaker", "Views", "by_corruption", "hardest"]
