"""`roma report`: from folders of results to a page."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from roma.evaluate.folders import Results, load_results, split_of
from roma.evaluate.record import ANSWERS
from roma.evaluate.report.cards import GalleryItem
from roma.evaluate.report.flips import Flip, OtherData, choose_flips, texts_of, with_images
from roma.evaluate.report.write import content_of, folder_of, write
from roma_kernels.errors import fail

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
            found = _summary(path)
            unscored = found.get("unscored")
            own = [f"{unscored} answers could not be scored; they count as wrong"]
            for said in [*found.get("notes", ()), *own * bool(unscored)]:
                told.setdefault(said, []).append(model)
    every = len(folders)
    return [
        f"{said}." if len(whose) == every else f"{', '.join(whose)}: {said}."
        for said, whose in told.items()
    ]


def _summary(path: Path) -> dict[str, Any]:
    """What a run wrote last."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        remedy = "run the same command again to write it anew"
        fail(str(path), "what a run wrote, as JSON", "a damaged file", remedy)
    return found


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
        return items, ["The images are not shown: those of lmms-eval's benchmarks are not kept."]
    settings = results[0].settings
    try:
        return with_images(items, flips, settings), []
    except (ValueError, OSError, ImportError) as error:  # the last: no DALI here
        return items, [f"The images are not shown: {_why(error, settings)}."]


def _why(error: Exception, settings: Mapping[str, Any]) -> str:
    """Why images could not be made again, in words."""
    if isinstance(error, OtherData):
        return str(error)
    for what, path in (("data", split_of(settings["data"])[0]), ("model", settings["model"])):
        if not Path(path).exists():
            return f"there is no {what} at {path}, seen from the folder of this command"
    return f"they could not be made again ({error})"


def _file(folder: Path, benchmark: str) -> Path:
    """The answers to a benchmark: of `roma eval`, or of `roma bench-vlm`."""
    alone = folder / ANSWERS
    return alone if alone.is_file() else folder / benchmark / ANSWERS
