"""The Triton back end: which kernel does which part."""

from roma.kernels.linear_logprob.configs import promoted
from roma.kernels.linear_logprob.dlogits import dlogits
from roma.kernels.linear_logprob.forward import sweep
from roma.kernels.linear_logprob.gather import give_rows, take_rows
from roma.kernels.linear_logprob.rows import TRITON_WORKSPACE, Kernels
from roma.kernels.products import multiply

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
