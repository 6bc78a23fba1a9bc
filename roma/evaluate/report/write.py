"""Writes a report: NAME.html, NAME.md and the figures."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from roma.evaluate import figures
from roma.evaluate.columns import columns_of, hardest_columns
from roma.evaluate.compare import compare
from roma.evaluate.figures import LineStyle
from roma.evaluate.folders import Results
from roma.evaluate.report import plots
from roma.evaluate.report.cards import GalleryItem
from roma.evaluate.report.content import Content, Summary, column, corruptions
from roma.evaluate.report.markdown import whole
from roma.evaluate.report.sections import page_of
from roma.evaluate.summary import summarise_suite
from roma_kernels.errors import fail


def write_report(
    out: str | Path,
    results: Sequence[Results],
    *,
    stem: str = "report",
    title: str | None = None,
    notes: Sequence[str] = (),
    against: str | None = None,
) -> list[Path]:
    """Writes the page, its Markdown and its figures, for one or several models.

    Args:
        out: the folder; made if absent.
        results: a model each, all on the same benchmarks and questions.
        stem: of the files' names.
        title: of the page; None: a question that names the model.
        notes: of the run, a sentence each.
        against: the model that the others are compared with; None: the first.

    Returns:
        STEM.html, STEM.md, and STEM-NAME.png for each figure.

    Raises:
        ValueError: no results, two of one name, no model `against`, or models on other benchmarks,
            questions or images.
        FileExistsError: `out` is a file.
    """
    folder = folder_of(out)
    content = content_of(results, title=title, notes=notes, against=against)
    return write(folder, content, stem=stem)


def folder_of(out: str | Path) -> Path:
    """The folder to write to, which need not be there yet.

    Raises:
        FileExistsError: it is a file.
    """
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        fail("out", "a folder", f"the file {folder}", "name another", error=FileExistsError)
    return folder


def write(
    folder: Path, content: Content, *, stem: str = "report", gallery: Sequence[GalleryItem] = ()
) -> list[Path]:
    """Writes a report's files; see `write_report`.

    Args:
        folder: made if absent.
        content: of `content_of`.
        stem: of the files' names.
        gallery: of `roma.evaluate.report.flips`.
    """
    styles = plots.styles_of(list(content.models))
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {
        name: figures.save(make(), folder / f"{stem}-{name}.png")
        for name, make in draw(content, styles, gallery).items()
    }
    images = {name: path.read_bytes() for name, path in drawn.items()}
    page, text = folder / f"{stem}.html", folder / f"{stem}.md"
    page.write_text(page_of(content, images, styles, gallery), encoding="utf-8")
    text.write_text(whole(content), encoding="utf-8")
    return [page, text, *drawn.values()]


def content_of(
    results: Sequence[Results],
    *,
    title: str | None = None,
    notes: Sequence[str] = (),
    against: str | None = None,
) -> Content:
    """Summaries and paired differences of all results; see `write_report`."""
    named = {each.name: each for each in results}
    if not named:
        fail("results", "at least one", "none", "name a folder with results")
    if len(named) < len(results):
        names = [each.name for each in results]
        twice = next(name for name in names if names.count(name) > 1)
        fail("results", "a name for each", f"{twice!r} twice", "give names: NAME=RUN")
    if against is not None and against not in named:
        fail("against", "one of " + ", ".join(named), repr(against), "name a model of the report")
    first = named[against or results[0].name]
    for each in results:
        if set(each.benchmarks) != set(first.benchmarks):
            expected = f"the benchmarks of {first.name}, " + ", ".join(first.benchmarks)
            got = ", ".join(each.benchmarks)
            fail(f"results of {each.name}", expected, got, "evaluate both on the same ones")
    differences = {each.name: compare(each, first) for each in results if each is not first}
    said = [f"Not compared: {each}." for own in differences.values() for each in own["left_out"]]
    subject = f"does {first.name}" if len(named) == 1 else f"do {len(named)} models"
    return Content(
        title or f"How {subject} stand up to bad images?",
        {each.name: summarise_suite(each.benchmarks) for each in results},
        differences,
        first.name,
        {each.name: each.settings for each in results},
        list(dict.fromkeys([*notes, *said])),
        [
            f"{name} and {first.name} were not asked alike, and their difference is of this too:"
            f" {'; '.join(found['differing'])}."
            for name, found in differences.items()
            if found["differing"]
        ],
        _asked({each.name: each.settings for each in results}),
    )


def _asked(settings: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the settings say in a word or number: alike for all models, then what differs."""
    flat: dict[str, dict[str, Any]] = {}
    for model, own in settings.items():
        for key, value in (own | own.get("versions", {})).items():
            if isinstance(value, str | int | float) and not key.endswith("fingerprint"):
                flat.setdefault(key.replace("_", " "), {})[model] = value
    alike, differing = [], []
    for key, values in flat.items():
        if len(values) == len(settings) and len(set(map(str, values.values()))) == 1:
            alike.append(f"{key} {next(iter(values.values()))}")
        else:
            said = ", ".join(f"{value} ({model})" for model, value in values.items())
            differing.append(f"{key[0].upper()}{key[1:]}: {said}.")
    return [f"Asked: {'; '.join(alike)}."] * bool(alike) + differing


def draw(
    content: Content, styles: Mapping[str, LineStyle], gallery: Sequence[GalleryItem] = ()
) -> dict[str, Callable[[], Figure]]:
    """Name → what draws the figure; the figures that the content gives rise to.

    Of more models than a panel holds (`plots.ABREAST`), the first are drawn.
    """
    summaries = next(iter(content.parts.values()))
    shown = dict(list(summaries.items())[: plots.ABREAST])
    first = next(iter(shown.values()))
    kinds: dict[str, set[str]] = {}
    for summary in shown.values():
        for pool, found in corruptions(summary).items():
            kinds.setdefault(pool, set()).update(found)
    crowded = max(map(len, kinds.values()), default=0) > len(figures.KINDS)
    drawn: dict[str, Callable[[], Figure]] = {}
    if kinds and len(shown) == 1 and not crowded:
        drawn["severity"] = lambda: figures.one_model(first)
    elif kinds:
        trees = {model: summary["pools"] for model, summary in shown.items()}
        drawn["severity"] = lambda: plots.severity(trees, styles)
        details = {model: summary["detail"] for model, summary in shown.items()}
        drawn["corruptions"] = lambda: plots.each_corruption(details, styles)
    if len(content.parts) > 1:
        rows = _marks(content.parts, shown, styles)
        drawn["benchmarks"] = lambda: plots.beside(rows, "accuracy, %")
    if content.differences:
        pairs = _marks(content.differing, shown, styles)
        unit = f"points over {styles[content.against].label}"
        drawn["differences"] = lambda: plots.beside(pairs, unit, zero=True)
    seen = [item for item in gallery if item.clean is not None]
    if seen:
        drawn["gallery"] = lambda: plots.gallery(seen, styles.__getitem__)
    return drawn


def _marks(
    parts: Mapping[str, Mapping[str, Summary]],
    shown: Mapping[str, Any],
    styles: Mapping[str, LineStyle],
) -> dict[str, dict[str, list[plots.Mark]]]:
    """Benchmark → clean, and each pool at its highest level → a mark for each model."""
    rows: dict[str, dict[str, list[plots.Mark]]] = {}
    for part, summaries in parts.items():
        row = rows.setdefault(part, {})
        for model, summary in summaries.items():
            tree = column(summary, "accuracy")
            for name in hardest_columns(tree) if model in shown else ():
                row.setdefault(name, []).append((styles[model], columns_of(tree)[name], ()))
    return rows
