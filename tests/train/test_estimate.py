"""The estimate of --dry-run, part by part, beside what a small run measures."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import measured, small_model, small_run

from bench.update_step.count import counted
from roma.models.lora import add_adapters
from roma.models.prefix import share_prompts
from roma.models.qwen_vl import Policy
from roma.train.config import Config
from roma.train.estimate import Assumed, MicroBatch, Options, Parameters, estimate, page
from roma.train.estimate import run as estimate_run
from roma.train.estimate.activations import activations, casts
from roma.train.estimate.states import read_model, states
from roma.train.estimate.work import Images, batch_of, images, largest, work
from roma.train.update import PolicyLoss

CPU = {"cuda": False}
PROMPTS, GROUP, VIEWS = 3, 4, 2
CLOSE = {True: 0.02, False: 0.06}
"""By shared prompts. 15 % is the bar. Packed groups agree within 0.1 %; rows keep a storage less
than is said where attention's output needs no copy: 3 to 5 %."""


def options(**change: Any) -> list[str]:
    """Overrides of a small run."""
    written = {name: json.dumps(value) for name, value in change.items()}
    names = {
        "dtype": "trainer.dtype",
        "checkpointed": "worker.actor.gradient_checkpointing",
        "frozen": "worker.actor.freeze_vision",
        "shared": "worker.actor.share_prompt",
        "rank": "worker.actor.lora.rank",
        "targets": "worker.actor.lora.targets",
    }
    return [f"{names[name]}={value}" for name, value in written.items()]


def other_model() -> Policy:
    """Fewer heads of keys, three layers, a tower whose last block feeds no layer."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    plain = small_model.policy()
    config = AutoConfig.from_pretrained(small_model.folder() / "model")
    config.text_config.num_hidden_layers = 3
    config.text_config.num_key_value_heads = 2
    config.text_config.layer_types = 3 * ["full_attention"]
    config.vision_config.depth = 3
    config.vision_config.deepstack_visual_indexes = [0]
    model: Any = AutoModelForImageTextToText.from_config(config)
    share_prompts(model)
    return Policy(model.eval(), plain.processor)


def saved(policy: Policy, config: Config) -> tuple[float, MicroBatch]:
    """Bytes that autograd keeps of an update with all rollouts right; and what was run."""
    actor = config.worker.actor
    policy.model.model.visual.requires_grad_(not actor.freeze_vision)
    if actor.lora.rank is not None:
        add_adapters(policy, rank=actor.lora.rank, targets=actor.lora.targets)
    if actor.gradient_checkpointing:
        policy.checkpoint()
    loss = PolicyLoss(policy, config.algorithm.roma, update="lean", share_prompt=actor.share_prompt)
    batch = measured.batch(policy, prompts=PROMPTS, group=GROUP, views=VIEWS)

    def call() -> None:
        with policy.autocast(config.trainer.dtype):
            out = loss(batch, batch.totals())
        out.loss.backward()

    run = batch_of(
        prompts=PROMPTS,
        prompt=batch.prompts.lengths[0],
        response=measured.RESPONSE,
        run=Images(1 + VIEWS, (1 + VIEWS) * GROUP),
        patches=int(batch.prompts.grids[0].prod()),
        shared=actor.share_prompt,
    )
    return counted(call, list(policy.parameters())).saved, run


def sizes(run: MicroBatch) -> dict[str, int]:
    """Its numbers, but for masks."""
    return {
        name: int(getattr(run, name)) for name in ("tokens", "queries", "keys", "patches", "rows")
    }


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"frozen": True},
        {"frozen": True, "rank": 8},
        {"frozen": True, "rank": 4, "targets": ["q_proj", "v_proj"]},
    ],
    ids=["all", "frozen", "adapters", "two adapters"],
)
def test_activations(dtype: str, shared: bool, change: dict[str, Any], tmp_path: Path) -> None:
    config = small_run.config(tmp_path, *options(dtype=dtype, shared=shared, **change))
    parameters = Parameters.count(small_model.policy().model, config)
    found, run = saved(small_model.policy(), config)
    chosen = Options.of(config, **CPU)
    said = activations(parameters, run, chosen).total + casts(parameters, chosen)
    assert said == pytest.approx(found, rel=CLOSE[shared])
    # The bar bites: a view forgotten, or the wrong precision.
    fewer = replace(run, **{name: value * 2 // 3 for name, value in sizes(run).items()})
    wrong = replace(chosen, half=not chosen.half)
    for part, given in ((fewer, chosen), (run, wrong)):
        other = activations(parameters, part, given).total + casts(parameters, given)
        assert other != pytest.approx(found, rel=0.15)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_of_other_sizes(dtype: str, tmp_path: Path) -> None:
    config = small_run.config(tmp_path, *options(dtype=dtype))
    policy = other_model()
    parameters = Parameters.count(policy.model, config)
    found, run = saved(policy, config)
    chosen = Options.of(config, **CPU)
    said = activations(parameters, run, chosen).total + casts(parameters, chosen)
    assert said == pytest.approx(found, rel=CLOSE[True])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("change", [{}, {"frozen": True}, {"frozen": True, "rank": 8}])
def test_checkpointed_layers_keep_their_inputs(
    dtype: str, change: dict[str, Any], tmp_path: Path
) -> None:
    config = small_run.config(tmp_path, *options(dtype=dtype, checkpointed=True, **change))
    parameters = Parameters.count(small_model.policy().model, config)
    found, run = saved(small_model.policy(), config)
    said = activations(parameters, run, Options.of(config, **CPU))
    # Under autocast the mergers and the patches' embedding are no layers: their weights are kept.
    outside = 0.0
    if dtype == "bfloat16" and not change:
        visual = small_model.policy().model.model.visual
        parts = (visual.merger, visual.deepstack_merger_list, visual.patch_embed)
        outside = 2.0 * sum(w.numel() for part in parts for w in part.parameters())
    assert said.kept + outside == pytest.approx(found, rel=CLOSE[True])
    # While one is run again, all of it is there: that of a pass without checkpoints, divided.
    plain = small_run.config(tmp_path, *options(dtype=dtype, **change))
    without = activations(parameters, run, Options.of(plain, **CPU))
    assert without.rerun == 0 and 0 < said.rerun < without.total / 2


def test_parameters_of_a_model_without_values(tmp_path: Path) -> None:
    policy = small_model.policy()
    config = small_run.config(tmp_path)
    found = Parameters.of(config)
    whole = sum(weight.numel() for weight in policy.parameters())
    assert found == Parameters.count(policy.model, config)
    assert (found.total, found.trained) == (whole, whole)
    frozen = Parameters.of(small_run.config(tmp_path, *options(frozen=True)))
    vision = sum(weight.numel() for weight in policy.model.model.visual.parameters())
    assert frozen.trained == whole - vision == frozen.total - vision
    adapted = Parameters.of(small_run.config(tmp_path, *options(rank=8, targets=["q_proj"])))
    add_adapters(policy, rank=8, targets=["q_proj"])
    weights = list(policy.parameters())
    assert adapted.total == sum(weight.numel() for weight in weights)
    assert adapted.trained == sum(weight.numel() for weight in weights if weight.requires_grad)
    assert all(weight.is_meta for weight in read_model(small_model.folder() / "model").parameters())


def test_states_by_hand() -> None:
    model: Any = SimpleNamespace(total=1000, trained=800, layer=100, outside=200)

    def of(engine: str, **change: bool) -> tuple[float, ...]:
        given = {"half": False, "cuda": False} | change
        return tuple(states(model, engine, 4, **given))

    assert of("single") == of("ddp") == (4000, 0, 3200, 6400, 0)
    assert of("zero1") == (4000, 0, 3200 + 800, 1600 + 800, 0)
    assert of("zero2") == (4000, 0, 800, 1600 + 800, 0)
    assert of("zero3") == (1000, 1600, 800, 1600 + 800, 0)
    assert of("fsdp2") == (1000, 1600, 800, 1600, 0)
    assert of("fsdp2", half=True) == (1000, 1200, 800, 1600, 0)
    assert of("single", cuda=True)[-1] == 3200 and of("zero3", cuda=True)[-1] == 800


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (["algorithm.view_mode=none"], (1, 4)),
        (["algorithm.view_mode=rollout"], (1, 4)),
        ([], (3, 12)),
        (["algorithm.view_mode=papo"], (2, 8)),
        (["algorithm.view_mode=dvrp"], (3, 12)),
        (["algorithm.roma.lambda_inv=0"], (3, 8)),
        (["algorithm.roma.lambda_inv=0", "algorithm.views.k=4"], (5, 8)),
        (["algorithm.roma.lambda_inv=0", "algorithm.roma.lambda_aux=0"], (1, 4)),
        (["algorithm.roma.lambda_inv=0", "worker.actor.update=joint"], (3, 12)),
    ],
)
def test_images_that_a_rollout_is_run_on(
    change: list[str], expected: tuple[int, int], tmp_path: Path
) -> None:
    assert images(small_run.config(tmp_path, *change)) == expected


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        (["candidates=3"], 1 + 3),
        (["attack.count=1"], 1 + 3 * 2 + 1),
        (["pool=adversarial", "k=3", "attack.steps=2"], 1 + 3 * (2 * 2 + 1)),
        (["target_divergence=0.1", "search_steps=4"], 1 + 4 * 2),
    ],
)
def test_views_made_after_the_rollouts_are_counted(
    options: list[str], passes: int, tmp_path: Path
) -> None:
    """In scorings of every rollout, all of them right; a second mini-batch costs one half."""
    parameters = Parameters.of(small_run.config(tmp_path))
    sizes = estimate_run.Sizes(20, 16, 20, 16, 6)

    def scoring(*change: str) -> float:
        return work(small_run.config(tmp_path, *change), parameters, sizes, right=1.0).scoring

    half = scoring("worker.actor.mini_batch_size=2")
    found = scoring(*(f"algorithm.views.{option}" for option in options))
    assert scoring() == 0 and found == pytest.approx(2 * half * passes)


def test_the_largest_micro_batch_is_the_trainers(tmp_path: Path) -> None:
    """With every answer right and at its longest, as `PolicyLoss.parts` cuts it."""
    length = measured.RESPONSE
    policy = small_model.policy()
    batch = measured.batch(policy, prompts=4, group=4, views=2)
    prompt = batch.prompts.lengths[0]
    for limit in (100, 700, 1500, 10**6):
        config = small_run.config(
            tmp_path,
            f"data.max_response_length={length}",
            f"worker.actor.micro_batch_tokens={limit}",
            "worker.actor.update=lean",
        )
        loss = PolicyLoss(policy, config.algorithm.roma, update="lean")
        parts = [part for _, part in loss.parts(batch, limit)]
        tokens = [int(loss._states(p).tokens_by_prompt(loss.plan(p).wanted()).sum()) for p in parts]
        sizes = estimate_run.Sizes(prompt, prompt - 3, prompt, prompt - 3, length)
        found, count = largest(config, sizes, 2, 1)
        assert (found.tokens, count) == (max(tokens), len(parts))


def test_a_dry_run_of_a_small_run_beside_the_run(tmp_path: Path) -> None:
    """Steps, parts and sizes, read from the configuration alone."""
    config = small_run.config(tmp_path, "trainer.dtype=float32", "trainer.device=cpu")
    found = estimate(config, Assumed(tflops=0.05, response_tokens=6))
    parts = {part.name: part.size for part in found.parts}
    policy = small_model.policy()
    held = sum(weight.numel() * 4 for weight in policy.parameters())
    assert parts["weights"] == parts["gradients"] == held
    assert parts["optimizer"] == 2 * held
    assert found.peak("update") == pytest.approx(
        4 * held + parts["activations"] + parts["loss workspace"]
    )
    assert found.rows == 24 and found.engine == "single" and found.ranks == 1
    assert found.sizes[:4] == (13, 8, 13, 8)  # what `encode_prompts` makes of those rows
    seen = {part.name for part in found.parts if part.sampling}
    assert seen == {"weights", "optimizer", "keys and values of sampling", "logits of sampling"} | {
        part.name for part in found.parts if not part.size
    } - {"optimizer step, temporary"}
    # A group of four on three images: 3 · 13 + 12 · 5 tokens; two prompts fit into 200.
    assert found.batch.tokens == 2 * 99 and found.micro_batches == 2


def test_the_cache_of_sampling_is_that_of_transformers(tmp_path: Path) -> None:
    from roma.rollout.hf import generate

    config = small_run.config(tmp_path, "data.max_response_length=20")
    found = estimate(config, Assumed(tflops=1))
    said = next(part.size for part in found.parts if part.name.startswith("keys"))
    policy = small_model.policy()
    kept: list[int] = []
    before = policy.model.generate

    def spy(**given: Any) -> Any:
        made = before(**given)
        layers = given["past_key_values"].layers
        kept.append(sum(measured.size([layer.keys, layer.values]) for layer in layers))
        return made

    policy.model.generate = spy
    batch = measured.batch(policy, prompts=4, group=1, views=0)
    policy.model.generation_config.eos_token_id = 10**6  # never: the longest answers
    generate(policy, batch.prompts, group_size=4, max_new_tokens=20, temperature=1.0)
    length = batch.prompts.lengths[0]
    assert said * (length + 19) / (13 + 20) == pytest.approx(kept[0], rel=0.15)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_divide(ranks: int, tmp_path: Path) -> None:
    config = small_run.config(tmp_path, "trainer.engine=fsdp2")
    one, more = (estimate(config, Assumed(tflops=1, ranks=r)) for r in (1, ranks))
    assert more.states.weights == one.states.weights / ranks
    assert more.work == one.work
    assert more.learning_s == pytest.approx(one.learning_s / ranks)


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_run.config(tmp_path)
    with pytest.raises(ValueError, match=r"mini_batch_size: expected a multiple of the 3 ranks"):
        estimate(config, Assumed(tflops=1, ranks=3))
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"a multiple of the 3 ranks"):
        estimate(config, Assumed(tflops=1))
    single = small_run.config(tmp_path, "trainer.engine=single")
    with pytest.raises(ValueError, match=r"trainer\.engine: expected one for 2 ranks, got single"):
        estimate(single, Assumed(tflops=1, ranks=2))
    nothing = small_run.config(tmp_path, f"worker.actor.model_path={tmp_path}")
    with pytest.raises(ValueError, match=r"model: expected a folder with a config\.json"):
        estimate(nothing, Assumed(tflops=1, ranks=1))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu = small_run.config(tmp_path, "trainer.device=cuda")
    with pytest.raises(ValueError, match=r"--tflops: expected a rate, as trainer\.device is cuda"):
        estimate(gpu, Assumed(ranks=1))
    assert estimate(gpu, Assumed(tflops=1, ranks=1)).batch.tokens


def test_a_model_of_config_json_alone(tmp_path: Path) -> None:
    """A run is planned before weights and tokenizer are there."""
    text = (small_model.folder() / "model" / "config.json").read_text()
    (tmp_path / "config.json").write_text(text)
    config = small_run.config(tmp_path, f"worker.actor.model_path={tmp_path}")
    found = estimate(config, Assumed(tflops=1))
    assert found.sizes.prompt == 1200
    assert any("assumed, as" in line and "--prompt-tokens" in line for line in found.said)
    given = estimate(config, Assumed(tflops=1, prompt_tokens=99, image_tokens=80))
    assert given.sizes[:2] == (99, 80)


def test_vllm_takes_its_share_of_the_gpu(tmp_path: Path) -> None:
    change = ["worker.rollout.name=vllm", "worker.rollout.vllm.memory=0.25"]
    for sleep in (True, False):
        asleep = f"worker.rollout.vllm.sleep={str(sleep).lower()}"
        config = small_run.config(tmp_path, *change, asleep)
        found = estimate(config, Assumed(tflops=1, gpu_gib=40))
        part = next(part for part in found.parts if part.name == "vLLM")
        assert part == ("vLLM", 10 * 2**30, True, not sleep, not sleep)
        assert not any("of sampling" in part.name for part in found.parts)


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    for device, gib, lines in (("cuda", 0.001, 3), ("cuda", 80.0, 0), ("cpu", 0.001, 0)):
        config = small_run.config(tmp_path, f"trainer.device={device}")
        said = estimate(config, Assumed(tflops=1, gpu_gib=gib)).said
        assert sum("does not fit into" in line for line in said) == lines


def test_the_rate_is_measured_where_none_is_given(tmp_path: Path) -> None:
    found = estimate(small_run.config(tmp_path, "trainer.device=cpu"))
    assert math.isfinite(found.learning_s) and found.learning_s > 0
    assert any("40%, assumed, of the" in line and "measured" in line for line in found.said)


def test_the_page_says_all_of_it(tmp_path: Path) -> None:
    config = small_run.config(tmp_path, "trainer.device=cpu")
    found = estimate(config, Assumed(tflops=2, response_tokens=3))
    text = page(config, found)
    for part in found.parts:
        assert (part.name in text) == (part.size > 0)
    assert "engine: single, 1 rank\n" in text
    assert "steps: 2 of 4 prompts and 16 answers" in text and "24 rows" in text
    assert "tokens: 48 of answers a step, 96 in all" in text
    assert all(line in text for line in found.said)
