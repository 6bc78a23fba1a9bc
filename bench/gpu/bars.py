"""The bars: what a card must show, each met, missed or not measured.

    the tests of a GPU      all pass
    the whole loss, K = 4   at least 1.8 times as fast as the fastest composition of public kernels
    the forward             at least 85 %, then 90 % of the rate of the vendor's product
    verl's Triton kernel    slower than ours at every size that both were timed at

A ratio counts by its interval's lower end. The product's rate is the higher of two: a square
product timed alone, and the same rows with the same head timed among the candidates.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

LOSS, FORWARD, BETTER = 1.8, 85.0, 90.0
OURS = "roma"
VERL = ("verl", "verl active")
Row = dict[str, str]


class Bar(NamedTuple):
    """One bar."""

    what: str
    measured: str
    verdict: str
    """"met", "missed" or "not measured"."""


NOT_MEASURED = "not measured"


def bars(
    tests: dict[str, dict[str, Any]], rows: Iterable[Row], square: float | None, whole: bool
) -> list[Bar]:
    """Every bar, from what there is.

    Args:
        tests: the tests' findings by name.
        rows: the benchmark's, as its CSV has them.
        square: TFLOP/s of the vendor's square product, or None.
        whole: whether every test has been run.
    """
    rows = list(rows)
    return [
        _tests(tests, whole),
        *_whole_loss(rows),
        *_forward(rows, square),
        *_against_verl(rows),
    ]


def number(value: Any) -> float:
    """A number, or NaN for whatever is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def timed(row: Row) -> bool:
    """Whether a row of the benchmark has a time."""
    return number(row.get("ms_p50")) > 0


def size(row: Row) -> str:
    """The size of a row of the benchmark."""
    names = {"tokens": "N", "views": "K", "depth": "D", "vocab": "V"}
    return " ".join(f"{short}={row.get(name, '?')}" for name, short in names.items())


def _verdict(met: bool) -> str:
    return "met" if met else "missed"


def _tests(tests: dict[str, dict[str, Any]], whole: bool) -> Bar:
    count = {
        status: sum(row.get("status") == status for row in tests.values())
        for status in ("ok", "failed", "crashed", "timeout", "skipped")
    }
    wrong = count["failed"] + count["crashed"] + count["timeout"]
    said = f"{count['ok']} passed, {wrong} not, {count['skipped']} skipped"
    if wrong:
        return Bar("pytest -m gpu", said, "missed")
    if not whole or not count["ok"]:
        return Bar("pytest -m gpu", said if tests else "", NOT_MEASURED)
    return Bar("pytest -m gpu", said, "met")


def _whole_loss(rows: list[Row]) -> list[Bar]:
    """Of each size with K = 4."""
    found = []
    for what, group in _variants(rows, "roma_loss", "both"):
        if group[0].get("views") != "4" or group[0].get("worst_over", "sequence") != "sequence":
            continue
        peers = [r for r in group if not r["provider"].startswith(OURS) and timed(r)]
        if not any(r["provider"] == OURS and timed(r) for r in group) or not peers:
            found.append(Bar(f"loss, {what}: ≥ {LOSS} ×", "", NOT_MEASURED))
            continue
        best = min(peers, key=lambda r: number(r.get("ratio")))
        ratio, low = number(best.get("ratio")), number(best.get("ratio_low"))
        high = number(best.get("ratio_high"))
        said = f"{ratio:.2f} × [{low:.2f}, {high:.2f}]: {best['provider']}, of {len(peers)} timed"
        found.append(Bar(f"loss, {what}: ≥ {LOSS} ×", said, _verdict(low >= LOSS)))
    return found or [Bar(f"loss, K = 4: ≥ {LOSS} ×", "", NOT_MEASURED)]


def _forward(rows: list[Row], square: float | None) -> list[Bar]:
    """Of each size with many rows, bf16."""
    found = []
    for what, group in _variants(rows, "linear_logprob", "forward"):
        count = number(group[0].get("tokens")) * (number(group[0].get("views")) + 1)
        if not count >= 4096:
            continue  # fewer rows are bound by W's bytes
        ours = [r for r in group if r["provider"] == OURS and timed(r)]
        name = f"forward, {what}: ≥ {FORWARD:.0f} %, then {BETTER:.0f} % of the product"
        if not ours:
            found.append(Bar(name, "", NOT_MEASURED))
            continue
        rate = number(ours[0].get("tflops"))
        rates = [number(ours[0].get("product_tflops")), square or math.nan]
        product = max((r for r in rates if r > 0), default=math.nan)
        share = 100 * rate / product
        if not share > 0:
            found.append(Bar(name, "", NOT_MEASURED))
            continue
        said = f"{share:.1f} % of {product:.4g} TFLOP/s"
        verdict = "met" if share >= BETTER else "85 % met" if share >= FORWARD else "missed"
        found.append(Bar(name, said, verdict))
    return found or [Bar(f"forward: ≥ {FORWARD:.0f} % of the product", "", NOT_MEASURED)]


def _against_verl(rows: list[Row]) -> list[Bar]:
    """Of all sizes together, by the worst."""
    name, worst, sizes = "faster than verl's Triton kernel at every size", None, 0
    for op, phase in (("linear_logprob", "forward"), ("linear_logprob", "both"),
                      ("roma_loss", "both")):  # fmt: skip
        for what, group in _variants(rows, op, phase):
            if not any(r["provider"] == OURS and timed(r) for r in group):
                continue
            for row in group:
                if row["provider"] not in VERL or not timed(row):
                    continue
                sizes += 1
                low = number(row.get("ratio_low"))
                if worst is None or not low >= worst[0]:
                    worst = (low, f"{row['provider']}, {op} {phase}, {what}")
    if worst is None:
        return [Bar(name, "", NOT_MEASURED)]
    said = f"{sizes} timings; the lowest ≥ {worst[0]:.2f} × ({worst[1]})"
    return [Bar(name, said, _verdict(worst[0] > 1))]


def _variants(rows: list[Row], op: str, phase: str) -> Iterable[tuple[str, list[Row]]]:
    """The rows of each variant of an op, with its size in words."""
    names = (
        "tokens",
        "views",
        "depth",
        "vocab",
        "dtype",
        "active",
        "right",
        "worst_over",
        "states",
    )
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row.get("op") == op and row.get("phase") == phase and row.get("provider"):
            groups.setdefault(tuple(row.get(name, "") for name in names), []).append(row)
    for group in groups.values():
        active = number(group[0].get("active"))
        part = f", {active:.0%} active" if active < 1 and op == "linear_logprob" else ""
        yield size(group[0]) + part, group
