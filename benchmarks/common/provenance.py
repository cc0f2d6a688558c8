"""Provenance of a result: date, machine, versions and command."""

import datetime
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "triton")


def provenance(device: str) -> dict[str, Any]:
    """Return date, machine, versions and command of a run on `device`, where any name but `cpu` means a GPU."""
    on_gpu = device != "cpu" and torch.cuda.is_available()
    found = {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()}
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if on_gpu else platform.machine(),
        "versions": {name: number for name, number in found.items() if number},
        "command": " ".join(["python", "-m", _script(), *sys.argv[1:]]),
    }


def _script() -> str:
    """Return the module name of the running script, such as benchmarks.speed.memory."""
    spec = sys.modules["__main__"].__spec__
    return Path(sys.argv[0]).stem if spec is None else spec.name


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
