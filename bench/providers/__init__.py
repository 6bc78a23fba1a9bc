"""The providers: functions (states [R, D], weight [V, D], tokens [R]) → log-probs [R].

A provider that cannot run here is listed with the reason: `python -m bench.providers`.
"""

import torch
from torch import Tensor

import roma
from bench.providers import peers, verl
from bench.providers.base import Load, Provider, Score, Unavailable, version_of

__all__ = ["OURS", "PROVIDERS", "Provider", "Score", "Unavailable", "version_of"]


def _roma(backend: str) -> Load:
    def load(device: str) -> Score:
        def score(states: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
            return roma.linear_logprob(states, weight, tokens, backend=backend).logp

        return score

    return load


def _naive_fp32(states: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    logits = states.float() @ weight.float().T
    return torch.log_softmax(logits, -1).gather(-1, tokens[:, None])[:, 0]


def _naive(states: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    logits = (states @ weight.T).float()
    return torch.log_softmax(logits, -1).gather(-1, tokens[:, None])[:, 0]


def _plain(score: Score) -> Load:
    return lambda device: score


def _compiled(score: Score) -> Load:
    def load(device: str) -> Score:
        compiled: Score = torch.compile(score, dynamic=False)
        return compiled

    return load


OURS = "roma"
INPUTS = "the inputs'"
KEPT, TILES = "1 + 2", "1 + 3"
"""Logits, or what follows from them, kept for the backward; computed again there."""
ACTIVE = "1 + 3 of the active rows"
PROVIDERS = [
    Provider(OURS, "roma-vlm", 'the back end that "auto" chooses', _roma("auto"), passes=ACTIVE),
    Provider("roma torch", "roma-vlm", "ours in plain PyTorch", _roma("torch"), passes=ACTIVE),
    Provider(
        "naive fp32",
        "torch",
        "all logits in fp32, log_softmax, gather",
        _plain(_naive_fp32),
        passes=KEPT,
    ),
    Provider(
        "naive",
        "torch",
        "all logits in the inputs' dtype, log_softmax in fp32",
        _plain(_naive),
        INPUTS,
        KEPT,
    ),
    Provider(
        "compile", "torch", "torch.compile of naive fp32", _compiled(_naive_fp32), passes=KEPT
    ),
    Provider(
        "torch fused",
        "torch",
        "torch.nn.functional.linear_cross_entropy, all logits",
        peers.torch_fused,
        INPUTS,
        KEPT,
    ),
    Provider(
        "torch chunked",
        "torch",
        "the same with LinearCrossEntropyOptions(): in chunks of rows",
        peers.torch_chunked,
        "fp32, the result in the inputs'",
        TILES,
    ),
    Provider(
        "liger",
        "liger-kernel",
        "fused linear scaled cross entropy, PyTorch on 512 rows at a time",
        peers.liger,
        INPUTS,
        TILES,
    ),
    Provider(
        "liger cute",
        "liger-kernel",
        "the same in CuTe for sm_90; dW summed in bf16 over waves of 1024 rows",
        peers.liger_cute,
        "fp16",
        TILES,
        cuda=True,
    ),
    Provider(
        "cce",
        "cut-cross-entropy",
        "Cut Cross-Entropy, its default filter; gradients summed in the inputs' dtype",
        peers.cce("cce"),
        passes="1 + 1 + 2 of the blocks that its filter leaves",
        cuda=True,
    ),
    Provider(
        "cce exact",
        "cut-cross-entropy",
        "the same without its filter",
        peers.cce("cce", filter_eps=None),
        passes=TILES,
        cuda=True,
    ),
    Provider(
        "cce compile",
        "cut-cross-entropy",
        "Cut Cross-Entropy's torch.compile form",
        peers.cce("torch_compile"),
        INPUTS,
        KEPT,
    ),
    Provider("trl", "trl", "the chunked head of TRL's trainers", peers.trl, INPUTS, TILES),
    Provider(
        "trl rows",
        "trl",
        "TRL's Triton row kernel on all logits",
        peers.trl_rows,
        INPUTS,
        KEPT,
        cuda=True,
    ),
    Provider(
        "verl",
        "verl",
        "verl's Triton kernels; dh summed over slices of the vocabulary in the inputs' dtype",
        verl.triton,
        passes=TILES,
        cuda=True,
    ),
    Provider(
        "verl chunked",
        "verl",
        "FusedLinearForPPO, PyTorch on 512 rows at a time",
        verl.chunked,
        INPUTS,
        TILES,
    ),
    Provider(
        "quack",
        "quack-kernels",
        "row kernel in CuTe on all logits; without a graph a product that keeps none",
        peers.quack,
        INPUTS,
        KEPT,
        cuda=True,
    ),
]
