"""Products with matrices stored as nonzeros: the CPU kernels as a torch operator, and when they are the way to go.

Legend: N tokens, O outputs, I inputs, B bytes of eight columns, G groups of columns that share a scale.
"""

from typing import Any

import torch
from torch import Tensor

from niwaki.kernels.codes import cpu_module

# As in niwaki.formats.sparse, which stands above the kernels.
LAYOUTS = ("bitmap", "two_four")
KINDS = ("bfloat16", "float16", "float32", "int8", "int4")
BEST, AVX2, BF16 = 0, 2, 4  # paths of the compiled kernels
# Beyond so many tokens decoding a matrix and a product of torch take less than the kernels. Measured, two threads,
# 4096 × 2048 in float32: 16 tokens 2.4 to 2.8 ms by the kernel and 3.0 to 3.3 decoded, 32 tokens 4.8 to 5.5 and 4.9;
# by tiles always less. In bfloat16 torch is slow (0.53 ms a token of 1024 × 2048, the kernel 0.19) but where the
# processor has instructions for it, 8192 × 2048: 8 tokens 1.3 to 1.9 and 1.8, 16 tokens 2.7 and 2.1, 64 by tiles 7.2
# and 8.
FEW_TOKENS = 16
FEW_TOKENS_BF16, FEW_TOKENS_TILES = 8, 64
PIECE_TOKENS = 64  # at a time: their inputs stay in the cache while the rows pass


def fast_path() -> bool:
    """Whether this processor multiplies nonzeros faster than it could decode them."""
    compiled = cpu_module()
    return compiled is not None and bool(compiled.supported(AVX2))


def reaches(x_NI: Tensor, tiles: bool = False) -> bool:
    """Whether the kernels take this product: on a CPU, of as many tokens as they are faster for than torch."""
    compiled = cpu_module()
    if x_NI.is_cuda or compiled is None:
        return False
    if x_NI.dtype == torch.bfloat16 and fast_path():
        few = FEW_TOKENS_TILES if tiles else FEW_TOKENS_BF16
        return len(x_NI) <= few or not compiled.supported(BF16)
    return len(x_NI) <= FEW_TOKENS or (tiles and fast_path())


def prepared_layer(
    places_OB: Tensor,
    values: Tensor,
    starts_O: Tensor | None,
    scale_OG: Tensor | None,
    columns: int,
    layout: str,
    kind: str,
    group: int,
) -> Any:
    """One object of the compiled kernels for the tensors of `sparse.Sparse`, for `product`."""
    compiled = cpu_module()
    assert compiled is not None, "callers ask `reaches` first"
    tensors = [None if t is None else t.numpy() for t in (places_OB, values, starts_O, scale_OG)]
    whole = scale_OG is None or scale_OG.shape[1] == 1
    group_bytes = max(places_OB.shape[1], 1) if whole else group // 8
    return compiled.SparseLayer(columns, LAYOUTS.index(layout), KINDS.index(kind), *tensors, group_bytes)


def prepared_tiles(
    places_TBR: Tensor, values_TFR: Tensor, scale_GO: Tensor, rows: int, columns: int, group: int
) -> Any:
    """The same for the tensors of `sparse_tiles.Tiled`."""
    compiled = cpu_module()
    assert compiled is not None, "callers ask `reaches` first"
    return compiled.TileLayer(rows, columns, group, places_TBR.numpy(), values_TFR.numpy(), scale_GO.numpy())


def product(layer: Any, x_NI: Tensor, rows: int, path: int = BEST) -> Tensor:
    """x Wᵀ in the dtype of `x_NI`, sums in float32. Only addresses cross into C++."""
    given_NI = (x_NI if x_NI.dtype in (torch.float32, torch.bfloat16) else x_NI.float()).contiguous()
    out_NO = given_NI.new_empty(len(given_NI), rows)
    narrow, threads = given_NI.dtype == torch.bfloat16, torch.get_num_threads()
    for some_NI, some_NO in zip(given_NI.split(PIECE_TOKENS), out_NO.split(PIECE_TOKENS), strict=True):
        layer.multiply(some_NI.data_ptr(), some_NO.data_ptr(), len(some_NI), narrow, threads, path)
    return out_NO.to(x_NI.dtype)


def sparse_product(
    x_NI: Tensor,
    places_OB: Tensor,
    values: Tensor,
    starts_O: Tensor | None,
    scale_OG: Tensor | None,
    layout: str,
    kind: str,
    group: int,
) -> Tensor:
    """`product` from the tensors themselves: what a traced graph holds."""
    layer = prepared_layer(places_OB, values, starts_O, scale_OG, x_NI.shape[1], layout, kind, group)
    return product(layer, x_NI.detach(), len(places_OB))


sparse_product_op = torch.library.custom_op("niwaki::sparse_product", sparse_product, mutates_args=())


@sparse_product_op.register_fake
def _(x_NI: Tensor, places_OB: Tensor, *_: object) -> Tensor:
    """Shape and dtype of the product."""
    return x_NI.new_empty(len(x_NI), len(places_OB))


def tile_product(
    x_NI: Tensor, places_TBR: Tensor, values_TFR: Tensor, scale_GO: Tensor, rows: int, group: int
) -> Tensor:
    """`product` from the tensors of tiles."""
    layer = prepared_tiles(places_TBR, values_TFR, scale_GO, rows, x_NI.shape[1], group)
    return product(layer, x_NI.detach(), rows)


tile_product_op = torch.library.custom_op("niwaki::tile_product", tile_product, mutates_args=())


@tile_product_op.register_fake
def _(x_NI: Tensor, _places: Tensor, _values: Tensor, _scale: Tensor, rows: int, _group: int) -> Tensor:
    """Shape and dtype of the product."""
    return x_NI.new_empty(len(x_NI), rows)
