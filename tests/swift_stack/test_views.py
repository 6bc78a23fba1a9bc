"""The rows on views: whose tokens, whose pixels, and what a text alone does."""

import numpy as np
import pytest
import torch
from PIL import Image
from swift_stack import oracle
from swift_stack.small import build_rows, is_right
from swift_stack.test_loss import VIEWS, hold

from roma.integrations.options import RomaOptions
from roma.views import degrade_batch, seed_for
from roma_kernels.errors import fail

OPTIONS = RomaOptions.parse(VIEWS)


def pixels_from_files(call, processor):
    """What the image processor makes of the dataset's own files, degraded as the specs say."""
    made = []
    for view, row in oracle.needed(call, OPTIONS):
        paths = [image["path"] if isinstance(image, dict) else image for image in call.images[row]]
        clean = [torch.from_numpy(np.array(Image.open(path).convert("RGB"))) for path in paths]
        seeds = [
            seed_for(OPTIONS.view_seed, call.step, call.rows.keys[row], view, number)
            for number in range(len(clean))
        ]
        spec = call.rows.specs[row][view]
        views = degrade_batch(clean, [spec] * len(clean), seeds)
        arrays = [own.numpy() for own in views]
        made.append(processor(images=arrays, do_resize=False, return_tensors="pt")["pixel_values"])
    return torch.cat(made)


def test_pairs_have_their_rows_tokens_and_their_images_degraded(run):
    made = run(VIEWS, learning_rate=0, gradient_accumulation_steps=2)
    processor = made.trainer.template.processor.image_processor
    counts = set()
    for call in made.calls:
        pairs, clean, joint = oracle.needed(call, OPTIONS), call.clean, call.inputs
        patches = len(clean["pixel_values"])
        assert torch.equal(joint["pixel_values"][:patches], clean["pixel_values"])
        want = pixels_from_files(call, processor)
        assert torch.equal(joint["pixel_values"][patches:], want)
        taken = torch.tensor([row for _, row in pairs])
        batch = len(call.mask)
        for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            assert torch.equal(joint[name][:batch], clean[name])
            assert torch.equal(joint[name][batch:], clean[name][taken])
        counts |= {len(own) for own in call.images}
    assert counts == {1, 2}  # rows of one image, and of two


def test_a_row_beside_others_scores_as_alone(run):
    made = run(VIEWS, learning_rate=0)
    (call,) = made.calls
    joint, length = call.inputs, call.mask.shape[1]
    images = [len(own) for own in call.images]
    pairs = oracle.needed(call, OPTIONS)
    order = [*range(len(call.mask)), *(row for _, row in pairs)]
    counts = [images[row] for row in order]
    grids = joint["image_grid_thw"].split(counts)
    pixels = joint["pixel_values"].split([int(own.prod(1).sum()) for own in grids])
    spread = []
    for place, row in enumerate(order):
        alone = {
            "pixel_values": pixels[place],
            "image_grid_thw": grids[place],
            "position_ids": joint["position_ids"][:, place : place + 1],
        }
        for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            alone[name] = joint[name][place : place + 1]
        with torch.no_grad():
            logits = made.trainer.model(**alone).logits[:, -length - 1 : -1]
        tokens = joint["input_ids"][place, -length:]
        logp = logits[0].log_softmax(-1)[torch.arange(length), tokens]
        spread.append((logp - call.logp[place])[call.mask[row]].abs().max())
    # Sums of a batched product may run in another order: a few hundred roundings in two layers,
    # at |logit| < 20. A view of another row, or of none, is off by the divergences, 1e-2 and more.
    assert max(spread) < 1e-4
    assert max(value for value in made.logged("roma/penalty_worst")) > 1e-3


def test_which_reward_says_right(run):
    rewards = ["length", "right"]
    for wanted in ("right", "Right", 1, "1"):
        made = run(VIEWS, reward_funcs=rewards, configured={"accuracy_reward": wanted})
        (call,) = made.calls
        assert call.right == [is_right(text, "0") == 1 for text in call.texts]
        hold(call, OPTIONS, "grpo", steps=1)
    assert any(call.right) and not all(call.right)
    text = f"{VIEWS},accuracy_threshold=-1"  # a length is above it
    made = run(text, reward_funcs=rewards)
    (call,) = made.calls
    call.right = [True] * 4
    hold(call, RomaOptions.parse(text), "grpo", steps=1)


def test_text_rows_beside_images_and_alone(run, tmp_path):
    dataset = build_rows(tmp_path / "mixed", ["image", "text", "text", "two"])
    changed = {"num_generations": 2, "per_device_train_batch_size": 4, "max_steps": 2}
    made = run(VIEWS, dataset=dataset, **changed)
    for call in made.calls:
        assert {bool(own) for own in call.images} == {True, False}
        hold(call, OPTIONS, "grpo", steps=1)
    alone = build_rows(tmp_path / "text", ["text"] * 4)
    made, stock = run(VIEWS, dataset=alone), run(None, dataset=alone)
    assert made.norms() == pytest.approx(stock.norms(), rel=1e-6)  # old log-probs: none, or equal
    assert made.logged("roma/penalty_worst") == [0.0]


def test_overlong_answers_have_no_view_terms(run):
    made = run(VIEWS, overlong_filter="true", max_steps=2)
    for call in made.calls:
        hold(call, OPTIONS, "grpo", steps=1)
    cut = [not bool(own) for call in made.calls for own in call.mask.any(1)]
    assert any(cut) and not all(cut)


def test_metrics_are_of_the_whole_step(run):
    one = run(VIEWS, learning_rate=0, gradient_accumulation_steps=2)
    want = {"penalty_worst": 0.0, "aux_loss": 0.0}
    for weight, name in (("lambda_inv", "penalty_worst"), ("lambda_aux", "aux_loss")):
        for call in one.calls:
            other = "lambda_aux" if weight == "lambda_inv" else "lambda_inv"
            alone = RomaOptions.parse(f"num_views=2,{weight}=1,{other}=0")
            none = RomaOptions.parse("num_views=2,lambda_inv=0,lambda_aux=0")
            call.logp = call.logp.detach()
            pairs = oracle.needed(call, OPTIONS)
            kept = [i for i, pair in enumerate(pairs) if pair in oracle.needed(call, alone)]
            rows = torch.tensor([*range(4), *(4 + i for i in kept)])
            full = call.logp
            call.logp = full[rows]
            value = oracle.loss(call, alone, "grpo", steps=2)[0]
            call.logp = full[:4]
            want[name] += float(value - oracle.loss(call, none, "grpo", steps=2)[0]) / 2
            call.logp = full
    for name, value in want.items():
        assert one.logged(f"roma/{name}")[0] == pytest.approx(value, rel=1e-5)
    (entry,) = [entry for entry in one.logs if "roma/penalty_worst" in entry]
    wins = [value for name, value in entry.items() if name.startswith("roma/worst_view/")]
    assert wins and all(0 <= value <= 1 for value in wins)


def test_a_view_of_another_size_is_refused(run, monkeypatch):
    import roma.integrations.views as views

    def cropped(images, specs, seeds, **options):
        return [own[:-16] for own in images]

    monkeypatch.setattr(views, "degrade_batch", cropped)
    with pytest.raises(ValueError, match="view: expected the clean image's size"):
        run(VIEWS)
    assert fail is views.fail
