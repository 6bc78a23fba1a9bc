"""The update step's benchmark: wrong is refused, work is counted, tables are the code's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from bench import ops, report, results
from bench import run as runner
from bench.gate import Wrong
from bench.job import Options
from bench.layout import Layout
from bench.update_step import predicted, step, table
from bench.update_step.count import counted
from bench.variants import HEADLINE, Variant, plan
from roma.train.batch import Totals, UpdateBatch
from roma.train.plan import Plan
from roma.train.update import PolicyLoss

ROOT = Path(__file__).parents[2]


def smoke() -> Variant:
    return next(v for v in plan("smoke", "cpu") if v.op == "update_step")


@pytest.mark.slow
def test_all_forms_and_trl_have_one_gradient(tmp_path: Path) -> None:
    """TRL's own loss agrees with GRPO here, every form of ROMA with the one that runs all pairs."""
    pytest.importorskip("trl", reason="make bench installs it")
    runner.run([smoke()], Options.of("smoke", "cpu", with_memory=False), tmp_path / "run.csv")
    rows = {row["provider"]: row for row in results.read(tmp_path / "run.csv")}
    assert set(rows) == set(step.names_of(smoke()))
    for name, row in rows.items():
        assert float(row["dweight"]) <= step.APART, name
        assert float(row["executed_gflop"]) > 0 and float(row["saved_mib"]) > 0
        assert float(row["ms_p20"]) <= float(row["ms_p50"]) <= float(row["ms_p80"])
    assert "-" not in {rows[name]["version"] for name in ("trl", "roma")}
    assert float(rows["grpo"]["ratio"]) == 1.0
    # TRL runs a completion's last token, too, and counts its head with the model.
    work = {name: float(row["executed_gflop"]) for name, row in rows.items()}
    assert work["grpo"] < work["trl"] < 1.2 * work["grpo"]
    assert work["grpo shared"] < work["grpo"] and work["roma"] < work["joint"]


@pytest.fixture(scope="module")
def bench() -> step.UpdateStepBench:
    made = ops.bench_of(smoke(), "cpu")
    assert isinstance(made, step.UpdateStepBench)
    return made


@pytest.fixture(scope="module")
def methods(bench: step.UpdateStepBench) -> dict[str, float]:
    """GFLOP of a step of each method, whose gradients were compared with the row-wise form's."""
    for name in ("grpo", "grpo shared", "roma", *step.METHODS):
        bench.run(name)
    return {
        n: float(bench.columns(n)["executed_gflop"]) for n in ("grpo", "roma", *step.METHODS)
    } | {"shared": float(bench.columns("grpo shared")["executed_gflop"])}


def test_a_method_takes_the_passes_that_it_says(methods: dict[str, float]) -> None:
    """A pass without a graph over one view is a third of GRPO's step, but for its vision."""
    one = methods["papo"] - methods["shared"]
    assert methods["shared"] / 3 == pytest.approx(one, rel=0.2)
    assert methods["dvrp"] - methods["shared"] == pytest.approx(2 * one, rel=0.1)
    assert 0 < methods["vgpo"] - methods["shared"] < 1.01 * one  # the image's features are there
    assert 2 * one < methods["srpo"] - methods["shared"] < 3.01 * one
    assert methods["mssr"] == pytest.approx(4 / 3 * methods["grpo"], rel=0.05)
    # Three passes forward and back to the pixels, one forward, on two views of right rollouts.
    assert methods["roma"] + 5 * one < methods["pgd"] < methods["roma"] + 17 * one


def test_a_method_without_its_term_is_refused(
    bench: step.UpdateStepBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = PolicyLoss.forward

    def without(loss: PolicyLoss, batch: UpdateBatch, totals: Totals) -> Any:
        if loss.update == "lean":
            batch = batch.without_views()
        return made(loss, batch, totals)

    monkeypatch.setattr(PolicyLoss, "forward", without)
    with pytest.raises(Wrong, match="its gradients are off"):
        bench.run("papo")


def test_a_wrong_choice_of_the_worst_view_is_refused(
    bench: step.UpdateStepBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = bench.run("two-pass")()
    assert check is not None
    check()
    right = Plan.with_worst
    monkeypatch.setattr(Plan, "with_worst", lambda plan, worst: right(plan, 1 - np.array(worst)))
    with pytest.raises(
        Wrong, match=r"its gradients are off by .*e-0[12] of their norm|off by [1-9]"
    ):
        bench.run("two-pass")


def test_a_call_is_held_after_it_was_timed(
    bench: step.UpdateStepBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = bench.run("roma")
    held = run()
    assert held is not None
    held()
    late = run()
    assert late is not None
    weight = next(bench._made.policy.parameters())
    assert weight.grad is not None
    weight.grad.add_(1.0)
    with pytest.raises(Wrong, match="its gradients are off"):
        late()


def test_attention_on_a_cpu_is_counted() -> None:
    """Causal: half of the pairs and the diagonal. With a mask: all. Backward: 5 products for 2."""
    q, k, v = (torch.randn(2, 3, 6, 8, requires_grad=True) for _ in range(3))
    half, whole = 6 * 7 / 2, 6 * 6
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    for options, pairs in (({"is_causal": True}, half), ({"attn_mask": mask}, whole)):
        with torch.no_grad():
            found = counted(lambda o=options: scaled_dot_product_attention(q, k, v, **o), [])  # type: ignore[misc]
        assert found.model == 2 * 3 * pairs * 4 * 8
        both = counted(
            lambda o=options: scaled_dot_product_attention(q, k, v, **o).sum().backward(),  # type: ignore[misc]
            [],
        )
        assert both.model == 2 * 3 * pairs * 8 * (4 + 10)


def test_saved_tensors_are_counted_once_and_for_as_long_as_they_live() -> None:
    weight = torch.nn.Parameter(torch.ones(100))
    x = torch.ones(100, requires_grad=True)

    def one() -> torch.Tensor:
        y = x * weight  # saves x and the weight
        return (y * y[:50].sum()).sum()  # saves y, a part of y again, and a number

    found = counted(lambda: one().backward(), [weight])
    assert found.saved == 4 * (100 + 100 + 1)
    assert counted(lambda: (one().backward(), one().backward()), [weight]).saved == found.saved
    both = counted(lambda: (one() + one()).backward(), [weight]).saved
    assert both == 4 * (100 + 2 * 100 + 2)  # x is one storage


def test_layouts_are_words() -> None:
    layout = Layout(prompts=2, rollouts=3, completion=16, prompt=20, image=12, ragged=True)
    assert Layout.of(str(layout)) == layout and str(layout).endswith("layers=4 ragged")
    assert layout.grid == (3, 4) and HEADLINE.grid == (16, 16)
    lengths = layout.lengths
    assert len(lengths) == 6 and max(lengths) == 16 and min(lengths) >= 2
    assert layout.tokens == sum(lengths) and HEADLINE.tokens == 2 * 8 * 128
    for word in ("tokens=3", "ragged=1", "prompts"):
        with pytest.raises(ValueError, match=f"what: expected a layout.* got {word}; see Layout"):
            Layout.of(word)


def test_the_plan_has_every_axis() -> None:
    variants = plan("update", "cpu")
    headline = [v for v in variants if v.what == str(HEADLINE)]
    assert {v.views for v in headline if v.right == 0.5} == {0, 1, 2, 4, 8}
    assert {v.right for v in headline} == {0.0, 0.5, 1.0}
    layouts = [Layout.of(v.what) for v in variants]
    assert {x.ragged for x in layouts} == {x.checkpointed for x in layouts} == {True, False}
    assert {0.25, 1.0, 3.0, 8.0} <= {x.prompt / x.completion for x in layouts}
    assert all(v.tokens == x.tokens for v, x in zip(variants, layouts, strict=True))
    assert step.names_of(headline[0]) == [
        *("grpo", "trl", "grpo shared", "joint", "lean rows", "roma", "two-pass"),
    ]
    with_two = next(v for v in headline if v.views == 2)
    assert set(step.names_of(with_two)) == {*step.names_of(headline[0]), *step.METHODS}
    without = next(v for v in headline if not v.views)
    assert step.names_of(without) == ["grpo", "trl", "grpo shared"]


def test_the_document_holds_the_predicted_table() -> None:
    text = (ROOT / "docs/COST.md").read_text()
    made = predicted.table()
    assert report.between_markers(text, made, "docs/COST.md", "predicted") == text
    assert made.count("| GRPO, a row and a vision pass per rollout | 1.00 |") == 2


def test_the_document_holds_the_measured_tables() -> None:
    path = results.FOLDER / "cpu-update.csv"
    text = (ROOT / "docs/COST.md").read_text()
    made = table.measured(results.read(path), path)
    assert report.between_markers(text, made, "docs/COST.md", "update") == text


def row(provider: str, views: int, ratio: float, **others: Any) -> results.Row:
    found = {
        **{"op": "update_step", "provider": provider, "views": views, "right": "0.5"},
        **{"what": str(HEADLINE), "depth": 192, "machine": "a CPU", "commit": "abc"},
        **{"torch": "2", "version": "1.16.0", "ms_p20": 90, "ms_p50": 100, "ms_p80": 120},
        **{"ratio": ratio, "ratio_low": ratio / 2, "ratio_high": 2 * ratio, "extra_mib": 64},
        **{"executed_gflop": 10 * ratio, "predicted_gflop": 10, "saved_mib": 30 * ratio},
        **others,
    }
    return {key: str(value) for key, value in found.items()}


def test_the_measured_tables() -> None:
    packed = Layout(prompts=3, rollouts=8, completion=32, prompt=64, image=32, layers=2)
    small = {"what": str(packed), "depth": 96, "packed_tokens": 2000}
    rows = [
        *(row("grpo", k, 1.0) for k in (0, 4)),
        *(row("roma", 4, 1.25), row("trl", 0, 1.1, extra_mib="")),
        row("roma", 4, 1.5, right="1"),
        row("roma", 4, 0.75, what=f"{HEADLINE} ragged"),
        row("roma", 4, 0.5, what=str(HEADLINE).replace("prompt=384", "prompt=32")),
        row("roma", 4, 0.9, **small),
        *(row(name, 2, r) for name, r in {"grpo": 1.0, "grpo shared": 0.3, "papo": 0.4}.items()),
        {**row("two-pass", 4, 1.0), "ms_p50": "", "reason": "refused: off"},
    ]
    lines = table.measured(rows, Path("x.csv")).splitlines()
    assert lines[:2] == ["| time | K = 0 | K = 2 | K = 4 |", "|---|---|---|---|"]
    assert "| GRPO, a row and a vision pass per rollout | 1 | 1 | 1 |" in lines
    assert "| TRL's `_compute_loss` | 1.10 |  |  |" in lines
    shown = [line for line in lines if line.startswith(("| PAPO", "| GRPO, prompt shared |"))]
    assert shown[-2:] == [
        "| GRPO, prompt shared | 0.30 [0.15, 0.60] | 0.30 | 0.30 |",
        "| PAPO | 0.40 [0.20, 0.80] | 0.40 | 0.40 |",
    ]
    in_full = "90 · 100 · 120 | 1.25 [0.62, 2.50] | 1.25 | 1.00 | 1.25 | 1.00 |"
    assert f"| **lean, prompt shared** | {in_full}" in lines
    assert "| 100% right, K = 4 |  |  |  | 1.50 |  |" in lines
    assert "| completions of 16 to 128 tokens, K = 4 |  |  |  | 0.75 |  |" in lines
    assert "| prompt 32, completion 128 (1 : 4), K = 4 |  |  |  | 0.50 |  |" in lines
    assert "| 2000 | 50.0 | 13.8 | 0.90 |" in lines
    assert "Not timed: two-pass (refused: off)." in lines[-1] and "TRL 1.16.0" in lines[-1]
