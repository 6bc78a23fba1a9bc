"""Tiny models of several families, and a float64 head that shares no line with the package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

VOCAB = 97


@dataclass(frozen=True)
class Family:
    """A class of transformers, what its configuration needs, and what it does to its logits."""

    name: str
    options: dict[str, Any]
    scale: float = 1.0
    softcap: float | None = None


# Numbers large enough that a scale or a cap that is forgotten, or in the wrong place, is seen.
FAMILIES = {
    "llama": Family("Llama", {}),
    "qwen3": Family("Qwen3", {"head_dim": 16}),
    "phi": Family("Phi", {}),  # a bias
    "gemma3": Family(
        "Gemma3",
        {"head_dim": 16, "final_logit_softcapping": 3.0, "tie_word_embeddings": False},
        softcap=3.0,
    ),
    "cohere": Family("Cohere", {"logit_scale": 0.25, "tie_word_embeddings": False}, scale=0.25),
    "granite": Family("Granite", {"logits_scaling": 4.0}, scale=0.25),
    "hyperclovax": Family("HyperCLOVAX", {"logits_scaling": 2.0}, scale=2.0),
    "falcon_h1": Family(
        "FalconH1",
        {
            "lm_head_multiplier": 0.5,
            "mamba_d_ssm": 32,
            "mamba_n_heads": 2,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_chunk_size": 8,
        },
        scale=0.5,
    ),
}


def model(family: str, seed: int = 0, **options: Any) -> Any:
    """In fp32, for training without dropout; its logits have a standard deviation of a few nats."""
    import transformers

    found = FAMILIES[family]
    kind = getattr(
        transformers, f"{found.name}TextConfig", getattr(transformers, f"{found.name}Config", None)
    )
    config = kind(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **(found.options | options),
    )
    torch.manual_seed(seed)
    made = getattr(transformers, f"{found.name}ForCausalLM")(config).train()
    with torch.no_grad():
        made.get_output_embeddings().weight.mul_(20.0)
        bias = made.get_output_embeddings().bias
        if bias is not None:
            bias.normal_()
    return made


def batch(seed: int = 0) -> dict[str, Tensor]:
    """Three rows of nine tokens; the second scores few, the third none."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (3, 9), generator=generator)
    labels = ids.clone()
    labels[0, :3] = -100
    labels[1, :6] = -100
    labels[2] = -100
    return {"input_ids": ids, "labels": labels}


class Upstream(NamedTuple):
    """Gradients by log-probs and entropies, [B, S − 1]."""

    dlogp: Tensor
    dentropy: Tensor


def upstream(shape: tuple[int, ...], seed: int = 1) -> Upstream:
    """Normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return Upstream(*torch.randn(2, *shape, generator=generator).unbind())


@dataclass
class Heads:
    """What a head gives for hidden states [B, S, D]; each field [B, S − 1], 0 without a label."""

    log_probs: Tensor
    entropy: Tensor
    log_sum_sq_probs: Tensor
    mean_logits: Tensor
    is_top1: Tensor
    dhidden: Tensor  # [B, S, D]
    dweight: Tensor  # [V, D]
    dbias: Tensor | None  # [V]


def plain(
    hidden: Tensor,
    head: Any,
    labels: Tensor,
    given: Upstream,
    *,
    family: str,
    temperature: float,
    dtype: torch.dtype,
) -> Heads:
    """MATH.md section 1 with all logits, in `dtype`; of float64 it is the oracle."""
    how = FAMILIES[family]
    hidden, weight = (x.detach().to(dtype).requires_grad_() for x in (hidden, head.weight))
    bias = getattr(head, "bias", None)
    bias = None if bias is None else bias.detach().to(dtype).requires_grad_()
    z = hidden[:, :-1] @ weight.T
    z = (z if bias is None else z + bias) * how.scale
    if how.softcap is not None:
        z = how.softcap * torch.tanh(z / how.softcap)
    z = z / temperature
    logp = z - torch.logsumexp(z, -1, keepdim=True)
    p = logp.exp()
    mask = labels[:, 1:] != -100
    tokens = labels[:, 1:].clamp(min=0)[..., None]
    own = logp.gather(-1, tokens)[..., 0] * mask
    entropy = -(p * logp).sum(-1) * mask
    leaves = [x for x in (hidden, weight, bias) if x is not None]
    total = (own * given.dlogp.to(dtype)).sum() + (entropy * given.dentropy.to(dtype)).sum()
    gradients = torch.autograd.grad(total, leaves)
    return Heads(
        own.detach(),
        entropy.detach(),
        (p.square().sum(-1).log() * mask).detach(),
        (z.mean(-1) * mask).detach(),
        (z.argmax(-1) == tokens[..., 0]) & mask,
        gradients[0],
        gradients[1],
        gradients[2] if bias is not None else None,
    )


OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def fused(
    patched: Any, inputs: dict[str, Tensor], given: Upstream, **call: Any
) -> tuple[Heads, Tensor]:
    """What a patched model gives, and the hidden states [B, S, D] that its body gave."""
    seen: list[Tensor] = []

    def keep(_module: object, _args: object, output: Any) -> None:
        output.last_hidden_state.retain_grad()
        seen.append(output.last_hidden_state)

    patched.zero_grad()
    hook = patched.base_model.register_forward_hook(keep)
    out = patched(**inputs, fused_lm_head=True, **call)
    hook.remove()
    ((out.log_probs * given.dlogp).sum() + (out.entropy * given.dentropy).sum()).backward()
    head = patched.get_output_embeddings()
    bias = getattr(head, "bias", None)
    found = Heads(
        *(out[name].detach() for name in OUTPUTS),
        dhidden=seen[0].grad,
        dweight=head.weight.grad,
        dbias=None if bias is None else bias.grad,
    )
    return found, seen[0].detach()
