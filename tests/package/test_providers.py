"""The peers: each loads or says why; those that a CPU can run agree with float64."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import data, gate
from bench.providers import PROVIDERS, Unavailable, base, peers, verl
from bench.providers.__main__ import HEADER, here, row

NAMES = [p.name for p in PROVIDERS]
COMPILED = ("compile", "cce compile")


def provider_of(name: str) -> base.Provider:
    return next(p for p in PROVIDERS if p.name == name)


def test_the_readme_has_the_table() -> None:
    text = (Path(data.__file__).parent / "README.md").read_text()
    assert "\n".join([HEADER, *map(row, PROVIDERS)]) in text


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", NAMES)
def test_loads_or_says_why(name: str, device: str) -> None:
    """In one line; any other exception would end a run before the others are timed."""
    provider = provider_of(name)
    try:
        provider.load(device)
    except Unavailable as why:
        assert str(why) and "\n" not in str(why)
    else:
        assert device == "cuda" or not provider.cuda


def held(score: base.Score) -> gate.Errors:
    want = gate.truth(data.make(data.Shape(64, 2, 128, 1000), "cpu"))
    errors = gate.hold(score, want)

    def shifted(*call: Tensor) -> Tensor:
        return score(*call) + 1.01 * want.limit

    with pytest.raises(gate.Wrong, match="logp_max"):
        gate.hold(shifted, want)
    return errors


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in COMPILED else ())
        for name in NAMES
        if not provider_of(name).cuda
    ],
)
def test_agrees_with_float64(name: str) -> None:
    """And its logits have the dtype that stands beside its name."""
    try:
        score = provider_of(name).load("cpu")
    except Unavailable as why:
        pytest.skip(str(why))
    errors = held(score)
    assert (errors.logp_rms < 1e-5) == (provider_of(name).logits == "fp32")


def test_reasons(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What to install; what an installed package says; which chip a kernel is for."""
    with pytest.raises(Unavailable, match=r"^pip install nowhere \(No module named 'nowhere'\)$"):
        base.taken("nowhere", "nowhere", "head")
    (tmp_path / "broken_head.py").write_text("raise TypeError('no such key\\nsecond line')\n")
    information = tmp_path / "broken_head-1.5.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: broken-head\nVersion: 1.5\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Unavailable, match=r"^broken-head 1\.5 does not import: no such key$"):
        base.taken("broken-head", "broken_head", "head")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    with pytest.raises(Unavailable, match=r"a kernel of sm_90 .*; this is sm_100"):
        peers.liger_cute("cuda")
    assert here(provider_of("naive"), "cpu") == torch.__version__
    assert here(provider_of("verl"), "cpu") == "not here: needs a GPU"


def test_a_dtype_that_a_peer_does_not_take() -> None:
    score = base.of_dtypes(lambda *call: call[0], torch.bfloat16)
    with pytest.raises(Unavailable, match="takes bfloat16 only"):
        score(torch.ones(1), torch.ones(1), torch.ones(1))
    assert score(torch.ones(1, dtype=torch.bfloat16), torch.ones(1), torch.ones(1)) == 1


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a module with some functions where a package's would be."""

    def plant(module: str, **functions: Any) -> None:
        parts = module.split(".")
        for i in range(1, len(parts)):
            parent = types.ModuleType(".".join(parts[:i]))
            parent.__path__ = []
            monkeypatch.setitem(sys.modules, parent.__name__, parent)
        made = types.ModuleType(module)
        made.__dict__.update(functions)
        monkeypatch.setitem(sys.modules, module, made)

    return plant


def nll(states: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(
        states.float() @ weight.float().T, tokens, reduction="none"
    )


def test_quack_keeps_no_logits_without_a_graph(planted: Callable[..., None]) -> None:
    """Its per-token loss with a graph; without one, lse and target logit from the product."""
    calls = []

    def fused(x: Tensor, w: Tensor, bias: None, y: Tensor, **options: Any) -> Tensor:
        calls.append(options)
        return nll(x, w, y)

    def swept(x: Tensor, w: Tensor, *, target: Tensor, **options: Any) -> dict[str, Tensor]:
        calls.append(options)
        z = x.float() @ w.float()
        return {"lse": z.logsumexp(1), "target_logit": z.gather(1, target[:, None])[:, 0]}

    planted("quack.linear_cross_entropy", linear_cross_entropy_func=fused, lse_target_epi=swept)
    assert held(peers._quack("cpu")).logp_rms < 1e-5
    assert all(c == {"reduction": "none", "inplace_backward": True} for c in calls)
    case = data.make(data.Shape(64, 0, 128, 1000), "cpu")
    with torch.no_grad():
        logp = peers._quack("cpu")(case.rows, case.weight, case.labels)
    assert torch.allclose(logp, -nll(case.rows, case.weight, case.labels), atol=1e-5)
    assert calls[-1] == {"store_d": False, "tuned": False}


def test_ligers_cute_form_is_looked_for_when_it_loads(
    monkeypatch: pytest.MonkeyPatch, planted: Callable[..., None]
) -> None:
    """Its public function would look for it at the first call, while it is timed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.delenv("LIGER_SCALED_CE_SM90_VALIDATE_TARGETS", raising=False)

    class Function:
        @staticmethod
        def apply(*call: Tensor) -> Tensor:
            return nll(*call)

    module = "liger_kernel.ops.fused_linear_scaled_cross_entropy"
    planted(module, LigerFusedLinearScaledCrossEntropyFunction=Function)
    sm90 = "liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90"
    monkeypatch.setitem(sys.modules, sm90, None)
    with pytest.raises(Unavailable, match=r"import of liger_kernel\.ops\.cutedsl"):
        peers.liger_cute("cuda")
    planted(sm90, LigerFusedScaledCrossEntropySM90Function=Function)
    planted(module, LigerFusedLinearScaledCrossEntropyFunction=Function)
    score = peers.liger_cute("cuda")
    assert held(score).logp_rms < 1e-5


def test_trls_row_kernel_in_the_interpreter() -> None:
    """Its Triton kernel itself, on fp32 logits of a CPU."""
    if torch.cuda.is_available():
        pytest.skip("compiled there, and held to float64 by the benchmark")
    try:
        score = peers._trl_rows("cpu")
    except Unavailable as why:
        pytest.skip(str(why))
    case = data.make(data.Shape(8, 0, 32, 300, torch.float32), "cpu")
    logp = score(case.rows, case.weight, case.labels)
    assert torch.allclose(logp, -nll(case.rows, case.weight, case.labels), atol=1e-5)


DEVICE = "def get_device_name():\n    return 'cpu'\n"
KERNELS = """
from verl.utils.device import get_device_name

def forward(x, w, y):
    z = x.float() @ w.float().T
    return z.gather(1, y[:, None])[:, 0] - z.logsumexp(1), get_device_name()
"""
HEAD = """
def linear_cross_entropy(x, w, y, temperature, reduction):
    from . import kernels
    assert temperature == 1.0 and reduction == "none"
    return kernels.forward(x, w, y)
"""


@pytest.fixture
def fake_verl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A verl whose `__init__` fails, as it does without ray."""
    files = {
        "__init__.py": "raise AssertionError('the package was imported')",
        "utils/__init__.py": "import ray_of_another_world",
        "utils/device.py": DEVICE,
        "utils/kernel/__init__.py": "raise AssertionError('so was its kernel folder')",
        "utils/kernel/kernels.py": KERNELS,
        "utils/kernel/linear_cross_entropy.py": HEAD,
    }
    for name, text in files.items():
        file = tmp_path / "verl" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [n for n in sys.modules if n.split(".")[0] in (verl.ALIAS, "verl")]:
        monkeypatch.delitem(sys.modules, name)
    yield tmp_path / "verl"
    for name in [n for n in sys.modules if n.split(".")[0] == verl.ALIAS]:
        del sys.modules[name]


def test_verls_kernels_without_verl(fake_verl: Path) -> None:
    """The right functions, with what they import by full name and at their first call."""
    assert held(verl._triton("cpu")).logp_rms < 1e-5
    assert not [n for n in sys.modules if n == "verl" or n.startswith("verl.")]
    with pytest.raises(Unavailable, match="divisible by 128 only, got 64"):
        verl._triton("cpu")(torch.ones(2, 64), torch.ones(3, 64), torch.zeros(2).long())


def test_a_verl_that_is_imported_stays(fake_verl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else's `import verl` has the same modules afterwards."""
    whole = types.ModuleType("verl")
    whole.__spec__ = verl._bare("verl", [fake_verl]).__spec__
    monkeypatch.setitem(sys.modules, "verl", whole)
    verl.head_module("linear_cross_entropy")
    assert sys.modules["verl"] is whole and "verl.utils" not in sys.modules


def test_a_verl_that_lacks_the_files(fake_verl: Path) -> None:
    (fake_verl / "utils/kernel/kernels.py").unlink()
    with pytest.raises(Unavailable, match=r"No module named '_verl_heads\.kernels'"):
        verl._triton("cpu")
    assert not [n for n in sys.modules if n == "verl" or n.startswith("verl.")]
