"""Lets torchvision be imported beside a CPU build of torch, for which it has no build.

With this folder on PYTHONPATH every process of vLLM's tests starts with it, the one too in which
vLLM looks at a model's class. vLLM and transformers' video processor import torchvision; its
compiled part asks for CUDA and does not load, and then the import fails, because fake versions of
two operators are registered whose schemas that part would have defined. Neither is called.
"""

import torch

_library = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
