"""SRPO: a token counts as much as its role depends on what it should (docs/MATH.md section 4).

Of arXiv 2605.07274 the abstract alone is public: roles, contrasts, one baseline that both roles
share, positive weights, reward and direction untouched. The formulas are ours. A response has
tokens that say what is seen (perception) and tokens that conclude (reasoning and the answer):

    perception:  s_t = logp(y_t | I) − logp(y_t | Ĩ)              Ĩ: the image corrupted
    reasoning:   s_t = logp(y_t | I) − logp(y_t | I, no perception), or the same Ĩ
    b_i = mean over the tokens with a role of clip(s_t, ±5)
    w_t = exp(clip((s_t − b_i)/τ, ±log 2)), 1 for a token without a role; over its mean
    Â_t = A_i·w_t

A step of a trainer: `roles` of the decoded tokens, `check_roles` once, `reweight`.
"""

import math
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from roma.advantages.inputs import check_mask, check_per_token, per_token
from roma_kernels.arguments import (
    check_dtype,
    check_positive,
    check_shape,
    check_tensor,
    check_values,
)
from roma_kernels.errors import fail

PERCEPTION, REASONING, NEITHER = 0, 1, 2

Tag = str | Sequence[str]
"""The name of a tag, "think" for <think>…</think>, or two texts, the opening and the closing."""


class Roles(NamedTuple):
    """What the tokens of responses do.

    Attributes:
        roles: [B, T] int8: 0 perception, 1 reasoning or answer, 2 neither.
        unparsable: [B] bool: the response does not have the tags as it should, and is all 2.
    """

    roles: Tensor
    unparsable: Tensor


def roles(
    token_texts: Sequence[Sequence[str]],
    *,
    perception: Tag = "perception",
    reasoning: Tag = "think",
    length: int | None = None,
) -> Roles:
    """The role of each token, by the tags of the response.

    A response has one `<perception>…</perception>` and one `<think>…</think>`, in either order,
    side by side. Inside of the first a token is perception; inside of the second, and anywhere
    after it outside of the first, reasoning, which the answer is. Neither are: a token before,
    or between a perception and the reasoning that follows; a token that holds a character of a
    tag, whatever else it holds; a token of no text, as a special one may be. A response with a tag
    missing, repeated, nested, crossed or not closed is unparsable, and has no role anywhere.

    Tags are found in the joined text: they may be spread over tokens. Where they are two texts,
    the closing one of the first block may be the opening one of the second:
    `perception=("<think>", "so"), reasoning=("so", "</think>")` splits `<think> left 3 so 4
    </think>` at "so".

    Args:
        token_texts: for each of B responses the decoded pieces of its tokens, without padding.
        perception: name of the tag, or its two texts.
        reasoning: name of the tag, or its two texts.
        length: T; None: that of the longest response. Beyond its tokens a response is 2.

    Returns:
        Roles, on the CPU.

    Raises:
        TypeError: a response is one text and not its pieces.
        ValueError: a tag that is neither a name nor two different texts, two tags that open alike,
            a response longer than `length`.

    Example:
        >>> roles([["<percep", "tion>a", "b", "</perception>", "<think>", "c", "</think>", "d"]])[0]
        tensor([[2, 2, 0, 2, 2, 1, 2, 1]], dtype=torch.int8)
    """
    orders = _Orders(_texts("perception", perception), _texts("reasoning", reasoning))
    if isinstance(token_texts, str) or any(isinstance(own, str) for own in token_texts):
        expected, remedy = "a list of pieces for each response", "decode token by token"
        fail("token_texts", expected, "a text", remedy, error=TypeError)
    longest = max(map(len, token_texts), default=0)
    if length is not None and length < longest:
        fail("length", f"at least {longest}, of the longest response", str(length), "give T")
    found = torch.full((len(token_texts), length or longest), NEITHER, dtype=torch.int8)
    unparsable = torch.zeros(len(token_texts), dtype=torch.bool)
    for row, own in enumerate(token_texts):
        spans = orders.spans("".join(own))
        unparsable[row] = spans is None
        ends = list(accumulate(map(len, own)))
        starts = [0, *ends[:-1]]
        for start, end, role in spans or ():
            found[row, bisect_left(starts, start) : bisect_right(ends, end)] = role
        silent = [index for index, text in enumerate(own) if not text]
        found[row, silent] = NEITHER
    return Roles(found, unparsable)


def check_roles(
    unparsable: Tensor, *, perception: Tag = "perception", reasoning: Tag = "think"
) -> None:
    """Stops a run in which no response has the tags: SRPO then changes nothing.

    Args:
        unparsable: [B] bool, `Roles.unparsable`, of all ranks. Read on the host.
        perception: as given to `roles`.
        reasoning: as given to `roles`.

    Raises:
        ValueError: all of them are; the message names the tags and the remedy.
    """
    if not len(unparsable) or not bool(unparsable.all()):
        return
    first, second = _texts("perception", perception), _texts("reasoning", reasoning)
    fail(
        "responses",
        f"some with one {first[0]}…{first[1]} and one {second[0]}…{second[1]}",
        f"none of {len(unparsable)}",
        "ask for these tags in the prompt, or name the tags that the model writes",
    )


@torch.no_grad()
def weights(
    logp: Tensor,
    corrupted_logp: Tensor,
    blind_logp: Tensor | None,
    roles: Tensor,
    mask: Tensor,
    *,
    tau: float = 1.0,
    clip: float = 5.0,
    limit: float = math.log(2),
) -> Tensor:
    """The w_t of `reweight`: [B, T] float64, > 0, of mean 1 over a sequence's counted tokens.

    0 outside the mask. Arguments and errors as those of `reweight`.
    """
    _check(logp, corrupted_logp, blind_logp, roles, mask)
    check_positive("tau", tau, "1 is the default")
    check_positive("clip", clip, "5 is the default")
    check_positive("limit", limit, "log 2, for weights of 1/2 to 2, is the default")
    other = corrupted_logp.double()
    if blind_logp is not None:
        other = blind_logp.double().where(roles == REASONING, other)
    has_role = mask & (roles != NEITHER)
    contrast = (logp.double() - other).where(has_role, 0.0)
    check_values(~contrast.isnan(), lambda: _missing(contrast.isnan()))
    baseline = contrast.clamp(-clip, clip).sum(-1) / has_role.sum(-1).clamp(min=1)
    raw = ((contrast - baseline[:, None]) / tau).clamp(-limit, limit).exp()
    raw = raw.where(has_role, 1.0).where(mask, 0.0)
    mean = (raw.sum(-1) / mask.sum(-1).clamp(min=1)).where(mask.any(-1), 1.0)
    return raw / mean[:, None]


@torch.no_grad()
def reweight(
    advantages: Tensor,
    logp: Tensor,
    corrupted_logp: Tensor,
    blind_logp: Tensor | None,
    roles: Tensor,
    mask: Tensor,
    *,
    tau: float = 1.0,
    clip: float = 5.0,
    limit: float = math.log(2),
) -> Tensor:
    """Advantages by token, larger where a token depends on what its role should depend on.

    The formula stands at the top of the module. The baseline b_i is the mean over the counted
    tokens with a role, of both roles; a token without one (2) has no contrast, counts 1 before the
    division by the sequence's mean, and is part of that mean. So the weights of a sequence are
    positive with mean 1, those of an unparsable response are exactly 1, and the sign of A stays.

    Args:
        advantages: [B] or [B, T], fp32 or fp64.
        logp: [B, T] nats, of the policy that sampled, on the clean image; so the next two.
        corrupted_logp: [B, T] nats, of the same tokens on a corrupted image.
        blind_logp: [B, T] nats, on the clean image without the text of the perception; read at
            reasoning tokens alone. None: `corrupted_logp` there too, and no further pass.
        roles: [B, T] of an integer type, each 0, 1 or 2 (`Roles.roles`).
        mask: [B, T] bool, True = counts. Nothing is read outside it.
        tau: > 0, nats.
        clip: > 0, nats, of a token's part in the baseline.
        limit: > 0, of |log w| before the division by the mean.

    Returns:
        [B, T], the dtype of `advantages`, 0 outside the mask, not differentiable.

    Raises:
        TypeError: not a tensor.
        ValueError: other shapes or dtypes, another role, a contrast that is NaN, advantages that
            are not finite, an option that is not > 0.

    Example:
        >>> one = torch.ones(1, 2)
        >>> reweight(one[:, 0], -one, torch.tensor([[-9.0, -1.0]]), None, one.int() * 0, one > 0)
        tensor([[1.6000, 0.4000]])
    """
    own = per_token(advantages, mask)
    options = {"tau": tau, "clip": clip, "limit": limit}
    weight = weights(logp, corrupted_logp, blind_logp, roles, mask, **options)
    return (own * weight).to(advantages.dtype)


class _Orders:
    """The two orders of the blocks, and where in a text of either the roles are."""

    def __init__(self, perception: tuple[str, str], reasoning: tuple[str, str]) -> None:
        if perception[0] == reasoning[0]:
            remedy = "name two different tags"
            fail("reasoning", "a tag that opens otherwise than perception", perception[0], remedy)
        # The longest first: of two tags that begin alike it is the one meant.
        every = sorted({*perception, *reasoning}, key=lambda text: (-len(text), text))
        self.pattern = re.compile("|".join(map(re.escape, every)))
        self.orders = (
            (PERCEPTION, _events(perception, reasoning)),
            (REASONING, _events(reasoning, perception)),
        )

    def spans(self, text: str) -> list[tuple[int, int, int]] | None:
        """Start, end and role of each stretch that has one; None if the text has other tags."""
        tags = list(self.pattern.finditer(text))
        for first, events in self.orders:
            if tuple(tag.group() for tag in tags) != events:
                continue
            second = REASONING if first == PERCEPTION else PERCEPTION
            between = NEITHER if first == PERCEPTION else REASONING
            kinds = [first, second] if len(events) == 3 else [first, between, second]
            ends = [tag.start() for tag in tags[1:]] + [len(text)]
            starts = [tag.end() for tag in tags]
            return list(zip(starts, ends, [*kinds, REASONING], strict=True))
        return None


def _events(first: tuple[str, str], second: tuple[str, str]) -> tuple[str, ...]:
    """The tags of two blocks in a row: once, if it closes the first and opens the second."""
    return (*first, second[1]) if first[1] == second[0] else (*first, *second)


def _texts(name: str, tag: Tag) -> tuple[str, str]:
    """The opening and the closing text of a tag."""
    if isinstance(tag, str):
        if not tag or re.search(r"[<>/\s]", tag):
            remedy = 'write "think" for <think>…</think>, or give both texts'
            fail(name, "the name of a tag", repr(tag), remedy)
        return f"<{tag}>", f"</{tag}>"
    texts = tuple(tag)
    if len(texts) != 2 or not all(texts) or texts[0] == texts[1]:
        fail(name, "two different texts, none empty", repr(tag), "give opening and closing text")
    return texts[0], texts[1]


def _check(
    logp: Tensor, corrupted: Tensor, blind: Tensor | None, roles: Tensor, mask: Tensor
) -> None:
    check_mask(mask)
    check_per_token("logp", logp, mask)
    check_per_token("corrupted_logp", corrupted, mask)
    if blind is not None:
        check_per_token("blind_logp", blind, mask)
    check_tensor("roles", roles, like=mask)
    check_dtype("roles", roles, (torch.int8, torch.int16, torch.int32, torch.int64))
    check_shape("roles", roles, ("[B, T]", tuple(mask.shape)))
    known = ((roles >= PERCEPTION) & (roles <= NEITHER)) | ~mask
    check_values(
        known, lambda: f"roles: expected 0, 1 or 2, got {roles[~known][0]}; take them from roles()"
    )


def _missing(missing: Tensor) -> str:
    return (
        "logp, corrupted_logp, blind_logp: expected numbers at the tokens that have a role, got "
        f"NaN in their difference at index {missing.nonzero()[0].tolist()}; score them again"
    )
