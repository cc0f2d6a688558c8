"""Which code multiplies a form's matrices at so many tokens: seen by running one layer, not read from a table.

A packed layer that calls a dense product of torch has decoded its matrix; one that does not ran a kernel of its own,
of which the compiled module says what it uses on this processor.

Legend: N tokens, I inputs.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from niwaki.formats.sparse_tiles import LAYOUT
from niwaki.kernels.cpu_module import AVX2, AVX512, BF16, cpu_module
from niwaki.kernels.types import MAX_TOKENS
from niwaki.runtime.linear import PackedLinear
from niwaki.runtime.sparse_linear import SparseLinear

DENSE = "torch"
DECODED = "decoded, then torch"
_PRODUCTS = ("mm", "linear", "matmul", "bmm")
_PATHS = {BF16: "AVX-512 BF16", AVX512: "AVX-512", AVX2: "AVX2"}  # of the compiled kernels, the fastest first


@dataclass(frozen=True)
class Ran:
    """What multiplied, and whether the host had to wait for the device on the way (then no CUDA graph holds it)."""

    kernel: str
    waits: bool = False


class _Products(TorchDispatchMode):
    """The products of torch that run inside: of dense matrices, and of those for sparse tensor cores."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = self.semi_structured = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if "cslt" in name or any("SemiStructured" in type(value).__name__ for value in args):
            self.semi_structured = True
        elif name.endswith(_PRODUCTS):
            self.dense = True
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def what_runs(model: Any, tokens: int) -> Ran:
    """Of the packed layers of a model, the kinds that there are; `torch` where there are none."""
    layers: dict[type, nn.Module] = {}
    for module in model.modules():
        if isinstance(module, PackedLinear | SparseLinear):
            known = layers.get(type(module))
            # A CPU decides by the number of tokens alone, and the smallest layer tells; a GPU may go by size.
            if known is None or _better(module, known, model.device.type == "cuda"):
                layers[type(module)] = module
    found = [_probed(layer, tokens, model) for layer in layers.values()]
    kernels = dict.fromkeys(ran.kernel for ran in found)
    return Ran(" + ".join(kernels) or DENSE, any(ran.waits for ran in found))


def contextual_kernel(model: Any, tokens: int) -> str:
    """What multiplies the kept rows and columns of a contextual model."""
    return "Triton rows" if model.device.type == "cuda" and tokens <= MAX_TOKENS else "torch on copies"


def _better(one: Any, other: Any, large: bool) -> bool:
    mine, theirs = (int(layer.out_features * layer.in_features) for layer in (one, other))
    return mine > theirs if large else mine < theirs


def _probed(layer: Any, tokens: int, model: Any) -> Ran:
    x_NI = torch.zeros(tokens, layer.in_features, dtype=model.dtype, device=model.device)
    layer(x_NI)  # what is prepared once is no part of it
    with _Products() as seen:
        layer(x_NI)
    waits = x_NI.is_cuda and _waits(layer, x_NI)
    if seen.semi_structured:
        return Ran("cuSPARSELt", waits)
    if seen.dense:
        return Ran(DECODED, waits)
    return Ran("Triton" if x_NI.is_cuda else _cpu_path(layer, model.dtype), waits)


def _cpu_path(layer: Any, dtype: torch.dtype) -> str:
    compiled = cpu_module()
    assert compiled is not None, "a layer that decoded nothing ran a compiled kernel"
    paths = (_widest(layer, dtype), 2)
    return next((_PATHS[number] for number in paths if compiled.supported(number)), "portable")


def _widest(layer: Any, dtype: torch.dtype) -> int:
    """The widest path that there is for a layer."""
    if isinstance(layer, PackedLinear):
        return 3
    stored = layer.described["sparse"]
    if stored["layout"] == LAYOUT:
        return 3
    return 4 if stored["values"] == "bfloat16" and dtype == torch.bfloat16 else 2


def _waits(layer: Any, x_NI: torch.Tensor) -> bool:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x_NI)
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return False
