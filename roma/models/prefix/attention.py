"""The attention of packed groups, registered with transformers under a name of its own.

    prompt       attends to itself, causally
    completion   attends to its group's prompt, and causally to itself

Rows without groups (sampling, evaluation, a row per rollout) go to transformers' sdpa as before.
Groups go, on a GPU in half precision, to one call of PyTorch's variable-length flash attention;
else, in fp32 and on a CPU, to sdpa, prompts and completions of equal shape together. Neither forms a
mask over the row: cost and memory are linear in the number of groups. Keys and values of a prompt
are gathered for each of its completions, so that the backward sums the prompt's gradient over them.
"""

import inspect
from collections import defaultdict
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from roma_kernels.errors import fail

ATTENTION = "roma_shared"
"""The name under which the attention is registered with transformers."""

_REFUSED = ("sliding_window", "softcap", "s_aux", "position_bias")  # change what a token sees


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
        self._on: dict[torch.device, tuple[list[_Kind], Tensor]] = {}
        self._varlen: dict[torch.device, _Varlen] = {}

    @cached_property
    def size(self) -> int:
        """Tokens of the row."""
        return int(self.prompt_lengths.sum() + self.lengths.sum())

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
        ends = (torch.tensor([0, *x]).cumsum(0).to(device, torch.int32) for x in (q, k))
        return _Varlen(torch.from_numpy(np.concatenate(keys)).to(device), *ends, max(q), max(k))


def _kind(
    queries: NDArray[np.int64],
    keys: NDArray[np.int64],
    mask: Tensor | None,
    device: torch.device,
) -> _Kind:
    flat = [torch.from_numpy(x.reshape(-1)).to(device) for x in (queries, keys)]
    shape = (len(queries), queries.shape[1], keys.shape[1])
    return _Kind(*flat, shape, None if mask is None else mask.to(device))


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
        ValueError: groups together with dropout, or with a window, a soft cap or a sink.
    """
    if shared is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **options
        )
    for name in _REFUSED:
        if options.get(name) is not None:
            remedy = "set worker.actor.share_prompt=false, or give a row to each rollout"
            fail(name, "none, because prompts are shared", repr(options[name]), remedy)
    if dropout:
        remedy = "call model.eval(): old and new log-probs would differ too"
        fail("attention dropout", "0, because prompts are shared", f"{dropout:g}", remedy)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [S, H, d]
    half = query.dtype in (torch.bfloat16, torch.float16)
    run = _by_varlen if query.is_cuda and half else _by_shape
    return run(q, k, v, shared, scaling)[None], None


def _by_shape(q: Tensor, k: Tensor, v: Tensor, shared: Segments, scaling: float | None) -> Tensor:
    kinds, at = shared.kinds(q.device)
    repeats = q.shape[1] // k.shape[1]
    made = []
    for kind in kinds:
        n, queries, keys = kind.shape
        own = _heads(q, kind.queries, n, queries)
        seen = [_heads(x, kind.keys, n, keys) for x in (k, v)]
        if repeats > 1:
            seen = [x.repeat_interleave(repeats, dim=1) for x in seen]
        out = scaled_dot_product_attention(
            own, *seen, attn_mask=kind.mask, is_causal=kind.mask is None, scale=scaling
        )
        made.append(out.transpose(1, 2).reshape(n * queries, -1))
    return torch.cat(made).index_select(0, at).view(q.shape)


def _heads(x: Tensor, where: Tensor, n: int, length: int) -> Tensor:
    """[S, H, d] at positions [n·length] as [n, H, length, d]."""
    return x.index_select(0, where).view(n, length, *x.shape[1:]).transpose(1, 2)


def _by_varlen(q: Tensor, k: Tensor, v: Tensor, shared: Segments, scaling: float | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    where = shared.varlen(q.device)
    # Fewer queries than keys: causal from the bottom right, as a completion behind its prompt is.
    options: dict[str, Any] = {"scale": scaling, "window_size": (-1, 0)}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    k, v = (x.index_select(0, where.keys) for x in (k, v))
    out = varlen_attn(
        q.contiguous(), k, v, where.cu_q, where.cu_k, where.max_q, where.max_k, **options
    )
    assert isinstance(out, Tensor)  # without return_aux
    return out


def share_prompts(model: Any) -> None:
    """Has a transformers model's text layers use this attention; once, before training.

    Args:
        model: a causal language model, or a vision-language model (its vision tower keeps its own
            attention), whose layers ask transformers' registry for their attention.

    Raises:
        ValueError: the model does not; give such a model a row per rollout.

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

    AttentionInterface.register(ATTENTION, attention)
    # Without a mask function of this name padding would be ignored in silence.
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    text = model.config.get_text_config()
    if text is model.config:
        model.set_attn_implementation(ATTENTION)
    else:
        names = [name for name in model.config.sub_configs if getattr(model.config, name) is text]
        model.set_attn_implementation({name: ATTENTION for name in names})
    if not shares_prompts(model):
        got = f"{type(model).__name__} with {text._attn_implementation}"
        remedy = "give each rollout a row of its own (worker.actor.share_prompt=false)"
        fail("model", "one that asks transformers' registry for its attention", got, remedy)


def shares_prompts(model: Any) -> bool:
    """Whether `share_prompts` was called on the model and took effect."""
    text = model.config.get_text_config()
    return bool(model._can_set_attn_implementation()) and text._attn_implementation == ATTENTION
