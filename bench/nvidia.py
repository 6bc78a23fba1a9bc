"""What nvidia-smi says of torch's first GPU: driver, clocks, power, temperature."""

from collections.abc import Mapping

import torch

from bench.processes import output

ABSENT = "-"
_ASKED = {
    "driver": "driver_version",
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "power_limit_w": "power.limit",
    "power_w": "power.draw",
    "temperature_c": "temperature.gpu",
}


_ANSWERED: dict[tuple[str, ...], tuple[str, ...]] = {}
"""By questions asked: the names of those that the driver answers."""


def ask(asked: Mapping[str, str]) -> dict[str, str]:
    """The answers by name, of questions by name; none where the tool is absent or says nothing."""
    key = tuple(asked.values())
    names = _ANSWERED.get(key, tuple(asked))
    line = _line(*(asked[name] for name in names))
    if not line and key not in _ANSWERED:
        # It refuses a list with a question that it does not know. Asked one by one, once.
        names = tuple(name for name in asked if _line(asked[name])) or names
        _ANSWERED[key] = names
        line = _line(*(asked[name] for name in names))
    values = [value.strip() for value in line.split(",")]
    return dict(zip(names, values, strict=True)) if len(values) == len(names) else {}


def _line(*fields: str) -> str:
    which = []
    if torch.cuda.is_available():
        uuid = getattr(torch.cuda.get_device_properties(0), "uuid", None)
        which = ["-i", f"GPU-{uuid}"] if uuid else []
    query = [f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    return output("nvidia-smi", *query, *which).split("\n")[0]


def state() -> dict[str, str]:
    """A variant's part of it; "-" for what has no answer."""
    found = ask(_ASKED)
    known = {name: value for name, value in found.items() if not value.startswith("[")}
    return dict.fromkeys(_ASKED, ABSENT) | known


def columns(before: dict[str, str], after: dict[str, str]) -> dict[str, str]:
    """A variant's columns from the states before and after it; clocks and power from the latter."""
    found = {key: value for key, value in after.items() if key != "temperature_c"}
    return found | {
        "temperature_before_c": before["temperature_c"],
        "temperature_after_c": after["temperature_c"],
    }
