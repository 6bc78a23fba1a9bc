"""Sampling with transformers' `generate`: one vision pass and one prefill per prompt."""

import torch

from roma.models.prompts import ImageFeatures, PromptBatch
from roma.models.qwen_vl import Policy
from roma.rollout.base import Rollouts


class HfSampler:
    """A `Sampler` that runs the policy itself, in this process.

    Args:
        policy: the model.
        synced: its weights are sharded, so that every rank calls the model until the last one's
            completions have ended.
    """

    def __init__(self, policy: Policy, *, synced: bool = False) -> None:
        """Keeps the policy: its weights are those of the call."""
        self.policy, self.synced = policy, synced

    def sample(
        self,
        prompts: PromptBatch,
        *,
        group_size: int,
        max_new_tokens: int,
        temperature: float | None,
        seed: int,
    ) -> Rollouts:
        """Samples completions; see `roma.rollout.base.Sampler`."""
        return generate(
            self.policy,
            prompts,
            group_size=group_size,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            synced=self.synced,
        )


@torch.no_grad()
def generate(
    policy: Policy,
    prompts: PromptBatch,
    *,
    group_size: int = 1,
    max_new_tokens: int,
    temperature: float | None,
    seed: int = 0,
    features: ImageFeatures | None = None,
    synced: bool = False,
) -> Rollouts:
    """Samples completions, from the full distribution at a temperature, or greedily.

    Image and video tokens are suppressed: teacher forcing could not score a completion that holds
    one.

    Args:
        policy: the model.
        prompts: P prompts.
        group_size: G.
        max_new_tokens: budget of a completion, tokens.
        temperature: > 0, or None for greedy decoding.
        seed: of the sampling, the only source of randomness; torch's global generators keep their
            state.
        features: of the prompts' images, if they are known already.
        synced: go on until all ranks are done.

    Returns:
        Rollouts with the images' features, without the sampler's log-probs.
    """
    from transformers import GenerationConfig

    model, config = policy.model, policy.model.config
    training = model.training
    model.eval()
    if synced and features is None and not len(prompts.grids):
        policy.blank_features(prompts)  # the other ranks call the tower, too
    features = features or policy.image_features(prompts.pixel_values, prompts.grids)
    cache = policy.prefill(prompts, features)
    cache.batch_repeat_interleave(group_size)
    # `generate` continues a cache with the position offset that the model kept from its prefill.
    lengths = prompts.attention_mask.sum(-1)
    model.model.rope_deltas = (prompts.next_position - lengths)[:, None].repeat_interleave(
        group_size, 0
    )
    given = model.generation_config
    options = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature is not None,
        **({} if temperature is None else {"temperature": temperature, "top_k": 0, "top_p": 1.0}),
        suppress_tokens=[config.image_token_id, config.video_token_id],
        eos_token_id=given.eos_token_id,
        pad_token_id=policy.pad_id,
    )
    devices = [policy.device] if policy.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        made = model.generate(
            input_ids=prompts.input_ids.repeat_interleave(group_size, 0),
            attention_mask=prompts.attention_mask.repeat_interleave(group_size, 0),
            past_key_values=cache,
            generation_config=options,
            synced_gpus=synced,
        )
    model.model.rope_deltas = None
    model.train(training)
    tokens = made[:, prompts.input_ids.shape[1] :]
    ends = torch.isin(tokens, torch.as_tensor(given.eos_token_id, device=tokens.device).reshape(-1))
    mask = ends.cumsum(-1) - ends.long() == 0
    return Rollouts(tokens, mask, ends.any(-1), features=features)
