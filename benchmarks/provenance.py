"""Where the numbers of a result file come from: what every file in benchmarks/results says beside its measurements."""

import datetime
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "triton")


def provenance(device: str) -> dict[str, Any]:
    """Date, machine, versions and command of a run on `device`, `cpu` or anything else for a GPU if there is one."""
    on_gpu = device != "cpu" and torch.cuda.is_available()
    found = {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()}
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if on_gpu else platform.machine(),
        "versions": {name: number for name, number in found.items() if number},
        "command": " ".join(["python", *sys.argv]),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
