"""The report of any evaluation: its numbers, its tables, and pages of odd shapes."""

import re

import numpy as np
import pytest
from support.report_models import CELLS, RIGHT, Tables, both, named, noisy, page_with, result_of

from roma.evaluate.conditions import Cell
from roma.evaluate.folders import Results
from roma.evaluate.report import markdown, write_report
from roma.evaluate.report.content import column
from roma.evaluate.report.findings import findings, opening
from roma.evaluate.report.markdown import whole
from roma.evaluate.report.plots import beside, styles_of
from roma.evaluate.report.write import content_of, draw
from roma.evaluate.result import CellResult, EvalResult
from roma.evaluate.summary import summarise
from roma.evaluate.wording import signed


def test_every_accuracy_stands_in_its_row_and_column():
    page = Tables(page_with(content_of(both())))
    top, below, *rows = page.tables[0]
    assert [cell[0] for cell in top] == ["model", "clean", "seen"]
    assert [cell[0] for cell in below] == ["L1", "L3"]
    # Counted by hand in RIGHT; at L3 the mean of jpeg and downscale.
    expected = {"first": (100.0, 87.5, (50 + 25) / 2), "second": (50.0, 50.0, 50.0)}
    for row in rows:
        means = tuple(float(cell[0].split()[0]) for cell in row[1:])
        assert means == pytest.approx(expected[row[0][0]], abs=0.051)


def test_drop_and_flips_are_those_counted_by_hand():
    tables = {table[2][0][0]: table for table in Tables(page_with(content_of(both()))).tables}
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
    content = content_of(both())
    _, _, after = page_with(content).partition('<section id="differences">')
    section = after.partition("</section>")[0]
    differences = Tables(section).tables[0]
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
    text = whole(content_of(both(), against="second"))
    assert re.search(r"\| digits \| first \| \*\*\+50\.0 \[", text)


def test_one_model_is_told_what_degradation_takes():
    content = content_of(both()[:1])
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
    content = content_of([named("m", *rows, cells=[CELLS[turn] for turn in order])])
    assert "seen\u00a0L3\u00a0−62.5" in findings(content)[0]


def test_markdown_of_a_suite_has_the_average_first_then_a_row_per_benchmark():
    results = noisy("m", CELLS, 6, ["one", "two"])
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
    summary = summarise(both()[0].benchmarks["digits"])
    text = markdown({"first": {"benchmarks": {"digits": summary}}})
    assert text.startswith("## Accuracy, % [95 % interval]\n\n| benchmark | clean | seen L1 |")
    assert "| seen | downscale | – | 25.0 |" in text


HOSTILE = ["<script>alert(1)</script>", 'a & b" onload="x', "$x_1$ | *y* " + "long/" * 40, "_hid"]


def test_hostile_and_long_names_are_shown_as_they_are():
    named = Cell("<script>", "<script>", 1)
    models = [noisy(name, [*CELLS, named], 6, HOSTILE[:2]) for name in HOSTILE]
    content = content_of(models, title="<i>", notes=["<b>bold"])
    page = page_with(content)
    read = Tables(page)
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
    content = content_of([noisy(f"m{turn}", cells, count, names) for turn in range(models)])
    page = page_with(content)
    read = Tables(page)
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
        for each in Tables(page_with(content_of([Results("m", {}, {"d": result})]))).tables
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
    content = content_of([Results("m", {}, {"d": result_of(never)})])
    assert column(content.parts["d"]["m"], "relative") == {"seen": {"L1": None, "L3": None}}
    assert re.search(r"\| d \| – \| – \|", whole(content))


def test_the_report_is_written_with_its_figures_and_loads_nothing(tmp_path):
    written = write_report(tmp_path, both(), stem="bench", notes=["judge none"])
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
    first, second = both()
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
