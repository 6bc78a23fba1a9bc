"""The Triton back end: which kernel does which part."""

from roma_kernels.linear_logprob.rows import TRITON_WORKSPACE, Kernels
from roma_kernels.linear_logprob.triton.configs import promoted
from roma_kernels.linear_logprob.triton.dlogits import dlogits
from roma_kernels.linear_logprob.triton.forward import sweep
from roma_kernels.linear_logprob.triton.gather import give_rows, take_rows
from roma_kernels.products import multiply

KERNELS = Kernels(
    sweep=sweep,
    take=take_rows,
    give=give_rows,
    dlogits=dlogits,
    multiply=multiply,
    dtype=promoted,
    workspace=TRITON_WORKSPACE,
    least_columns=2048,
)
