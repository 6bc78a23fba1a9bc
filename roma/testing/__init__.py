"""Hold a kernel of your own to the oracle that ours are held to.

`check_backend` draws inputs (`strategies`), runs your function instead of `linear_logprob`,
`roma_loss` or `roma_loss_from_logp`, and compares values and every gradient with an oracle in
float64 (`oracle`) under derived bounds (`tolerance`). `count_products` tells how many rows a call
really multiplied. Needs Hypothesis: `pip install 'roma-vlm[testing]'`.
"""

import roma.namesake  # noqa: F401 - an ImportError if another `roma` is in the way

try:
    import hypothesis as _hypothesis  # noqa: F401
except ImportError as missing:
    raise ImportError("roma.testing needs hypothesis: pip install 'roma-vlm[testing]'") from missing

from roma.testing.backends import check_backend
from roma.testing.counts import ProductCount, count_products

__all__ = ["ProductCount", "check_backend", "count_products"]
