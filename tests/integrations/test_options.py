"""`RomaOptions`: what is parsed, what is refused, what switches ROMA off."""

from __future__ import annotations

from dataclasses import asdict, fields

import hypothesis.strategies as st
import pytest
from hypothesis import given

from roma import RomaConfig
from roma.integrations.options import VARIABLE, RomaOptions
from roma.views import CORRUPTIONS

# Every field, and values of it other than its default.
VALUES = {
    "num_views": [0, 1, 3],
    "view_pool": ["unseen"],
    "view_max_level": [0.5, 3.0],
    "view_strength": ["strong"],
    "view_level_table": [],  # a file: below
    "view_seed": [7],
    "view_device": ["cuda"],
    "lambda_inv": [0.0, 3.0],
    "lambda_aux": [0.0, 0.25],
    "penalty_ratio": ["clean/view"],
    "worst_over": ["token", "batch", "mean"],
    "penalty_over": ["correct"],
    "accuracy_threshold": [0.9],
    "clip_low": [0.1],
    "clip_high": [0.4],
    "dual_clip": [2.0],
}
chosen = st.fixed_dictionaries(
    {}, optional={name: st.sampled_from(own) for name, own in VALUES.items() if own}
)


def test_every_option_is_drawn_here():
    assert list(VALUES) == [field.name for field in fields(RomaOptions)]


@given(chosen=chosen, spaces=st.sampled_from(["", " "]))
def test_text_gives_what_the_names_give(chosen, spaces):
    text = f",{spaces}".join(f"{name}{spaces}={spaces}{value}" for name, value in chosen.items())
    parsed = RomaOptions.parse(text)
    assert parsed == RomaOptions(**chosen)
    for name, value in asdict(parsed).items():  # 3, not "3": 3.0 == 3 hides neither
        assert type(value) is type(chosen.get(name, getattr(RomaOptions(), name)))


@given(chosen=chosen)
def test_a_file_gives_what_the_names_give(chosen, tmp_path_factory):
    file = tmp_path_factory.mktemp("options") / "roma.yaml"
    file.write_text("".join(f"{name}: {value}\n" for name, value in chosen.items()))
    assert RomaOptions.parse(f" {file} ") == RomaOptions(**chosen)


def test_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert RomaOptions.from_env() == RomaOptions()
    monkeypatch.setenv(VARIABLE, "num_views=4,lambda_inv=3,dual_clip=none")
    assert RomaOptions.from_env() == RomaOptions(num_views=4, lambda_inv=3.0)
    empty = tmp_path / "empty.yml"
    empty.write_text("# nothing\n")
    monkeypatch.setenv(VARIABLE, str(empty))
    assert RomaOptions.from_env() == RomaOptions()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_view=2", f"{VARIABLE}: expected one of num_views, .*, got 'num_view'"),
        ("num_views", f"{VARIABLE}: expected name=value pairs, got 'num_views'"),
        ("num_views=two", f"{VARIABLE}, num_views: expected a whole number, got 'two'"),
        ("num_views=2.5", f"{VARIABLE}, num_views: expected a whole number, got '2.5'"),
        ("lambda_inv=much", f"{VARIABLE}, lambda_inv: expected a number, got 'much'"),
        ("lambda_inv=nan", "lambda_inv: expected a finite number"),
        ("lambda_aux=-1", "lambda_aux: expected a finite number"),
        ("num_views=-1", "num_views: expected a whole number, 0 or more, got -1"),
        ("num_views=9", "num_views: expected at most 4, .*'seen', got 9"),
        ("view_pool=rain", "view_pool: "),
        ("view_max_level=9", "view_max_level: "),
        ("view_strength=weak", "view_strength: "),
        ("view_device=tpu", "view_device: expected 'cpu' or 'cuda', got 'tpu'"),
        ("worst_over=rollout", "worst_over: expected one of 'sequence', .*got 'rollout'"),
        ("penalty_ratio=both", "penalty_ratio: expected one of"),
        ("penalty_over=none", "penalty_over: expected one of"),
        ("clip_low=2", "clip_low: expected a number ≤ 1"),
        ("accuracy_threshold=nan", "accuracy_threshold: expected a finite number, got nan"),
        ("dual_clip=0.5", "dual_clip: expected "),
    ],
)
def test_what_does_not_fit_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        RomaOptions.parse(text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- 1\n", "expected a mapping, got list"),
        ("num_views: 2.5\n", f"{VARIABLE}, num_views: expected a whole number, got 2.5"),
        ("num_views: true\n", f"{VARIABLE}, num_views: expected a whole number, got True"),
        ("lambda_inv: [1]\n", f"{VARIABLE}, lambda_inv: expected a number"),
        ("num_views: .inf\n", f"{VARIABLE}, num_views: expected a whole number, got inf"),
        ("view_pool: 3\n", f"{VARIABLE}, view_pool: expected text, got 3"),
        ("num_views:\n", f"{VARIABLE}, num_views: expected a whole number, got None"),
        ("num_views: [2\n", "expected YAML, got an error: .*line 2"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, content, message):
    file = tmp_path / "roma.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        RomaOptions.parse(str(file))


@pytest.mark.parametrize("text", ["none.yaml", "view_level_table=none.yaml"])
def test_a_file_that_is_not_there(text):
    with pytest.raises(FileNotFoundError, match=r"expected a YAML file, got 'none.yaml', and no"):
        RomaOptions.parse(text)


def test_a_level_table(tmp_path):
    file = tmp_path / "levels.yaml"
    file.write_text("jpeg: {levels: [90, 80]}\n")
    options = RomaOptions(view_level_table=str(file), num_views=4)
    assert options.corruptions["jpeg"].levels == (90, 80)
    assert options.corruptions["downscale"] == CORRUPTIONS["downscale"]
    (spec,) = [spec for spec in options.draw(0, "a") if spec.corruption == "jpeg"]
    assert 80 <= spec.parameter <= 100
    assert RomaOptions.parse(f"num_views=4,view_level_table={file}") == options


@pytest.mark.parametrize(
    ("given_options", "active"),
    [
        ({}, True),
        ({"num_views": 0}, False),
        ({"lambda_inv": 0.0, "lambda_aux": 0.0}, False),
        ({"lambda_inv": 0.0}, True),
        ({"lambda_aux": 0.0}, True),
    ],
)
def test_active(given_options, active):
    assert RomaOptions(**given_options).active is active


def test_a_draw_depends_on_seed_and_key_alone():
    options = RomaOptions(num_views=3)
    drawn = options.draw(5, "image")
    assert drawn == RomaOptions(num_views=3, lambda_inv=9.0).draw(5, "image")
    assert len({spec.corruption for spec in drawn}) == 3
    others = [options.draw(6, "image"), options.draw(5, "other")]
    others.append(RomaOptions(num_views=3, view_seed=1).draw(5, "image"))
    assert all(drawn != other for other in others)


def test_the_clip_range_is_the_trainers_where_none_is_given():
    own = {"aggregation": "dr_grpo", "max_length": 7, "clip_low": 0.11, "clip_high": 0.12}
    made = RomaOptions().loss_config(dual_clip=None, **own)
    assert made == RomaConfig(main=None, dual_clip=None, **own)
    named = RomaOptions(clip_low=0.3, clip_high=0.4, dual_clip=5.0)
    made = named.loss_config(dual_clip=None, **own)
    assert (made.clip_low, made.clip_high, made.dual_clip) == (0.3, 0.4, 5.0)
    assert RomaOptions().loss_config() == RomaConfig(main=None)
