"""`roma report`: from folders of results to a page."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from roma.evaluate.folders import Results, load_results
from roma.evaluate.record import ANSWERS
from roma.evaluate.report.cards import GalleryItem
from roma.evaluate.report.flips import Flip, choose_flips, texts_of, with_images
from roma.evaluate.report.write import content_of, folder_of, write

_CARDS = 12


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
    content = content_of(results, title=title, notes=_notes(places), against=against)
    gallery, notes = _gallery(results, places)
    return write(place, replace(content, notes=[*content.notes, *notes]), gallery=gallery)


def _named(run: str) -> tuple[str | None, Path]:
    """NAME=FOLDER, or a folder, which may have that sign in its own name."""
    name, sign, folder = run.partition("=")
    if sign and name and not Path(run).exists():
        return name, Path(folder)
    return None, Path(run)


def _notes(folders: Mapping[str, Path]) -> list[str]:
    """What the runs themselves said: alike for all, or of the models that are named."""
    told: dict[str, list[str]] = {}
    for model, folder in folders.items():
        for path in filter(Path.is_file, (folder / "bench.json", folder / "eval.json")):
            found = json.loads(path.read_text(encoding="utf-8"))
            unscored = found.get("unscored")
            own = [f"{unscored} answers could not be scored; they count as wrong"]
            for said in [*found.get("notes", ()), *own * bool(unscored)]:
                told.setdefault(said, []).append(model)
    every = len(folders)
    return [
        f"{said}." if len(whose) == every else f"{', '.join(whose)}: {said}."
        for said, whose in told.items()
    ]


def _gallery(
    results: Sequence[Results], folders: Mapping[str, Path]
) -> tuple[list[GalleryItem], list[str]]:
    """Questions whose answers flip, and a note where their images cannot be shown."""
    benchmarks = list(results[0].benchmarks)
    flips: list[Flip] = []
    items: list[GalleryItem] = []
    share, more = divmod(_CARDS, len(benchmarks))
    for turn, name in enumerate(benchmarks):
        own = {each.name: each.benchmarks[name] for each in results}
        chosen = choose_flips(own, items=share + (turn < more))
        flips += chosen
        items += texts_of(chosen, {model: _file(at, name) for model, at in folders.items()})
    if not flips:
        return [], []
    if not all((folder / ANSWERS).is_file() for folder in folders.values()):
        return items, ["No images are shown: those of benchmarks through lmms-eval are not kept."]
    try:
        return with_images(items, flips, results[0].settings), []
    except (ValueError, OSError, ImportError) as error:  # the last: no DALI here
        return items, [f"No images are shown: {error}."]


def _file(folder: Path, benchmark: str) -> Path:
    """The answers to a benchmark: of `roma eval`, or of `roma bench-vlm`."""
    alone = folder / ANSWERS
    return alone if alone.is_file() else folder / benchmark / ANSWERS
