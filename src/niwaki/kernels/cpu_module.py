"""Loader of the compiled CPU kernels, and the numbers of their instruction sets."""

import warnings
from functools import cache
from types import ModuleType
from typing import Any

from torch import Tensor

# In the order of `enum class Path` in cpu/kernels.h. BF16 and GFNI include AVX-512 with VBMI2, and VBMI includes VNNI.
BEST, PORTABLE, AVX2, AVX512, BF16, GFNI, VBMI = range(7)


@cache
def cpu_module() -> ModuleType | None:
    """Return the compiled CPU kernels, or warn and return None if the package was installed without a compiler."""
    try:
        from niwaki.kernels import _cpu
    except ImportError:
        warnings.warn("niwaki was installed without its CPU kernels: slower torch code runs instead", stacklevel=2)
        return None
    return _cpu


def as_array(tensor: Tensor | None) -> Any:
    """Return a NumPy view of a stored tensor, which converts to C++ ten times as fast as the tensor itself.

    A tensor of a file may begin at any byte. It is copied if its elements may not.
    """
    if tensor is None:
        return None
    return (tensor.clone() if tensor.data_ptr() % tensor.itemsize else tensor).contiguous().numpy()
