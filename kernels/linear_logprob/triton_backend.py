"""The Triton back end: which kernel does which part."""

from roma.kernels.linear_logprob.configs import promoted
from roma.kernels.linear_logprob.dlogits import dlogits
from roma.kernels.linear_logprob.forward import sweep
from roma.kernels.linear_logprob.gather import give_rows, take_rows
from roma.kernels.linear_logprob.rows import Kernels

KERNELS = Kernels(
    sweep=sweep,
    take=take_rows,
    give=give_rows,
    dlogits=dlogits,
    dtype=promoted,
    # At V = 152k, D = 4096 and 8192 active rows: vocabulary tiles of 16k entries, ten of them.
    workspace=512 * 2**20,
    least_columns=2048,
)
