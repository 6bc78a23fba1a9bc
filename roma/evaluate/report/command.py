"""`roma report`: from folders of results to a page."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from roma.evaluate.folders import Results, load_results
from roma.evaluate.record import ANSWERS
from roma.evaluate.report.cards import GalleryItem
from roma.evaluate.report.flips import choose_flips, items_of
from roma.evaluate.report.write import content_of, folder_of, write


def run_report(
    runs: Sequence[str],
    *,
    out: str | Path = "report",
    title: str | None = None,
    against: str | None = None,
) -> list[Path]:
    """Writes report.html, report.md and figures of folders of `roma eval` or `roma bench-vlm`.

    Args:
        runs: a folder each, or NAME=FOLDER.
        out: the folder to write to.
        title: of the page; None: a question that names the model.
        against: the model that the others are compared with; None: the first.

    Returns:
        The files.

    Raises:
        ValueError: see `roma.evaluate.report.write_report`, or a run that is not finished.
        FileNotFoundError: there is no such folder, or no results in it.
        FileExistsError: `out` is a file.
    """
    place = folder_of(out)
    folders, results = [], []
    for run in runs:
        name, folder = _named(run)
        folders.append(folder)
        results.append(load_results(folder, name=name))
    places = {each.name: folder for each, folder in zip(results, folders, strict=True)}
    content = content_of(results, title=title, against=against)
    gallery, notes = _gallery(results, places)
    return write(place, replace(content, notes=[*content.notes, *notes]), gallery=gallery)


def _named(run: str) -> tuple[str | None, Path]:
    """NAME=FOLDER, or a folder, which may have that sign in its own name."""
    name, sign, folder = run.partition("=")
    if sign and name and not Path(run).exists():
        return name, Path(folder)
    return None, Path(run)


def _gallery(
    results: Sequence[Results], folders: Mapping[str, Path]
) -> tuple[list[GalleryItem], list[str]]:
    """Questions whose answers flip, and a note where they cannot be shown."""
    if not all((folder / ANSWERS).is_file() for folder in folders.values()):
        return [], ["No images are shown: those of benchmarks through lmms-eval are not kept."]
    flips = choose_flips({each.name: next(iter(each.benchmarks.values())) for each in results})
    if not flips:
        return [], []
    try:
        return items_of(flips, folders, results[0].settings), []
    except (ValueError, OSError) as error:
        return [], [f"No images are shown: {error}."]
