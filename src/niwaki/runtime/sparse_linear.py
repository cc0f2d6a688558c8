"""A linear layer that keeps a pruned matrix as its nonzeros.

A few tokens at a time (decoding) go through the kernels, which read the nonzeros as they are. Many tokens (a prompt)
are multiplied with the matrix decoded some rows at a time: on the CPU so that it never exists as a whole, on a GPU,
where one kernel decodes them, so that no more than `sparse_gpu.DECODED_BYTES` do.

On a GPU a bitmap has a table beside it (0.25 bit a weight), and with `fast_prompts` a two-four matrix also the form
that sparse tensor cores read, made at the first long prompt: as much memory again.

Legend: N tokens, O outputs, I inputs.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from niwaki.formats.record import read_sparse, record_shapes
from niwaki.formats.sparse import Sparse
from niwaki.formats.sparse_tiles import LAYOUT, Tiled
from niwaki.kernels.cpu_module import cpu_module
from niwaki.kernels.sparse_gpu import MIN_SEMI_TOKENS, gpu_record, multiply, semi_structured
from niwaki.kernels.sparse_product import (
    prepared_layer,
    prepared_tiles,
    product,
    reaches,
    sparse_product_op,
    tile_product_op,
)
from niwaki.kernels.types import GpuRecord
from niwaki.runtime.chunked_matmul import by_pieces


class SparseLinear(nn.Module):
    """y = x Wᵀ + b with W stored as the record that `described` tells of (see `sparse`)."""

    def __init__(self, rows: int, columns: int, described: Mapping[str, Any], bias: bool) -> None:
        super().__init__()
        self.out_features, self.in_features = rows, columns
        self.described = described
        for name, (dtype, shape) in record_shapes(described).items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype))  # integers: no cast of the model touches them
        self.bias = nn.Parameter(torch.empty(rows), requires_grad=False) if bias else None
        self.fast_prompts = False
        self._prepared: tuple[Tensor, Any] | None = None
        self._semi: tuple[torch.dtype, Any] | None = None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """What was prepared of the old tensors goes with them."""
        self._prepared = self._semi = None
        super()._load_from_state_dict(*args, **kwargs)

    def stored(self) -> dict[str, Tensor]:
        """The tensors of the matrix by their names in the file."""
        return {name: self.get_buffer(name) for name in record_shapes(self.described)}

    def record(self) -> Sparse | Tiled:
        """The matrix as it is stored."""
        return read_sparse(self.stored(), self.described)

    def weight_OI(self, dtype: torch.dtype) -> Tensor:
        """The matrix that the record stands for."""
        return self.record().decode().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] → [..., O] in the dtype of `x`."""
        x_NI = x.reshape(-1, self.in_features)
        if x_NI.is_cuda:
            y_NO = self._on_gpu(x_NI)
        else:
            tiles = self.described["sparse"]["layout"] == LAYOUT
            y_NO = self._few(x_NI) if reaches(x_NI, tiles) else self._many(x_NI)
            y_NO = y_NO if self.bias is None else y_NO + self.bias
        return y_NO.view(*x.shape[:-1], self.out_features)

    def _on_gpu(self, x_NI: Tensor) -> Tensor:
        record = self._layer()
        if self.fast_prompts and len(x_NI) >= MIN_SEMI_TOKENS:
            if self._semi is None or self._semi[0] != x_NI.dtype:
                self._semi = (x_NI.dtype, semi_structured(record, x_NI.dtype))
            if self._semi[1] is not None:
                return linear(x_NI, self._semi[1], None if self.bias is None else self.bias.to(x_NI.dtype))
        return multiply(x_NI, record, self.bias)

    def _few(self, x_NI: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            record = self.record()
            if isinstance(record, Tiled):
                tiled: Tensor = tile_product_op(x_NI, *record.tensors().values(), record.size, record.group)
                return tiled
            found: Tensor = sparse_product_op(
                x_NI, record.metadata_OB, record.values_N, record.starts_O, record.scale_OG,
                record.layout, record.values, record.group,
            )  # fmt: skip
            return found
        return product(self._layer(), x_NI, self.out_features)

    def _many(self, x_NI: Tensor) -> Tensor:
        layer = None if torch.compiler.is_compiling() or cpu_module() is None else self._layer()
        return by_pieces(x_NI, self.out_features, layer, lambda first, last: self.record().rows(first, last).decode())

    def _layer(self) -> Any:
        """What the kernels take, made anew when the buffers are others: just loaded, or moved."""
        values = self._buffers["values"]
        if self._prepared is None or self._prepared[0] is not values:
            record, self._semi = self.record(), None
            layer: Any
            if values is not None and values.is_cuda:
                layer = for_gpu(record)
            elif isinstance(record, Tiled):
                layer = prepared_tiles(
                    record.metadata_TBR, record.values_TFR, record.scale_GO, record.size, record.columns, record.group
                )
            else:
                layer = prepared_layer(
                    record.metadata_OB, record.values_N, record.starts_O, record.scale_OG,
                    record.columns, record.layout, record.values, record.group,
                )  # fmt: skip
            assert values is not None
            self._prepared = (values, layer)
        return self._prepared[1]

    def __getstate__(self) -> dict[str, Any]:
        """Copies prepare themselves."""
        return {**self.__dict__, "_prepared": None, "_semi": None}

    def extra_repr(self) -> str:
        """Shape, layout and values, as print shows them."""
        kind = self.described["sparse"]
        return f"{self.in_features} → {self.out_features}, {kind['layout']} of {kind['values']}"


def for_gpu(record: Sparse | Tiled) -> GpuRecord:
    """A record as the kernels of a GPU take it."""
    if isinstance(record, Tiled):
        tiles = record.metadata_TBR, record.values_TFR, None, record.scale_GO
        return gpu_record(record.size, record.columns, record.group, LAYOUT, "int4", *tiles)
    tensors = record.metadata_OB, record.values_N, record.starts_O, record.scale_OG
    return gpu_record(len(record.metadata_OB), record.columns, record.group, record.layout, record.values, *tensors)
