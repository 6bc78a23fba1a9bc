"""The reward of boxed answers, and loading a user's own."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from roma.rewards import compute_score, last_box, load_reward, same_answer


def score(response: str, truth: str = "8", **options: Any) -> tuple[float, float, float]:
    finished = {"finished": options.pop("finished")} if "finished" in options else {}
    item = {"response": response, "response_length": 12, "ground_truth": truth, **finished}
    (result,) = compute_score([item], **options)
    return result["overall"], result["format"], result["accuracy"]


GOOD = r"<think> left 3 right 5 so 8 </think> \boxed{ 8 }"


def test_right_and_well_formed() -> None:
    assert score(GOOD) == (1.0, 1.0, 1.0)
    assert score(GOOD, finished=True) == (1.0, 1.0, 1.0)
    assert score(f"  {GOOD}\n") == (1.0, 1.0, 1.0)
    assert score(GOOD, truth="9") == (pytest.approx(0.1), 1.0, 0.0)


@pytest.mark.parametrize(
    "response",
    [
        r"\boxed{8}",
        r"<think> 8 \boxed{8}",
        r"8 </think> \boxed{8}",
        r"so <think> 8 </think> \boxed{8}",
        r"<think> <think> 8 </think> \boxed{8}",
        r"<think> 8 </think> </think> \boxed{8}",
    ],
)
def test_tags_missing_or_doubled_cost_the_format_alone(response: str) -> None:
    assert score(response) == (pytest.approx(0.9), 0.0, 1.0)


def test_rambling_and_cut_off_responses_get_nothing() -> None:
    for tail in (" so", " .", " }", r" \boxed{", r" <think>"):
        assert score(GOOD + tail) == (0.0, 0.0, 0.0)
    assert score(GOOD, finished=False) == (0.0, 0.0, 0.0)
    assert score(GOOD[:-1]) == (0.0, 0.0, 0.0)
    assert score("") == (0.0, 0.0, 0.0)


def test_the_strict_end_can_be_switched_off() -> None:
    assert score(GOOD + ".", strict_end=False) == (pytest.approx(0.9), 0.0, 1.0)
    assert score(GOOD, strict_end=False, finished=False) == (pytest.approx(0.9), 0.0, 1.0)


def test_the_last_box_counts() -> None:
    assert score(r"<think> \boxed{7} </think> no \boxed{8}") == (1.0, 1.0, 1.0)
    assert score(r"<think> \boxed{8} </think> no \boxed{7}")[2] == 0.0


def test_options() -> None:
    assert score(r"\boxed{8}", format_weight=0.5)[0] == 0.5
    assert score(r"\boxed{8}", think=None) == (1.0, 1.0, 1.0)
    assert score(r"3 + 5 </think> \boxed{8}", think=("", "</think>")) == (1.0, 1.0, 1.0)
    assert score(r"[r] 3 [/r] \boxed{8}", think=["[r]", "[/r]"]) == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match=r"format_weight: expected a number in 0\.\.1, got 2"):
        score(GOOD, format_weight=2)
    with pytest.raises(ValueError, match="think: expected"):
        score(GOOD, think=("<think>", ""))
    with pytest.raises(ValueError, match=r"reward_inputs\[1\]: expected the key 'ground_truth'"):
        compute_score([{"response": "", "ground_truth": 1}, {"response": ""}])


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{ 8 }", "8"),
        (r"\boxed {8}", "8"),
        (r"\boxed{\frac{1}{2}} rest", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{a\}b}", r"a\}b"),
        (r"\boxed{}", ""),
        (r"\boxed{1} \boxed{2", None),
        (r"boxed{1}", None),
        (r"\boxed{{1}", None),
    ],
)
def test_last_box(text: str, content: str | None) -> None:
    box = last_box(text)
    assert (box and box.content) == content
    if box:
        assert text[box.start] == "\\" and text[box.end - 1] == "}"


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("8", " 8 "),
        ("8.0", "8"),
        ("+8", "8"),
        ("08", "8"),
        ("1,000", "1000"),
        ("1,234,567.50", "1234567.5"),
        ("1{,}000", "1000"),
        (r"\$1,000", "1000"),
        ("\u22123", "-3"),
        ("1/2", "0.5"),
        (r"\frac{1}{2}", ".5"),
        (r"-\dfrac{3}{4}", "-0.75"),
        ("1e3", "1000"),
        ("50%", "50"),
        (r"50\%", "50"),
        (r"90^\circ", "90"),
        ("Rice", "rice"),
        (r"\text{Rice}", "Rice"),
        ("Rice.", "Rice"),
        ("(B)", "b"),
        ("$x^2 + 1$", "x^2  + 1"),
        (r"\left(1, 2\right)", "(1,2)"),
        (r"\frac {1} {2}", "0.5"),
        ("New  York", r"New\ York"),
    ],
)
def test_same_answer(answer: str, truth: str) -> None:
    assert same_answer(answer, truth) and same_answer(truth, answer)


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("", ""),
        ("", "8"),
        ("8", "80"),
        ("8 8", "8"),
        ("8 8", "88"),
        ("2+3", "5"),
        ("2**3", "8"),
        ("1,00", "100"),
        ("1,2", "12"),
        ("1/0", "0"),
        (r"\frac{1}{0}", "1/0"),
        ("0.333", "1/3"),
        ("0.1", "0.10000000000000000001"),
        ("1e99999999", "5"),
        ("nan", "0"),
        ("inf", "1e9"),
        ("9" * 5000, "9"),
        ("Rice and Corn", "Rice"),
    ],
)
def test_other_answer(answer: str, truth: str) -> None:
    assert not same_answer(answer, truth) and not same_answer(truth, answer)


@given(st.text(alphabet="<think>/ \\boxed{}8.,$-e%", max_size=60), st.booleans())
def test_any_text_is_scored(response: str, finished: bool) -> None:
    overall, form, accuracy = score(response, finished=finished)
    assert form in (0, 1) and accuracy in (0, 1)
    assert overall == pytest.approx(0.9 * accuracy + 0.1 * form)
    assert finished or overall == 0


@given(st.integers(-(10**12), 10**12))
def test_a_number_equals_itself_however_it_is_written(number: int) -> None:
    for text in (f"{number:,}", f"{number}.00", f"{2 * number}/2", rf"\frac{{{number}}}{{1}}"):
        assert same_answer(text, str(number))
        assert not same_answer(text, str(number + 1))


def test_a_long_response_takes_no_time() -> None:
    for response in ("<think>" * 20_000, r"\boxed{" * 20_000, "<think>" + "a<" * 50_000 + GOOD):
        assert score(response)[1] == 0


USER = """
def compute_score(reward_inputs, bonus=0.0):
    return [{"overall": bonus, "format": 1, "accuracy": True, "own": 3} for _ in reward_inputs]

def compute_scores_twice(reward_inputs):
    return compute_score(reward_inputs) * 2

def no_key(reward_inputs):
    return [{"overall": 1.0, "format": 1.0} for _ in reward_inputs]

def not_finite(reward_inputs):
    return [{"overall": float("nan"), "format": 1.0, "accuracy": 1.0} for _ in reward_inputs]

def text(reward_inputs):
    return [{"overall": "1", "format": 1.0, "accuracy": 1.0} for _ in reward_inputs]

def one_dict(reward_inputs):
    return {"overall": 1.0, "format": 1.0, "accuracy": 1.0}
"""


@pytest.fixture
def user_file(tmp_path: Path) -> Path:
    path = tmp_path / "my_reward.py"
    path.write_text(USER)
    return path


def test_load_reward(user_file: Path) -> None:
    inputs = [{"response": GOOD, "response_length": 12, "ground_truth": "8"}] * 2
    result = load_reward(f"{user_file}:compute_score", bonus=0.25)(inputs)
    assert result == [{"overall": 0.25, "format": 1, "accuracy": True, "own": 3}] * 2
    own = load_reward("roma.rewards:compute_score", format_weight=0.0)
    assert own(inputs) == compute_score(inputs, format_weight=0.0)


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        ("compute_scores_twice", ValueError, "expected 1 results, got 2"),
        ("no_key", ValueError, r"result 0: expected the keys .* add 'accuracy'"),
        ("not_finite", ValueError, "a finite number under 'overall', got nan"),
        ("text", ValueError, "a finite number under 'overall', got '1'"),
        ("one_dict", TypeError, "expected a list of dicts, got {'overall'"),
    ],
)
def test_a_bad_result_is_refused(
    user_file: Path, function: str, error: type[Exception], message: str
) -> None:
    reward = load_reward(f"{user_file}:{function}")
    with pytest.raises(error, match=message):
        reward([{"response": "", "response_length": 0, "ground_truth": ""}])


def test_a_bad_spec_is_refused(user_file: Path) -> None:
    with pytest.raises(ValueError, match=r"expected 'file\.py:function', got 'reward\.py'"):
        load_reward("reward.py")
    with pytest.raises(
        FileNotFoundError, match=r"reward: expected an existing file, got .*none\.py"
    ):
        load_reward("none.py:compute_score")
    with pytest.raises(ValueError, match="did you mean 'compute_score'"):
        load_reward(f"{user_file}:compute_scor")
    with pytest.raises(ValueError, match=r"options .*'bonsu'.* unexpected keyword argument"):
        load_reward(f"{user_file}:compute_score", bonsu=1)
