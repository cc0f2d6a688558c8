"""niwaki makes pretrained language models smaller and faster after training, and proves what that cost.

import niwaki

niwaki.compress("model", "out", method="sparsegpt", target="2:4", calibration=["mine.txt"])
niwaki.compare("model", ["out"], data=["held_out.txt"])
"""

from typing import TYPE_CHECKING, Any

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
from niwaki.runtime import hf_hook
from niwaki.version import __version__ as __version__

if TYPE_CHECKING:
    from niwaki.compression.compress import compress
    from niwaki.compression.inspect import inspect
    from niwaki.compression.plan.planner import plan
    from niwaki.compression.recover import recover
    from niwaki.compression.rotate import rotate
    from niwaki.exporters.export import export
    from niwaki.measure.bench.benchmark import bench
    from niwaki.measure.compare.comparison import compare
    from niwaki.measure.evaluate.evaluation import evaluate
    from niwaki.runtime.load import generate, load

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
    "rotate",
]

_LAZY = {
    "bench": "niwaki.measure.bench.benchmark",
    "compare": "niwaki.measure.compare.comparison",
    "compress": "niwaki.compression.compress",
    "evaluate": "niwaki.measure.evaluate.evaluation",
    "export": "niwaki.exporters.export",
    "generate": "niwaki.runtime.load",
    "inspect": "niwaki.compression.inspect",
    "load": "niwaki.runtime.load",
    "plan": "niwaki.compression.plan.planner",
    "recover": "niwaki.compression.recover",
    "rotate": "niwaki.compression.rotate",
}


def __getattr__(name: str) -> Any:
    """Import torch and transformers only when a function that needs them is used."""
    if name not in _LAZY:
        raise AttributeError(f"module 'niwaki' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    """Return all names, also those of functions that are not imported yet."""
    return sorted({*globals(), *_LAZY})


hf_hook.install()
