"""The report of any evaluation: its numbers, its sentences, and pages of odd shapes."""

import re
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser

import numpy as np
import pytest

from roma.evaluate.conditions import Cell, cells_of
from roma.evaluate.folders import Results
from roma.evaluate.report import markdown, write_report
from roma.evaluate.report.content import Content, column
from roma.evaluate.report.findings import findings, opening
from roma.evaluate.report.markdown import whole
from roma.evaluate.report.plots import beside, styles_of
from roma.evaluate.report.sections import page_of
from roma.evaluate.report.tables import difference_form, share_form
from roma.evaluate.report.wording import signed, with_interval
from roma.evaluate.report.write import content_of, draw
from roma.evaluate.result import CellResult, EvalResult
from roma.evaluate.summary import summarise

CELLS = [Cell(), Cell("seen", "jpeg", 1), Cell("seen", "jpeg", 3), Cell("seen", "downscale", 3)]
RIGHT = {
    "first": ["11111111", "11111110", "11110000", "11000000"],
    "second": ["11110000", "11110000", "11110000", "11110000"],
}
"""Model → for each of CELLS, which of eight questions it answers right."""


def _result(cells: Mapping[Cell, Sequence[int]]) -> EvalResult:
    found = {cell: CellResult(np.array(row, np.uint8), []) for cell, row in cells.items()}
    return EvalResult([f"q{i}" for i in range(len(next(iter(cells.values()))))], found)


def _named(name: str, *rows: str, cells: Sequence[Cell] = CELLS) -> Results:
    every = {cell: [int(sign) for sign in row] for cell, row in zip(cells, rows, strict=True)}
    return Results(name, {"seed": 0, "engine": "hf"}, {"digits": _result(every)})


def _both() -> list[Results]:
    return [_named(name, *rows) for name, rows in RIGHT.items()]


def _noisy(name: str, cells: Sequence[Cell], count: int, benchmarks: Sequence[str]) -> Results:
    rng = np.random.default_rng(len(name))
    made = {each: {c: rng.integers(0, 2, count) for c in cells} for each in benchmarks}
    return Results(name, {"seed": 0}, {each: _result(found) for each, found in made.items()})


class _Tables(HTMLParser):
    """Tables of a page: the cells of each row as (text, columns that it spans, CSS classes)."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables: list[list[list[tuple[str, int, str]]]] = []
        self._cell: list[str] | None = None
        self.open: list[str] = []
        self.seen: set[str] = set()  # tags and attributes
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.seen |= {tag, *given}
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self._cell = []
            span = int(given.get("colspan") or 1)
            self.tables[-1][-1].append(("", span, given.get("class") or ""))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag
        if tag in ("td", "th") and self._cell is not None:
            _, span, kind = self.tables[-1][-1][-1]
            self.tables[-1][-1][-1] = ("".join(self._cell), span, kind)
            self._cell = None

    def handle_data(self, data):
        if self._cell is not None:
            self._cell.append(data if not self._cell else f" {data}")


def _page(content: Content) -> str:
    return page_of(content, {}, styles_of(list(content.models)))


def test_every_accuracy_stands_in_its_row_and_column():
    page = _Tables(_page(content_of(_both())))
    top, below, *rows = page.tables[0]
    assert [cell[0] for cell in top] == ["model", "clean", "seen"]
    assert [cell[0] for cell in below] == ["L1", "L3"]
    # Counted by hand in RIGHT; at L3 the mean of jpeg and downscale.
    expected = {"first": (100.0, 87.5, (50 + 25) / 2), "second": (50.0, 50.0, 50.0)}
    for row in rows:
        means = tuple(float(cell[0].split()[0]) for cell in row[1:])
        assert means == pytest.approx(expected[row[0][0]], abs=0.051)


def test_drop_and_flips_are_those_counted_by_hand():
    tables = {table[2][0][0]: table for table in _Tables(_page(content_of(_both()))).tables}
    rows = tables["drop: clean minus degraded accuracy, points"]
    found, heading = {}, ""
    for row in rows[2:]:
        if len(row) == 1:
            heading = row[0][0].split(":")[0]
        else:
            found[heading, row[0][0]] = row[2][0].split()[0], row[2][2]
    assert found["drop", "first"] == ("+62.5", "down")
    assert found["destructive flips", "first"][0] == "62.5"
    assert found["corrective flips", "second"][0] == "0.0"
    assert found["relative robustness", "first"][0] == "37.5"
    assert found["drop", "second"] == ("+0.0", "")  # nothing shown: no colour


def test_a_difference_is_coloured_and_said_only_where_its_interval_excludes_0():
    content = content_of(_both())
    section = _page(content).partition('<section id="differences">')[2].partition("</section>")[0]
    differences = _Tables(section).tables[0]
    _, clean, mild, hard = differences[2]
    assert clean[0].startswith("−50.0") and "down" in clean[2]
    assert mild[0].startswith("−37.5") and hard[0].startswith("+12.5")
    assert "up" not in hard[2] and "down" not in hard[2]
    said = [sentence.replace("\u00a0", " ") for sentence in findings(content)]
    (pair,) = (sentence for sentence in said if sentence.startswith("second minus first"))
    assert re.search(r"clean −50\.0 \[.*?\] \(lower\)", pair)
    assert re.search(r"seen L3 \+12\.5 \[.*?\] \(no difference shown\)", pair)
    text = whole(content)
    assert re.search(r"\| digits \| second \| \*\*−50\.0 \[", text)
    assert re.search(r"\+12\.5 \[[^]]*\] \|", text)


def test_against_turns_the_differences_round():
    text = whole(content_of(_both(), against="second"))
    assert re.search(r"\| digits \| first \| \*\*\+50\.0 \[", text)


def test_one_model_is_told_what_degradation_takes():
    content = content_of(_both()[:1])
    assert opening(content) == (
        "1 model, 1 benchmark, 8 questions; clean images and 2 corruptions at levels 1, 3."
    )
    first, worst = (said.replace("\u00a0", " ") for said in findings(content))
    drop = content.models["first"]["benchmarks"]["digits"]["robustness"]["seen"]["L3"]["drop"]
    turned = {"mean": -drop["mean"], "low": -drop["high"], "high": -drop["low"]}
    assert f"seen L3 {signed(turned)} (lower)" in first and drop["mean"] == 62.5
    assert worst.startswith("first: lowest under downscale at L3, 25.0 [")


def test_the_hardest_level_is_the_highest_not_the_last_that_was_measured():
    order = [0, 2, 1, 3]  # L3 before L1
    rows = [RIGHT["first"][turn] for turn in order]
    content = content_of([_named("m", *rows, cells=[CELLS[turn] for turn in order])])
    assert "seen\u00a0L3\u00a0−62.5" in findings(content)[0]


def test_markdown_of_a_suite_has_the_average_first_then_a_row_per_benchmark():
    results = _noisy("m", CELLS, 6, ["one", "two"])
    text = whole(content_of([results]))
    table = text[text.index("| benchmark |") :].split("\n\n")[0].splitlines()
    assert table[0] == "| benchmark | clean | seen L1 | seen L3 |"
    assert [line.split(" | ")[0] for line in table[2:]] == [
        "| average over 2 benchmarks",
        "| one",
        "| two",
    ]
    means = [float(line.split(" | ")[1].split()[0]) for line in table[2:]]
    assert means[0] == pytest.approx((means[1] + means[2]) / 2, abs=0.11)


def test_markdown_of_one_benchmark_is_its_tables():
    summary = summarise(_both()[0].benchmarks["digits"])
    text = markdown({"first": {"benchmarks": {"digits": summary}}})
    assert text.startswith("## Accuracy, % [95 % interval]\n\n| benchmark | clean | seen L1 |")
    assert "| seen | downscale | – | 25.0 |" in text


HOSTILE = ["<script>alert(1)</script>", 'a & b" onload="x', "$x_1$ | *y* " + "long/" * 40, "_hid"]


def test_hostile_and_long_names_are_shown_as_they_are():
    named = Cell("<script>", "<script>", 1)
    models = [_noisy(name, [*CELLS, named], 6, HOSTILE[:2]) for name in HOSTILE]
    content = content_of(models, title="<i>", notes=["<b>bold"])
    page = _page(content)
    read = _Tables(page)
    assert not read.seen & {"script", "i", "b", "onload"}
    shown = {row[0][0].strip() for table in read.tables for row in table}
    assert {" ".join(name.split()) for name in HOSTILE} <= {" ".join(s.split()) for s in shown}
    assert r"\<script\>alert(1)\</script\>" in whole(content)
    styles = styles_of(HOSTILE)
    entry = {"mean": 50.0, "low": 40.0, "high": 60.0}
    marks = [(style, entry, ()) for style in styles.values()]
    (legend,) = beside({"digits": {"clean": marks}}, "%").legends
    assert len(legend.get_texts()) == len(HOSTILE)
    assert max(len(text.get_text()) for text in legend.get_texts()) <= 30


WIDE = [Cell("wide", f"corruption_{turn}", level) for turn in range(40) for level in (1, 2)]
SHAPES = {
    "one question": (1, CELLS, 1, 1),
    "one cell": (4, [Cell()], 2, 1),
    "no clean cell": (4, CELLS[1:], 2, 2),
    "no degraded cell": (4, [Cell()], 1, 2),
    "one degraded cell": (4, [CELLS[1]], 2, 1),
    "forty corruptions": (4, [Cell(), *WIDE], 2, 1),
    "nine models": (4, CELLS, 9, 1),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_pages_of_any_shape_have_whole_tables(shape):
    count, cells, models, benchmarks = SHAPES[shape]
    names = [f"b{turn}" for turn in range(benchmarks)]
    content = content_of([_noisy(f"m{turn}", cells, count, names) for turn in range(models)])
    page = _page(content)
    read = _Tables(page)
    assert read.open == [] and read.tables
    for top, below, *rows in read.tables:
        width = sum(cell[1] for cell in top)
        assert sum(cell[1] for cell in below) == sum(c[1] for c in top if "group" in c[2])
        assert {sum(cell[1] for cell in row) for row in rows} == {width}
    # Without a clean cell there is nothing to lose.
    assert ("drop: clean minus" in page) == (Cell() in cells and len(cells) > 1)
    assert ("Each corruption" in page) == any(cell.level for cell in cells)
    figures = draw(content, styles_of(list(content.models)))
    assert ("severity" in figures) == any(cell.level for cell in cells)
    assert ("differences" in figures) == (models > 1)
    assert ("benchmarks" in figures) == (benchmarks > 1)


def test_pass_and_majority_stand_under_robustness_with_clean_first():
    rng = np.random.default_rng(0)
    cells = {}
    for cell in CELLS:
        answers = rng.integers(0, 2, (5, 4))
        voted = answers[:, 0].astype(np.uint8)
        cells[cell] = CellResult(answers.mean(1), [], answers.max(1).astype(np.uint8), voted)
    result = EvalResult([str(i) for i in range(5)], cells)
    (table,) = (
        each
        for each in _Tables(_page(content_of([Results("m", {}, {"d": result})]))).tables
        if each[2][0][0].startswith("drop")
    )
    assert [cell[0] for cell in table[0]] == ["", "clean", "seen"]
    rows = {row[0][0].split(":")[0]: [cell[0] for cell in row[1:]] for row in table[2:]}
    assert rows["drop"][0] == "–"
    clean = cells[Cell()]
    assert float(rows["pass"][0].split()[0]) == pytest.approx(100 * clean.passed.mean())
    assert float(rows["majority"][0].split()[0]) == pytest.approx(100 * clean.voted.mean())


def test_a_column_that_could_not_be_taken_is_a_dash():
    never = {cell: [0, 0] for cell in CELLS}
    content = content_of([Results("m", {}, {"d": _result(never)})])
    assert column(content.parts["d"]["m"], "relative") == {"seen": {"L1": None, "L3": None}}
    assert re.search(r"\| d \| – \| – \|", whole(content))


def test_the_report_is_written_with_its_figures_and_loads_nothing(tmp_path):
    written = write_report(tmp_path, _both(), stem="bench", notes=["judge none"])
    assert [path.name for path in written] == [
        "bench.html",
        "bench.md",
        "bench-severity.png",
        "bench-corruptions.png",
        "bench-differences.png",
    ]
    page = written[0].read_text(encoding="utf-8")
    assert not re.search(r"https?://|//[a-z]+\.|<script|<link|@import|url\(", page)
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert sum(source.startswith("data:image/png;base64,") for source in sources) == 3
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in sources)
    assert all(f'id="{name}"' in page for name in re.findall(r'href="#([a-z]+)"', page))
    assert "judge none" in page and "engine hf" in page


def test_what_cannot_be_reported_together_is_named(tmp_path):
    first, second = _both()
    with pytest.raises(ValueError, match="results: expected at least one, got none"):
        content_of([])
    with pytest.raises(ValueError, match=r"got 'first' twice; give names: NAME=RUN"):
        content_of([first, first])
    with pytest.raises(ValueError, match=r"against: expected one of first, second, got 'third'"):
        content_of([first, second], against="third")
    other = Results("second", {}, {"charts": second.benchmarks["digits"]})
    with pytest.raises(ValueError, match=r"results of second: expected the benchmarks of first"):
        content_of([first, other])
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="out: expected a folder"):
        write_report(tmp_path / "file", [first])


def test_a_figure_has_one_place_for_a_level_whichever_models_were_asked_it(tmp_path):
    """Of three one was asked clean images alone, one L1 and L3, one L3 and another pool."""
    rows = RIGHT["first"]
    blur = Cell("unseen", "motion_blur", 3)
    results = [
        _named("three", rows[0], cells=CELLS[:1]),
        _named("one", *rows[:3], cells=CELLS[:3]),
        _named("two", rows[0], rows[2], rows[3], cells=[CELLS[0], CELLS[2], blur]),
    ]
    content = content_of(results)
    assert opening(content).endswith("clean images and 2 corruptions at levels 1, 3.")
    drawn = draw(content, styles_of(list(content.models)))
    seen, unseen = drawn["severity"]().axes
    assert [label.get_text() for label in seen.get_xticklabels()] == ["clean", "L1", "L3"]
    places = [line.get_xdata().round().tolist() for line in seen.lines[::3]]  # with two caps each
    assert places == [[0], [0, 1, 2], [0, 2]]
    assert unseen.get_title(loc="left") == "unseen corruptions"
    jpeg, motion = drawn["corruptions"]().axes[:2]
    assert [line.get_xdata().tolist() for line in jpeg.lines] == [[0], [0, 1, 2], [0, 2]]
    assert [line.get_xdata().tolist() for line in motion.lines] == [[0], [0], [0, 2]]


def test_a_model_without_an_average_stays_in_the_tables():
    """The average over benchmarks is of one model alone, and the first table's first block."""
    one = _noisy("one", CELLS, 6, ["a", "b"])
    apart = {"a": _result({CELLS[0]: [1] * 6}), "b": _result({CELLS[1]: [0] * 6})}
    content = content_of([one, Results("two", {"seed": 0}, apart)])
    accuracy = _Tables(_page(content)).tables[0]
    assert [row[0][0].strip() for row in accuracy].count("two") == 2


def test_what_only_one_model_has_is_left_out_of_differences_and_said():
    first = _both()[0]
    second = _named("second", "11110000", "11110000", cells=CELLS[:2])
    content = content_of([first, second])
    assert any(note.startswith("Not compared:") and "L3" in note for note in content.notes)
    assert "L3" not in content.differing["digits"]["second"]["pools"]["seen"]


def test_benchmarks_without_a_condition_in_common_have_no_average():
    apart = {"one": _result({Cell(): [1, 0]}), "two": _result({CELLS[1]: [1, 0]})}
    content = content_of([Results(name, {}, apart) for name in ("m", "n")])
    assert list(content.parts) == ["one", "two"]
    assert opening(content).endswith(
        "Findings are of one alone: the benchmarks have no condition in common."
    )
    assert not any("by benchmark" in said for said in findings(content))
    assert _Tables(_page(content)).open == []


def test_what_was_asked_differently_is_said():
    one, two = _both()
    two = Results(two.name, two.settings | {"engine": "vllm"}, two.benchmarks)
    content = content_of([one, two])
    said = findings(content)
    assert said[0] == (
        "second and first were not asked alike, and their difference is of this too:"
        " engine vllm in second, hf in first."
    )
    assert said[1].startswith("second minus first")
    assert not content.notes and whole(content).count("not asked alike") == 1
    assert "Engine: hf (first), vllm (second)." in content.asked


def test_cells_of_the_package_give_the_papers_columns():
    results = _noisy("m", cells_of(["clean", "seen", "unseen"], [1, 2, 3]), 3, ["one", "two"])
    names = "clean | seen L1 | seen L2 | seen L3 | unseen L1 | unseen L2 | unseen L3"
    assert f"| benchmark | {names} |" in whole(content_of([results]))


def test_judges_that_differ_are_named_before_the_differences_and_in_words():
    one, two = _both()
    two.settings["judge"] = {"by": "model", "model": "Qwen3", "protocol": "92d2"}
    two.settings["versions"] = {"roma": "1", "torch": "2"}
    one.settings.update(judge={"by": "none"}, versions={"roma": "1", "torch": "3"})
    first, second, *_ = findings(content_of([one, two]))
    assert first.endswith(
        "this too: judged by the model Qwen3 in second, by the tasks' own rules in first;"
        " versions torch 2 in second, torch 3 in first."
    )
    assert second.startswith("second minus first") and "{" not in first


def test_differences_are_said_before_what_degradation_takes_from_each_model():
    said = findings(content_of([_noisy(name, CELLS, 6, "ab") for name in ("m", "nn")]))
    assert [each.split(",")[0].split(":")[0] for each in said if "by benchmark" not in each] == [
        *("nn minus m", "m", "m", "nn", "nn"),
    ]


def test_there_is_no_minus_nought_and_intervals_have_one_form():
    entry = {"mean": -0.04, "low": -0.2, "high": 5.84}
    assert signed(entry) == "+0.0 [−0.2, +5.8]"
    assert with_interval(entry) == "0.0 [−0.2, 5.8]"
    assert difference_form(entry) == ("", "+0.0<small>[−0.2, +5.8]</small>")
    assert share_form(entry) == ("", "0.0<small>[−0.2, 5.8]</small>")
    assert signed(entry | {"mean": -10.04}).startswith("−10.0 ")


def test_the_lowest_condition_is_named_only_where_there_is_one():
    def last(*rows):
        return findings(content_of([_named("m", *rows)]))[-1]

    assert last(*["11111111"] * 4) == "m: all 3 degraded conditions alike, 100.0 % right."
    two = last("11111111", "11110000", "11111110", "11110000")
    assert two == "m: lowest under jpeg at L1 and downscale at L3, 50.0 % right."


def test_panels_side_by_side_have_one_scale():
    content = content_of(_both())
    left, middle = draw(content, styles_of(list(content.models)))["differences"]().axes[:2]
    assert left.get_xlim() == middle.get_xlim()


def test_the_last_panel_of_each_column_names_its_severities():
    cells = [Cell("wide", f"kind_{turn}", 1) for turn in range(7)]  # five and two
    content = content_of([_noisy(name, [Cell(), *cells], 4, ["d"]) for name in ("m", "nn")])
    panels = draw(content, styles_of(list(content.models)))["corruptions"]().axes
    shown = [panel.xaxis.get_tick_params()["labelbottom"] for panel in panels[:7]]
    assert shown == [False, False, True, True, True, True, True]
