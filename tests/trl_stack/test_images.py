"""Images of every mode, number and size, rows of text between them; evaluation, what is logged."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Pillow
from trl_stack import small
from trl_stack.oracle import Oracle, digest
from trl_stack.small import LAMBDAS, held

from roma.views import sample

MODES = ("RGB", "RGBA", "L", "P", "1", "CMYK")
# Per prompt the sizes of its images (height, width); the processor resizes some of them.
SIZES = [
    [(48, 64)],
    [],
    [(33, 90), (64, 20)],
    [(40, 40)],
    [],
    [(48, 64), (16, 32), (80, 50)],
    [(100, 30)],
    [],
]


def picture(number, size, mode):
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    made = Pillow.fromarray(pixels).convert(mode)
    if mode == "RGBA":
        made.putalpha(Pillow.fromarray(pixels[..., 0]))  # RGB where it is clear must not matter
    return made


def mixed(sizes=SIZES):
    """Prompts with no, one or several images, of every mode in turn."""
    images: list[list[Pillow.Image]] = []
    for own in sizes:
        first = sum(map(len, images))
        images.append([picture(n, size, MODES[n % 6]) for n, size in enumerate(own, first)])
    prompts = [[{"role": "user", "content": "say which way"}] for _ in sizes]
    message = List({"role": Value("string"), "content": Value("string")})
    features = Features({"prompt": message, "images": List(Image())})
    return Dataset.from_dict({"prompt": prompts, "images": images}, features=features)


@pytest.mark.parametrize("update", ["lean", "joint"])
def test_mixed_images_and_text(folder, tmp_path, update):
    """The oracle finds each row by pixels that are bit for bit the processor's of the files."""
    trainer = small.run(
        folder,
        tmp_path,
        data=mixed(),
        shuffle_dataset=False,  # the first four prompts
        view_update=update,
        gradient_accumulation_steps=4,
        num_iterations=2,  # the old policy is scored in chunks of mixed rows
        max_steps=2,
        penalty_over="correct",
        **LAMBDAS,
    )
    counts = [b["num_images"] for s in trainer.steps for b in s.batches if "num_images" in b]
    assert {0, 1} <= {n for own in counts for n in own}
    assert max(n for own in counts for n in own) >= 2
    oracle = Oracle(trainer, folder)
    held(trainer, oracle, 1)
    log = trainer.state.log_history[0]
    rows = [row for batch in trainer.steps[0].batches for row in oracle.rows(batch)]
    assert log["roma/has_views"] == pytest.approx(np.mean([bool(row.images) for row in rows]))
    assert log["roma/correct"] == pytest.approx(np.mean([row.right for row in rows]))


def test_a_micro_batch_of_text_alone(folder, tmp_path):
    """Rows of text have no views and no part in ROMA's terms, and count in the denominators."""
    data = mixed([[], [(48, 64)], [], []])
    trainer = small.build(
        folder,
        tmp_path,
        data=data,
        per_device_train_batch_size=2,
        num_generations=2,
        gradient_accumulation_steps=4,
        **LAMBDAS,
    )
    trainer.train()
    batches = trainer.steps[0].batches
    blank = [not any(batch.get("num_images", [0])) for batch in batches]
    assert sum(blank) >= 2 and not all(blank)  # 2 rows of 8 have an image, 2 rows a micro-batch
    oracle = Oracle(trainer, folder)
    held(trainer, oracle)
    for batch, loss, none in zip(batches, oracle.losses, blank, strict=True):
        if none:  # λ does not matter to it
            args = trainer.args
            before = args.lambda_inv, args.lambda_aux
            args.lambda_inv = args.lambda_aux = 0.0
            alone = oracle.micro_batch(
                oracle.model(trainer.steps[0].weights, torch.float32), 0, batch, 0
            )
            args.lambda_inv, args.lambda_aux = before
            assert float(alone.detach()) == pytest.approx(loss, abs=1e-6)


def divergences(trainer, oracle, model, row, step):
    """D of each view of a row, and the names of their corruptions."""
    clean = oracle.scored(model, row, row.clean)[0].detach()
    args, found = trainer.args, []
    for k in range(args.num_views):
        gap = oracle.scored(model, row, oracle.view(row, k, step))[0].detach() - clean
        found.append(float((torch.expm1(gap) - gap).mean()))
    key = (args.view_seed, step, row.key)
    specs = sample(args.view_pool, args.num_views, key, max_level=args.view_max_level)
    return found, [spec.corruption for spec in specs]


@pytest.fixture(scope="module")
def told(folder, tmp_path_factory):
    """A run that logs its completions, and evaluates."""
    out = tmp_path_factory.mktemp("told")
    trainer = small.build(
        folder,
        out,
        data=mixed(SIZES[:6]),
        log_completions=True,
        eval_strategy="no",
        per_device_eval_batch_size=4,
        num_generations_eval=2,
        given={"eval_dataset": mixed([[(48, 64)], [(32, 32)]])},
        **LAMBDAS,
    )
    trainer.train()
    return trainer


def test_the_table_of_completions(folder, told):
    extra = {name: list(told._logs["extra"][name]) for name in told._logs["extra"]}
    oracle = Oracle(told, folder)
    model = oracle.model(told.steps[0].weights, torch.float64)
    texts = [completion[0]["content"] for completion in told._logs["completion"]]
    assert {len(column) for column in extra.values()} == {len(texts)} == {8}
    assert set(extra) == {"roma/correct", "roma/penalty", "roma/worst_view"}
    seen = 0
    for batch in told.steps[0].batches:
        for row, place in zip(oracle.rows(batch), batch["roma_row"].tolist(), strict=True):
            decoded = told.processing_class.decode(row.completion, skip_special_tokens=True)
            assert texts[place] == decoded  # the row's own line
            assert extra["roma/correct"][place] is row.right
            if not (row.right and row.images):
                assert extra["roma/penalty"][place] is None
                assert extra["roma/worst_view"][place] is None
                continue
            found, names = divergences(told, oracle, model, row, 0)
            assert extra["roma/penalty"][place] == pytest.approx(max(found), rel=1e-4, abs=1e-6)
            assert extra["roma/worst_view"][place] == names[int(np.argmax(found))]
            seen += 1
    assert seen


def test_the_log_of_a_step(folder, told):
    """By hand from the oracle's rows: means over the step, by corruption over right rollouts."""
    log = told.state.log_history[0]
    oracle = Oracle(told, folder)
    model = oracle.model(told.steps[0].weights, torch.float64)
    rows = [row for batch in told.steps[0].batches for row in oracle.rows(batch)]
    by_name, worst, mean = {}, 0.0, 0.0
    for row in rows:
        if row.right and row.images:
            found, names = divergences(told, oracle, model, row, 0)
            worst, mean = worst + max(found), mean + float(np.mean(found))
            for value, name in zip(found, names, strict=True):
                by_name.setdefault(name, []).append((value, value == max(found)))
    near = {"rel": 1e-4, "abs": 1e-6}
    assert log["roma/penalty_worst"] == pytest.approx(worst / len(rows), **near)
    assert log["roma/penalty_mean"] == pytest.approx(mean / len(rows), **near)
    assert 0 <= log["roma/aux_clipfrac"] <= 1
    for name, own in by_name.items():
        assert log[f"roma/penalty/{name}"] == pytest.approx(np.mean([v for v, _ in own]), **near)
        assert log[f"roma/worst_view/{name}"] == pytest.approx(np.mean([top for _, top in own]))
    plain = {"penalty_worst", "penalty_mean", "aux_loss", "aux_clipfrac", "correct", "has_views"}
    named = {f"{kind}/{name}" for name in by_name for kind in ("penalty", "worst_view")}
    assert {name for name in log if name.startswith("roma/")} == {
        f"roma/{name}" for name in plain | named
    }


def test_evaluation(told):
    before = {name: list(values) for name, values in told._metrics["train"].items()}
    weights = small.weights_of(told)
    metrics = told.evaluate()
    log = [entry for entry in told.state.log_history if "eval_reward" in entry][-1]
    assert metrics["eval_loss"] == pytest.approx(log["eval_loss"])
    for name in ("penalty_worst", "penalty_mean", "aux_loss", "aux_clipfrac", "correct"):
        assert np.isfinite(log[f"eval_roma/{name}"])
    assert log["eval_roma/has_views"] == 1
    assert any(name.startswith("eval_roma/penalty/") for name in log) == (
        log["eval_roma/correct"] > 0
    )
    # Nothing of it is told as training's, and no weight moves.
    assert {name: list(values) for name, values in told._metrics["train"].items()} == before
    assert all(torch.equal(weights[name], now) for name, now in small.weights_of(told).items())


def test_the_same_image_is_one_key_whatever_its_mode(folder, tmp_path):
    """A grey picture and its copy in colour look the same to the model, so they share views."""
    grey = picture(3, (48, 64), "L")
    prompt = [{"role": "user", "content": "say which way"}]
    rows = {"prompt": [prompt] * 2, "images": [[grey], [grey.convert("RGB")]]}
    trainer = small.build(folder, tmp_path, data=Dataset.from_dict(rows))
    oracle = Oracle(trainer, folder)
    assert len({digest(images) for images, _ in oracle.data.values() if images}) == 1
