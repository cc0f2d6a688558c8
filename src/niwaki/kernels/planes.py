"""Products with matrices stored as bit planes: the kernels as torch operators, and when they are the way to go.

Legend: N tokens, O outputs, I inputs, C columns of a part, T tiles of 32 rows, K bits, B bytes of eight columns,
G groups of columns that share a scale.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from niwaki.kernels.codes import cpu_module

BLOCK_COLUMNS = 32  # columns that share a table's scale: groups of the CPU kernel hold whole blocks
FEW_TOKENS = 16  # beyond this many tokens, decoding the matrix once costs less than as many products


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
    if len(x_NI) > FEW_TOKENS:
        return False
    if x_NI.is_cuda:
        return group >= columns or group % 8 == 0
    return (group >= columns or group % BLOCK_COLUMNS == 0) and cpu_module() is not None


def prepared_product(part: PlanePart) -> Callable[[Any, Any, int, int], None]:
    """`plane_product` of this part on the CPU, as a function of input, output, threads and 0 for the best kernel.

    Input and output are NumPy views, as those of the part are, made here: they cross into C++ ten times as fast as
    tensors do.
    """
    compiled = cpu_module()
    assert compiled is not None, "callers ask `reaches` first"
    planes, scale, offset, zero, columns = (None if tensor is None else tensor.numpy() for tensor in part[:5])
    group_bytes = part.group // 8 if len(part.scale_GO) > 1 else max(part.planes_TKBR.shape[2], 1)
    return partial(compiled.plane_product, planes, scale, offset, zero, part.centre, group_bytes, columns, part.columns)


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
    prepared_product(part)(x_NI.detach().numpy(), out_NO.numpy(), torch.get_num_threads(), 0)


plane_product_op = torch.library.custom_op("niwaki::plane_product", plane_product, mutates_args={"out_NO"})


@plane_product_op.register_fake
def _(*_: object) -> None:
    """Nothing to trace: the output is given."""


def layer_product(
    x_NI: Tensor, tensors: Sequence[Tensor | None], numbers: Sequence[float], bias_O: Tensor | None, rows: int
) -> Tensor:
    """x Wᵀ + bias on a GPU, in one launch. Of one or two parts (`PlanePart.for_gpu`): five tensors, three numbers."""
    from niwaki.kernels.triton_planes import few_tokens

    parts = []
    for number in range(len(tensors) // 5):
        planes_TKBR, scale_GO, offset_GO, zero_GO, columns_8B = tensors[5 * number : 5 * number + 5]
        centre, columns, group = numbers[3 * number : 3 * number + 3]
        assert planes_TKBR is not None and scale_GO is not None
        parts.append(PlanePart(planes_TKBR, scale_GO, offset_GO, zero_GO, columns_8B, centre, int(columns), int(group)))
    out_NO = x_NI.new_empty(len(x_NI), rows)
    few_tokens(x_NI.contiguous(), parts, bias_O, out_NO)
    return out_NO


layer_product_op = torch.library.custom_op("niwaki::layer_product", layer_product, mutates_args=())


@layer_product_op.register_fake
def _(x_NI: Tensor, _tensors: object, _numbers: object, _bias_O: Tensor | None, rows: int) -> Tensor:
    """Shape and dtype of the product."""
    return x_NI.new_empty(len(x_NI), rows)


def multiply(x_NI: Tensor, parts: Sequence[PlanePart], bias_O: Tensor | None, rows: int) -> Tensor:
    """`layer_product` of these parts, as an operator where a graph is traced."""
    tensors = [t for part in parts for t in part[:5]]
    numbers = [float(number) for part in parts for number in part[5:]]
    product = layer_product_op if torch.compiler.is_compiling() else layer_product
    return product(x_NI, tensors, numbers, bias_O, rows)
