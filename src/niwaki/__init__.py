"""niwaki makes pretrained language models smaller and faster after training, and proves what that cost.

import niwaki

niwaki.compress("model", "out", method="sparsegpt", target="2:4", calibration=["mine.txt"])
niwaki.compare("model", ["out"], data=["held_out.txt"])
"""

from typing import TYPE_CHECKING, Any

from niwaki import _hook
from niwaki.errors import (
    ArchitectureError,
    CalibrationError,
    CheckpointError,
    InputError,
    MeasuringError,
    NiwakiError,
    NumericalError,
    OutputError,
    ResumeError,
    TargetError,
)

if TYPE_CHECKING:
    from niwaki.benching import bench
    from niwaki.comparing.comparison import compare
    from niwaki.compression import compress
    from niwaki.evaluation import evaluate
    from niwaki.exporting import export
    from niwaki.generation import generate, load
    from niwaki.inspecting import inspect
    from niwaki.planning import plan
    from niwaki.recovery import recover

__version__ = "0.1.0"

__all__ = [
    "ArchitectureError",
    "CalibrationError",
    "CheckpointError",
    "InputError",
    "MeasuringError",
    "NiwakiError",
    "NumericalError",
    "OutputError",
    "ResumeError",
    "TargetError",
    "bench",
    "compare",
    "compress",
    "evaluate",
    "export",
    "generate",
    "inspect",
    "load",
    "plan",
    "recover",
]

_LAZY = {
    "bench": "niwaki.benching",
    "compare": "niwaki.comparing.comparison",
    "compress": "niwaki.compression",
    "evaluate": "niwaki.evaluation",
    "export": "niwaki.exporting",
    "generate": "niwaki.generation",
    "inspect": "niwaki.inspecting",
    "load": "niwaki.generation",
    "plan": "niwaki.planning",
    "recover": "niwaki.recovery",
}


def __getattr__(name: str) -> Any:
    """Imports torch and transformers only when a function that needs them is used."""
    if name not in _LAZY:
        raise AttributeError(f"module 'niwaki' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)


_hook.install()
