"""What a second reading found, where no foreign package is needed."""

from __future__ import annotations

import copy
import pickle

import pytest

from roma.integrations.options import RomaOptions


def test_a_table_of_levels_is_read_once(tmp_path):
    """A file that changes or goes during a run changes nothing: views are of their specs."""
    table = tmp_path / "levels.yaml"
    table.write_text("jpeg: {levels: [31, 21, 11]}\n")
    options = RomaOptions(num_views=4, view_level_table=str(table))
    before = options.draw(0, "an image")
    assert {s.parameter for s in options.draw(0, "an image") if s.corruption == "jpeg"} != set()
    table.write_text("jpeg: {levels: [90, 80, 70]}\n")
    assert options.draw(0, "an image") == before
    table.unlink()
    assert options.draw(0, "an image") == before
    assert pickle.loads(pickle.dumps(options)) == copy.deepcopy(options) == options
    with pytest.raises(FileNotFoundError, match="view_level_table"):
        RomaOptions(num_views=4, view_level_table=str(table))
