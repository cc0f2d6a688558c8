"""Products with matrices stored as bit planes: the kernels as torch operators, and when they are the way to go.

Legend: N tokens, O outputs, I inputs, C columns of a part, T tiles of 32 rows, K bits, B bytes of eight columns,
G groups of columns that share a scale.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from niwaki.kernels.codes import cpu_module

BLOCK_COLUMNS = 32  # columns that share a table's scale: groups of the CPU kernel hold whole blocks
# Beyond so many tokens the matrix is decoded: exact, where the tables round, and faster from about 50 tokens on. Two
# threads, 8192 × 2048 at 4 bits: decoding 6.8 ms, 32 tokens 5.9 ms by the kernel and 8.9 decoded, 64 tokens 11.4 and
# 10.0.
FEW_TOKENS = 16
# With GFNI decoding takes 1.2 ms for any bits up to four, the kernel 0.073 ms a plane and token: 8 tokens at 4 bits 2.4
# and 2.5 ms, 16 tokens 4.7 and 2.8.
FEW_PLANES = 36  # times tokens
GFNI, MAX_GFNI_BITS = 5, 4  # as the compiled kernels number their paths, and what that one decodes
# Measured on an H100, 4096² to 28672 × 8192 (packed-linear-h100.json). Multiply-adds cost about half a token's time for
# each more, tensor cores the same for 1 to 16 tokens; from there on decoding the matrix catches up with both.
FEW_TOKENS_GPU = 8  # multiply-adds, where tensor cores do not reach
CORE_TOKENS = 64
SMALL_WEIGHTS = 2**25  # for four tokens, multiply-adds are faster below so many weights
CORE_GROUP = 128  # columns: what tensor cores take at a time


class PlanePart(NamedTuple):
    """One part of a matrix as the kernels take it: the tensors of `codes`, with zero codes uint8 [G, O].

    `columns_C` int32 says which inputs the columns are (None: all, in order). `for_gpu` changes its form.
    """

    planes_TKBR: Tensor
    scale_GO: Tensor
    offset_GO: Tensor | None
    zero_GO: Tensor | None
    columns_C: Tensor | None
    centre: float
    columns: int
    group: int

    def for_gpu(self) -> "PlanePart":
        """Rows of scales filled up to whole words of four; `columns_C` by lane, [8, B] with −1 for none."""
        places = self.columns_C
        if places is not None:
            places = torch.nn.functional.pad(places, (0, -len(places) % 8), value=-1).view(-1, 8).T.contiguous()
        scale_GO, offset_GO, zero_GO = (_whole_words(t) for t in (self.scale_GO, self.offset_GO, self.zero_GO))
        assert scale_GO is not None
        return self._replace(scale_GO=scale_GO, offset_GO=offset_GO, zero_GO=zero_GO, columns_C=places)


def _whole_words(values_GO: Tensor | None) -> Tensor | None:
    if values_GO is None or values_GO.shape[1] % 4 == 0:
        return values_GO
    return torch.nn.functional.pad(values_GO, (0, -values_GO.shape[1] % 4))


def reaches(x_NI: Tensor, group: int, columns: int) -> bool:
    """Whether a kernel takes this product: few tokens, and groups of whole bytes (GPU) or whole blocks (CPU)."""
    if x_NI.is_cuda:
        most = CORE_TOKENS if cores_reach(x_NI, group, columns) else FEW_TOKENS_GPU
        return len(x_NI) <= most and (group >= columns or group % 8 == 0)
    if len(x_NI) > FEW_TOKENS:
        return False
    return (group >= columns or group % BLOCK_COLUMNS == 0) and cpu_module() is not None


def decoding_pays(x_NI: Tensor, described: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a CPU decodes all parts of a matrix, and multiplies, faster than its kernel looks them up."""
    if x_NI.dtype != torch.bfloat16 or MAX_GFNI_BITS * len(x_NI) <= FEW_PLANES:  # first: every token asks
        return False
    compiled = cpu_module()
    if compiled is None or not compiled.supported(GFNI):
        return False
    planes = sum(about["bits"] * about["columns"] for about in described)
    fast = all(about["bits"] <= MAX_GFNI_BITS for about in described)
    return fast and len(x_NI) * planes > FEW_PLANES * sum(about["columns"] for about in described)


def cores_reach(x_NI: Tensor, group: int, columns: int) -> bool:
    """Whether tensor cores take it: inputs of 16 bits, groups of whole steps."""
    return x_NI.dtype in (torch.bfloat16, torch.float16) and (group >= columns or group % CORE_GROUP == 0)


def prepared_layer(parts: Sequence[PlanePart], rows: int, inputs: int) -> Any:
    """The parts of a matrix [rows, inputs] as one object of the compiled kernels, for `cpu_product`."""
    compiled = cpu_module()
    assert compiled is not None, "callers ask `reaches` first"
    layer = compiled.Layer(rows, inputs)
    for part in parts:
        layer.add(*_compiled_arguments(part))
    return layer


def cpu_product(layer: Any, x_NI: Tensor, rows: int) -> Tensor:
    """x Wᵀ in the dtype of `x_NI`, sums in float32. In float32 and bfloat16 only addresses cross into C++."""
    given_NI = (x_NI if x_NI.dtype in (torch.float32, torch.bfloat16) else x_NI.float()).contiguous()
    out_NO = given_NI.new_empty(len(given_NI), rows)
    narrow, threads = given_NI.dtype == torch.bfloat16, torch.get_num_threads()
    layer.multiply(given_NI.data_ptr(), out_NO.data_ptr(), len(given_NI), narrow, threads)
    return out_NO.to(x_NI.dtype)


def _compiled_arguments(part: PlanePart) -> tuple[Any, ...]:
    """What C++ takes of a part. Views of NumPy cross ten times as fast as tensors."""
    planes, scale, offset, zero, columns = (None if tensor is None else tensor.numpy() for tensor in part[:5])
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
    """out += x[:, columns] Wᵀ for one part: W = code · scale + offset, offset = −(zero or centre) · scale if not given.

    Float32 in and out. `planes_TKBR` uint8 as `codes.pack_planes` lays them out, scales and offsets float16 as int16,
    zero codes uint8, `columns_C` int32 (None: all, in order).
    """
    part = PlanePart(planes_TKBR, scale_GO, offset_GO, zero_GO, columns_C, centre, columns, group)
    compiled = cpu_module()
    assert compiled is not None, "callers ask `reaches` first"
    x, out = x_NI.detach().numpy(), out_NO.numpy()
    compiled.plane_product(*_compiled_arguments(part), x, out, torch.get_num_threads(), 0)


plane_product_op = torch.library.custom_op("niwaki::plane_product", plane_product, mutates_args={"out_NO"})


@plane_product_op.register_fake
def _(*_: object) -> None:
    """Nothing to trace: the output is given."""


def layer_product(
    x_NI: Tensor, tensors: Sequence[Tensor | None], numbers: Sequence[float], bias_O: Tensor | None, rows: int
) -> Tensor:
    """x Wᵀ + bias on a GPU. Of one or two parts (`PlanePart.for_gpu`): five tensors and three numbers each."""
    out_NO = x_NI.new_empty(len(x_NI), rows)
    gpu_product(x_NI.contiguous(), _given(tensors, numbers), bias_O, out_NO)
    return out_NO


def gpu_product(x_NI: Tensor, parts: Sequence[PlanePart], bias_O: Tensor | None, out_NO: Tensor) -> None:
    """out = x Wᵀ + bias by the kernel that is faster for so many tokens."""
    small = x_NI.shape[1] * out_NO.shape[1] <= SMALL_WEIGHTS
    reach = all(cores_reach(x_NI, part.group, part.columns) for part in parts)
    if reach and len(x_NI) > (4 if small else 2):
        from niwaki.kernels.triton.dot import some_tokens

        some_tokens(x_NI, parts, bias_O, out_NO)
    else:
        from niwaki.kernels.triton.planes import few_tokens

        few_tokens(x_NI, parts, bias_O, out_NO)


def layer_decoded(
    tensors: Sequence[Tensor | None], numbers: Sequence[float], rows: int, first: int, last: int, dtype: torch.dtype
) -> Tensor:
    """Rows [first, last) of `rows` on a GPU, the parts side by side, [last − first, C₀ + C₁]; given as `layer_product`.

    `first` begins a tile.
    """
    from niwaki.kernels.triton.decode import decode_planes

    parts = _given(tensors, numbers)
    out_RC = _room(parts[0].planes_TKBR, numbers, first, last, dtype)
    decode_planes(parts, rows, first, out_RC)
    return out_RC


def _room(like: Tensor, numbers: Sequence[float], first: int, last: int, dtype: torch.dtype) -> Tensor:
    columns = sum(int(number) for number in numbers[1::3])
    return torch.empty(last - first, columns, dtype=dtype, device=like.device)


def _given(tensors: Sequence[Tensor | None], numbers: Sequence[float]) -> list[PlanePart]:
    """The parts that `_flat` took apart."""
    parts = []
    for number in range(len(tensors) // 5):
        planes_TKBR, scale_GO, offset_GO, zero_GO, columns_8B = tensors[5 * number : 5 * number + 5]
        centre, columns, group = numbers[3 * number : 3 * number + 3]
        assert planes_TKBR is not None and scale_GO is not None
        parts.append(PlanePart(planes_TKBR, scale_GO, offset_GO, zero_GO, columns_8B, centre, int(columns), int(group)))
    return parts


def _flat(parts: Sequence[PlanePart]) -> tuple[list[Tensor | None], list[float]]:
    """Tensors and numbers of all parts: operators take lists of them."""
    return [t for part in parts for t in part[:5]], [float(number) for part in parts for number in part[5:]]


layer_product_op = torch.library.custom_op("niwaki::layer_product", layer_product, mutates_args=())


@layer_product_op.register_fake
def _(x_NI: Tensor, _tensors: object, _numbers: object, _bias_O: Tensor | None, rows: int) -> Tensor:
    """Shape and dtype of the product."""
    return x_NI.new_empty(len(x_NI), rows)


layer_decoded_op = torch.library.custom_op("niwaki::layer_decoded", layer_decoded, mutates_args=())


@layer_decoded_op.register_fake
def _(
    tensors: Sequence[Tensor], numbers: Sequence[float], _rows: int, first: int, last: int, dtype: torch.dtype
) -> Tensor:
    """Shape and dtype of the rows."""
    return _room(tensors[0], numbers, first, last, dtype)


def multiply(x_NI: Tensor, parts: Sequence[PlanePart], bias_O: Tensor | None, rows: int) -> Tensor:
    """`layer_product` of these parts, as an operator where a graph is traced."""
    product = layer_product_op if torch.compiler.is_compiling() else layer_product
    return product(x_NI, *_flat(parts), bias_O, rows)


def decode(parts: Sequence[PlanePart], rows: int, first: int, last: int, dtype: torch.dtype) -> Tensor:
    """`layer_decoded` of these parts, as an operator where a graph is traced."""
    decoded = layer_decoded_op if torch.compiler.is_compiling() else layer_decoded
    return decoded(*_flat(parts), rows, first, last, dtype)
