"""Products with matrices stored as bit planes: the compiled kernel as a torch operator, and when it is the way to go.

Legend: N tokens, O outputs, I inputs, C columns of a part, G groups of columns that share a scale.
"""

from typing import Any

import torch
from torch import Tensor

from niwaki.kernels.codes import cpu_module

BLOCK_COLUMNS = 32  # columns that share a table's scale: groups of the CPU kernel hold whole blocks
FEW_TOKENS = 16  # beyond this many tokens, decoding the matrix once costs less than as many products


def reaches(x_NI: Tensor, group: int, columns: int) -> bool:
    """Whether a compiled kernel takes this product: few tokens on the CPU, groups of whole blocks."""
    if x_NI.is_cuda or len(x_NI) > FEW_TOKENS:
        return False
    return (group >= columns or group % BLOCK_COLUMNS == 0) and cpu_module() is not None


def add_plane_product(
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
    compiled = cpu_module()
    assert compiled is not None, "callers ask `reaches` first"
    width = planes_TKBR.shape[2]
    compiled.plane_product(
        planes_TKBR,
        scale_GO,
        offset_GO,
        zero_GO,
        centre,
        group // 8 if len(scale_GO) > 1 else max(width, 1),
        columns_C,
        columns,
        x_NI,
        out_NO,
        torch.get_num_threads(),
        False,
    )


plane_product_op = torch.library.custom_op("niwaki::plane_product", add_plane_product, mutates_args={"out_NO"})


@plane_product_op.register_fake
def _(*_: object) -> None:
    """Nothing to trace: the output is given."""


def plane_product(*arguments: Any) -> None:
    """`add_plane_product`, as an operator where a graph is traced; called directly it costs less."""
    (plane_product_op if torch.compiler.is_compiling() else add_plane_product)(*arguments)
