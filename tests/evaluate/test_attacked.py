"""Accuracy under attack: the clean answers, then those on images that were attacked for them."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from support import small_model

from roma import RomaConfig
from roma.data import Example, load_dataset_rows
from roma.evaluate.attack import evaluate_attacked
from roma.evaluate.conditions import Cell, DegradedImages, cells_of
from roma.evaluate.record import read_result
from roma.evaluate.result import EvalResult
from roma.evaluate.run import evaluate, policy_answerer, run_eval
from roma.models.qwen_vl import Policy
from roma.rollout.hf import generate
from roma.train.batch import UpdateBatch
from roma.train.config.views import AttackConfig
from roma.train.scoring import Scorer
from roma.train.views.attack import perturb
from roma.train.views.probe import Probe
from roma.views import CORRUPTIONS, seed_for

BUDGET = 6
ATTACKS = cells_of(["adversarial"], [3, 5])


@pytest.fixture(scope="module")
def policy() -> Policy:
    """Weights ten times those of a fresh model, which hardly sees its image."""
    made = small_model.policy()
    with torch.no_grad():
        for weight in made.parameters():
            if weight.ndim > 1:
                weight *= 10
    return made


@pytest.fixture(scope="module")
def asked() -> list[Example]:
    """Three questions with an image, and one without."""
    rows = load_dataset_rows(small_model.folder() / "data@val")
    alone = replace(rows[3], images=(), problem="larger sum ?")
    return [rows[0], rows[1], alone, rows[2]]


def by_text(rows):
    """Right: an even number of characters."""
    right = [float(len(row["response"]) % 2 == 0) for row in rows]
    return [{"overall": x, "format": x, "accuracy": x} for x in right]


@pytest.fixture(scope="module")
def result(policy: Policy, asked: list[Example]) -> EvalResult:
    return evaluate_attacked(policy, asked, ATTACKS, max_new_tokens=BUDGET, score=by_text, seed=4)


def test_it_is_answered_clean_and_on_what_was_attacked(
    policy: Policy, asked: list[Example], result: EvalResult
) -> None:
    """Clean as `evaluate` answers; attacked as the policy answers `perturb`'s images."""
    assert list(result.cells) == [Cell(), *ATTACKS]
    assert [str(cell) for cell in result.cells] == ["clean", "pgd L3", "pgd L5"]
    answer = policy_answerer(policy, max_new_tokens=BUDGET)
    images = DegradedImages(asked, [Cell()], resize=policy.processor.resize)
    clean = evaluate(answer, images, score=by_text)
    assert clean.cells[Cell()].texts == result.cells[Cell()].texts
    np.testing.assert_array_equal(clean.cells[Cell()].correct, result.cells[Cell()].correct)
    prompts = policy.encode_prompts([x.problem for x in asked], [x.load_images() for x in asked])
    made = generate(policy, prompts, max_new_tokens=BUDGET, temperature=None)
    batch = UpdateBatch.to_score(prompts, made, torch.arange(4))
    probe = Probe(Scorer(policy, RomaConfig()), batch, torch.ones(4, 1, dtype=torch.bool), views=1)
    for cell in ATTACKS:
        eps = CORRUPTIONS["pgd"].parameter(cell.level)
        attacked = perturb(
            probe,
            [[eps] * 4],
            lambda _, p, n, level=cell.level: seed_for(4, asked[p].id, n, "pgd", level),
            AttackConfig(),
        ).images[0]
        assert attacked[2] == []
        texts = [a.text for a in answer([x.problem for x in asked], attacked)]
        assert texts == result.cells[cell].texts
        right = [len(text) % 2 == 0 for text in texts]
        np.testing.assert_array_equal(result.cells[cell].correct, np.array(right, dtype=np.uint8))
    texts = {cell: found.texts for cell, found in result.cells.items()}
    assert texts[Cell()][2] == texts[ATTACKS[1]][2]  # no image, no attack
    assert texts[Cell()] != texts[ATTACKS[1]]  # at 16 levels some answer has changed


def test_a_table_may_have_whole_numbers(policy: Policy, asked: list[Example]) -> None:
    """As a level table of a user has them: `pgd: {levels: [1, 4]}`."""
    found = []
    for levels in ((1, 4), (1.0, 4.0)):
        table = {**CORRUPTIONS, "pgd": replace(CORRUPTIONS["pgd"], levels=levels)}
        options = {"max_new_tokens": BUDGET, "score": by_text, "corruptions": table}
        cells = cells_of(["adversarial"], [2], table)
        found.append(evaluate_attacked(policy, asked[:1], cells, **options))
    assert [x.texts for x in found[0].cells.values()] == [x.texts for x in found[1].cells.values()]


def test_batches_and_the_limit_change_nothing(
    policy: Policy, asked: list[Example], result: EvalResult
) -> None:
    """Nor what else is asked; progress counts every image answered."""
    counts: list[int] = []
    again = evaluate_attacked(
        policy,
        asked,
        ATTACKS[1:],
        max_new_tokens=BUDGET,
        score=by_text,
        seed=4,
        batch_size=3,
        limit=1,
        progress=counts.append,
    )
    for cell, found in again.cells.items():
        assert found.texts == result.cells[cell].texts
    assert counts == [3, 3, 1, 1]
    assert all(weight.grad is None for weight in policy.parameters())


def test_the_command_measures_it_beside_other_pools(tmp_path: Path) -> None:
    """Cells in the order that was asked for; the clean one once, from the attack."""
    said = io.StringIO()
    root = small_model.folder()
    summary = run_eval(
        root / "model",
        f"{root / 'data'}@val",
        pools=["clean", "seen", "adversarial"],
        levels=[3],
        out=tmp_path,
        limit=3,
        max_new_tokens=BUDGET,
        attack_steps=1,
        device="cpu",
        console=Console(file=said, width=100),
    )
    assert list(summary["pools"]) == ["clean", "seen", "adversarial"]
    assert summary["attack_steps"] == 1 and "pgd" in said.getvalue()
    kept = read_result(tmp_path / "answers.jsonl", texts=True)
    assert set(kept.cells) == set(cells_of(["clean", "seen", "adversarial"], [3]))
    policy = Policy.load(root / "model").eval()
    rows = load_dataset_rows(root / "data@val")[:3]
    one_step = AttackConfig(steps=1)
    options = {"max_new_tokens": BUDGET, "options": one_step, "batch_size": 16}
    alone = evaluate_attacked(policy, rows, cells_of(["adversarial"], [3]), **options)
    for cell, found in alone.cells.items():
        assert kept.cells[cell].texts == found.texts
        assert kept.cells[cell].correct.tolist() == found.correct.tolist()
    assert json.loads((tmp_path / "eval.json").read_text())["attack_steps"] == 1
    assert (tmp_path / "eval.png").is_file()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"attack_steps": 3}, r"^attack_steps: expected None without pool 'adversarial', got 3"),
        ({"attack_steps": 0, "pools": ["adversarial"]}, r"^attack_steps: expected at least 1"),
        ({"engine": "vllm", "pools": ["adversarial"]}, r"^engine: expected 'hf' with pool 'adv"),
        ({"answers": 2, "pools": ["adversarial"]}, r"^answers: expected 1 with pool 'adversarial'"),
        (
            {"temperature": 0.5, "pools": ["adversarial"]},
            r"^temperature: expected None with pool 'adversarial', got 0.5",
        ),
        ({"levels": [6], "pools": ["adversarial"]}, r"^levels: expected 1 to 5, the levels of p"),
    ],
)
def test_the_command_refuses(tmp_path: Path, options: dict, message: str) -> None:
    """Before anything is loaded."""
    with pytest.raises(ValueError, match=message):
        run_eval(tmp_path / "none", "nowhere", **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"examples": []}, r"^examples: expected at least one, got none"),
        ({"batch_size": 0}, r"^batch_size: expected at least 1, got 0"),
        ({"cells": [Cell("seen", "jpeg", 1)]}, r"^cells: expected cells of pool 'adversarial', "),
    ],
)
def test_wrong_input(policy: Policy, asked: list[Example], options: dict, message: str) -> None:
    given = {"examples": asked, "cells": ATTACKS, "max_new_tokens": BUDGET} | options
    with pytest.raises(ValueError, match=message):
        evaluate_attacked(policy, **given)
