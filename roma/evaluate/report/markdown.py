"""A report as Markdown: accuracy, robustness, differences, each corruption."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from roma.evaluate.columns import columns_of, groups_of
from roma.evaluate.report.content import (
    MEASURES,
    Content,
    Suite,
    Summary,
    column,
    corruptions,
)
from roma.evaluate.report.findings import CAVEAT, findings, opening
from roma.evaluate.wording import Entry, direction, number, signed, with_interval

Lines = list[str]


def markdown(models: Mapping[str, Suite], *, title: str = "", notes: Sequence[str] = ()) -> str:
    """The tables of one or several models over one or several benchmarks.

    Args:
        models: name → `summarise_suite`'s; one benchmark of one model is
            `{model: {"benchmarks": {data: summarise(result)}}}`.
        title: none: the tables alone, without findings.
        notes: of the run, a sentence each.

    Returns:
        Accuracy (clean and each pool at each level; the average over benchmarks first), the
        columns of robustness, and each corruption.

    Example:
        >>> entry = {"mean": 90.0, "low": 88.0, "high": 92.0, "n": 500}
        >>> summary = {"images": 500, "pools": {"clean": entry}, "detail": []}
        >>> print(markdown({"mine": {"benchmarks": {"digits": summary}}}))
        ## Accuracy, % [95 % interval]
        <BLANKLINE>
        | benchmark | clean |
        |---|---|
        | digits | 90.0 [88.0, 92.0] |
        <BLANKLINE>
    """
    return whole(Content(title, models, notes=notes))


def whole(content: Content) -> str:
    """All of a report's text and tables, differences between its models among them."""
    parts: list[Lines] = []
    if content.title:
        parts += [[f"# {escaped(content.title)}"], [escaped(opening(content))]]
        parts.append([f"* {escaped(said)}" for said in findings(content)])
        parts.append([CAVEAT])
    if content.notes:
        parts.append(["Notes:", "", *(f"* {escaped(note)}" for note in content.notes)])
    parts += [*_accuracy(content), *_differences(content), *_robustness(content)]
    parts += _corruptions(content)
    if content.asked:
        parts += [["## Settings"], [f"* {escaped(said)}" for said in content.asked]]
    return "\n\n".join("\n".join(lines) for lines in parts if lines) + "\n"


def escaped(text: str) -> str:
    r"""Text that Markdown shows as it is.

    Example:
        >>> print(escaped("a|b <script> *c*"))
        a\|b \<script\> \*c\*
    """
    flat = text.replace("\n", " ").replace("&", "&amp;")
    return "".join(f"\\{sign}" if sign in "\\`*|<>[]" else sign for sign in flat)


def table(
    first: Sequence[str],
    rows: Sequence[tuple[Sequence[str], Mapping[str, Any]]],
    form: Callable[[Entry], str],
) -> Lines:
    """Rows over the columns of all of them; an entry that is missing or None is a dash.

    Args:
        first: headings of the labels.
        rows: labels of a row, and its entries as a tree.
        form: of an entry.
    """
    flats = [columns_of(tree) for _, tree in rows]
    groups = groups_of([tree for _, tree in rows])
    names = [f"{name} {c}".rstrip() for name, below in groups.items() for c in below or [""]]
    lines = [_line([*first, *names]), "|---" * (len(first) + len(names)) + "|"]
    for (labels, _), flat in zip(rows, flats, strict=True):
        cells = [form(flat[name]) if flat.get(name) else "–" for name in names]
        lines.append(_line([*labels, *cells], raw=len(cells)))
    return lines


def _line(cells: Sequence[str], *, raw: int = 0) -> str:
    """A row; its last `raw` cells are Markdown already."""
    texts = len(cells) - raw
    return "| " + " | ".join([*map(escaped, cells[:texts]), *cells[texts:]]) + " |"


def _labels(content: Content, heading: str, model: str) -> list[str]:
    return [heading, *([model] if len(content.models) > 1 else [])]


def _first(content: Content) -> list[str]:
    return ["benchmark", *(["model"] if len(content.models) > 1 else [])]


def _each(content: Content) -> Iterator[tuple[list[str], Summary]]:
    """Labels and summary of every part and model."""
    for heading, summaries in content.parts.items():
        for model, summary in summaries.items():
            yield _labels(content, heading, model), summary


def _accuracy(content: Content) -> Iterator[Lines]:
    yield ["## Accuracy, % [95 % interval]"]
    rows = [(labels, column(summary, "accuracy")) for labels, summary in _each(content)]
    yield table(_first(content), rows, with_interval)


def _differences(content: Content) -> Iterator[Lines]:
    if not content.differences:
        return
    yield [f"## Minus {escaped(content.against)}, points [95 % interval], paired"]
    yield ["Bold: the interval excludes 0. Accuracy:"]
    for name, meaning in ({"accuracy": ""} | MEASURES).items():
        rows = [
            ([heading, model], tree)
            for heading, summaries in content.differing.items()
            for model, summary in summaries.items()
            if (tree := column(summary, name))
        ]
        if rows:
            yield [_sentence(meaning)] if meaning else []
            yield table(["benchmark", "model"], rows, _marked)


def _sentence(meaning: str) -> str:
    return f"{meaning[0].upper()}{meaning[1:]}:"


def _marked(entry: Entry) -> str:
    return f"**{signed(entry)}**" if direction(entry) else signed(entry)


def _robustness(content: Content) -> Iterator[Lines]:
    said = False
    for name, meaning in MEASURES.items():
        rows = [(labels, column(summary, name)) for labels, summary in _each(content)]
        if not any(tree for _, tree in rows):
            continue
        if not said:
            yield ["## Robustness [95 % interval]"]
            said = True
        yield [_sentence(meaning)]
        yield table(_first(content), rows, signed if name == "drop" else with_interval)


def _corruptions(content: Content) -> Iterator[Lines]:
    headings = list(content.parts)
    for heading, summaries in content.parts.items():
        rows = []
        for model, summary in summaries.items():
            for pool, kinds in corruptions(summary).items():
                for kind, levels in kinds.items():
                    labels = [pool, kind, *([model] if len(content.models) > 1 else [])]
                    rows.append((labels, levels))
        if not rows:
            continue
        if heading == headings[0]:
            yield ["## Each corruption, accuracy in %"]
        if len(headings) > 1:
            yield [f"### {escaped(heading)}"]
        first = ["pool", "corruption", *(["model"] if len(content.models) > 1 else [])]
        yield table(first, rows, lambda entry: number(entry["mean"]))
