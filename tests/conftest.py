"""Environment of all tests, set before transformers is imported: quiet and offline."""

import importlib.util
import os
import sys
import tempfile
from pathlib import Path

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
