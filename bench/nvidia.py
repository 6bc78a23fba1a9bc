"""Driver, clocks, power and temperature of a GPU, by one call of nvidia-smi."""

import subprocess

import torch

ABSENT = "-"
_ASKED = {
    "driver": "driver_version",
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "power_limit_w": "power.limit",
    "power_w": "power.draw",
    "temperature_c": "temperature.gpu",
}
_SECONDS = 10.0  # a GPU that hangs may hang the tool too


def state() -> dict[str, str]:
    """What the tool says of torch's first GPU; "-" for all if it is absent or does not answer."""
    which = []
    if torch.cuda.is_available():
        uuid = getattr(torch.cuda.get_device_properties(0), "uuid", None)
        which = ["-i", f"GPU-{uuid}"] if uuid else []
    query = [f"--query-gpu={','.join(_ASKED.values())}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            ["nvidia-smi", *query, *which],
            capture_output=True,
            text=True,
            check=True,
            timeout=_SECONDS,
        )
    except (OSError, subprocess.SubprocessError):
        return dict.fromkeys(_ASKED, ABSENT)
    values = [value.strip() for value in done.stdout.split("\n")[0].split(",")]
    if len(values) != len(_ASKED):
        return dict.fromkeys(_ASKED, ABSENT)
    known = [ABSENT if value.startswith("[") else value for value in values]
    return dict(zip(_ASKED, known, strict=True))


def columns(before: dict[str, str], after: dict[str, str]) -> dict[str, str]:
    """A variant's columns from the states before and after it; clocks and power from the latter."""
    found = {key: value for key, value in after.items() if key != "temperature_c"}
    return found | {
        "temperature_before_c": before["temperature_c"],
        "temperature_after_c": after["temperature_c"],
    }
