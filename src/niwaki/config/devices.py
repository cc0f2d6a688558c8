"""Early refusal of a GPU that is not there: torch takes seconds to load, and needs a driver to find one."""

import ctypes
from pathlib import Path

from niwaki.errors import InputError

NO_GPU = "device {!r}: this machine has {} CUDA devices; use --device cpu"
_DRIVER, _AMD = "libcuda.so.1", Path("/dev/kfd")


def may_have_gpu() -> bool:
    """Return whether there is a driver of a GPU. Without one, torch finds no device."""
    try:
        ctypes.CDLL(_DRIVER)
    except OSError:
        return _AMD.exists()
    return True


def check_device(name: str) -> None:
    """Raise InputError for a GPU on a machine without a driver for one."""
    if name.partition(":")[0] == "cuda" and not may_have_gpu():
        raise InputError(NO_GPU.format(name, 0))
