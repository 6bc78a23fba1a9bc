"""What does not fit is one line before the first step: options, losses, images, plug-ins."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from verl_stack import cases

from roma.integrations.options import RomaOptions

PLUGIN = "roma.integrations.verl.plugin"


def run(code: str, **variables: str | None) -> subprocess.CompletedProcess:
    """A process of its own, with these variables changed; None takes one away."""
    given = {
        name: value for name, value in {**os.environ, **variables}.items() if value is not None
    }
    command = [sys.executable, "-W", "ignore", *(code.split() if code[0] == "-" else ["-c", code])]
    return subprocess.run(command, env=given, capture_output=True, text=True, timeout=180)


def installed(folder, name: str, **files: str) -> str:
    """PYTHONPATH with a distribution in front of the others."""
    info = folder / f"{name}.dist-info"
    info.mkdir()
    for file, text in files.items():
        (info / file.replace("_txt", ".txt")).write_text(text)
    return os.pathsep.join([str(folder), os.environ["PYTHONPATH"]])


ENTRY = {"entry_points_txt": f"[verl.plugins]\nroma = {PLUGIN}\n", "METADATA": "Name: roma-vlm\n"}
ASK = "import roma.integrations.verl as r; r.check(); print('checked')"


@pytest.mark.slow
def test_the_entry_point_loads_the_engine(tmp_path):
    path = installed(tmp_path, "roma_vlm-0.1.0", **ENTRY)
    made = run(ASK, PYTHONPATH=path, VERL_USE_EXTERNAL_MODULES="verl_on_cpu")
    assert made.returncode == 0 and "checked" in made.stdout, made.stderr


@pytest.mark.slow
def test_without_the_vendor_nothing_is_loaded(tmp_path):
    path = installed(tmp_path, "roma_vlm-0.1.0", **ENTRY)
    code = "import verl, sys; print('roma.integrations.verl.engine' in sys.modules)"
    named = {"VERL_USE_EXTERNAL_MODULES": "verl_on_cpu", "VERL_ENGINE_VENDOR": None}
    assert run(code, PYTHONPATH=path, **named).stdout.endswith("False\n")


@pytest.mark.slow
def test_an_engine_that_does_not_load_ends_the_process(tmp_path):
    """By the entry point, whose exceptions verl keeps to itself."""
    installed(tmp_path, "roma_vlm-0.1.0", **ENTRY)
    path = installed(tmp_path, "verl-0.10.0", METADATA="Name: verl\nVersion: 0.10.0\n")
    code = "import verl; print('verl goes on')"
    made = run(code, PYTHONPATH=path, VERL_USE_EXTERNAL_MODULES="verl_on_cpu")
    assert made.returncode != 0 and "goes on" not in made.stdout
    assert (
        "roma: VERL_ENGINE_VENDOR=roma, but its engine did not load: verl: expected version 0.9"
        in (made.stderr)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "variables",
    [
        {"VERL_ENGINE_VENDOR": "nvidia"},
        # The plug-in is not found: no entry point, and no module named.
        {"VERL_USE_EXTERNAL_MODULES": "verl_on_cpu"},
    ],
)
def test_check_names_the_engine_that_verl_would_take(variables):
    made = run(ASK, **variables)
    assert made.returncode != 0
    said = made.stderr.strip().splitlines()[-1]
    assert "FSDPEngineWithLMHead; set VERL_ENGINE_VENDOR=roma and VERL_USE_EXTERNAL" in said


@pytest.mark.slow
def test_options_are_refused_by_the_launcher():
    made = run("-m roma.integrations.verl --cfg job", ROMA_OPTIONS="num_view=2")
    assert made.returncode != 0
    assert "ROMA_OPTIONS: expected one of num_views" in made.stderr


@pytest.mark.slow
def test_the_examples_command_hands_its_environment_to_rays_workers():
    """verl's own main composes its real configuration of it, prints it and does not run."""
    changed = {
        "PYTHON": f"{sys.executable} -W ignore",
        "ROMA_OPTIONS": "num_views=3,view_level_table=None",
        "VERL_USE_EXTERNAL_MODULES": "verl_on_cpu",
    }
    given = {name: value for name, value in os.environ.items() if name != "VERL_ENGINE_VENDOR"}
    command = ["sh", "examples/verl/run.sh", "trainer.n_gpus_per_node=3", "--cfg", "job"]
    made = subprocess.run(
        command, env={**given, **changed}, capture_output=True, text=True, timeout=180
    )
    assert made.returncode == 0, made.stderr
    assert "roma: on; RomaOptions(num_views=3" in made.stdout
    assert "n_gpus_per_node: 3" in made.stdout
    for line in (
        "VERL_ENGINE_VENDOR: roma",
        f"VERL_USE_EXTERNAL_MODULES: verl_on_cpu,{PLUGIN}",
        "ROMA_OPTIONS: num_views=3,view_level_table=None",
    ):
        assert f"        {line}\n" in made.stdout


def test_other_backends_are_refused():
    from verl.workers.engine.base import EngineRegistry

    with pytest.raises(ValueError, match=r"strategy: expected fsdp or fsdp2, .*, got fsdp_turbo"):
        EngineRegistry.new(
            "language_model", "fsdp_turbo", engine_config=SimpleNamespace(strategy="fsdp_turbo")
        )


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda **_: None, "loss function: expected verl's own"),
        (functools.partial(lambda **_: None, config=None), "loss function: expected verl's own"),
        (
            functools.partial(lambda **_: None, config=cases, distillation_config=1),
            "got one that distils a teacher",
        ),
    ],
)
def test_a_loss_without_a_clip_range(worker_of, loss, said):
    data = cases.batch(cases.rows())
    with pytest.raises(ValueError, match=said):
        worker_of().engine.forward_backward_batch(data, loss)


def test_a_batch_without_advantages(worker_of):
    given = [{k: v for k, v in row.items() if k != "advantages"} for row in cases.rows()]
    with pytest.raises(ValueError, match="micro-batch: expected the key advantages, got batch_num"):
        cases.step(worker_of(), cases.batch(given))


def test_a_view_of_another_size(worker_of, monkeypatch):
    from roma.integrations import views

    smaller = [torch.zeros(16, 16, 3, dtype=torch.uint8)]
    monkeypatch.setattr(views, "degrade_batch", lambda images, *_, **__: smaller * len(images))
    with pytest.raises(ValueError, match=r"view: expected the clean image's size \[32, 64, 3\]"):
        cases.step(worker_of(), cases.batch(cases.rows()))


def test_pixels_that_no_processor_made(worker_of):
    given = cases.rows()
    media = given[0]["multi_modal_inputs"]
    noisy = {**media, "pixel_values": media["pixel_values"] + 1e-3}
    given[0] = {**given[0], "multi_modal_inputs": noisy}
    with pytest.raises(ValueError, match="pixel_values, image 0: expected clean images"):
        cases.step(worker_of(), cases.batch(given))


def test_a_model_without_images(worker_of):
    engine = worker_of().engine
    stock = engine.model_config.processor
    engine.model_config.processor = None
    try:
        with pytest.raises(ValueError, match="processor: expected one with an image_processor"):
            engine._prepare(RomaOptions())
        engine._prepare(RomaOptions(num_views=0))
    finally:
        engine.model_config.processor = stock
