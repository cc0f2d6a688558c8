"""Products with matrices stored as bit planes: the kernels as torch operators, and the limits of their use.

Legend: N tokens, O outputs, I inputs, C columns of a part, T tiles of 32 rows, K bits, B bytes of eight columns,
G groups of columns that share a scale.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from niwaki.kernels.cpu_module import BEST, GFNI, as_array, cpu_module
from niwaki.kernels.types import PlanePart

TABLE_COLUMNS = 32  # columns that share a table scale: groups of the CPU kernel hold whole blocks
# With more tokens the matrix is decoded: that is exact, where the tables round, and faster from about 50 tokens on. Two
# threads, 8192 × 2048 at 4 bits: decoding 6.8 ms; 32 tokens 5.9 ms by tables and 8.9 decoded, 64 tokens 11.4 and 10.0.
MAX_TABLE_TOKENS = 16
# With GFNI, decoding takes 1.2 ms for 1 to 4 bits, and the tables take 0.073 ms per plane and token. At 4 bits, 8
# tokens take 2.4 ms by tables and 2.5 ms decoded, 16 tokens 4.7 and 2.8.
MAX_TABLE_PLANES = 36  # planes times tokens
MAX_GFNI_BITS = 4
# Measured on an H100, 4096² to 28672 × 8192 (packed-linear-h100.json). With multiply-adds, every further token costs
# about half of the first one. With tensor cores, 1 to 16 tokens cost the same. Above the limits decoding is faster.
MAX_FMA_TOKENS = 8
MAX_CORE_TOKENS = 64
MAX_SMALL_WEIGHTS = 2**25  # matrices up to this size multiply 3 and 4 tokens faster by multiply-adds
CORE_GROUP = 128  # columns of one tensor-core step


def reaches(x_NI: Tensor, group: int, columns: int) -> bool:
    """Return whether a kernel takes this product: few tokens, and groups of whole bytes (GPU) or blocks (CPU)."""
    if x_NI.is_cuda:
        max_tokens = MAX_CORE_TOKENS if cores_reach(x_NI, group, columns) else MAX_FMA_TOKENS
        return len(x_NI) <= max_tokens and (group >= columns or group % 8 == 0)
    if len(x_NI) > MAX_TABLE_TOKENS:
        return False
    return (group >= columns or group % TABLE_COLUMNS == 0) and cpu_module() is not None


def decoding_pays(x_NI: Tensor, described: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a CPU decodes all parts of a matrix and multiplies faster than its tables do."""
    # Every token asks: the cheap test comes first.
    if x_NI.dtype != torch.bfloat16 or MAX_GFNI_BITS * len(x_NI) <= MAX_TABLE_PLANES:
        return False
    compiled = cpu_module()
    if compiled is None or not compiled.supported(GFNI):
        return False
    planes = sum(about["bits"] * about["columns"] for about in described)
    fast = all(about["bits"] <= MAX_GFNI_BITS for about in described)
    return fast and len(x_NI) * planes > MAX_TABLE_PLANES * sum(about["columns"] for about in described)


def cores_reach(x_NI: Tensor, group: int, columns: int) -> bool:
    """Return whether tensor cores take the product: inputs of 16 bits, groups of whole steps."""
    return x_NI.dtype in (torch.bfloat16, torch.float16) and (group >= columns or group % CORE_GROUP == 0)


def prepared_layer(parts: Sequence[PlanePart], rows: int, inputs: int) -> Any:
    """Return the parts of a matrix [rows, inputs] as one object of the compiled kernels, for `cpu_product`."""
    compiled = cpu_module()
    assert compiled is not None, "callers check `reaches` first"
    layer = compiled.Layer(rows, inputs)
    for part in parts:
        layer.add(*_compiled_arguments(part))
    return layer


def cpu_product(layer: Any, x_NI: Tensor, rows: int) -> Tensor:
    """Return x Wᵀ in the dtype of `x_NI`, with sums in float32. Only addresses of float32 or bfloat16 go to C++."""
    given_NI = (x_NI if x_NI.dtype in (torch.float32, torch.bfloat16) else x_NI.float()).contiguous()
    out_NO = given_NI.new_empty(len(given_NI), rows)
    narrow, threads = given_NI.dtype == torch.bfloat16, torch.get_num_threads()
    layer.multiply(given_NI.data_ptr(), out_NO.data_ptr(), len(given_NI), narrow, threads)
    return out_NO.to(x_NI.dtype)


def _compiled_arguments(part: PlanePart) -> tuple[Any, ...]:
    """Return the arguments of C++ for a part."""
    planes, scale, offset, zero, columns = (as_array(tensor) for tensor in part[:5])
    group_bytes = part.group // 8 if len(part.scale_GO) > 1 else max(part.planes_TKBR.shape[2], 1)
    return planes, scale, offset, zero, part.centre, group_bytes, columns, part.columns


def plane_product(
    x_NI: Tensor,
    planes_TKBR: Tensor,
    scale_GO: Tensor,
    offset_GO: Tensor | None,
    zero_GO: Tensor | None,
    columns_C: Tensor | None,
    centre: float,
    columns: int,
    group: int,
    out_NO: Tensor,
) -> None:
    """Add x[:, columns] Wᵀ of one part to `out_NO`, where W = code · scale + offset.

    Without `offset_GO` the offset is −(zero or centre) · scale. Inputs and outputs are float32. `planes_TKBR` is uint8
    in the order of `quantized.pack_planes`. Scales and offsets are float16 viewed as int16, zero codes uint8.
    `columns_C` is int32; None means all columns in order.
    """
    part = PlanePart(planes_TKBR, scale_GO, offset_GO, zero_GO, columns_C, centre, columns, group)
    compiled = cpu_module()
    assert compiled is not None, "callers check `reaches` first"
    x, out = x_NI.detach().numpy(), out_NO.numpy()
    compiled.plane_product(*_compiled_arguments(part), x, out, torch.get_num_threads(), BEST)


def layer_product(
    x_NI: Tensor, tensors: Sequence[Tensor | None], numbers: Sequence[float], bias_O: Tensor | None, rows: int
) -> Tensor:
    """Return x Wᵀ + bias on a GPU. Each of the one or two `PlanePart.for_gpu` has five tensors and three numbers."""
    out_NO = x_NI.new_empty(len(x_NI), rows)
    gpu_product(x_NI.contiguous(), _parts_of(tensors, numbers), bias_O, out_NO)
    return out_NO


def gpu_product(x_NI: Tensor, parts: Sequence[PlanePart], bias_O: Tensor | None, out_NO: Tensor) -> None:
    """Write x Wᵀ + bias to `out_NO` by the kernel that is faster for this number of tokens."""
    small = x_NI.shape[1] * out_NO.shape[1] <= MAX_SMALL_WEIGHTS
    reach = all(cores_reach(x_NI, part.group, part.columns) for part in parts)
    if reach and len(x_NI) > (4 if small else 2):
        from niwaki.kernels.triton.dot import core_product

        core_product(x_NI, parts, bias_O, out_NO)
    else:
        from niwaki.kernels.triton.planes import fma_product

        fma_product(x_NI, parts, bias_O, out_NO)


def layer_decoded(
    tensors: Sequence[Tensor | None], numbers: Sequence[float], rows: int, first: int, last: int, dtype: torch.dtype
) -> Tensor:
    """Return rows [first, last) of `rows` on a GPU, the parts side by side: [last − first, C₀ + C₁].

    Parts come as in `layer_product`. `first` is the first row of a tile.
    """
    from niwaki.kernels.triton.decode import decode_planes

    parts = _parts_of(tensors, numbers)
    out_RC = _empty_rows(parts[0].planes_TKBR, numbers, first, last, dtype)
    decode_planes(parts, rows, first, out_RC)
    return out_RC


def _empty_rows(like: Tensor, numbers: Sequence[float], first: int, last: int, dtype: torch.dtype) -> Tensor:
    columns = sum(int(number) for number in numbers[1::3])
    return torch.empty(last - first, columns, dtype=dtype, device=like.device)


def _parts_of(tensors: Sequence[Tensor | None], numbers: Sequence[float]) -> list[PlanePart]:
    """Rebuild the parts from the lists of `_flat`."""
    parts = []
    for number in range(len(tensors) // 5):
        planes_TKBR, scale_GO, offset_GO, zero_GO, columns_8B = tensors[5 * number : 5 * number + 5]
        centre, columns, group = numbers[3 * number : 3 * number + 3]
        assert planes_TKBR is not None and scale_GO is not None
        parts.append(PlanePart(planes_TKBR, scale_GO, offset_GO, zero_GO, columns_8B, centre, int(columns), int(group)))
    return parts


def _flat(parts: Sequence[PlanePart]) -> tuple[list[Tensor | None], list[float]]:
    """Return the tensors and the numbers of all parts as two lists, which operators take."""
    return [t for part in parts for t in part[:5]], [float(number) for part in parts for number in part[5:]]


layer_product_op = torch.library.custom_op("niwaki::layer_product", layer_product, mutates_args=())


@layer_product_op.register_fake
def _(x_NI: Tensor, _tensors: object, _numbers: object, _bias_O: Tensor | None, rows: int) -> Tensor:
    """Return an empty tensor with shape and dtype of the product."""
    return x_NI.new_empty(len(x_NI), rows)


layer_decoded_op = torch.library.custom_op("niwaki::layer_decoded", layer_decoded, mutates_args=())


@layer_decoded_op.register_fake
def _(
    tensors: Sequence[Tensor], numbers: Sequence[float], _rows: int, first: int, last: int, dtype: torch.dtype
) -> Tensor:
    """Return an empty tensor with shape and dtype of the rows."""
    return _empty_rows(tensors[0], numbers, first, last, dtype)


def multiply(x_NI: Tensor, parts: Sequence[PlanePart], bias_O: Tensor | None, rows: int) -> Tensor:
    """Call `layer_product`, as an operator while a graph is traced."""
    product = layer_product_op if torch.compiler.is_compiling() else layer_product
    return product(x_NI, *_flat(parts), bias_O, rows)


def decode(parts: Sequence[PlanePart], rows: int, first: int, last: int, dtype: torch.dtype) -> Tensor:
    """Call `layer_decoded`, as an operator while a graph is traced."""
    decoded = layer_decoded_op if torch.compiler.is_compiling() else layer_decoded
    return decoded(*_flat(parts), rows, first, last, dtype)
