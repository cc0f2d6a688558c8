"""Environment of all tests, set before transformers is imported: quiet and offline; each has its own command line."""

import importlib.util
import os
import sys
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
if "NIWAKI_CACHE" not in os.environ:
    cache = tempfile.TemporaryDirectory(prefix="niwaki-cache-")  # removed at the end of the process
    os.environ["NIWAKI_CACHE"] = cache.name


def use_kernels(path: Path) -> None:
    """Use other compiled kernels than those of the package: a build that reports wrong accesses to memory."""
    import niwaki.kernels

    found = importlib.util.spec_from_file_location("niwaki.kernels._cpu", path)
    assert found is not None and found.loader is not None, f"expected a module at {path}"
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    sys.modules["niwaki.kernels._cpu"] = niwaki.kernels._cpu = module


if "NIWAKI_TEST_KERNELS" in os.environ:
    use_kernels(Path(os.environ["NIWAKI_TEST_KERNELS"]))


@pytest.fixture(autouse=True)
def own_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore the command line after every test, because records keep it."""
    monkeypatch.setattr(sys, "argv", list(sys.argv))
