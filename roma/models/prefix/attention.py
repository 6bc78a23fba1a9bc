"""The attention of packed groups, registered with transformers under a name of its own.

    prompt       attends to itself, causally
    completion   attends to its group's prompt, and causally to itself

Rows without groups (sampling, evaluation, a row per rollout) go to transformers' sdpa as before.
Groups go to one call of PyTorch's variable-length flash attention where it computes them: on an
NVIDIA GPU from Ampere on, in bf16 or fp16, heads of 8, 16, …, 256 numbers. Else (fp32, a CPU, an
AMD GPU, whose flash attention would let a completion see the wrong part of its prompt) they go to
sdpa, prompts and completions of equal shape together. Neither forms a mask over the row: cost and
memory are linear in the number of groups. Keys and values of a prompt are gathered for each of its
completions, so that the backward sums the prompt's gradient over them.

Under `torch.autocast` it computes and returns what sdpa does, the autocast dtype. On a GPU the
gradient of the gather adds up in any order, unless `torch.use_deterministic_algorithms` is set.
`torch.compile` of a model gives the same, in pieces, but compiles it for each layout of groups
anew: not worth it where layouts change with each batch.
"""

import inspect
from collections import defaultdict
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from roma_kernels.errors import fail

ATTENTION = "roma_shared"
"""The name under which the attention is registered with transformers."""

# Change what a token sees: windows, soft caps, sinks, biases, chosen keys.
_REFUSED = (
    "sliding_window",
    "softcap",
    "s_aux",
    "sinks",
    "position_bias",
    "indices",
    "block_indices",
)
_ROWS = "give each rollout a row of its own (worker.actor.share_prompt=false)"


class _Kind(NamedTuple):
    """Sequences of one shape, n of q queries and k keys."""

    queries: Tensor  # [n·q] int64 positions in the row; where a shorter one ends, any
    keys: Tensor  # [n·k]
    shape: tuple[int, int, int]  # n, q, k
    mask: Tensor | None  # [q, k] bool; None: causal, q = k


class _Varlen(NamedTuple):
    """All sequences, as variable-length attention takes them."""

    keys: Tensor  # [Σ k] int64 positions in the row
    cu_q: Tensor  # [n + 1] int32
    cu_k: Tensor
    max_q: int
    max_k: int


class Segments:
    """Where prompts and completions stand in the row; made once, read by every layer.

    Args:
        prompt_starts: [groups] int64.
        prompt_lengths: [groups].
        starts: [completions].
        lengths: [completions], 0 for a completion of one token.
        group: [completions], in the order of the row.
    """

    def __init__(
        self,
        prompt_starts: NDArray[np.int64],
        prompt_lengths: NDArray[np.int64],
        starts: NDArray[np.int64],
        lengths: NDArray[np.int64],
        group: NDArray[np.int64],
    ) -> None:
        """Keeps all; index tensors are made for the first device that asks."""
        self.prompt_starts, self.prompt_lengths = prompt_starts, prompt_lengths
        self.starts, self.lengths, self.group = starts, lengths, group
        self.size = int(prompt_lengths.sum() + lengths.sum())  # tokens of the row
        self._on: dict[torch.device, tuple[list[_Kind], Tensor]] = {}
        self._varlen: dict[torch.device, _Varlen] = {}

    def kinds(self, device: torch.device) -> tuple[list[_Kind], Tensor]:
        """Sequences by shape, and [S]: where each token's output stands among all of theirs."""
        if device not in self._on:
            self._on[device] = self._make_kinds(device)
        return self._on[device]

    def _make_kinds(self, device: torch.device) -> tuple[list[_Kind], Tensor]:
        made, at, done = [], np.zeros(self.size, dtype=np.int64), 0
        by_length = defaultdict(list)
        for number, length in enumerate(self.prompt_lengths.tolist()):
            by_length[length].append(number)
        for length, numbers in by_length.items():
            where = self.prompt_starts[numbers][:, None] + np.arange(length)
            made.append(_kind(where, where, None, device))
            at[where] = done + np.arange(where.size).reshape(where.shape)
            done += where.size
        by_shape = defaultdict(list)
        # Completions within a factor of two together: a call each would cost more than the padding.
        for number, (group, length) in enumerate(
            zip(self.group.tolist(), self.lengths.tolist(), strict=True)
        ):
            if length:
                by_shape[int(self.prompt_lengths[group]), length.bit_length()].append(number)
        for (prompt, _), numbers in by_shape.items():
            lengths = self.lengths[numbers]
            top = int(lengths.max())
            ramp = np.arange(top)
            # Past a completion's end stands whatever follows it: the others do not see it.
            own = np.minimum(self.starts[numbers][:, None] + ramp, self.size - 1)
            before = self.prompt_starts[self.group[numbers]][:, None] + np.arange(prompt)
            keys = np.concatenate([before, own], axis=1)
            seen = np.tri(top, prompt + top, prompt, dtype=bool)
            made.append(_kind(own, keys, torch.from_numpy(seen), device))
            inside = ramp < lengths[:, None]
            at[own[inside]] = (done + np.arange(own.size).reshape(own.shape))[inside]
            done += own.size
        return made, torch.from_numpy(at).to(device)

    def varlen(self, device: torch.device) -> _Varlen:
        """Every prompt and completion as one sequence with its keys, in the order of the row."""
        if device not in self._varlen:
            self._varlen[device] = self._make_varlen(device)
        return self._varlen[device]

    def _make_varlen(self, device: torch.device) -> _Varlen:
        keys, q, k = [], [], []
        first = np.searchsorted(self.group, np.arange(len(self.prompt_starts) + 1))
        for number, (start, length) in enumerate(
            zip(self.prompt_starts.tolist(), self.prompt_lengths.tolist(), strict=True)
        ):
            prompt = np.arange(start, start + length)
            keys.append(prompt)
            q.append(length)
            k.append(length)
            for own in range(first[number], first[number + 1]):
                if count := int(self.lengths[own]):
                    keys += [prompt, np.arange(self.starts[own], self.starts[own] + count)]
                    q.append(count)
                    k.append(length + count)
        cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0).to(device, torch.int32) for x in (q, k))
        where = torch.from_numpy(np.concatenate(keys)).to(device)
        return _Varlen(where, cu_q, cu_k, max(q), max(k))


def _kind(
    queries: NDArray[np.int64],
    keys: NDArray[np.int64],
    mask: Tensor | None,
    device: torch.device,
) -> _Kind:
    own, seen = (torch.from_numpy(x.reshape(-1)).to(device) for x in (queries, keys))
    shape = (len(queries), queries.shape[1], keys.shape[1])
    return _Kind(own, seen, shape, None if mask is None else mask.to(device))


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    shared: Segments | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention function as transformers calls it, [1, H, S, d] to [1, S, H, d].

    Raises:
        ValueError: groups together with dropout, or with a window, a soft cap or a sink; or with
            other inputs than `Packed.inputs()`.
    """
    if shared is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **options
        )
    if dropout:
        remedy = "call model.eval(): old and new log-probs would differ too"
        fail("attention dropout", "0, because prompts are shared", f"{dropout:g}", remedy)
    _check(module, options)
    sizes = (len(query), query.shape[2], key.shape[2])
    entries = 0 if attention_mask is None else attention_mask.numel()
    if sizes != (1, shared.size, shared.size) or entries:
        expected = f"one row of {shared.size} tokens and a mask without entries"
        got = f"{sizes[0]} of {sizes[1]} queries and {sizes[2]} keys, a mask of {entries} entries"
        fail("packed groups", expected, got, "pass Packed.inputs() as they are, and no cache")
    q, k, v = (x[0].transpose(0, 1) for x in _as_sdpa(query, key, value))  # [S, H, d]
    run = _by_varlen if _varlen_takes(q, v) else _by_shape
    return run(q, k, v, shared, scaling)[None], None


def _check(module: nn.Module, options: dict[str, Any]) -> None:
    for name in _REFUSED:
        if options.get(name) is not None:
            fail(name, "none, because prompts are shared", repr(options[name]), _ROWS)
    causal = options.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        fail("is_causal", "True, because prompts are shared", "False", _ROWS)


def _as_sdpa(*tensors: Tensor) -> list[Tensor]:
    """In the dtype to which autocast has sdpa cast its inputs."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device) or tensors[0].dtype == torch.float64:
        return list(tensors)
    return [x.to(torch.get_autocast_dtype(device)) for x in tensors]


def _varlen_takes(q: Tensor, v: Tensor) -> bool:
    """Whether PyTorch's variable-length attention computes this, causal from the bottom right.

    The compiled flash attention of ROCm aligns a causal mask at the top left.
    """
    size = q.shape[-1]
    return (
        q.is_cuda
        and torch.version.hip is None
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
        and q.dtype in (torch.bfloat16, torch.float16)
        and size == v.shape[-1]
        and size % 8 == 0
        and size <= 256
    )


def _by_shape(q: Tensor, k: Tensor, v: Tensor, shared: Segments, scaling: float | None) -> Tensor:
    kinds, at = shared.kinds(q.device)
    repeats = q.shape[1] // k.shape[1]
    made = []
    for kind in kinds:
        n, queries, keys = kind.shape
        own = _heads(q, kind.queries, n, queries)
        keyed, valued = (_heads(x, kind.keys, n, keys) for x in (k, v))
        if repeats > 1:
            keyed, valued = (x.repeat_interleave(repeats, dim=1) for x in (keyed, valued))
        causal = kind.mask is None
        out = scaled_dot_product_attention(
            own, keyed, valued, attn_mask=kind.mask, is_causal=causal, scale=scaling
        )
        made.append(out.transpose(1, 2).reshape(n * queries, -1))
    return torch.cat(made).index_select(0, at).unflatten(-1, (q.shape[1], -1))


def _heads(x: Tensor, where: Tensor, n: int, length: int) -> Tensor:
    """[S, H, d] at positions [n·length] as [n, H, length, d]."""
    return x.index_select(0, where).view(n, length, *x.shape[1:]).transpose(1, 2)


def _by_varlen(q: Tensor, k: Tensor, v: Tensor, shared: Segments, scaling: float | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    where = shared.varlen(q.device)
    k, v = (x.index_select(0, where.keys) for x in (k, v))
    # Torch 2.11 takes fewer heads of keys than of queries unasked.
    grouped: dict[str, Any] = {"enable_gqa": True} if _has_gqa(varlen_attn) else {}
    out = varlen_attn(
        q.contiguous(),
        k,
        v,
        where.cu_q,
        where.cu_k,
        where.max_q,
        where.max_k,
        scale=scaling,
        # Fewer queries than keys: causal from the bottom right, as a completion behind its prompt.
        window_size=(-1, 0),
        **grouped,
    )
    assert isinstance(out, Tensor)  # without return_aux
    return out


@cache
def _has_gqa(function: Any) -> bool:
    return "enable_gqa" in inspect.signature(function).parameters


def share_prompts(model: Any) -> None:
    """Has a transformers model's text layers use this attention; once, before training.

    Args:
        model: a causal language model, or a vision-language model (its vision tower keeps its own
            attention), whose layers ask transformers' registry for their attention. Nothing but
            attention may carry from token to token, and image tokens may not see later ones, as
            they do in PaliGemma: that is not noticed.

    Raises:
        ValueError: the layers do not ask, or some are no causal attention over all tokens
            (windows, chunks, recurrences); give such a model a row per rollout.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, intermediate_size=32, **small))
        >>> share_prompts(model)
        >>> shares_prompts(model)
        True
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    text = model.config.get_text_config()
    others = {*(getattr(text, "layer_types", None) or ())} - {"full_attention", "attention"}
    if others or model._is_stateful:
        got = f"{type(model).__name__} with {', '.join(sorted(others)) or 'recurrent'} layers"
        fail("model", "one of full attention in every layer", got, _ROWS)
    AttentionInterface.register(ATTENTION, attention)
    # Without a mask function of this name padding would be ignored in silence.
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    if text is model.config:
        model.set_attn_implementation(ATTENTION)
    else:
        names = [name for name in model.config.sub_configs if getattr(model.config, name) is text]
        model.set_attn_implementation({name: ATTENTION for name in names})
    if not shares_prompts(model):
        got = f"{type(model).__name__} with {text._attn_implementation}"
        fail("model", "one that asks transformers' registry for its attention", got, _ROWS)


def shares_prompts(model: Any) -> bool:
    """Whether `share_prompts` was called on the model and took effect."""
    text = model.config.get_text_config()
    return bool(model._can_set_attn_implementation()) and text._attn_implementation == ATTENTION
