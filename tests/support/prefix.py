"""Small models and layouts for shared prompts, and a row per rollout, to which they are held.

The rows are transformers' own: its sdpa, its positions, its vision tower for each row, no padding.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from types import MethodType
from typing import Any, NamedTuple

import pytest
import torch
from support import small_model
from torch import Tensor, nn

from roma.models.prefix import Group, Packed, pack
from roma.models.processor import Processor
from roma.models.prompts import PromptBatch
from roma.models.qwen_vl import Policy

T, PER_PROMPT = 6, 4  # tokens of the longest completion, rollouts of a prompt
_SIZE = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}


class Case(NamedTuple):
    """What is packed: a rollout's prompt is its number // PER_PROMPT."""

    prompts: list[Tensor]  # P of [L] int64
    tokens: Tensor  # [B, T] int64
    lengths: Tensor  # [B]
    groups: list[Group]
    upstream: Tensor  # [K + 1, B, T], the gradient by each log-prob
    batch: PromptBatch | None = None  # of a model with images
    views: list[Tensor] = []  # noqa: RUF012  # K of [Σ gh·gw, C]

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Variant and rollout, in the groups' order."""
        return [(g.variant, r) for g in self.groups for r in g.rollouts]


@dataclass
class Score:
    """Log-probs of all pairs' tokens, and the gradient of their sum with the upstream weights."""

    logp: Tensor
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def off(self, exact: Score) -> tuple[str, float]:
        """What differs most, and by which share of its norm.

        Of a gradient that is next to nothing, the share of 1e-3 of them all.
        """
        whole = sum(float(g.square().sum()) for g in exact.gradients.values()) ** 0.5
        made = {"logp": _norm(self.logp - exact.logp) / _norm(exact.logp)}
        for name in exact.gradients.keys() | self.gradients.keys():
            want, got = (x.gradients.get(name, torch.zeros(())) for x in (exact, self))
            made[name] = _norm(got - want) / max(_norm(want), 1e-3 * whole)
        return max(made.items(), key=lambda item: item[1])

    def shares(self, exact: Score) -> tuple[float, float]:
        """The errors of the log-probs and of the whole gradient, as shares of their norms."""
        mine, theirs = (
            torch.cat([x.gradients[name].double().flatten() for name in exact.gradients])
            for x in (self, exact)
        )
        logp = _norm(self.logp.double() - exact.logp) / _norm(exact.logp)
        return logp, _norm(mine - theirs) / _norm(theirs)


def _norm(x: Tensor) -> float:
    return float(x.detach().double().norm())


# Layouts ----------------------------------------------------------------------------------------

PROBLEMS: dict[str, list[tuple[str, list[tuple[int, int]]]]] = {
    "padded": [
        ("<image> sum ?", [(32, 64)]),
        ("left <image> right <image> larger ?", [(32, 32), (64, 48)]),
        ("so <image> larger sum ?", [(48, 48)]),
    ],
    "text among images": [
        ("sum ?", []),
        ("left <image> right <image> larger ?", [(32, 32), (32, 64)]),
        ("larger sum left right so ?", []),
    ],
    "text alone": [("sum ?", []), ("larger sum left right so ?", []), ("left sum ?", [])],
    "equal": [("<image> sum ?", [(32, 32)]), ("<image> larger ?", [(32, 32)])],
}


def groups_of(kind: str, prompts: int, views: int) -> list[Group]:
    """`whole`: in order; `single`: a rollout each, any order; `views`: some of each, any order."""
    draw = random.Random(0)
    every = range(prompts * PER_PROMPT)
    made = []
    for variant in range(views + 1):
        if kind == "whole":
            made += [Group(variant, p, _own(p)) for p in range(prompts)]
        elif kind == "single":
            made += [Group(variant, r // PER_PROMPT, (r,)) for r in every]
        else:  # a prompt may have no rollout on a view, and then no group
            for p in range(prompts):
                own = [r for r in _own(p) if not variant or (r + variant) % 3]
                draw.shuffle(own)
                some = own[: len(own) - (variant + p) % 2]
                made += [Group(variant, p, tuple(some))] if some and (p or variant != 2) else []
    if kind != "whole":
        draw.shuffle(made)
    return made


def _own(prompt: int) -> tuple[int, ...]:
    return tuple(range(prompt * PER_PROMPT, (prompt + 1) * PER_PROMPT))


def lengths_of(kind: str, count: int) -> Tensor:
    """`ragged`: 1 to T, each of them; `one`: 1; `full`: T."""
    ragged = torch.arange(count) * 5 % T + 1
    return {"ragged": ragged, "one": ragged * 0 + 1, "full": ragged * 0 + T}[kind]


def _case(prompts: list[Tensor], words: range, grouping: str, lengths: str, views: int) -> Case:
    count = len(prompts) * PER_PROMPT
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(words.start, words.stop, (count, T), generator=generator)
    upstream = torch.randn(views + 1, count, T, generator=generator, dtype=torch.float64)
    groups = groups_of(grouping, len(prompts), views)
    return Case(prompts, tokens, lengths_of(lengths, count), groups, upstream)


def text_case(grouping: str, lengths: str) -> Case:
    """Prompts of 1, 5 and 9 tokens."""
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(1, 64, (size,), generator=generator) for size in (5, 1, 9)]
    return _case(prompts, range(1, 64), grouping, lengths, 0)


def image_case(policy: Policy, problems: str, grouping: str, lengths: str, views: int) -> Case:
    """Views are other images of the same size."""
    draw = torch.Generator().manual_seed(5)
    texts, sizes = zip(*PROBLEMS[problems], strict=True)
    images = [
        [torch.randint(256, (*hw, 3), generator=draw).to(torch.uint8).numpy() for hw in own]
        for own in sizes
    ]
    batch = policy.encode_prompts(list(texts), images)
    clean = batch.pixel_values.to(policy.head_weight.dtype)
    changed = [torch.randn(clean.shape, generator=draw).to(clean) for _ in range(views)]
    starts = [batch.input_ids.shape[1] - n for n in batch.lengths]
    prompts = [row[start:] for row, start in zip(batch.input_ids, starts, strict=True)]
    case = _case(prompts, range(9, 20), grouping, lengths, views)
    return case._replace(batch=replace(batch, pixel_values=clean), views=changed)


def later(case: Case) -> Case:
    """The same with completions a position further from their prompts: a planted error."""
    assert case.batch
    return case._replace(batch=replace(case.batch, next_position=case.batch.next_position + 1))


# Scores -----------------------------------------------------------------------------------------


def rows(model: Any, case: Case, *, autocast: bool = False) -> Score:
    """Each pair alone, as transformers runs it."""
    made = []
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for variant, rollout in case.pairs:
            prompt = rollout // PER_PROMPT
            own = case.tokens[rollout, : case.lengths[rollout]]
            ids = torch.cat([case.prompts[prompt], own[:-1]])[None]
            states = model.model(ids, use_cache=False, **_images(model, case, variant, prompt, ids))
            before = len(case.prompts[prompt]) - 1
            made.append(states.last_hidden_state[0, before:])
    return scored(model, case, torch.cat(made))


def _images(model: Any, case: Case, variant: int, prompt: int, ids: Tensor) -> dict[str, Tensor]:
    batch = case.batch
    if batch is None or not batch.images_of(prompt):
        return {}
    pixels = [batch.pixel_values, *case.views][variant][batch.patches(prompt)]
    grids = batch.grids[list(batch.images_of(prompt))]
    kinds = (ids == model.config.image_token_id).int()
    return {"pixel_values": pixels, "image_grid_thw": grids, "mm_token_type_ids": kinds}


def packed(model: Any, case: Case, *, autocast: bool = False) -> Score:
    """All pairs in one row: of a policy with images, or of a language model."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        states, row = states_of(model, case)
    core = model.model if isinstance(model, Policy) else model
    return scored(core, case, states[row.reads(case.pairs)])


def states_of(model: Any, case: Case, groups: list[Group] | None = None) -> tuple[Tensor, Packed]:
    """[S, D] and the row; `groups`: the order in which images are read, if it is another one."""
    if case.batch is None:
        row = pack(case.prompts, case.tokens, case.lengths, case.groups)
        return model.model(**row.inputs(), use_cache=False).last_hidden_state[0], row
    row = model.packed(case.batch, case.groups, case.tokens, case.lengths)
    features = model.group_features(case.batch, case.views, groups or case.groups)
    return model.packed_hidden(row, features), row


def scored(model: Any, case: Case, states: Tensor) -> Score:
    """Log-probs and gradients of states [N, D] in the order of the pairs."""
    tokens = torch.cat([case.tokens[r, : case.lengths[r]] for _, r in case.pairs])
    weights = torch.cat([case.upstream[v, r, : case.lengths[r]] for v, r in case.pairs])
    weight = model.get_output_embeddings().weight
    logp = (states.to(weight.dtype) @ weight.T).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    model.zero_grad()
    (logp * weights).sum().backward()
    found = {n: w.grad.clone() for n, w in model.named_parameters() if w.grad is not None}
    return Score(logp.detach(), found)


# Models -----------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def qwen2_5_folder() -> Path:
    """A small Qwen2.5-VL with the small Qwen3-VL's tokenizer; two heads of keys for four."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    processor = Processor.load(small_model.folder() / "model")
    ids = processor.tokenizer.convert_tokens_to_ids
    text = {
        **_SIZE,
        "vocab_size": len(processor.tokenizer),
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.1,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [2, 3, 3],
        },
        "pad_token_id": ids("<|endoftext|>"),
        "eos_token_id": ids("<|im_end|>"),
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 8,
        "spatial_merge_size": 2,
        "window_size": 32,
        "out_hidden_size": 64,
        "fullatt_block_indexes": [1],
        "initializer_range": 0.1,
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen2_5_VLForConditionalGeneration(config)
    path = small_model.folder() / "qwen2.5"
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def vision_folder(family: str) -> Path:
    """Of "qwen3" or "qwen2.5"."""
    return qwen2_5_folder() if family == "qwen2.5" else small_model.folder() / "model"


def plain(path: Path) -> Any:
    """The model of a folder as transformers loads it."""
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(path).eval()


def text_model(family: str, **options: Any) -> Any:
    """A causal language model with random weights: a name of transformers' configurations."""
    import transformers

    config = getattr(transformers, f"{family}Config")
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {**_SIZE, "num_attention_heads": 4, "initializer_range": 0.1, **special, **options}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, f"{family}ForCausalLM")(config(**sizes)).eval()


@contextmanager
def exact(*models: nn.Module) -> Iterator[None]:
    """Without transformers' casts to fp32 in the norms and in the vision tower's rotations."""
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
    from transformers.models.qwen3_vl import modeling_qwen3_vl

    def norm(self: Any, x: Tensor) -> Tensor:
        scale = (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()
        return self.weight * (x * scale)

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        def turned(x: Tensor) -> Tensor:
            a, b = x.chunk(2, dim=-1)
            return x * cos.unsqueeze(-2) + torch.cat([-b, a], dim=-1) * sin.unsqueeze(-2)

        return turned(q), turned(k)

    with pytest.MonkeyPatch.context() as patch:
        for module in (modeling_qwen2_5_vl, modeling_qwen3_vl):
            patch.setattr(module, "apply_rotary_pos_emb_vision", rotate)
        for model in models:
            for part in model.modules():
                if type(part).__name__.endswith("RMSNorm"):
                    patch.setattr(part, "forward", MethodType(norm, part))
        yield


Attend = Callable[..., Tensor]


def by_mask(seen: Tensor) -> Attend:
    """Attention over the whole row with a mask [S, S], as the registered one is called."""

    def attend(q: Tensor, k: Tensor, v: Tensor, _: Any, scaling: float | None) -> Tensor:
        repeats = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * (
            q.shape[-1] ** -0.5 if scaling is None else scaling
        )
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, v)

    return attend


def seen_in(case: Case) -> Tensor:
    """[S, S]: which tokens a token of the row sees, from the definition."""
    owner, group = [], []  # of each token: -1 its group's prompt, else the completion's number
    for number, g in enumerate(case.groups):
        parts = [(-1, len(case.prompts[g.prompt]))]
        parts += [(i, int(case.lengths[r]) - 1) for i, r in enumerate(g.rollouts)]
        for who, count in parts:
            owner += [who] * count
            group += [number] * count
    who, of = torch.tensor(owner), torch.tensor(group)
    causal = torch.ones(len(who), len(who), dtype=torch.bool).tril()
    return causal & (of[:, None] == of) & ((who == -1) | (who[:, None] == who))
