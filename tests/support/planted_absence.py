"""Imported by a worker: OpenCV and DALI are not installed."""

import sys

for module in ("cv2", "nvidia.dali"):
    sys.modules[module] = None  # type: ignore[assignment]  # importing it fails then
