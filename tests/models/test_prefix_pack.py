"""The row of packed groups against one that is laid out token by token, and what is refused."""

from __future__ import annotations

import random
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import roma
from roma.models.prefix import Group, Packed, pack

ROOT = Path(__file__).resolve().parents[2]


def drawn(seed: int, axes: int) -> tuple[dict[str, Any], list[Group]]:
    """Prompts of 1 to 7 tokens, completions of 1 to 5; groups may be empty, rollouts left out."""
    draw = random.Random(seed)
    prompts = [
        torch.tensor([draw.randint(1, 99) for _ in range(draw.randint(1, 7))])
        for _ in range(draw.randint(1, 4))
    ]
    count = draw.randint(1, 9)
    tokens = torch.tensor([[draw.randint(100, 199) for _ in range(5)] for _ in range(count)])
    lengths = torch.tensor([draw.randint(1, 5) for _ in range(count)])
    groups = []
    for variant in range(draw.randint(1, 3)):
        left = list(range(count))
        draw.shuffle(left)
        while left:
            size, prompt = draw.randint(0, 3), draw.randrange(len(prompts))
            groups.append(Group(variant, prompt, tuple(left[:size])))
            left = left[size + draw.randint(0, 1) :]
    draw.shuffle(groups)
    given_: dict[str, Any] = {"prompts": prompts, "tokens": tokens, "lengths": lengths}
    if axes:
        given_["positions"] = [torch.randint(50, (axes, len(ids))) for ids in prompts]
        given_["next_position"] = torch.randint(50, (len(prompts),))
    return given_, groups


def laid_out(given_: dict[str, Any], groups: list[Group]) -> tuple[list, list, dict]:
    """Ids, positions (a tuple for each token), and of each pair the places of its states."""
    ids, places, states = [], [], {}
    for group in groups:
        prompt = given_["prompts"][group.prompt].tolist()
        own = [(i,) for i in range(len(prompt))]
        behind, axes = len(prompt), 1
        if "positions" in given_:
            own = list(zip(*given_["positions"][group.prompt].tolist(), strict=True))
            behind, axes = int(given_["next_position"][group.prompt]), len(own[0])
        ids += prompt
        places += own
        last = len(ids) - 1
        for rollout in group.rollouts:
            count = int(given_["lengths"][rollout]) - 1  # the last token predicts nothing
            states[group.variant, rollout] = [last, *range(len(ids), len(ids) + count)]
            ids += given_["tokens"][rollout, :count].tolist()
            places += [(behind + i,) * axes for i in range(count)]
    return ids, places, states


@settings(max_examples=100)
@given(seed=st.integers(0, 10_000), axes=st.sampled_from([0, 3, 4]))
def test_token_by_token(seed: int, axes: int) -> None:
    given_, groups = drawn(seed, axes)
    row = pack(**given_, groups=groups)
    ids, places, states = laid_out(given_, groups)
    assert row.input_ids.tolist() == [ids] and row.segments.size == len(ids)
    assert row.position_ids.shape == ((axes, 1, len(ids)) if axes else (1, len(ids)))
    assert row.position_ids.reshape(-1, len(ids)).T.tolist() == [list(place) for place in places]
    pairs = random.Random(seed).choices(list(states), k=5) if states else []  # some of them twice
    assert row.reads(pairs).tolist() == [place for pair in pairs for place in states[pair]]
    views = [pair for pair in states if pair[0]]
    where = row.view_rows(views, views=2, rollouts=len(given_["tokens"]))
    reads = row.reads(views).tolist()
    for k, i in [(k, i) for k in range(2) for i in range(len(given_["tokens"]))]:
        start = int(where[k, i])
        assert (start >= 0) == ((k + 1, i) in states)
        if start >= 0:
            own = states[k + 1, i]
            assert reads[start : start + len(own)] == own


PROMPTS = [torch.tensor([1, 2]), torch.tensor([3])]
TOKENS = torch.tensor([[7, 8, 9], [7, 5, 5]])
GOOD: dict[str, Any] = {
    "prompts": PROMPTS,
    "tokens": TOKENS,
    "lengths": torch.tensor([3, 1]),
    "groups": [Group(0, 0, (0,)), Group(0, 1, (1,))],
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"groups": []}, "groups: expected at least one, got none"),
        ({"groups": [Group(0, 2, (0,))]}, r"groups\[0\]: expected a prompt from 0 to 1, got 2"),
        ({"groups": [Group(0, -1, (0,))]}, r"groups\[0\]: expected a prompt from 0 to 1, got -1"),
        ({"groups": [Group(0, 0, (2,))]}, r"groups\[0\]: expected rollouts from 0 to 1, got 2"),
        ({"groups": [Group(0, 0, (-1,))]}, r"groups\[0\]: expected rollouts from 0 to 1, got -1"),
        (
            {"groups": [Group(1, 0, (0,)), Group(1, 1, (0,))]},
            r"rollout 0 twice on variant 1, in groups\[1\] again; merge the groups",
        ),
        (
            {"prompts": [PROMPTS[0], torch.tensor([]).long()]},
            r"prompts\[1\]: expected at least one",
        ),
        ({"lengths": torch.tensor([3, 0])}, "lengths: expected 1 to 3, got 0 for rollout 1"),
        ({"lengths": torch.tensor([4, 1])}, "lengths: expected 1 to 3, got 4 for rollout 0"),
        ({"lengths": torch.tensor([3])}, r"lengths: expected \[B\] = \[2\], got \[1\]"),
        ({"positions": [torch.ones(3, 2)]}, "next_position: expected P numbers"),
        (
            {"positions": [torch.ones(3, 5), torch.ones(3, 1)], "next_position": [5, 1]},
            r"positions\[0\]: expected one for each token, got 5 for 2 tokens; leave padding out",
        ),
    ],
)
def test_what_is_refused(change: dict[str, Any], words: str) -> None:
    pack(**GOOD)
    with pytest.raises(ValueError, match=words):
        pack(**GOOD | change)


def test_pairs_that_are_not_there() -> None:
    row: Packed = pack(**GOOD)
    with pytest.raises(
        ValueError, match=r"pairs: expected pairs of the .* got variant 1, rollout 0"
    ):
        row.reads([(0, 0), (1, 0)])
    with pytest.raises(ValueError, match=r"pairs: expected those of views, .* got variant 0"):
        row.view_rows([(0, 0)], views=1, rollouts=2)
    assert row.view_rows([], views=1, rollouts=2).tolist() == [[-1, -1]]


def test_the_example_is_the_whole_update(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its loss and gradients are those of a row per rollout, on every view."""
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    made = runpy.run_path(str(ROOT / "examples" / "shared_update.py"))
    said = capsys.readouterr().out
    assert re.match(r"loss -?0\.\d+, worst view 0\.\d+ nats\ntokens run \d+; .*: 2\d%\n$", said)
    model, tokens, lengths = made["model"], made["tokens"], made["lengths"]
    found = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    hidden = []
    for pixels in made["pixels"]:
        for i, own in enumerate(tokens):
            prompt = i // made["G"]
            ids = torch.cat([made["prompts"][prompt], own[:-1]])[None]
            states = model.model(
                ids,
                pixel_values=pixels[prompt],
                image_grid_thw=made["grids"][prompt : prompt + 1],
                mm_token_type_ids=(ids == model.config.image_token_id).int(),
                use_cache=False,
            ).last_hidden_state
            hidden.append(states[0, len(made["prompts"][prompt]) - 1 :])
    both = torch.stack(hidden).unflatten(0, (-1, len(tokens)))
    model.zero_grad()
    out = roma.roma_loss(
        both[0],
        both[1:],
        model.lm_head.weight,
        tokens,
        mask=torch.arange(tokens.shape[1]) < lengths[:, None],
        advantages=made["advantages"],
        correct=made["correct"],
        aux_view=made["aux_view"],
    )
    out.loss.backward()
    # Sums of fp32 in another order: a hundred roundings of the largest number.
    torch.testing.assert_close(made["out"].loss, out.loss, rtol=0, atol=1e-5)
    for name, weight in model.named_parameters():
        close = {"rtol": 0, "atol": 1e-5 * float(weight.grad.abs().max()) + 1e-7}
        torch.testing.assert_close(found[name], weight.grad, **close, msg=lambda m, n=name: n + m)
