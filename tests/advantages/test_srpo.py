"""SRPO: roles against a reading character by character, weights against MATH.md in floats."""

import math
import statistics
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from roma.advantages.srpo import check_roles, reweight, roles, weights

EPS = torch.finfo(torch.float64).eps
LOG2 = math.log(2)

# Responses whose tags are as they should be, in parts; with each, what its characters are:
# p(erception), r(easoning), or neither.
SOUND = [
    [
        *(
            ("So ", "."),
            ("<perception>", "."),
            ("3 and 4", "p"),
            ("</perception>", "."),
            (" ", "."),
        ),
        *(("<think>", "."), ("3+4", "r"), ("</think>", "."), (" \\boxed{7}", "r")),
    ],
    [
        *(("<think>", "."), ("a", "r"), ("</think>", "."), ("b", "r"), ("<perception>", ".")),
        *(("c", "p"), ("</perception>", "."), ("d", "r")),
    ],
    [("<perception></perception><think></think>", ".")],
    [
        *(("<perception>", "."), ("a < b</p>", "p"), ("</perception><think>", ".")),
        *(("<perc>", "r"), ("</think>", "."), ("é", "r")),
    ],
]
UNSOUND = [
    "",
    "7",
    "<think>3+4</think>7",
    "<perception>3</perception>7",
    "<perception>3<think>4</think>7",
    "<perception>3</perception><think>4",
    "3</perception><think>4</think>",
    "<perception>3</perception><perception>3</perception><think>4</think>",
    "<perception>3</perception><think>4</think><think>4</think>",
    "<think><perception>3</perception>4</think>",
    "<perception>3<think>4</perception>5</think>",
    "</perception>3<perception><think>4</think>",
    "<Perception>3</Perception><think>4</think>",
]


def pieces(text: str, generator: torch.Generator) -> list[str]:
    """The text cut anywhere, with pieces of no text here and there."""
    cuts = (torch.rand(len(text) + 1, generator=generator) < 0.4).nonzero().flatten().tolist()
    ends = sorted([0, *cuts, *cuts[:2], len(text)])
    return [text[a:b] for a, b in pairwise(ends)]


def by_letters(letters: str, own: list[str]) -> list[int]:
    found, at = [], 0
    for piece in own:
        does = set(letters[at : at + len(piece)])
        found.append({"p": 0, "r": 1}.get(does.pop(), 2) if len(does) == 1 else 2)
        at += len(piece)
    return found


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=40)
def test_roles_of_tags_spread_over_tokens(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sound = ["".join(text for text, _ in parts) for parts in SOUND]
    does = ["".join(letter * len(text) for text, letter in parts) for parts in SOUND]
    every = [pieces(text, generator) for text in [*sound, *UNSOUND]]
    found = roles(every)
    assert found.roles.dtype == torch.int8
    assert found.unparsable.tolist() == [False] * len(SOUND) + [True] * len(UNSOUND)
    for row, letters, own in zip(found.roles.tolist(), does, every, strict=False):
        expected = by_letters(letters, own)
        assert row == expected + [2] * (len(row) - len(expected))
    assert bool((found.roles[len(SOUND) :] == 2).all())
    # Any order of the batch, and a longer T.
    again = roles(every[::-1], length=found.roles.shape[1] + 2)
    assert torch.equal(again.roles[:, :-2], found.roles.flip(0))
    assert bool((again.roles[:, -2:] == 2).all())


def test_tokens_that_hold_a_tag_and_more() -> None:
    own = ["x<percep", "tion>3", "4", "5</perception>", "<think>", "6", "</think>7", "8", ""]
    assert roles([own]).roles.tolist() == [[2, 2, 0, 2, 2, 1, 2, 1, 2]]


def test_other_tags() -> None:
    text = ["<see>", "a", "</see>", "<why>", "b", "</why>", "c"]
    found = roles([text], perception="see", reasoning="why")
    assert found.roles.tolist() == [[2, 0, 2, 2, 1, 2, 1]]
    assert bool(roles([text]).unparsable)
    # The demo's answers: what is read off the image stands before "so".
    words = "<think> left 3 right 4 so 7 </think> \\boxed{ 7 }".split()
    found = roles([words], perception=("<think>", "so"), reasoning=("so", "</think>"))
    assert found.roles.tolist() == [[2, 0, 0, 0, 0, 2, 1, 2, 1, 1, 1]]
    # Of two that begin alike the longer one is meant.
    words = ["see", "a", ".", "seen", "b", "!", "c"]
    found = roles([words], perception=("see", "."), reasoning=("seen", "!"))
    assert found.roles.tolist() == [[2, 0, 2, 2, 1, 2, 1]]


def test_no_responses_and_no_tokens() -> None:
    assert roles([]).roles.shape == (0, 0) and roles([]).unparsable.shape == (0,)
    assert roles([[], []], length=3).roles.tolist() == [[2] * 3] * 2


def test_absent_tags_are_told() -> None:
    check_roles(torch.tensor([True, False]))
    check_roles(torch.tensor([], dtype=torch.bool))
    message = (
        r"some with one <perception>…</perception> and one <why>…</why>, got none of 2; ask for"
    )
    with pytest.raises(ValueError, match=message):
        check_roles(torch.tensor([True, True]), reasoning="why")


def test_wrong_tags() -> None:
    for tag in ("", "<think>", "two words"):
        with pytest.raises(ValueError, match="perception: expected the name of a tag"):
            roles([], perception=tag)
    for pair in (("a",), ("a", "a"), ("", "b")):
        with pytest.raises(ValueError, match="reasoning: expected two different texts"):
            roles([], reasoning=pair)
    with pytest.raises(ValueError, match="a tag that opens otherwise than perception"):
        roles([], perception="think")
    with pytest.raises(TypeError, match="token_texts: expected a list of pieces for each response"):
        roles(["<think>"])
    with pytest.raises(ValueError, match="length: expected at least 2, of the longest"):
        roles([["a", "b"]], length=1)


Batch = dict[str, Tensor]


def weights_by_hand(
    batch: Batch,
    *,
    tau: float = 1.0,
    clip: float = 5.0,
    limit: float = LOG2,
    planted: str = "",
) -> Tensor:
    """MATH.md section 4, a sequence at a time."""
    found = torch.zeros_like(batch["logp"])
    for i, row in enumerate(batch["mask"].tolist()):
        counted = [t for t, on in enumerate(row) if on]
        role = batch["roles"][i].tolist()
        contrast = {}
        for t in counted:
            if role[t] < 2:
                other = batch["blind_logp" if role[t] == 1 else "corrupted_logp"]
                contrast[t] = float(batch["logp"][i, t] - other[i, t])
        inside = {t: min(max(s, -clip), clip) for t, s in contrast.items()}
        raw = {}
        for t in counted:
            among = [s for u, s in inside.items() if planted != "by_role" or role[u] == role[t]]
            if planted == "over_all":
                among = [*among, *(0.0 for _ in counted if _ not in inside)]
            if t in contrast:
                z = (contrast[t] - statistics.fmean(among)) / tau
                raw[t] = math.exp(min(max(z, -limit), limit))
            else:
                raw[t] = 1.0
        for t in counted:
            found[i, t] = raw[t] / statistics.fmean(raw.values())
    return found


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Log-probs, roles and a mask with gaps; what is not to be read is no number."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    B, T = draw(st.sampled_from([(1, 1), (4, 9), (2, 30)]))
    mask = torch.rand(B, T, generator=generator) < 0.8
    logp, corrupted, blind = (
        -2 * torch.rand(B, T, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    role = torch.randint(3, (B, T), generator=generator).to(torch.int8)
    difficulty = draw(
        st.sampled_from(["plain", "equal", "far", "one_role", "no_role", "empty_row"])
    )
    if difficulty == "equal":
        corrupted, blind = logp.clone(), logp.clone()
    elif difficulty == "far":  # beyond every clip, and what rounds to probability 0
        corrupted = corrupted * 100
        blind[0] = -math.inf
    elif difficulty == "one_role":
        role.fill_(1)
    elif difficulty == "no_role":
        role[0] = 2
    elif difficulty == "empty_row":
        mask[0] = False
    corrupted = corrupted.masked_fill(role != 0, math.nan)
    blind = blind.masked_fill(role != 1, math.nan)
    logp = logp.masked_fill(~mask, math.nan)
    role = role.masked_fill(~mask, 9)
    return {
        "logp": logp,
        "corrupted_logp": corrupted,
        "blind_logp": blind,
        "roles": role,
        "mask": mask,
    }


OPTIONS = [{}, {"tau": 0.3, "clip": 1.0, "limit": 1.5}]


@given(batches(), st.sampled_from(OPTIONS))
@settings(max_examples=80)
def test_weights(batch: Batch, options: dict[str, float]) -> None:
    found, mask = weights(**batch, **options), batch["mask"]
    expected = weights_by_hand(batch, **options)
    # A mean of T contrasts of at most 5 nats, in units of τ; exp and a mean of at most e^1.5.
    bound = 32 * mask.shape[1] * 5 / 0.3 * EPS * 5
    assert float((found - expected).abs().max()) <= bound
    assert bool((found[mask] > 0).all()) and bool((found[~mask] == 0).all())
    mean = found.sum(-1)[mask.any(-1)] / mask.sum(-1)[mask.any(-1)]
    torch.testing.assert_close(mean, torch.ones_like(mean), rtol=0, atol=mask.shape[1] * EPS)
    # Without a role in a sequence, or any contrast, the weights are exactly 1.
    flat = (batch["roles"].masked_fill(~mask, 2) == 2).all(-1)
    assert bool((found[flat] == mask[flat]).all())


@given(batches(), st.integers(0, 2**32 - 1))
@settings(max_examples=40)
def test_advantages(batch: Batch, seed: int) -> None:
    generator, mask = torch.Generator().manual_seed(seed), batch["mask"]
    A = torch.randn(len(mask), generator=generator, dtype=torch.float64)
    found = reweight(A, **batch)
    assert torch.equal(found, (A[:, None] * weights(**batch)).masked_fill(~mask, 0))
    assert torch.equal(found.sign(), A.sign()[:, None] * mask)
    by_token = A[:, None] * torch.ones_like(batch["logp"])
    assert torch.equal(reweight(by_token.masked_fill(~mask, math.nan), **batch), found)
    order = torch.randperm(len(mask), generator=generator)
    moved = reweight(A[order], **{name: value[order] for name, value in batch.items()})
    torch.testing.assert_close(moved, found[order], rtol=1e-12, atol=0)
    longer = {
        name: torch.nn.functional.pad(value, (0, 5), value=math.nan if "logp" in name else 0)
        for name, value in batch.items()
    }
    torch.testing.assert_close(reweight(A, **longer)[:, :-5], found, rtol=1e-12, atol=0)


def plain() -> Batch:
    generator = torch.Generator().manual_seed(5)
    logps = -2 * torch.rand(3, 4, 12, generator=generator, dtype=torch.float64)
    names = ("logp", "corrupted_logp", "blind_logp")
    role = torch.arange(12).expand(4, 12) % 3
    mask = torch.ones(4, 12, dtype=torch.bool)
    return dict(zip(names, logps, strict=True)) | {"roles": role, "mask": mask}


@pytest.mark.parametrize("planted", ["by_role", "over_all"])
def test_another_baseline_is_seen(planted: str) -> None:
    batch = plain()
    wrong = weights_by_hand(batch, planted=planted)
    assert float((weights(**batch) - wrong).abs().max()) > 1e-2


def test_one_pass_serves_both_roles() -> None:
    batch = plain()
    both = weights(**batch | {"blind_logp": batch["corrupted_logp"]})
    single = dict(batch, blind_logp=None)
    assert torch.equal(weights(**single), both)
    assert not torch.equal(weights(**batch), both)
    # More where the corrupted image makes a token less likely.
    less = batch["corrupted_logp"] - 4.0 * (torch.arange(12) == 3)
    more = weights(**dict(single, corrupted_logp=less))
    assert bool((more[:, 3] > both[:, 3]).all()) and bool((more[:, 1] < both[:, 1]).any())


def test_dtypes_and_gradients() -> None:
    batch = plain()
    leaves = {name: batch[name].float().requires_grad_() for name in ("logp", "corrupted_logp")}
    found = reweight(torch.ones(4).requires_grad_(), **batch | leaves)
    assert found.dtype == torch.float32 and not found.requires_grad
    torch.testing.assert_close(found.double(), weights(**batch), rtol=1e-5, atol=0)


def test_wrong_input() -> None:
    batch, one = plain(), torch.ones(4)
    nan = batch["blind_logp"].clone()
    nan[2, 4] = math.nan  # a reasoning token
    assert reweight(one, **dict(batch, corrupted_logp=nan)).isfinite().all()
    with pytest.raises(ValueError, match=r"NaN in their difference at index \[2, 4\]; score them"):
        reweight(one, **dict(batch, blind_logp=nan))
    with pytest.raises(ValueError, match="roles: expected 0, 1 or 2, got 3; take them from"):
        reweight(one, **dict(batch, roles=batch["roles"] + 1))
    with pytest.raises(ValueError, match=r"roles: expected dtype int8 or .* got float32"):
        reweight(one, **dict(batch, roles=batch["roles"].float()))
    with pytest.raises(ValueError, match=r"corrupted_logp: expected \[B, T\] = \[4, 12\], got"):
        reweight(one, **dict(batch, corrupted_logp=nan[:, 1:]))
    with pytest.raises(ValueError, match=r"advantages: expected \[B\] = \[4\] or"):
        reweight(one[:3], **batch)
    for name in ("tau", "clip", "limit"):
        with pytest.raises(ValueError, match=f"{name}: expected a finite number > 0, got 0"):
            reweight(one, **batch, **{name: 0})
