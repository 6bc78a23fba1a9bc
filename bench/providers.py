"""The providers: functions (states [R, D], weight [V, D], tokens [R]) → log-probs [R].

A provider that cannot run here is listed with the reason.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

import roma

Score = Callable[[Tensor, Tensor, Tensor], Tensor]
TRL_CHUNK = 32768  # columns, as its trainers pass


class Unavailable(Exception):
    """Why a provider cannot run here."""


@dataclass(frozen=True)
class Provider:
    """One implementation of the log-probs of the sampled tokens."""

    name: str
    package: str
    what: str
    load: Callable[[str], Score]
    """The function on a device type; raises Unavailable."""


def version_of(package: str) -> str:
    """An installed package's version; "-" where it is not installed, as ours in a bare checkout."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "-"


def _roma(backend: str) -> Callable[[str], Score]:
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


def _plain(score: Score) -> Callable[[str], Score]:
    return lambda device: score


def _compiled(score: Score) -> Callable[[str], Score]:
    def load(device: str) -> Score:
        compiled: Score = torch.compile(score, dynamic=False)
        return compiled

    return load


def _torch_fused(device: str) -> Score:
    fused = getattr(torch.nn.functional, "linear_cross_entropy", None)
    if fused is None:
        raise Unavailable(f"torch {torch.__version__} has no linear_cross_entropy (2.13 has)")

    def score(states: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
        return -fused(states, weight, tokens, reduction="none").float()

    return score


def _liger(device: str) -> Score:
    try:
        from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
            LigerFusedLinearScaledCrossEntropyFunction as Function,
        )
    except ImportError as missing:
        raise Unavailable(f"pip install liger-kernel ({missing})") from missing

    def score(states: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
        return -Function.apply(states, weight, tokens).float()

    return score


def _cce(impl: str, **options: object) -> Callable[[str], Score]:
    def load(device: str) -> Score:
        try:
            from cut_cross_entropy import linear_cross_entropy
        except ImportError as missing:
            raise Unavailable(f"pip install cut-cross-entropy ({missing})") from missing
        if impl == "cce" and device == "cpu":
            raise Unavailable("its Triton kernels need a GPU")

        def score(states: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
            return -linear_cross_entropy(
                states, weight, tokens, reduction="none", impl=impl, **options
            ).float()

        return score

    return load


def _trl(device: str) -> Score:
    try:
        from trl.kernels import ChunkedLogProbFunction
    except ImportError as missing:
        raise Unavailable(f"pip install 'trl>=1.16' ({missing})") from missing

    def score(states: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
        found: Tensor = ChunkedLogProbFunction.apply(
            states, weight, None, tokens, 1.0, TRL_CHUNK, None, 1.0, ("log_probs",)
        )[0]
        return found.float()

    return score


def _verl(device: str) -> Score:
    try:
        from verl.utils.experimental.torch_functional import FusedLinearForPPO
    except ImportError as missing:
        raise Unavailable(f"pip install verl ({missing})") from missing
    fused = FusedLinearForPPO()

    def score(states: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
        found: Tensor = fused(states[None], weight, tokens[None])[0][0]
        return found.float()

    return score


def _quack(device: str) -> Score:
    raise Unavailable("quack's linear_cross_entropy returns a mean: no log-prob of a token")


OURS = "roma"
PROVIDERS = [
    Provider(OURS, "roma", 'the back end that "auto" chooses', _roma("auto")),
    Provider("roma torch", "roma", "ours in plain PyTorch", _roma("torch")),
    Provider("naive fp32", "torch", "all logits in fp32, log_softmax, gather", _plain(_naive_fp32)),
    Provider(
        "naive", "torch", "all logits in the inputs' dtype, log_softmax in fp32", _plain(_naive)
    ),
    Provider("compile", "torch", "torch.compile of naive fp32", _compiled(_naive_fp32)),
    Provider("torch fused", "torch", "torch.nn.functional.linear_cross_entropy", _torch_fused),
    Provider("liger", "liger-kernel", "fused linear scaled cross entropy", _liger),
    Provider("cce", "cut-cross-entropy", "Cut Cross-Entropy, its default filter", _cce("cce")),
    Provider(
        "cce exact",
        "cut-cross-entropy",
        "the same without its filter",
        _cce("cce", filter_eps=None),
    ),
    Provider(
        "cce compile",
        "cut-cross-entropy",
        "Cut Cross-Entropy's torch.compile form",
        _cce("torch_compile"),
    ),
    Provider("trl", "trl", "the chunked head of TRL's trainers", _trl),
    Provider("verl", "verl", "FusedLinearForPPO", _verl),
    Provider("quack", "quack-kernels", "linear_cross_entropy", _quack),
]
