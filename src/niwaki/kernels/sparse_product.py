"""Products with matrices stored as nonzeros: the CPU kernels, and the limits of their use.

Legend: N tokens, O outputs, I inputs, B bytes of eight columns, G groups of columns that share a scale.
"""

from typing import Any

import torch
from torch import Tensor

from niwaki.formats.sparse import KINDS, LAYOUTS
from niwaki.kernels.cpu_module import AVX2, BEST, BF16, as_array, cpu_module

# With more tokens, decoding the matrix and a torch product take less time than the kernels. Two threads, 4096 × 2048 in
# float32: 16 tokens 2.4 to 2.8 ms by the kernel and 3.0 to 3.3 decoded, 32 tokens 4.8 to 5.5 and 4.9; tiles always win.
MAX_FLOAT_TOKENS = 16
# In bfloat16 torch is slow without BF16 instructions (0.53 ms per token of 1024 × 2048, the kernel 0.19). With them,
# 8192 × 2048: 8 tokens 1.3 to 1.9 ms by the kernel and 1.8 decoded, 16 tokens 2.7 and 2.1, 64 by tiles 7.2 and 8.
MAX_BF16_TOKENS, MAX_BF16_TILE_TOKENS = 8, 64
CHUNK_TOKENS = 64  # per call: the inputs stay in the cache while the rows pass


def fast_path() -> bool:
    """Return whether this processor multiplies nonzeros faster than it decodes them."""
    compiled = cpu_module()
    return compiled is not None and bool(compiled.supported(AVX2))


def reaches(x_NI: Tensor, tiles: bool = False) -> bool:
    """Return whether the CPU kernels take this product: as long as they are faster than torch for its tokens."""
    compiled = cpu_module()
    if x_NI.is_cuda or compiled is None:
        return False
    if x_NI.dtype == torch.bfloat16 and fast_path():
        max_tokens = MAX_BF16_TILE_TOKENS if tiles else MAX_BF16_TOKENS
        return len(x_NI) <= max_tokens or not compiled.supported(BF16)
    return len(x_NI) <= MAX_FLOAT_TOKENS or (tiles and fast_path())


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
    """Return the tensors of `sparse.Sparse` as one object of the compiled kernels, for `product`."""
    compiled = cpu_module()
    assert compiled is not None, "callers check `reaches` first"
    tensors = [as_array(t) for t in (places_OB, values, starts_O, scale_OG)]
    whole = scale_OG is None or scale_OG.shape[1] == 1
    group_bytes = max(places_OB.shape[1], 1) if whole else group // 8
    return compiled.SparseLayer(columns, LAYOUTS.index(layout), KINDS.index(kind), *tensors, group_bytes)


def prepared_tiles(
    places_TBR: Tensor, values_TFR: Tensor, scale_GO: Tensor, rows: int, columns: int, group: int
) -> Any:
    """Return the tensors of `sparse_tiles.Tiled` as one object of the compiled kernels, for `product`."""
    compiled = cpu_module()
    assert compiled is not None, "callers check `reaches` first"
    tensors = [as_array(t) for t in (places_TBR, values_TFR, scale_GO)]
    return compiled.TileLayer(rows, columns, group, *tensors)


def product(layer: Any, x_NI: Tensor, rows: int, path: int = BEST) -> Tensor:
    """Return x Wᵀ in the dtype of `x_NI`, with sums in float32. Only addresses go to C++."""
    given_NI = (x_NI if x_NI.dtype in (torch.float32, torch.bfloat16) else x_NI.float()).contiguous()
    out_NO = given_NI.new_empty(len(given_NI), rows)
    narrow, threads = given_NI.dtype == torch.bfloat16, torch.get_num_threads()
    for some_NI, some_NO in zip(given_NI.split(CHUNK_TOKENS), out_NO.split(CHUNK_TOKENS), strict=True):
        layer.multiply(some_NI.data_ptr(), some_NO.data_ptr(), len(some_NI), narrow, threads, path)
    return out_NO.to(x_NI.dtype)
