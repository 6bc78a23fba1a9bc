"""The measured tables of the update step, from a CSV of `python -m bench --preset update`."""

from pathlib import Path

from bench.layout import Layout
from bench.variants import HEADLINE

Row = dict[str, str]
BASE = "grpo"
SAYS = {
    "grpo": "GRPO, a row and a vision pass per rollout",
    "trl": "TRL's `_compute_loss`",
    "grpo shared": "GRPO, prompt shared",
    "joint": "joint, row-wise",
    "lean rows": "lean, row-wise",
    "roma": "**lean, prompt shared**",
    "two-pass": "two-pass, prompt shared",
}
METHODS = {
    "grpo shared": "GRPO, prompt shared",
    "mssr": "MSSR: one rollout a prompt, as many rollouts",
    "vgpo": "VGPO",
    "srpo": "SRPO",
    "papo": "PAPO",
    "dvrp": "DVRP",
    "roma": "ROMA, K = 2",
    "pgd": "ROMA, K = 2, views by PGD in 3 steps",
}
AT = "4"  # the K at which all is shown


def measured(rows: list[Row], path: Path) -> str:
    """All tables of a CSV, with where they come from."""
    timed = [row for row in rows if row["op"] == "update_step" and row.get("ms_p50")]
    headline = [r for r in timed if r["what"] == str(HEADLINE) and r["right"] == "0.5"]
    first = headline[0]
    parts = [
        *(_by_views(headline), _in_full(headline), _changed(timed), _packed(timed)),
        _methods(headline),
    ]
    version = next((r["version"] for r in timed if r["provider"] == "trl"), "not here")
    commits = ", ".join(dict.fromkeys(r["commit"] for r in timed))
    source = (
        f"{first['machine']}; torch {first['torch']}; TRL {version}; commit {commits}; "
        f"source: [{path.name}](../bench/results/{path.name})."
    )
    absent = {r["provider"]: r["reason"] for r in rows if r.get("reason")}
    if absent:
        source += " Not timed: " + "; ".join(f"{n} ({why})" for n, why in absent.items()) + "."
    return "\n\n".join(["\n".join(part) for part in parts if part] + [source])


def _by_views(headline: list[Row]) -> list[str]:
    """Time over the base's, by K."""
    views = sorted({r["views"] for r in headline}, key=int)
    lines = ["| time | " + " | ".join(f"K = {k}" for k in views) + " |", _rule(1 + len(views))]
    for name, label in SAYS.items():
        cells = [_ratio([r for r in headline if r["views"] == k], name) for k in views]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


def _in_full(headline: list[Row]) -> list[str]:
    """At one K: times, and what was counted, over the base's."""
    own = {r["provider"]: r for r in headline if r["views"] == AT}
    if BASE not in own:
        return []
    base = own[BASE]
    lines = [
        f"| K = {AT} | ms, p20 · p50 · p80 | time, 95 % interval | FLOP | FLOP, predicted | "
        "saved | resident |",
        _rule(7),
    ]
    for name, label in SAYS.items():
        if name not in own:
            continue
        row = own[name]
        ms = " · ".join(f"{float(row[f'ms_p{p}']):.0f}" for p in (20, 50, 80))
        low, high = (float(row[f"ratio_{end}"]) for end in ("low", "high"))
        time = "1" if name == BASE else f"{float(row['ratio']):.2f} [{low:.2f}, {high:.2f}]"
        over = [
            f"{float(row[key]) / float(base[key]):.2f}" if row[key] and base[key] else "–"
            for key in ("executed_gflop", "predicted_gflop", "saved_mib", "extra_mib")
        ]
        lines.append(f"| {label} | {ms} | {time} | {' | '.join(over)} |")
    resident = f"{float(base['extra_mib']):.0f} MiB" if base["extra_mib"] else "not measured"
    return [
        *lines,
        "",
        f"1 is {float(base['executed_gflop']):.0f} GFLOP, {float(base['saved_mib']):.0f} MiB of "
        f"tensors saved for the backward, and a peak of resident memory of {resident}.",
    ]


def _changed(timed: list[Row]) -> list[str]:
    """Time over the base's where one thing differs from the headline."""
    names = ["trl", "grpo shared", "joint", "roma", "two-pass"]
    lines = [
        "| time | " + " | ".join(SAYS[n].replace("*", "") for n in names) + " |",
        _rule(1 + len(names)),
    ]
    kinds = dict.fromkeys((r["what"], r["right"], r["views"]) for r in timed if r["depth"] == "192")
    for kind in kinds:
        label = _label(Layout.of(kind[0]), *kind[1:])
        own = [r for r in timed if (r["what"], r["right"], r["views"]) == kind]
        if label:
            lines.append(f"| {label} | {' | '.join(_ratio(own, name) for name in names)} |")
    return lines if len(lines) > 2 else []


def _label(layout: Layout, right: str, views: str) -> str:
    """What differs from the headline; "" if nothing does."""
    k = f", K = {views}"
    if layout.ragged:
        return f"completions of {layout.completion // 8} to {layout.completion} tokens{k}"
    if layout.checkpointed:
        return f"checkpointed{k}"
    if right != "0.5":
        return f"{float(right):.0%} right{k}"
    if layout == HEADLINE:
        return ""
    share = layout.prompt / layout.completion
    proportion = f"{share:g} : 1" if share >= 1 else f"1 : {1 / share:g}"
    return f"prompt {layout.prompt}, completion {layout.completion} ({proportion}){k}"


def _packed(timed: list[Row]) -> list[str]:
    """Milliseconds for 1000 packed tokens, by how many there are."""
    own = [r for r in timed if r["depth"] == "96" and r["provider"] == "roma"]
    if not own:
        return []
    lines = [
        "| packed tokens | ms for 1000 of them | saved, KiB a token | time over GRPO's |",
        _rule(4),
    ]
    for row in sorted(own, key=lambda r: float(r["packed_tokens"])):
        count = float(row["packed_tokens"])
        ms = 1000 * float(row["ms_p50"]) / count
        kib = 1024 * float(row["saved_mib"]) / count
        lines.append(f"| {count:.0f} | {ms:.1f} | {kib:.1f} | {_ratio([row], 'roma')} |")
    return lines


def _methods(headline: list[Row]) -> list[str]:
    """A whole step's gradients by method, scoring passes in it, over GRPO's row-wise."""
    own = {r["provider"]: r for r in headline if r["views"] == "2"}
    if not own.keys() & METHODS.keys() - SAYS.keys():
        return []
    base = own[BASE]
    lines = [
        "| a step of another method, with what it scores | time, 95 % interval | FLOP | saved |",
        _rule(4),
    ]
    for name, label in METHODS.items():
        if name in own:
            row = own[name]
            low, high = (float(row[f"ratio_{end}"]) for end in ("low", "high"))
            time = f"{float(row['ratio']):.2f} [{low:.2f}, {high:.2f}]"
            over = [
                f"{float(row[k]) / float(base[k]):.2f}" for k in ("executed_gflop", "saved_mib")
            ]
            lines.append(f"| {label} | {time} | {' | '.join(over)} |")
    return lines


def _ratio(rows: list[Row], name: str) -> str:
    row = next((r for r in rows if r["provider"] == name), None)
    if row is None or not row["ratio"]:
        return ""
    return "1" if name == BASE else f"{float(row['ratio']):.2f}"


def _rule(columns: int) -> str:
    return "|---" * columns + "|"
