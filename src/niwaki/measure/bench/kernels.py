"""Detection of the kernels that multiply the matrices of a variant, for a number of tokens, by a run of one layer.

A packed layer that calls a dense product of torch has decoded its matrix. Any other ran its own kernel, and the
compiled module reports the instruction set of this processor.

Legend: N tokens, I inputs.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from niwaki.formats.sparse_tiles import LAYOUT
from niwaki.kernels.cpu_module import AVX2, AVX512, BF16, VBMI, cpu_module
from niwaki.kernels.types import MAX_TOKENS
from niwaki.runtime.contextual.predictor_files import InputShadow
from niwaki.runtime.linear import PackedLinear
from niwaki.runtime.sparse_linear import SparseLinear
from niwaki.runtime.trellis_linear import TrellisLinear

DENSE = "torch"
DECODED = "decoded, then torch"
_PRODUCTS = ("mm", "linear", "matmul", "bmm")
_PATHS = {
    VBMI: "AVX-512 VBMI",
    BF16: "AVX-512 BF16",
    AVX512: "AVX-512",
    AVX2: "AVX2",
}  # of the compiled kernels, the fastest first


@dataclass(frozen=True)
class KernelRun:
    """The kernel of a run. `waits`: the host waited for the device, so a CUDA graph cannot record it."""

    kernel: str
    waits: bool = False


class _ProductObserver(TorchDispatchMode):
    """Observer of the products of torch: of dense matrices, and of sparse tensor cores."""

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
def detect_kernels(model: Any, tokens: int) -> KernelRun:
    """Return the kernels of every kind of packed layer of a model, `torch` if there are none."""
    layers: dict[type, nn.Module] = {}
    for module in model.modules():
        if isinstance(module, PackedLinear | SparseLinear | TrellisLinear):
            known = layers.get(type(module))
            # A CPU selects by tokens alone, so the smallest layer is enough; a GPU may select by size.
            if known is None or _better(module, known, model.device.type == "cuda"):
                layers[type(module)] = module
    runs = [_probe(layer, tokens, model) for layer in layers.values()]
    kernels = dict.fromkeys(run.kernel for run in runs)
    return KernelRun(" + ".join(kernels) or DENSE, any(run.waits for run in runs))


def contextual_kernel(model: Any, tokens: int) -> str:
    """Return the kernel that multiplies the kept rows and columns, or the kept inputs, of a contextual model."""
    if isinstance(model.contextual.shadow, InputShadow):
        return _inputs_kernel(model.device.type == "cuda", tokens)
    return "Triton rows" if model.device.type == "cuda" and tokens <= MAX_TOKENS else "torch on copies"


def _inputs_kernel(cuda: bool, tokens: int) -> str:
    compiled = cpu_module()
    if tokens > MAX_TOKENS or (compiled is None and not cuda):
        return DENSE
    if cuda or compiled is None:
        return "Triton inputs"
    return next((_PATHS[number] for number in (AVX512, AVX2) if compiled.supported(number)), "portable")


def _better(one: Any, other: Any, large: bool) -> bool:
    size, other_size = (int(layer.out_features * layer.in_features) for layer in (one, other))
    return size > other_size if large else size < other_size


def _probe(layer: Any, tokens: int, model: Any) -> KernelRun:
    x_NI = torch.zeros(tokens, layer.in_features, dtype=model.dtype, device=model.device)
    layer(x_NI)  # without this run, one-time preparations would be observed
    with _ProductObserver() as products:
        layer(x_NI)
    waits = x_NI.is_cuda and _waits(layer, x_NI)
    if products.semi_structured:
        return KernelRun("cuSPARSELt", waits)
    if products.dense:
        return KernelRun(DECODED, waits)
    return KernelRun("Triton" if x_NI.is_cuda else _cpu_path(layer, model.dtype), waits)


def _cpu_path(layer: Any, dtype: torch.dtype) -> str:
    compiled = cpu_module()
    assert compiled is not None, "a layer that decoded nothing ran a compiled kernel"
    paths = (_widest(layer, dtype), 2)
    return next((_PATHS[number] for number in paths if compiled.supported(number)), "portable")


def _widest(layer: Any, dtype: torch.dtype) -> int:
    """Return the widest compiled path for a layer."""
    if isinstance(layer, PackedLinear):
        return 3
    if isinstance(layer, TrellisLinear):
        return VBMI
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
