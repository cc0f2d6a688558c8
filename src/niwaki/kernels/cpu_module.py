"""Loader of the compiled CPU kernels, and the numbers of their instruction sets."""

import warnings
from functools import cache
from types import ModuleType

# In the order of `enum class Path` in cpu/kernels.h. BF16 and GFNI include AVX-512 with VBMI2.
BEST, PORTABLE, AVX2, AVX512, BF16, GFNI = range(6)


@cache
def cpu_module() -> ModuleType | None:
    """Return the compiled CPU kernels, or warn and return None if the package was installed without a compiler."""
    try:
        from niwaki.kernels import _cpu
    except ImportError:
        warnings.warn("niwaki was installed without its CPU kernels: slower torch code runs instead", stacklevel=2)
        return None
    return _cpu
