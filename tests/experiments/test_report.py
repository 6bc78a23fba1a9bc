"""The report of made-up results: schema, tables, page and figures."""

import json
import re

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from experiments.report import plots
from experiments.report.curves import learning_curves
from experiments.report.page import render_page
from experiments.report.report import (
    build_report,
    choose_gallery,
    read_metrics,
    summary,
    write_report,
)
from experiments.report.terminal import print_report
from roma.data import Example
from roma.evaluate import figures
from roma.evaluate.columns import columns_of
from roma.evaluate.conditions import Cell, DegradedImages, cells_of
from roma.evaluate.report.cards import GalleryItem
from roma.evaluate.result import CellResult, EvalResult
from roma.evaluate.summary import summarise
from roma.views import CORRUPTIONS

IMAGES = 120
ARMS = ("base", "grpo", "grpo_equal_time", "naive", "roma")
SKILL = {"base": 0.80, "grpo": 0.88, "grpo_equal_time": 0.88, "naive": 0.87, "roma": 0.87}
FRAGILITY = {"base": 0.06, "grpo": 0.06, "grpo_equal_time": 0.06, "naive": 0.045, "roma": 0.03}


def made_up_results(images: int = IMAGES, seeds: int = 3) -> dict[str, dict[int, EvalResult]]:
    """Images of differing difficulty; accuracy falls with the level, by a slope of each arm."""
    cells = cells_of(["clean", "seen", "unseen"], [1, 2, 3])
    hard = np.random.default_rng(0).random(images)
    results: dict[str, dict[int, EvalResult]] = {}
    for a, arm in enumerate(ARMS):
        for seed in range(1 if arm == "base" else seeds):
            rng = np.random.default_rng([a, seed])
            found = {}
            for cell in cells:
                kind = list(CORRUPTIONS).index(cell.corruption) if cell.corruption else 0
                limit = SKILL[arm] - FRAGILITY[arm] * cell.level * (0.5 + kind % 4 / 2)
                correct = (hard + rng.normal(0, 0.05, images) < limit).astype(np.uint8)
                texts = [
                    rf"<think> left 3 right 5 so {8 * c} </think> \boxed{{ {8 * c} }}"
                    for c in correct
                ]
                found[cell] = CellResult(correct, texts)
            results.setdefault(arm, {})[seed] = EvalResult([str(i) for i in range(images)], found)
    return results


def made_up_metrics(steps: int = 90) -> list[dict]:
    """Rows as the trainer logs them; views only in ROMA's arm."""
    rng = np.random.default_rng(3)
    seen = [name for name, corruption in CORRUPTIONS.items() if corruption.pool == "seen"]
    rows = []
    for arm in ARMS[1:]:
        for seed in range(3):
            for step in range(1, steps + 1):
                learnt = 1 - np.exp(-step / 40)
                row = {"arm": arm, "seed": seed, "step": step}
                row["reward/accuracy"] = 0.6 + 0.25 * learnt + rng.normal(0, 0.02)
                row["reward/overall"] = 0.9 * row["reward/accuracy"] + 0.1
                row["rollout/distinct_share"] = 0.3 - 0.1 * learnt + rng.normal(0, 0.01)
                row["response_length/mean"] = 12 + rng.normal(0, 0.05)
                if step % 30 == 0:
                    row["val/accuracy"] = 0.8 + 0.08 * learnt
                if arm == "roma":
                    row["actor/roma_penalty_worst"] = 0.08 * np.exp(-step / 50) + 0.01
                    row["actor/roma_penalty_mean"] = 0.05 * np.exp(-step / 50) + 0.007
                    for i, kind in enumerate(seen):
                        row[f"actor/roma_penalty/{kind}"] = (4 - i) * 0.02 * np.exp(-step / 50)
                        row[f"actor/roma_worst_view/{kind}"] = (4 - i) / 10
                rows.append(row)
    return rows


def made_up_images(count: int = IMAGES) -> DegradedImages:
    """Random gray blots as test images; every question's answer is 8."""
    rng = np.random.default_rng(1)
    blots = rng.integers(0, 255, (count, 4, 8, 1), dtype=np.uint8).repeat(3, axis=-1)
    pictures = [Image.fromarray(blot).resize((64, 32), Image.Resampling.BICUBIC) for blot in blots]
    examples = [Example(str(i), (p,), "<image> sum ?", "8") for i, p in enumerate(pictures)]
    return DegradedImages(examples, cells_of(["clean", "seen", "unseen"], [3]))


@pytest.fixture(scope="module")
def report() -> dict:
    return build_report(
        made_up_results(),
        config={"algorithm": {"lambda_inv": 3.0}, "data": {"train": "digits"}},
        versions={"torch": "2.13.0", "roma": "0.1.0"},
        timings={"data": 3.25, "train": {"grpo": 42.0, "roma": 84.0}, "runs": made_up_runs()},
    )


def made_up_runs() -> dict[str, dict[str, float]]:
    """What training took, as the demo writes it."""
    runs: dict[str, dict[str, float]] = {"base-seed0": {"steps": 0, "train_cpu_s": 0.0}}
    for seed in range(3):
        for arm, steps in {"grpo": 90, "grpo_equal_time": 150 + seed, "naive": 90}.items():
            runs[f"{arm}-seed{seed}"] = {"steps": steps, "train_cpu_s": 20.0 + seed}
        runs[f"roma-seed{seed}"] = {"steps": 90, "train_cpu_s": 40.4}
    return runs


@pytest.fixture(scope="module")
def with_methods() -> dict:
    """Beside the four arms MSSR, which is level with GRPO, and MSSR with ROMA, which is as ROMA."""
    results = made_up_results()
    results |= {"mssr_roma": results["roma"], "mssr": results["grpo"], "mine": results["naive"]}
    return build_report(results, config={}, versions={}, timings={})


def test_the_report_has_the_agreed_form(report):
    assert report["seeds"] == [0, 1, 2] and report["images"] == IMAGES
    assert list(report["arms"]) == list(ARMS)
    for arm in ARMS:
        tree = report["arms"][arm]
        assert list(tree) == ["clean", "seen", "unseen"]
        for entry in (
            tree["clean"],
            *(tree[p][f"L{lv}"] for p in ("seen", "unseen") for lv in (1, 2, 3)),
        ):
            assert set(entry) == {"mean", "low", "high", "n"}
            assert 0 <= entry["low"] <= entry["mean"] <= entry["high"] <= 100
            assert entry["n"] == IMAGES
    assert set(report["differences"]) == {
        "roma-grpo",
        "roma-naive",
        "roma-grpo_equal_time",
        "naive-grpo",
    }
    assert list(report["differences"]["roma-grpo"]) == ["mean", "0", "1", "2"]
    assert report["tuned_on"] == "validation split"
    assert report["timings"]["train"]["roma"] == 84.0
    assert json.loads(json.dumps(report)) == report


def test_detail_differences_and_means_agree_with_each_other(report):
    roma, grpo = report["arms"]["roma"], report["arms"]["grpo"]
    gap = report["differences"]["roma-grpo"]["mean"]["seen"]["L3"]["mean"]
    assert gap == pytest.approx(roma["seen"]["L3"]["mean"] - grpo["seen"]["L3"]["mean"], abs=2e-3)
    rows = [
        row["mean"]
        for row in report["detail"]
        if (row["arm"], row["seed"], row["pool"], row["level"]) == ("roma", "mean", "seen", 3)
    ]
    assert len(rows) == 4
    assert sum(rows) / 4 == pytest.approx(roma["seen"]["L3"]["mean"], abs=2e-3)
    seeds = [report["per_seed"]["roma"][str(seed)]["seen"]["L3"]["mean"] for seed in range(3)]
    assert sum(seeds) / 3 == pytest.approx(roma["seen"]["L3"]["mean"], abs=2e-3)
    count = len(cells_of(["clean", "seen", "unseen"], [1, 2, 3]))
    assert len(report["detail"]) == count * (2 + 4 * 4)


def _sentences(results) -> list[str]:
    found = summary(build_report(results, config={}, versions={}, timings={}))
    return [sentence.replace("\u00a0", " ") for sentence in found]


def test_the_summary_says_who_wins_and_who_does_not():
    results = made_up_results(seeds=1)
    won = _sentences(results)
    assert won[0].startswith("120 held-out test images per condition; one training seed")
    assert re.search(r"ROMA minus GRPO, in points: .*seen L3 \+.*\(higher\)", won[1])
    assert "clean" in won[1] and "(no difference shown)" in won[1]
    swapped = {**results, "roma": results["grpo"], "grpo": results["roma"]}
    lost = _sentences(swapped)
    assert re.search(r"ROMA minus GRPO, in points: .*seen L3 −.*\(lower\)", lost[1])


def test_arms_on_other_images_or_cells_are_refused():
    results = made_up_results(seeds=1)
    other = EvalResult(["x", *results["roma"][0].ids[1:]], results["roma"][0].cells)
    with pytest.raises(ValueError, match="results of roma, seed 0: expected the images and cells"):
        build_report({**results, "roma": {0: other}}, config={}, versions={}, timings={})
    with pytest.raises(ValueError, match="results: expected at least one seed of each arm"):
        build_report({}, config={}, versions={}, timings={})


def test_the_terminal_shows_every_number_of_the_tables_in_80_columns(report):
    console = Console(width=80, record=True, file=open("/dev/null", "w"))
    print_report(report, console)
    text = console.export_text()
    for arm in ARMS:
        for entry in columns_of(report["arms"][arm]).values():
            assert f"{entry['mean']:.1f}" in text
            assert f"{entry['low']:.1f}–{entry['high']:.1f}" in text
    for by_seed in report["differences"].values():
        for tree in by_seed.values():
            mean = f"{columns_of(tree)['unseen L3']['mean']:+.1f}".replace("-", "−")
            assert mean in text
    assert max(map(len, text.splitlines())) <= 80


def test_the_page_loads_nothing_from_outside_and_says_what_the_json_says(report, tmp_path):
    gallery = choose_gallery(made_up_results(), made_up_images())
    page = write_report(tmp_path, report, metrics=made_up_metrics(), gallery=gallery)
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == report
    for name in ("robustness", "corruptions", "learning_curves", "gallery"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.width > 500
    html = page.read_text(encoding="utf-8")
    assert not re.search(r"https?://|//[a-z]+\.|<script|<link|@import|url\(", html)
    sources = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in sources)
    for arm in ARMS:
        assert plots.arm_style(arm).label in html
        for entry in columns_of(report["arms"][arm]).values():
            assert f"{entry['mean']:.1f}<small>[{entry['low']:.1f}, {entry['high']:.1f}]" in html
    assert all(f'id="{name}"' in html for name in re.findall(r'href="#([a-z]+)"', html))
    assert "validation split" in html and "lambda_inv: 3.0" in html and "train / roma" in html


NO_FIGURES = dict.fromkeys(("robustness", "methods", "corruptions", "learning_curves"), b"")


def test_what_training_took_stands_beside_the_accuracies(report):
    assert report["costs"]["grpo_equal_time"] == {"steps": [150, 151, 152], "cpu_s": [20, 21, 22]}
    assert "base" not in report["costs"]
    table = render_page(report, summary(report), NO_FIGURES, []).partition("</table>")[0]
    rows = {
        re.sub("<.*?>", " ", row).strip().partition("  ")[0]: row for row in table.split("<tr>")
    }
    assert "<td>150–152</td><td>21</td>" in rows["GRPO, equal time"]
    assert "<td>90</td><td>40</td>" in rows["ROMA"] and "<td>–</td><td>–</td>" in rows["warm start"]
    console = Console(width=80, record=True, file=open("/dev/null", "w"))
    print_report(report, console)
    assert re.search(r"steps +– +90 +150–152 +90 +90", console.export_text())


def test_methods_stand_beside_the_four_arms(with_methods):
    """In the order of the figures' styles, against GRPO, and with ROMA against ROMA too."""
    assert list(with_methods["arms"]) == [*ARMS, "mssr", "mssr_roma", "mine"]
    differences = with_methods["differences"]
    assert {"mssr-grpo", "mssr_roma-grpo", "mssr_roma-roma"} <= differences.keys()
    assert "mssr-roma" not in differences
    assert columns_of(differences["mssr-grpo"]["mean"])["seen L3"]["mean"] == 0
    html = render_page(with_methods, summary(with_methods), NO_FIGURES, [])
    assert 'id="methods"' in html and "MSSR + ROMA" in html
    console = Console(width=80, record=True, file=open("/dev/null", "w"))
    print_report(with_methods, console)
    text = console.export_text()
    assert text.count("Accuracy, %") == 2 and max(map(len, text.splitlines())) <= 80


def test_the_figure_of_methods_has_a_line_an_arm_and_a_panel_a_column(with_methods):
    panels = plots.methods(with_methods).axes
    assert [panel.get_title(loc="left") for panel in panels] == ["clean", "seen L3", "unseen L3"]
    named = [label.get_text() for label in panels[0].get_yticklabels()]
    assert named == ["naive augmentation", "ROMA", "MSSR", "MSSR + ROMA"]
    shown = columns_of(with_methods["differences"]["roma-grpo"]["mean"])["seen L3"]
    (bar,) = (
        x for x in panels[1].lines if list(x.get_ydata()) == [1, 1] and len(x.get_xdata()) == 2
    )
    assert list(bar.get_xdata()) == [shown["low"], shown["high"]]


def test_a_crowded_panel_leaves_the_methods_out():
    some = ["base", "grpo", "roma", "mssr"]
    assert plots.few(some) == some
    assert plots.few([*ARMS, "mssr", "vgpo", "dvrp"]) == [
        "base",
        "grpo",
        "grpo_equal_time",
        "naive",
        "roma",
    ]


def test_hostile_text_is_escaped(report, tmp_path):
    gray = np.zeros((4, 8, 3), dtype=np.uint8)
    said = {"roma": {"clean": ("<script>alert(1)</script>", True)}}
    item = GalleryItem("<b>sum", "<i>", "jpeg L3", gray, gray, said)
    html = write_report(tmp_path, report, gallery=[item]).read_text(encoding="utf-8")
    assert "<script" not in html and "<b>" not in html and "<i>" not in html


def test_gallery_images_are_chosen_without_looking_at_answers():
    results, images = made_up_results(), made_up_images()
    items = choose_gallery(results, images)
    assert len(items) == 12
    assert {item.condition for item in items} == {
        f"{name} L3" for name in CORRUPTIONS if CORRUPTIONS[name].pool in ("seen", "unseen")
    }
    swapped = {**results, "roma": results["base"]}
    again = choose_gallery(swapped, images)
    for one, two in zip(items, again, strict=True):
        np.testing.assert_array_equal(one.degraded, two.degraded)
    text, right = items[0].answers["grpo"]["clean"]
    assert text == f"left 3 right 5 so {8 * right} → {8 * right}"


def test_metrics_are_read_from_every_run_and_a_broken_line_is_named(tmp_path):
    for arm in ("grpo", "roma"):
        folder = tmp_path / f"{arm}-seed2"
        folder.mkdir()
        (folder / "metrics.jsonl").write_text('{"step": 1, "reward/overall": 0.5}\n')
    rows = read_metrics(tmp_path)
    assert rows[1] == {"arm": "roma", "seed": 2, "step": 1, "reward/overall": 0.5}
    (tmp_path / "roma-seed2" / "metrics.jsonl").write_text('{"step": 1}\n{"step"')
    assert read_metrics(tmp_path, arms=["grpo"]) == rows[:1]
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: expected a JSON object"):
        read_metrics(tmp_path)


@pytest.mark.parametrize(
    "metrics",
    [
        [],
        [{"step": 0}],
        [{"step": 1, "arm": "roma", "seed": 0, "reward/overall": None}],
        [{"step": 1, "arm": "roma", "seed": 0, "reward/overall": float("nan")}],
        [{"step": 3, "arm": "mine", "seed": 0, "actor/roma_worst_view/jpeg": 1.0}],
        made_up_metrics(2),
    ],
)
def test_learning_curves_draw_whatever_was_logged(metrics):
    assert isinstance(learning_curves(metrics), Figure)


def test_every_quantity_that_was_logged_has_a_panel():
    titles = [axes.get_title(loc="left") for axes in learning_curves(made_up_metrics()).axes]
    assert [title for title in titles if title] == [
        "Reward (overall)",
        "Training accuracy (rollouts)",
        "Validation accuracy",
        "Distinct rollouts",
        "Completion length",
        "ROMA: invariance penalty",
        "ROMA: penalty per corruption",
        "ROMA: which view was worst",
    ]


def test_the_penalty_that_is_drawn_is_that_of_one_arm():
    """With a method beside ROMA both log a penalty under the same seeds."""
    rows = made_up_metrics()
    more = [row | {"arm": "mssr_roma", "actor/roma_penalty_worst": 9.0} for row in rows]
    alone, beside = learning_curves(rows), learning_curves(rows + more)
    drawn = [
        next(axes for axes in figure.axes if "invariance" in axes.get_title(loc="left"))
        for figure in (alone, beside)
    ]
    one, two = (panel.lines[0].get_ydata() for panel in drawn)
    np.testing.assert_array_equal(one, two)


def test_an_arm_has_one_colour_everywhere_and_no_two_share_one():
    colours = [style.colour for style in (plots.ARMS | plots.METHODS).values()]
    assert len(set(colours)) == len(colours)
    assert plots.arm_style("mine").label == "mine"


def test_figures_of_few_arms_or_one_model():
    results = made_up_results(seeds=1)
    clean = {
        "grpo": {0: EvalResult(results["grpo"][0].ids, {Cell(): results["grpo"][0].cells[Cell()]})}
    }
    alone = build_report(clean, config={}, versions={}, timings={})
    assert alone["differences"] == {}
    assert isinstance(plots.robustness(alone), Figure)
    assert isinstance(plots.corruptions(alone), Figure)
    figure = figures.one_model(summarise(results["roma"][0]))
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "seen corruptions",
        "unseen corruptions",
    ]
