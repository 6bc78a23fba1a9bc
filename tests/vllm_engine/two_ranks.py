"""Two ranks, an engine each, weights that every rank takes at once: run by torchrun, from a test.

Each rank samples other prompts and prints what it found as a line of JSON.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from support.small_model import mixed_prompts
from torch import Tensor
from vllm_engine.model import OPTIONS, mismatch, shake

from roma.models.qwen_vl import Policy
from roma.rollout.vllm import VllmSampler

ASKED = {"group_size": 4, "max_new_tokens": 12, "temperature": 1.0, "seed": 3}


def main(folder: Path) -> None:
    """Old weights, then new ones, which rank 1 gets from rank 0 while vLLM reads them."""
    dist.init_process_group("gloo")
    rank, version = dist.get_rank(), 0
    policy = Policy.load(folder).eval()

    def weights() -> Iterator[tuple[str, Tensor]]:
        for name, weight in policy.model.state_dict().items():
            whole = weight.clone() if rank == 0 else torch.zeros_like(weight)
            dist.broadcast(whole, 0)  # every rank at once, in one order, or it hangs
            yield name, whole

    sampler = VllmSampler(policy, weights=weights, version=lambda: version, options=OPTIONS)
    prompts = mixed_prompts(policy).select([0, 1] if rank == 0 else [2])
    found = [mismatch(policy, prompts, sampler.sample(prompts, **ASKED), 1.0)]
    shake(policy, 5)
    version = 1
    made = sampler.sample(prompts, **ASKED)
    found.append(mismatch(policy, prompts, made, 1.0))
    print(json.dumps({"rank": rank, "mismatch": found, "rows": len(made.tokens)}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
