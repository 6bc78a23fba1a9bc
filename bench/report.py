"""From a CSV to the tables in docs/ and the plots beside the CSV."""

import re
from collections.abc import Callable
from pathlib import Path

from bench.ops import ACTIVE
from bench.providers import OURS, PROVIDERS
from bench.results import FOLDER, Row, read
from bench.update_step.predicted import table as predicted
from bench.update_step.table import measured
from roma_kernels.errors import fail

ROOT = Path(__file__).parents[1]
HEAD = ("linear_logprob", "roma_loss")
BEGIN, END = "<!-- {}:begin, written by python -m bench --report -->", "<!-- {}:end -->"


def write(path: Path) -> None:
    """Plots beside the CSV, and each table for which it has the rows between a document's markers.

    Raises:
        ValueError: a document has lost its markers.
    """
    rows = read(path)
    for plot in plots(rows, path):
        print(f"written: {plot}")
    ops = {row["op"] for row in rows if row.get("ms_p50")}
    tables: dict[tuple[str, str], Callable[[list[Row], Path], str]] = {}
    if set(HEAD) <= ops:
        tables = {("docs/BENCHMARKS.md", "bench"): table, ("docs/COST.md", "bench"): costs}
    elif ops == {"views"}:
        tables = {("docs/VIEWS.md", "bench"): views}
    elif ops == {"update_step"}:
        tables = {
            ("docs/COST.md", "update"): measured,
            ("docs/COST.md", "predicted"): lambda rows, path: predicted(),
        }
    if any(row.get("device") == "cuda" for row in rows):
        tables = {}
        print("tables of a card: python -m bench.gpu.summary CSV")
    if not tables:
        print(f"no tables: they need {' and '.join(HEAD)}, or views or update_step alone")
        return
    if path.resolve().parent != FOLDER:
        print(f"no tables: they link to CSVs in {FOLDER.relative_to(ROOT)}")
        return
    for (name, mark), make in tables.items():
        text = (ROOT / name).read_text()
        new = between_markers(text, make(rows, path), name, mark)
        if new != text:
            (ROOT / name).write_text(new)
            print(f"written: the table {mark} in {name}")


def between_markers(text: str, made: str, name: str, mark: str = "bench") -> str:
    """The text of document `name` with `made` between the markers of that name."""
    begin, end = BEGIN.format(mark), END.format(mark)
    between = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    found = len(between.findall(text))
    if found != 1:
        fail(name, f"one {begin} … {end}", str(found), "put the markers back")
    return between.sub(lambda _: f"{begin}\n{made}\n{end}", text)


def views(rows: list[Row], path: Path) -> str:
    """Images per second for each corruption and size; in brackets a loop's time over ours."""
    timed = [row for row in rows if row.get("ms_p50")]
    names = sorted({row["provider"] for row in timed} - {OURS})
    sizes = dict.fromkeys((row["depth"], row["tokens"]) for row in timed)
    heads = [f"{side}×{side}: roma | {' | '.join(names)}" for side, _ in sizes]
    lines = [
        f"| images/s | {' | '.join(heads)} |",
        "|---" * (1 + len(sizes) * (1 + len(names))) + "|",
    ]
    for what in dict.fromkeys(row["what"] for row in timed):
        cells = []
        for side, _ in sizes:
            here = [r for r in timed if (r["what"], r["depth"]) == (what, side)]
            cells += [_rate(here, name) for name in (OURS, *names)]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    first = timed[0]
    called = " and ".join(f"{count} of {side}×{side}" for side, count in sizes)
    lines += [
        "",
        f"{first['machine']}; commit {first['commit']}; {called} a call, level 2; mix: the seen "
        "corruptions in equal numbers. In brackets: the time over ours, paired within rounds; "
        "“level” where the 95 % interval contains 1. "
        f"Source: [{path.name}](../bench/results/{path.name}).",
    ]
    return "\n".join(lines)


def _rate(rows: list[Row], name: str) -> str:
    row = next((row for row in rows if row["provider"] == name), None)
    if row is None:
        return "–"
    rate = float(row["tokens"]) / float(row["ms_p50"]) * 1e3
    return (f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}") + _beside_ours(row)


def costs(rows: list[Row], path: Path) -> str:
    """Our times beside the cost model's prediction: executed products at one rate for all."""
    ours = [r for r in rows if r["provider"] == OURS and r.get("executed_gflop")]
    ours = [r for r in ours if r["op"] in HEAD and r["phase"] == "both"]
    ours = [r for r in ours if r["dtype"] == ours[0]["dtype"]]
    base = next((r for r in ours if r["op"] == "roma_loss" and _base(r, rows)), None)
    if base is None:
        return f"Ours has no time of the loss in [{path.name}](../bench/results/{path.name})."
    rate = float(base["executed_gflop"]) / float(base["ms_p50"])
    lines = [
        "| op | N | K | D | V | what | products, GFLOP | predicted, ms | measured, ms | off |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in ours:
        work, measured = float(row["executed_gflop"]), float(row["ms_p50"])
        what = f"{float(row['right']):.0%} right, worst over {row['worst_over']}"
        if row["op"] == "linear_logprob":
            what = f"{float(row['active']):.0%} active"
        size = " | ".join(row[axis] for axis in ("tokens", "views", "depth", "vocab"))
        lines.append(
            f"| {row['op']} | {size} | {what} | {work:.3g} | {work / rate:.0f} | {measured:.0f} | "
            f"{measured * rate / work - 1:+.0%} |"
        )
    lines += [
        "",
        f"The rate is that of the first `roma_loss` row: {rate * 1e3:.0f} GFLOP/s. "
        f"{base['machine']}, {base['dtype']}; source: [{path.name}](../bench/results/{path.name}).",
    ]
    scaling = plot_of(path, "scaling")
    if scaling.exists():
        lines += [
            "",
            "Times along each axis. The floor is the useful products at the rate of one plain "
            "product in the inputs' dtype, whose result is rounded to it:",
        ]
    return "\n".join(lines + _image("cost along each axis", scaling))


def plot_of(path: Path, name: str) -> Path:
    """A plot beside its CSV."""
    return path.with_name(f"{path.stem}-{name}.png")


def _image(title: str, plot: Path) -> list[str]:
    return ["", f"![{title}](../bench/results/{plot.name})"] if plot.exists() else []


def table(rows: list[Row], path: Path) -> str:
    """The peers at the size at which all were timed, and why the others were not timed."""
    timed = [row for row in rows if row.get("ms_p50")]
    first = timed[0]
    columns: list[tuple[str, Callable[[Row], bool]]] = [
        ("forward", lambda r: r["op"] == "linear_logprob" and r["phase"] == "forward"),
        ("+ backward", lambda r: r["op"] == "linear_logprob" and _both(r, "1")),
        ("¼ active", lambda r: r["op"] == "linear_logprob" and _both(r, "0.25")),
        ("whole loss", lambda r: r["op"] == "roma_loss" and _base(r, rows)),
    ]
    names = [n for n in dict.fromkeys(r["provider"] for r in timed if r["op"] == "linear_logprob")]
    lines = [
        "| ms (time over ours) | " + " | ".join(name for name, _ in columns)
        + " | whole loss, active rows only | extra MiB | logp rms, nats | worst view agrees |",
        "|---" * (len(columns) + 5) + "|",
    ]  # fmt: skip
    for name in names:
        cells = [_cell(timed, name, wanted) for _, wanted in columns]
        whole = columns[-1][1]
        cells.append("" if name == OURS else _cell(timed, name + ACTIVE, whole))
        one = next(r for r in timed if r["provider"] == name and r["op"] == "linear_logprob")
        memory = next((r["extra_mib"] for r in timed if r["provider"] == name and whole(r)), "")
        cells += [
            f"{float(memory):.0f}" if memory else "–",
            one["logp_rms"],
            f"{float(one['worst_view']):.0%}" if one["worst_view"] != "nan" else "–",
        ]
        label = f"**{name}**" if name == OURS else name
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    absent = {r["provider"]: r["reason"] for r in rows if r.get("reason")}
    absent = {n: why for n, why in absent.items() if not n.endswith(ACTIVE)}
    lines.append("")
    shape = next(r for r in timed if r["op"] == "linear_logprob")
    size = f"N = {shape['tokens']} tokens, K = {shape['views']}, D = {shape['depth']}"
    drawn = f"median {shape['entropy_p50']} nats, largest logit {shape['logit_max']}"
    lines.append(
        f"{first['machine']}; torch {first['torch']}; commit {first['commit']}; {size}, V = "
        f"{shape['vocab']}, {shape['dtype']}. Whole loss: half of the rollouts right, worst view "
        "by sequence. Medians; in brackets: the ratio to ours, paired within rounds, “level” where "
        f"its 95 % interval contains 1. Entropy of the drawn softmax: {drawn}. Source: "
        f"[{path.name}](../bench/results/{path.name})."
    )
    known = {p.name: p.what for p in PROVIDERS}
    lines += ["", "The rows. " + "; ".join(f"{n}: {known[n]}" for n in names if n in known) + "."]
    if absent:
        lines += ["", "Not timed: " + "; ".join(f"{n} ({why})" for n, why in absent.items()) + "."]
    return "\n".join(lines + _image("time of the whole loss over ours", plot_of(path, "loss")))


def _both(row: Row, active: str) -> bool:
    return row["phase"] == "both" and row["active"] == active


def _base(row: Row, rows: list[Row]) -> bool:
    """Whether it is the loss at the size at which every provider was timed, the plan's first."""
    first = next(r for r in rows if r["op"] == "roma_loss")
    keys = ("tokens", "views", "depth", "vocab", "dtype", "right", "worst_over")
    return all(row[key] == first[key] for key in keys)


def _cell(rows: list[Row], name: str, wanted: Callable[[Row], bool]) -> str:
    row = next((r for r in rows if r["provider"] == name and wanted(r)), None)
    if row is None:
        return "–"
    return f"{float(row['ms_p50']):.3g}" + _beside_ours(row)


def _beside_ours(row: Row) -> str:
    """In brackets: the time over ours, where ours has one."""
    if row["provider"] == OURS or not row["ratio"]:
        return ""
    if float(row["ratio_low"]) <= 1 <= float(row["ratio_high"]):
        return " (level)"
    return f" ({float(row['ratio']):.2g}×)"


def plots(rows: list[Row], path: Path) -> list[Path]:
    """The loss's times over ours with their intervals, and times along each axis, if measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    timed = [row for row in rows if row.get("ms_p50")]
    made = []
    base = [r for r in timed if r["op"] == "roma_loss" and _base(r, rows) and r["ratio"]]
    if base:
        base.sort(key=lambda r: float(r["ratio"]))
        figure, axes = plt.subplots(figsize=(8, 0.32 * len(base) + 1.4), layout="constrained")
        for place, row in enumerate(base):
            ratio, low, high = (float(row[k]) for k in ("ratio", "ratio_low", "ratio_high"))
            exact = float(row["logp_rms"]) < 1e-4
            axes.errorbar(
                ratio, place, xerr=[[ratio - low], [high - ratio]], fmt="o", capsize=3,
                color="C0" if exact else "C3",
            )  # fmt: skip
        axes.axvline(1, color="grey", lw=0.8)
        axes.set_yticks(range(len(base)), [r["provider"] for r in base])
        axes.set_xscale("log")
        ticks = [
            t for t in (0.25, 0.5, 1, 2, 4, 8, 16, 32) if t <= 2 * float(base[-1]["ratio_high"])
        ]
        axes.set_xticks(ticks, [f"{t:g}×" for t in ticks])
        axes.minorticks_off()
        axes.set_xlabel("time of the whole loss, forward + backward, over ours (95 % interval)")
        axes.set_title(
            "blue: fp32 logits; red: rounded logits (worst view near chance)", fontsize=9
        )
        made.append(plot_of(path, "loss"))
        figure.savefig(made[-1], dpi=120)
        plt.close(figure)
    made += _scaling(timed, path)
    return made


def _scaling(timed: list[Row], path: Path) -> list[Path]:
    from matplotlib import pyplot as plt

    loss = [r for r in timed if r["op"] == "roma_loss" and _plain(r, timed)]
    axes_of = {
        "tokens": "tokens N",
        "views": "views K",
        "vocab": "vocabulary V",
        "depth": "hidden size D",
    }
    series = {axis: _along(loss, axis) for axis in axes_of}
    series = {axis: rows for axis, rows in series.items() if len({r[axis] for r in rows}) > 2}
    if not series:
        return []
    figure, panels = plt.subplots(
        1, len(series), figsize=(3.4 * len(series), 3.4), layout="constrained", squeeze=False
    )
    for panel, (axis, rows) in zip(panels[0], series.items(), strict=True):
        for number, name in enumerate((OURS, "naive fp32", "naive fp32" + ACTIVE)):
            mine = sorted((r for r in rows if r["provider"] == name), key=lambda r: float(r[axis]))
            if mine:
                x, y = ([float(r[k]) for r in mine] for k in (axis, "ms_p50"))
                panel.plot(x, y, "o-", color=f"C{number}", label=name, ms=4)
        ours = sorted((r for r in rows if r["provider"] == OURS), key=lambda r: float(r[axis]))
        floor = [float(r["useful_gflop"]) / float(r["product_tflops"]) for r in ours]
        panel.plot(
            [float(r[axis]) for r in ours], floor, "--", color="grey", label="floor: products"
        )
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xlabel(axes_of[axis])
    panels[0][0].set_ylabel("ms, forward + backward")
    panels[0][0].legend(fontsize=7)
    made = plot_of(path, "scaling")
    figure.savefig(made, dpi=120)
    plt.close(figure)
    return [made]


def _plain(row: Row, timed: list[Row]) -> bool:
    first = next(r for r in timed if r["op"] == "roma_loss")
    return all(row[key] == first[key] for key in ("right", "worst_over", "dtype"))


def _along(rows: list[Row], axis: str) -> list[Row]:
    """Rows that differ from the first in one axis only."""
    if not rows:
        return []
    others = [a for a in ("tokens", "views", "vocab", "depth") if a != axis]
    found = [r for r in rows if all(r[a] == rows[0][a] for a in others)]
    return [r for r in found if float(r[axis]) > 0]  # the axis is logarithmic
