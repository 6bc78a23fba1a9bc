"""The policy and its rollouts, held to transformers' own forward and generate."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support import small_model

from roma.models.device import resolve_device
from roma.models.qwen_vl import Policy
from roma.rollout.hf import HfSampler, generate
from roma_kernels.linear_logprob.api import linear_logprob

# Ten roundings of the largest log-prob, 4.4 nats (ulp 4.8e-7); one such rounding was measured.
CLOSE = {"rtol": 0, "atol": 5e-6}


@pytest.fixture(scope="module")
def policy() -> Policy:
    return small_model.policy()


def logits_of(policy: Policy, prompts, tokens, mask) -> torch.Tensor:
    """[P, T, V] by the model's own forward, one completion per prompt, clean images."""
    inputs = small_model.plain_inputs(policy, prompts)
    none = torch.zeros_like(tokens)
    inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], none.int()], dim=1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], mask.long()], dim=1)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], tokens], dim=1)
    policy.model.model.rope_deltas = None
    logits = policy.model(**inputs).logits
    return logits[:, prompts.input_ids.shape[1] - 1 : -1]


@torch.no_grad()
def test_greedy_rollouts_are_those_of_plain_generate(policy: Policy) -> None:
    prompts = small_model.mixed_prompts(policy)
    assert prompts.padded and len({len(own) for own in prompts.images}) == 2
    ours = generate(policy, prompts, group_size=2, max_new_tokens=7, temperature=None)
    config = policy.model.config
    plain = policy.model.generate(
        **small_model.plain_inputs(policy, prompts),
        max_new_tokens=7,
        do_sample=False,
        suppress_tokens=[config.image_token_id, config.video_token_id],
    )[:, prompts.input_ids.shape[1] :]
    expected = plain.repeat_interleave(2, 0)
    assert torch.equal(ours.tokens[:, : expected.shape[1]], expected)


@torch.no_grad()
def test_sampled_tokens_score_as_in_the_whole_model(policy: Policy) -> None:
    """Prefill, cache, repeated groups, padding, M-RoPE: one mistake in any would show here."""
    prompts = small_model.mixed_prompts(policy)
    made = generate(policy, prompts, max_new_tokens=9, temperature=1.0, seed=3)
    features = policy.image_features(prompts.pixel_values, prompts.grids)
    rows = torch.arange(len(prompts.images))
    hidden = policy.completion_hidden(prompts, features, rows, made.tokens, made.mask)
    ours = linear_logprob(hidden, policy.head_weight, made.tokens).logp
    plain = logits_of(policy, prompts, made.tokens, made.mask).log_softmax(-1)
    plain = plain.gather(-1, made.tokens[..., None])[..., 0]
    torch.testing.assert_close(ours[made.mask], plain[made.mask], **CLOSE)
    wrong = policy.completion_hidden(
        prompts, features, rows.roll(1), made.tokens, made.mask
    )  # another prompt's rows must not pass
    assert (linear_logprob(wrong, policy.head_weight, made.tokens).logp - plain).abs().max() > 1e-3


@torch.no_grad()
def test_sampling_is_seeded_masked_and_free_of_image_tokens(policy: Policy) -> None:
    prompts = small_model.mixed_prompts(policy)
    state = torch.get_rng_state()
    draws = [
        generate(policy, prompts, group_size=40, max_new_tokens=12, temperature=1.0, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(draws[0].tokens, draws[1].tokens)
    assert not torch.equal(draws[0].tokens[:, 0], draws[2].tokens[:, 0])
    config, end = policy.model.config, policy.model.generation_config.eos_token_id
    for made in draws:
        assert not torch.isin(made.tokens, torch.tensor([config.image_token_id])).any()
        for row, on, finished in zip(made.tokens, made.mask, made.finished, strict=True):
            counted = row[on].tolist()
            assert bool(finished) == (end in counted)
            assert end not in counted[:-1]
            assert on.tolist() == sorted(on.tolist(), reverse=True)


@torch.no_grad()
def test_a_view_is_another_image_on_the_same_grid(policy: Policy) -> None:
    prompts = small_model.mixed_prompts(policy)
    darker = [[image // 2 for image in own] for own in prompts.images]
    pixels = policy.view_pixels(prompts, darker)
    fresh = policy.encode_prompts(
        ["<image> sum ?", "left <image> right <image> larger ?", "so <image> larger sum ?"], darker
    )
    assert torch.equal(pixels, fresh.pixel_values) and torch.equal(prompts.grids, fresh.grids)
    darker[1][1] = darker[1][1][:32]
    with pytest.raises(ValueError, match=r"views, image 2: expected the clean grid \[1, 8, 6\]"):
        policy.view_pixels(prompts, darker)
    with pytest.raises(ValueError, match="views: expected 4 images, got 1"):
        policy.view_pixels(prompts, [darker[0]])


@torch.no_grad()
def test_a_slice_of_prompts_is_encoded_as_if_alone(policy: Policy) -> None:
    prompts = small_model.mixed_prompts(policy)
    part = prompts.select([1, 2])
    assert torch.equal(part.pixel_values, prompts.gather(prompts.pixel_values, [1, 2]))
    assert part.grids.tolist() == prompts.grids[1:].tolist() and part.first_image == [0, 2, 3]
    tokens = torch.tensor([[9, 10, 11]] * 2)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    whole_features = policy.image_features(prompts.pixel_values, prompts.grids)
    features = policy.image_features(part.pixel_values, part.grids)
    whole = policy.completion_hidden(prompts, whole_features, torch.tensor([1, 2]), tokens, mask)
    alone = policy.completion_hidden(part, features, torch.tensor([0, 1]), tokens, mask)
    torch.testing.assert_close(alone, whole, **CLOSE)


def test_resize_follows_the_grid(policy: Policy) -> None:
    image = np.zeros((61, 70, 3), np.uint8)
    resized = policy.processor.resize(image)
    assert resized.shape == (64, 64, 3) and resized.dtype == np.uint8
    square = np.full((32, 64, 3), 77, np.uint8)
    assert np.array_equal(policy.processor.resize(square), square)


def test_saved_and_loaded_again(policy: Policy, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    policy.save_pretrained(tmp_path)
    again = Policy.load(tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(policy.parameters(), again.parameters(), strict=True)
    )
    grids = torch.tensor([[1, 4, 8]])
    ids = policy.processor.prompt_ids("<image> sum ?", grids)
    assert again.processor.prompt_ids("<image> sum ?", grids) == ids
    assert ids.count(policy.model.config.image_token_id) == 8
    assert isinstance(AutoModelForImageTextToText.from_pretrained(tmp_path), type(policy.model))


def test_a_device_is_checked_before_weights_are_read(tmp_path: Path) -> None:
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_device(torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(ValueError, match=r"device: expected a device .*, got 'tpu' \(") as caught:
        Policy.load(tmp_path, device="tpu")
    assert len(str(caught.value)) < 250 and "\n" not in str(caught.value)


@torch.no_grad()
def test_the_sampler_is_generate(policy: Policy) -> None:
    prompts = small_model.mixed_prompts(policy)
    options = {"group_size": 3, "max_new_tokens": 5, "temperature": 0.8, "seed": 4}
    made, expected = (
        HfSampler(policy).sample(prompts, **options),
        generate(policy, prompts, **options),
    )
    assert torch.equal(made.tokens, expected.tokens) and torch.equal(made.mask, expected.mask)
    assert torch.equal(made.finished, expected.finished) and made.logp is None


def test_what_a_wrong_folder_or_problem_gets(policy: Policy, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model: expected a Hugging Face model's folder"):
        Policy.load(tmp_path)
    with pytest.raises(ValueError, match="problem: expected one `<image>` per image, got 2 marks"):
        policy.encode_prompts(["<image> <image> ?"], [[np.zeros((32, 32, 3), np.uint8)]])


def test_a_transformers_that_drops_the_images_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """5.17 takes any keyword, and reads no features from one."""
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

    monkeypatch.setattr(Qwen3VLModel, "forward", lambda self, input_ids=None, **rest: None)
    with pytest.raises(ValueError, match=r"transformers: expected 5.18 or newer, got .* silence"):
        Policy.load(small_model.folder() / "model")
