"""The Triton back end: which kernel does which part, by the plan that the tuning table has."""

from torch import Tensor

from roma_kernels.linear_logprob.rows import GPU_WORKSPACE, Active, Head, Kernels, Rows
from roma_kernels.linear_logprob.triton import dlogits as fused
from roma_kernels.linear_logprob.triton import forward, vendor
from roma_kernels.linear_logprob.triton.gather import gather_rows, scatter_rows
from roma_kernels.linear_logprob.triton.launch import promoted
from roma_kernels.linear_logprob.triton.tuning import plan_for
from roma_kernels.products import addmm_, mm_out


def sweep(rows: Rows, head: Head, sums: Tensor) -> None:
    """Fills `sums` [3 or 4, R] with peak, total, target and (if four) moment of each row."""
    dtype = promoted(rows.hidden, head.weight)
    plan = plan_for(sums.device, "forward", dtype, rows.num_rows)
    if plan == "vendor":
        vendor.sweep(rows, head, sums)
    else:
        forward.sweep(rows, head, sums, plan)


def dlogits(active: Active, head: Head) -> Tensor:
    """The gradient dz [A, V] for a head, or a slice of one, of V entries."""
    states = active.states
    plan = plan_for(states.device, "dlogits", states.dtype, active.out_of)
    return vendor.dlogits(active, head) if plan == "vendor" else fused.dlogits(active, head, plan)


KERNELS = Kernels(
    sweep=sweep,
    gather=gather_rows,
    scatter=scatter_rows,
    dlogits=dlogits,
    mm_out=mm_out,
    addmm_=addmm_,
    dtype=promoted,
    workspace=GPU_WORKSPACE,
    least_columns=2048,
)
