"""report.json, report.html and the tables of a comparison: arms on clean, seen and unseen images.

Accuracies are in percent. All arms, corruptions and seeds of one report are resampled on the same
draws of test images, and differences are paired. The interval of a mean over seeds covers test
images and training seeds (`Hierarchy`), that of one seed test images alone (`Bootstrap`).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from experiments.report import plots
from experiments.report.columns import only, range_of_training
from experiments.report.costs import costs_of
from experiments.report.curves import learning_curves
from experiments.report.hierarchy import Hierarchy
from experiments.report.page import render_page
from experiments.report.plots import METHODS, arm_order, arm_style
from experiments.report.rows import csv_of
from roma.evaluate.conditions import Cell, DegradedImages
from roma.evaluate.figures import save
from roma.evaluate.report.cards import GalleryItem, short_answer
from roma.evaluate.report.plots import gallery as draw_gallery
from roma.evaluate.result import EvalResult
from roma.evaluate.summary import tree_of
from roma.evaluate.wording import finding
from roma_kernels.errors import fail

Results = Mapping[str, Mapping[int, EvalResult]]
"""Arm → training seed → what that model answered; the warm start is one model under one seed."""

COMPARISONS = (
    *(("roma", "grpo"), ("roma", "naive"), ("roma", "naive_mild"), ("roma", "grpo_equal_time")),
    *(("naive", "grpo"), ("naive_mild", "grpo"), ("naive", "naive_mild")),
    *((method, "grpo") for method in METHODS),
    *((method, "roma") for method in METHODS if method.endswith("_roma")),
)
"""The paired differences of the demo's report."""

RESAMPLES, COVERAGE = 10_000, 0.95


def build_report(
    results: Results,
    *,
    config: Mapping[str, Any],
    versions: Mapping[str, str],
    timings: Mapping[str, Any],
    tuned_on: str = "validation split",
    trained_to: float | None = None,
    comparisons: Sequence[tuple[str, str]] = COMPARISONS,
    bootstrap_seed: int = 0,
) -> dict[str, Any]:
    """The contents of report.json.

    Args:
        results: arm → seed → result; all on the same images and cells. A difference takes the
            seeds that both arms have.
        config: the run's settings, JSON-able.
        versions: package → version.
        timings: stage → seconds; may be nested. "runs": "<arm>-seed<k>" → "steps", "train_cpu_s".
        tuned_on: what the settings were chosen on.
        trained_to: the strongest level of training views; the levels that stand for a comparison
            are then the highest up to it and the highest beyond. None: the highest alone.
        comparisons: pairs of arms whose difference is taken, first minus second; a pair with an
            absent arm is left out.
        bootstrap_seed: of the resamples that all intervals share.

    Returns:
        "seeds"; "images"; "costs": arm → "steps" and "cpu_s", seed by seed; "arms": arm → pool →
        level → {"mean", "low", "high", "n"}, mean over seeds, "clean" without a level; "per_seed":
        arm → seed → the same tree; "differences": "roma-grpo" → "mean" or a seed → the same tree,
        in points; "detail": one row per arm, cell and seed or "mean"; "tuned_on"; "trained_to";
        "intervals": how they were made; "config"; "versions"; "timings".

    Raises:
        ValueError: no results, or an arm that was measured on other images or cells than the first.
    """
    first = _check(results)
    arms = arm_order(results)
    draws = Hierarchy(len(first.ids), resamples=RESAMPLES, seed=bootstrap_seed)

    def macros(arm: str, seeds: Sequence[int]) -> np.ndarray:
        """[seeds, columns, n]."""
        return np.array(
            [[results[arm][s].scores(*column) for column in first.columns] for s in seeds]
        )

    def accuracy(arm: str, seeds: Sequence[int]) -> dict[str, Any]:
        return tree_of(first.columns, draws.intervals(macros(arm, seeds)))

    def difference(one: str, other: str, seeds: Sequence[int]) -> dict[str, Any]:
        found = draws.differences(macros(one, seeds), macros(other, seeds))
        return tree_of(first.columns, found)

    differences = {}
    for one, other in comparisons:
        shared = sorted(set(results.get(one, ())) & set(results.get(other, ())))
        if shared:
            by_seed = {str(seed): difference(one, other, [seed]) for seed in shared}
            differences[f"{one}-{other}"] = {"mean": difference(one, other, shared)} | by_seed
    trained = [arm for arm in arms if arm != "base"] or arms
    seeds = sorted({seed for arm in trained for seed in results[arm]})
    return {
        "seeds": seeds,
        "images": len(first.ids),
        "costs": costs_of(arms, timings.get("runs", {})),
        "arms": {arm: accuracy(arm, sorted(results[arm])) for arm in arms},
        "per_seed": {
            arm: {str(seed): accuracy(arm, [seed]) for seed in sorted(results[arm])} for arm in arms
        },
        "differences": differences,
        "detail": list(_detail(results, arms, draws)),
        "tuned_on": tuned_on,
        "trained_to": trained_to,
        "intervals": {
            "kind": "Bayesian bootstrap over test images, paired between arms and corruptions;"
            " four imagined images keep room for scores that were not seen; of a mean over seeds"
            " with Student's t over their means",
            "covers": "the choice of test images and, in a mean over seeds, of training seeds"
            if len(seeds) > 1
            else "the choice of test images, not the choice of training seeds",
            "coverage": COVERAGE,
            "resamples": RESAMPLES,
            "seed": bootstrap_seed,
        },
        "config": dict(config),
        "versions": dict(versions),
        "timings": dict(timings),
    }


def _check(results: Results) -> EvalResult:
    """The first result, after checking that all others have its images and cells."""
    every = [
        (f"{arm}, seed {s}", r) for arm, by_seed in results.items() for s, r in by_seed.items()
    ]
    if not every or not all(results.values()):
        fail("results", "at least one seed of each arm", "none", "evaluate a model first")
    name, first = every[0]
    for other, found in every[1:]:
        if found.ids != first.ids or list(found.cells) != list(first.cells):
            expected = f"the images and cells of {name}"
            fail(f"results of {other}", expected, "others", "evaluate all on one DegradedImages")
    return first


def _detail(results: Results, arms: Sequence[str], draws: Hierarchy) -> Iterator[dict[str, Any]]:
    """One row per arm, seed or "mean", and cell."""
    for arm in arms:
        seeds = sorted(results[arm])
        groups: dict[int | str, list[int]] = {"mean": seeds} | {seed: [seed] for seed in seeds}
        cells = results[arm][seeds[0]].cells
        for name, group in groups.items():
            by_seed = [[results[arm][s].cells[cell].correct for cell in cells] for s in group]
            intervals = draws.intervals(by_seed)
            for cell, interval in zip(cells, intervals, strict=True):
                yield {"arm": arm, "seed": name} | asdict(cell) | interval.as_dict()


def summary(report: Mapping[str, Any]) -> list[str]:
    """The findings in sentences: an opening, one finding per compared pair, a caveat.

    A difference is called higher or lower only where its interval excludes 0.
    """
    count = len(report["seeds"])
    averaged = f"mean over {count} training seeds" if count > 1 else "one training seed"
    tuned = f"settings tuned on: {report['tuned_on']}"
    opening = f"{report['images']} held-out test images per condition; {averaged}; {tuned}."
    text = [" ".join(filter(None, (opening, range_of_training(report))))]
    for name, by_seed in report["differences"].items():
        one, other = (arm_style(arm).label for arm in name.split("-"))
        shown = only(by_seed["mean"], report.get("trained_to"))
        text.append(finding(f"{one} minus {other}", shown))
    over = "test images and training seeds" if count > 1 else "test images"
    more = (
        "those of a single seed cover test images alone"
        if count > 1
        else "they do not cover the choice of the training seed"
    )
    text.append(
        f"Brackets are 95 % bootstrap intervals over {over}, paired between the arms; {more}."
    )
    return text


def read_metrics(run_dir: str | Path, *, arms: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Rows of every `<arm>-seed<k>/metrics.jsonl` in a run, each with its "arm" and "seed".

    Args:
        run_dir: the folder that holds the runs.
        arms: whose rows to read; None: all.

    Raises:
        ValueError: a line that is not JSON; file and line are named.
    """
    rows = []
    for path in sorted(Path(run_dir).glob("*-seed*/metrics.jsonl")):
        arm, seed = path.parent.name.rsplit("-seed", 1)
        if arms is not None and arm not in arms:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                fail(f"{path}, line {number}", "a JSON object", repr(line[:40]), "remove the line")
            rows.append({"arm": arm, "seed": int(seed) if seed.isdigit() else seed} | row)
    return rows


def choose_gallery(
    results: Results, images: DegradedImages, *, items: int = 12
) -> list[GalleryItem]:
    """Test images at equal distances through the set; the corruptions alternate, at highest level.

    The choice does not depend on the answers.

    Args:
        results: as for `build_report`; each arm's first seed answers.
        images: what the results were measured on.
        items: at most this number.
    """
    by_level = sorted(images.cells, key=lambda cell: cell.level)
    highest = list({cell.corruption: cell for cell in by_level if cell.corruption}.values())
    count = min(items, len(images.examples))
    chosen = []
    for turn, index in enumerate(np.linspace(0, len(images.examples) - 1, count).astype(int)):
        cell = highest[turn % len(highest)] if highest else Cell()
        example = images.examples[index]
        answers: dict[str, dict[str, tuple[str, bool]]] = {}
        for arm in arm_order(results):
            found = results[arm][min(results[arm])].cells
            answers[arm] = {
                name: (short_answer(found[at].texts[index]), bool(found[at].correct[index]))
                for name, at in (("clean", Cell()), ("degraded", cell))
                if at in found
            }
        question = " ".join(example.problem.replace("<image>", " ").split())
        clean, degraded = (images.at(at)[index][0] for at in (Cell(), cell))
        chosen.append(GalleryItem(question, example.answer, str(cell), clean, degraded, answers))
    return chosen


def write_report(
    out: str | Path,
    report: Mapping[str, Any],
    *,
    metrics: Sequence[Mapping[str, Any]] = (),
    gallery: Sequence[GalleryItem] = (),
) -> Path:
    """Writes report.json, report.csv (`rows_of`), report.html and the figures as PNG files.

    Args:
        out: the folder; made if absent.
        report: of `build_report`.
        metrics: of `read_metrics`; may lack any key.
        gallery: of `choose_gallery`.

    Returns:
        The path of report.html.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=1, ensure_ascii=False)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    (folder / "report.csv").write_text(csv_of(report), encoding="utf-8")
    figures = {
        "robustness": plots.robustness(report),
        "methods": plots.methods(report),
        "corruptions": plots.corruptions(report),
        "learning_curves": learning_curves(metrics),
        "gallery": draw_gallery(gallery, arm_style),
    }
    drawn = {}
    for name, figure in figures.items():
        drawn[name] = save(figure, folder / f"{name}.png").read_bytes()
    page = folder / "report.html"
    page.write_text(render_page(report, summary(report), drawn, gallery), encoding="utf-8")
    return page
