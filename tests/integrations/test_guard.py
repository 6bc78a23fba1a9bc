"""What an integration refuses before training, and what it lets pass."""

import functools
import importlib.metadata
import sys
from types import ModuleType

import pytest

from roma.integrations.guard import check_parameters, check_version, refuse_unsloth, require


class TestRequire:
    def test_imports(self):
        assert require("json.decoder", "json") is sys.modules["json.decoder"]

    def test_says_what_to_install(self):
        with pytest.raises(ImportError, match=r"no_such_one\.part: .*no module no_such_one; pip"):
            require("no_such_one.part", "roma-vlm[trl]")
        with pytest.raises(ImportError, match=r"pip install 'roma-vlm\[trl\]'"):
            require("no_such_one", "roma-vlm[trl]")

    def test_other_errors_of_an_import_pass(self, tmp_path, monkeypatch):
        (tmp_path / "fails_itself.py").write_text("raise ValueError('its own')")
        monkeypatch.syspath_prepend(str(tmp_path))
        with pytest.raises(ValueError, match="its own"):
            require("fails_itself", "nothing")


class TestVersion:
    @pytest.fixture(autouse=True)
    def installed(self, monkeypatch):
        self.version = "1.16.2"
        monkeypatch.setattr(importlib.metadata, "version", lambda _: self.version)

    @pytest.mark.parametrize(
        "found", ["1.16", "1.16.0", "1.16.9", "1.17.3", "1.17.0.dev0", "1.17.1+cpu", "1.16.1rc1"]
    )
    def test_both_ends_are_inside(self, found):
        self.version = found
        assert check_version("trl", "1.16", "1.17") == found

    @pytest.mark.parametrize("found", ["1.15.9", "1.18.0", "2.0", "0.99", "1.18.0.dev0"])
    def test_outside(self, found):
        self.version = found
        remedy = rf"got {found}; pip install 'trl>=1\.16,<1\.18'"
        with pytest.raises(ValueError, match=rf"trl: expected version 1\.16 to 1\.17, .*{remedy}"):
            check_version("trl", "1.16", "1.17")

    def test_as_many_parts_as_the_bound_has(self):
        self.version = "0.29.1"
        check_version("trl", "0.29.1", "0.29.1")
        check_version("trl", "0.29.1", "1")
        for low, high in [("0.29.2", "1"), ("0.1", "0.29.0"), ("0.1", "0.28")]:
            with pytest.raises(ValueError, match=r"got 0\.29\.1"):
                check_version("trl", low, high)
        self.version = "2"
        check_version("trl", "2.0", "2.0")

    def test_no_version(self):
        self.version = "unknown"
        with pytest.raises(ValueError, match="'unknown', which is no version"):
            check_version("trl", "1.16", "1.17")

    def test_not_installed(self, monkeypatch):
        monkeypatch.undo()
        with pytest.raises(ValueError, match=r"no such package; pip install 'no-such-one>=1,<3"):
            check_version("no-such-one", "1", "2")


def loss(self, model, inputs, num_items=None):
    return 0


class TestParameters:
    @pytest.mark.parametrize(
        "function",
        [
            loss,
            lambda model, inputs, num_items: 0,
            lambda self, model, inputs, num_items, new=1: 0,
            lambda self, model, inputs, num_items, *args, new=1, **kwargs: 0,
            lambda self, model, inputs, *, new=1, num_items: 0,
        ],
        ids=["same", "no self", "optional at the end", "variadic", "by keyword"],
    )
    def test_fits(self, function):
        check_parameters(function, ["model", "inputs", "num_items"], "loss")

    @pytest.mark.parametrize(
        ("function", "got"),
        [
            (lambda self, model, inputs: 0, "missing: num_items"),
            (lambda self, model, batch, num_items: 0, "missing: inputs; new and required: batch"),
            (lambda self, model, inputs, num_items, old: 0, "new and required: old"),
            (lambda self, model, inputs, num_items, *, old: 0, "new and required: old"),
            (lambda self, inputs, model, num_items: 0, "moved: model, inputs"),
            (lambda self, model, new=1, inputs=2, num_items=3: 0, "moved: inputs, num_items"),
            (lambda self, model, **kwargs: 0, "missing: inputs, num_items"),
        ],
        ids=["gone", "renamed", "new", "new keyword", "swapped", "optional between", "kwargs"],
    )
    def test_says_what_moved(self, function, got):
        with pytest.raises(ValueError, match=f"trl.loss: expected .*, got {got}; "):
            check_parameters(function, ["model", "inputs", "num_items"], "trl.loss")

    def test_looks_through_decorators(self):
        @functools.wraps(loss)
        def wrapped(*args, **kwargs):
            return loss(*args, **kwargs)

        check_parameters(wrapped, ["model", "inputs", "num_items"], "loss")
        with pytest.raises(ValueError, match="missing: other"):
            check_parameters(wrapped, ["other"], "loss")

    def test_variadic_by_name(self):
        check_parameters(lambda self, *args, **kwargs: 0, ["args", "kwargs"], "loss")
        with pytest.raises(ValueError, match="missing: kwargs"):
            check_parameters(lambda self, *args: 0, ["args", "kwargs"], "loss")

    def test_self_where_it_is_expected(self):
        check_parameters(loss, ["self", "model", "inputs", "num_items"], "loss")
        with pytest.raises(ValueError, match="missing: self"):
            check_parameters(lambda model: 0, ["self", "model"], "loss")


class TestUnsloth:
    class Trainer:
        pass

    def test_without_it(self):
        refuse_unsloth(self.Trainer)

    @pytest.mark.parametrize("name", ["unsloth", "unsloth_zoo"])
    def test_loaded(self, monkeypatch, name):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        with pytest.raises(ValueError, match=f"the module {name} loaded; run without"):
            refuse_unsloth()

    @pytest.mark.parametrize(
        ("module", "name"),
        [
            ("UnslothGRPOTrainer", "_Trainer"),
            ("unsloth_compiled_cache.trainers", "Trainer"),
            ("trl", "UnslothGRPOTrainer"),
        ],
    )
    def test_a_class_that_it_wrote(self, module, name):
        base = type(name, (), {"__module__": module})
        with pytest.raises(ValueError, match=rf"{module}\.{name}, which Unsloth wrote"):
            refuse_unsloth(type("Mine", (base,), {}))

    def test_trl_is_looked_at_by_itself(self, monkeypatch):
        module = ModuleType("trl.trainer.grpo_trainer")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        module.GRPOTrainer = self.Trainer
        refuse_unsloth()
        module.GRPOTrainer = type("UnslothGRPOTrainer", (), {})
        with pytest.raises(ValueError, match="which Unsloth wrote"):
            refuse_unsloth()
