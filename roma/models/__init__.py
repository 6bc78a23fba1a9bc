"""Vision-language models as the separate passes that a trainer needs, and their processors."""

import roma.namesake  # noqa: F401 - an ImportError if another `roma` is in the way
