"""FSDP2: PyTorch's `fully_shard`, a layer of the text model or of the tower at a time."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from roma.train import ranks
from roma.train.engine.whole import Single

T = TypeVar("T")


class Fsdp2(Single):
    """Weights, gradients and moments sharded over the ranks.

    Under bfloat16 a layer's weights are gathered in it, half the bytes; the shards stay fp32, and
    gradients are summed in fp32.
    """

    sharded: ClassVar[bool] = True

    def wrap(self) -> None:
        """A unit for each layer; the rest, embedding, head and norms, is one unit."""
        mesh = init_device_mesh(self.device.type, (ranks.ranks(),))
        half = self.dtype == "bfloat16"
        # Autocast casts inputs; the residual stream, the last norm and the head stay fp32.
        exact = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        policy = replace(exact, param_dtype=torch.bfloat16 if half else None)
        model = self.policy.model.model
        for layer in (*model.language_model.layers, *model.visual.blocks):
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(self.door, mesh=mesh, mp_policy=exact)

    def forward(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Inside of the root's forward its own weights are whole; a layer gathers its own."""
        found: T = self.door(function, *args, **kwargs)
        return found

    def whole(self, weight: Tensor) -> Tensor:
        """Gathered from the ranks."""
        weight = weight.detach()
        return weight.full_tensor() if isinstance(weight, DTensor) else weight

    def own(self, like: Tensor, whole: Tensor) -> Tensor:
        """This rank's shard."""
        whole = whole.to(like.device)
        if not isinstance(like, DTensor):
            return whole
        return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
