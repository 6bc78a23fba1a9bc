"""Evaluation takes any engine: what it asks of one, and what it refuses before anything is read."""

import importlib.util
from typing import Any

import pytest
import torch
from support import small_model

from roma.evaluate.answers import several_answerer
from roma.evaluate.run import policy_answerer, run_eval
from roma.models.prompts import PromptBatch
from roma.rollout.base import Rollouts
from roma.rollout.hf import HfSampler


class Recorder:
    """transformers' engine, which keeps what was asked."""

    def __init__(self, policy: Any) -> None:
        self.inner, self.asked = HfSampler(policy), list[dict[str, Any]]()

    def sample(self, prompts: PromptBatch, **options: Any) -> Rollouts:
        self.asked.append(options)
        return self.inner.sample(prompts, **options)


def test_another_engine_answers_greedily() -> None:
    policy = small_model.policy()
    problems = ["<image> sum ?", "<image> larger ?"]
    images = [[torch.zeros(32, 64, 3, dtype=torch.uint8).numpy()]] * 2
    sampler = Recorder(policy)
    found = policy_answerer(policy, max_new_tokens=5, sampler=sampler)(problems, images)
    assert found == policy_answerer(policy, max_new_tokens=5)(problems, images)
    expected = {"group_size": 1, "max_new_tokens": 5, "temperature": None, "seed": 0}
    assert sampler.asked == [expected]


def test_several_answers_of_a_question_stand_together() -> None:
    policy = small_model.policy()
    problems = ["<image> sum ?", "<image> larger ?"]
    images = [[torch.full((32, 64, 3), 90 * i, dtype=torch.uint8).numpy()] for i in range(2)]
    sampler = Recorder(policy)
    options = {"max_new_tokens": 5, "count": 3, "temperature": 2.0, "sampler": sampler}
    found = several_answerer(policy, **options)(problems, images, seed=7)
    expected = {"group_size": 3, "max_new_tokens": 5, "temperature": 2.0, "seed": 7}
    assert sampler.asked == [expected]
    made = HfSampler(policy).sample(policy.encode_prompts(problems, images), **expected)
    texts = policy.processor.decode(made.tokens, made.mask)
    assert [[answer.text for answer in own] for own in found] == [texts[:3], texts[3:]]
    assert [own[0].length for own in found] == made.mask.sum(-1)[[0, 3]].tolist()
    assert len({answer.text for own in found for answer in own}) > 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"engine": "sgl"}, """engine: expected "hf" or "vllm", got 'sgl'"""),
        ({"engine": "vllm", "device": "cpu"}, "device: expected None with engine=vllm, got 'cpu'"),
    ],
)
def test_engines_are_checked_first(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_eval("no-such-model", "no-such-data", **given)


def test_without_vllm_it_says_so_first() -> None:
    assert importlib.util.find_spec("vllm") is None  # it has an environment of its own
    with pytest.raises(ImportError, match=r"^engine=vllm needs vLLM, which is not installed: see"):
        run_eval("no-such-model", "no-such-data", engine="vllm")
