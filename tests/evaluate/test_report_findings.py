"""The report of several models: what sets them apart, what was asked, their figures."""

from support.report_models import CELLS, RIGHT, Tables, both, named, noisy, page_with, result_of

from roma.evaluate.conditions import Cell, cells_of
from roma.evaluate.folders import Results
from roma.evaluate.report.findings import findings, opening
from roma.evaluate.report.markdown import whole
from roma.evaluate.report.plots import styles_of
from roma.evaluate.report.tables import difference_form, share_form
from roma.evaluate.report.write import content_of, draw
from roma.evaluate.wording import signed, with_interval


def test_a_figure_has_one_place_for_a_level_whichever_models_were_asked_it(tmp_path):
    """Of three one was asked clean images alone, one L1 and L3, one L3 and another pool."""
    rows = RIGHT["first"]
    blur = Cell("unseen", "motion_blur", 3)
    results = [
        named("three", rows[0], cells=CELLS[:1]),
        named("one", *rows[:3], cells=CELLS[:3]),
        named("two", rows[0], rows[2], rows[3], cells=[CELLS[0], CELLS[2], blur]),
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
    one = noisy("one", CELLS, 6, ["a", "b"])
    apart = {"a": result_of({CELLS[0]: [1] * 6}), "b": result_of({CELLS[1]: [0] * 6})}
    content = content_of([one, Results("two", {"seed": 0}, apart)])
    accuracy = Tables(page_with(content)).tables[0]
    assert [row[0][0].strip() for row in accuracy].count("two") == 2


def test_what_only_one_model_has_is_left_out_of_differences_and_said():
    first = both()[0]
    second = named("second", "11110000", "11110000", cells=CELLS[:2])
    content = content_of([first, second])
    assert any(note.startswith("Not compared:") and "L3" in note for note in content.notes)
    assert "L3" not in content.differing["digits"]["second"]["pools"]["seen"]


def test_benchmarks_without_a_condition_in_common_have_no_average():
    apart = {"one": result_of({Cell(): [1, 0]}), "two": result_of({CELLS[1]: [1, 0]})}
    content = content_of([Results(name, {}, apart) for name in ("m", "n")])
    assert list(content.parts) == ["one", "two"]
    assert opening(content).endswith(
        "Findings are of one alone: the benchmarks have no condition in common."
    )
    assert not any("by benchmark" in said for said in findings(content))
    assert Tables(page_with(content)).open == []


def test_what_was_asked_differently_is_said():
    one, two = both()
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
    results = noisy("m", cells_of(["clean", "seen", "unseen"], [1, 2, 3]), 3, ["one", "two"])
    names = "clean | seen L1 | seen L2 | seen L3 | unseen L1 | unseen L2 | unseen L3"
    assert f"| benchmark | {names} |" in whole(content_of([results]))


def test_judges_that_differ_are_named_before_the_differences_and_in_words():
    one, two = both()
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
    said = findings(content_of([noisy(name, CELLS, 6, "ab") for name in ("m", "nn")]))
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
        return findings(content_of([named("m", *rows)]))[-1]

    assert last(*["11111111"] * 4) == "m: all 3 degraded conditions alike, 100.0 % right."
    two = last("11111111", "11110000", "11111110", "11110000")
    assert two == "m: lowest under jpeg at L1 and downscale at L3, 50.0 % right."


def test_panels_side_by_side_have_one_scale():
    content = content_of(both())
    left, middle = draw(content, styles_of(list(content.models)))["differences"]().axes[:2]
    assert left.get_xlim() == middle.get_xlim()


def test_the_last_panel_of_each_column_names_its_severities():
    cells = [Cell("wide", f"kind_{turn}", 1) for turn in range(7)]  # five and two
    content = content_of([noisy(name, [Cell(), *cells], 4, ["d"]) for name in ("m", "nn")])
    panels = draw(content, styles_of(list(content.models)))["corruptions"]().axes
    shown = [panel.xaxis.get_tick_params()["labelbottom"] for panel in panels[:7]]
    assert shown == [False, False, True, True, True, True, True]
