"""What surrounds vLLM, without it: marks of images, names of weights, log-probs, the choice."""

import importlib.util
import math
from types import SimpleNamespace

import pytest
import torch
from support import small_model

from roma.rollout import make_sampler
from roma.rollout.hf import HfSampler
from roma.rollout.vllm import _logprobs, collapsed
from roma.rollout.vllm_weights import checked, reload, some, weight_names


@pytest.mark.parametrize(
    ("ids", "counts", "expected"),
    [
        ([1, 9, 9, 9, 9, 2], [4], [1, 9, 2]),
        ([9, 9, 9, 9, 9, 2], [2, 3], [9, 9, 2]),  # two images without a token between them
        ([1, 9, 2, 9, 9], [1, 2], [1, 9, 2, 9]),
        ([1, 2, 3], [], [1, 2, 3]),
        ([1, 9, 9], [], [1, 9, 9]),  # a mark that is text: vLLM's own count will differ
    ],
)
def test_an_image_becomes_one_mark(ids: list[int], counts: list[int], expected: list[int]) -> None:
    assert collapsed(ids, 9, counts) == expected


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_log_probs_over_the_whole_vocabulary(temperature: float) -> None:
    """From those of a soft-max in which two logits are lower by 100, as vLLM reports them."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(5, 20, generator=generator)
    lowered = logits.clone()
    lowered[:, [6, 7]] -= 100.0
    reported = (lowered / temperature).log_softmax(-1)
    tokens = torch.tensor([0, 3, 8, 19, 5])
    columns = torch.cat([tokens[:, None], torch.tensor([[6, 7]]).expand(5, 2)], 1)
    flat = SimpleNamespace(
        token_ids=columns.flatten().tolist(),
        logprobs=reported.gather(1, columns).flatten().tolist(),
    )
    found = _logprobs(flat, tokens, temperature)
    expected = (logits.double() / temperature).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    # A logit of magnitude 110 rounds by 110·eps32/2, twice, over τ; so does the soft-max of it.
    bound = 4 * 110 / temperature * torch.finfo(torch.float32).eps
    assert float((found - expected).abs().max()) < bound
    assert float((reported.gather(1, tokens[:, None])[:, 0] - expected).abs().max()) > 10 * bound


def test_a_model_has_the_names_of_its_state() -> None:
    policy = small_model.policy()
    required, known = weight_names(policy.model.config)
    assert required == known == set(policy.model.state_dict())


def test_a_tied_head_need_not_come() -> None:
    config = small_model.policy().model.config
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    required, known = weight_names(config)
    assert known - required == {"lm_head.weight"}


def test_weights_are_copies_in_the_engines_dtype() -> None:
    weight = torch.ones(3, requires_grad=True)
    ((name, made),) = checked([("a", weight)], {"a"}, {"a"}, torch.float32)
    assert name == "a" and not made.requires_grad and made.data_ptr() != weight.data_ptr()
    ((_, made),) = checked([("a", weight)], {"a"}, {"a"}, torch.bfloat16)
    assert made.dtype == torch.bfloat16


def test_a_name_too_many_or_too_few_is_named() -> None:
    one = torch.ones(1)
    names = {"a", "b", "c", "d", "e"}
    with pytest.raises(ValueError, match=r"expected names of the model, got base_layer\.a"):
        list(checked([("a", one), ("base_layer.a", one)], names, names, torch.float32))
    with pytest.raises(ValueError, match="got none for b, c, d and 1 more"):
        list(checked([("a", one)], names, names, torch.float32))
    assert some(["b", "a"]) == "a, b" and some("dcba") == "a, b, c and 1 more"


class Worker(torch.nn.Module):
    """A worker of vLLM, and its model, whose loader leaves out what it does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.known, self.unknown = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))

    def get_model(self) -> "Worker":
        return self

    def load_weights(self, weights: object) -> set[str]:
        assert dict(weights) == {"known": 1}  # type: ignore[call-overload]
        return {"known"}

    def reload_weights(self, weights_iterator: object, is_checkpoint_format: bool) -> None:
        assert is_checkpoint_format
        self.load_weights(weights_iterator)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is here")
def test_a_parameter_that_got_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("roma.rollout.vllm_weights._pack_heads", lambda model: None)
    worker = Worker()
    with pytest.raises(ValueError, match="every parameter of vLLM's model loaded, got not unknown"):
        reload(worker, [("known", 1)])  # type: ignore[list-item]
    assert "load_weights" not in vars(worker)  # the model is as it was


def options(name: str) -> SimpleNamespace:
    vllm = SimpleNamespace(memory=0.4, sleep=True, dtype="auto", max_sequences=None)
    return SimpleNamespace(name=name, vllm=vllm)


def test_the_configuration_chooses() -> None:
    policy = small_model.policy()
    given = {"weights": lambda: iter(()), "version": lambda: 0}
    assert isinstance(make_sampler(options("hf"), policy, **given), HfSampler)
    with pytest.raises(ValueError, match=r"rollout\.name: expected .hf. or .vllm., got .sgl."):
        make_sampler(options("sgl"), policy, **given)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is here")
def test_without_vllm_the_message_says_where_it_comes_from() -> None:
    given = {"weights": lambda: iter(()), "version": lambda: 0}
    with pytest.raises(ImportError, match=r"name=vllm needs vLLM, see docs/ROLLOUTS\.md"):
        make_sampler(options("vllm"), small_model.policy(), **given)


def test_an_engine_in_another_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    given = {"weights": lambda: iter(()), "version": lambda: 0}
    with pytest.raises(ValueError, match="VLLM_ENABLE_V1_MULTIPROCESSING: expected 0, got 1"):
        make_sampler(options("vllm"), small_model.policy(), **given)


def test_finite() -> None:
    """Suppressed tokens that would have taken nearly everything leave a log-prob that says so."""
    flat = SimpleNamespace(token_ids=[0, 6, 7], logprobs=[-0.5, -80.0, -300.0])
    found = float(_logprobs(flat, torch.tensor([0]), 1.0)[0])
    assert found == pytest.approx(-0.5 - math.log1p(math.exp(20)), rel=1e-6)
