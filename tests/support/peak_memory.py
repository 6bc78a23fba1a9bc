"""Run as a program: peak extra resident memory, in MiB, of one roma_loss and its backward.

K = 4, 512 tokens, V = 151,936, bf16; arguments: back end, D.
"""

import resource
import sys

import torch

import roma

ENGINE, D = sys.argv[1], int(sys.argv[2])
K, B, T, V = 4, 4, 128, 151_936
# The first call of an operator imports what torch keeps for it, 150 MiB of Python.
small = torch.zeros(3, 4, requires_grad=True)
roma.linear_logprob(small, small, torch.arange(3), backend=ENGINE).logp.sum().backward()
torch.manual_seed(0)
hidden = torch.randn(B, T, D).bfloat16().requires_grad_()
views = torch.randn(K, B, T, D).bfloat16().requires_grad_()
weight = torch.empty(V, D, dtype=torch.bfloat16).normal_(std=0.05).requires_grad_()
tokens = torch.randint(V, (B, T))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
out = roma.roma_loss(
    hidden,
    views,
    weight,
    tokens,
    mask=torch.ones(B, T, dtype=torch.bool),
    advantages=torch.randn(B),
    correct=torch.tensor([True, False, True, False]),
    old_logp=torch.full((B, T), -12.0),
    aux_view=torch.tensor([0, 1, 2, 3]),
    backend=ENGINE,
)
out.loss.backward()
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) / 1024)
