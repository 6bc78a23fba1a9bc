"""The Triton back end: which kernel does which part."""

from roma_kernels.linear_logprob.rows import TRITON_WORKSPACE, Kernels
from roma_kernels.linear_logprob.triton.configs import promoted
from roma_kernels.linear_logprob.triton.dlogits import dlogits
from roma_kernels.linear_logprob.triton.forward import sweep
from roma_kernels.linear_logprob.triton.gather import gather_rows, scatter_rows
from roma_kernels.products import addmm_, mm_out

KERNELS = Kernels(
    sweep=sweep,
    gather=gather_rows,
    scatter=scatter_rows,
    dlogits=dlogits,
    mm_out=mm_out,
    addmm_=addmm_,
    dtype=promoted,
    workspace=TRITON_WORKSPACE,
    least_columns=2048,
)
