"""Linear layer that keeps a pruned matrix as its nonzeros.

Kernels multiply a few tokens (decode) and read the nonzeros directly. Many tokens (prefill) are multiplied with the
matrix decoded in chunks of rows. On the CPU a chunk fits in the cache (`chunked_matmul`). On a GPU one kernel decodes
up to `sparse_gpu.DECODED_BYTES`.

On a GPU a bitmap needs a table of 0.25 bit per weight. With `fast_prompts` a two-four matrix also gets the layout of
sparse tensor cores, made at the first long prompt, which takes the same memory again.

Legend: N tokens, O outputs, I inputs.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from niwaki.formats.descriptors import read_descriptor
from niwaki.formats.packed import read_sparse
from niwaki.formats.sparse import Sparse
from niwaki.formats.sparse_tiles import LAYOUT, Tiled
from niwaki.kernels.cpu_module import cpu_module
from niwaki.kernels.sparse_gpu import MIN_SEMI_TOKENS, gpu_record, multiply, semi_structured
from niwaki.kernels.sparse_product import prepared_layer, prepared_tiles, product, reaches
from niwaki.kernels.types import GpuRecord
from niwaki.runtime.chunked_matmul import multiply_in_chunks
from niwaki.runtime.linear import ReadableLinear


class SparseLinear(ReadableLinear):
    """Product y = x Wᵀ + b with W stored as the packed record that `described` describes (see `formats.sparse`)."""

    def __init__(
        self, rows: int, columns: int, described: Mapping[str, Any], bias: bool, name: str = "a packed matrix"
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = rows, columns
        self.described = described
        self.register(read_descriptor(name, described))
        self.bias = nn.Parameter(torch.empty(rows), requires_grad=False) if bias else None
        self.fast_prompts = False
        self._semi: tuple[torch.dtype, Any] | None = None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Drop what was made from the old tensors."""
        self._semi = None
        super()._load_from_state_dict(*args, **kwargs)

    def record(self) -> Sparse | Tiled:
        """Return the packed record of the matrix."""
        return read_sparse(self.stored(), self.described)

    def weight_OI(self, dtype: torch.dtype) -> Tensor:
        """Return the decoded matrix."""
        return self.record().decode().to(dtype)

    def cpu_product(self, x_NI: Tensor) -> Tensor:
        """Return x Wᵀ + b on the CPU: few tokens with the nonzeros, many with decoded rows."""
        if reaches(x_NI, self.described["sparse"]["layout"] == LAYOUT):
            y_NO = product(self._prepare(), x_NI, self.out_features)
        else:
            layer = None if cpu_module() is None else self._prepare()
            y_NO = multiply_in_chunks(
                x_NI, self.out_features, layer, lambda first, last: self.record().rows(first, last).decode()
            )
        return y_NO if self.bias is None else y_NO + self.bias

    def gpu_product(self, x_NI: Tensor) -> Tensor:
        """Return x Wᵀ + b on a GPU: long prompts on sparse tensor cores, if they are asked for and fit."""
        record = self._prepare()
        if self.fast_prompts and len(x_NI) >= MIN_SEMI_TOKENS:
            if self._semi is None or self._semi[0] != x_NI.dtype:
                self._semi = (x_NI.dtype, semi_structured(record, x_NI.dtype))
            if self._semi[1] is not None:
                return linear(x_NI, self._semi[1], None if self.bias is None else self.bias.to(x_NI.dtype))
        return multiply(x_NI, record, self.bias)

    def _prepare(self) -> Any:
        """Return the matrix for the kernels. Make it again if the buffers changed: after a load or a move."""
        values = self._buffers["values"]
        if self._prepared is None or self._prepared[0] is not values:
            self.check()
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
        """Return the state without what is prepared; copies prepare again."""
        return {**super().__getstate__(), "_semi": None}

    def extra_repr(self) -> str:
        """Return shape, layout and values for print."""
        kind = self.described["sparse"]
        return f"{self.in_features} → {self.out_features}, {kind['layout']} of {kind['values']}"


def for_gpu(record: Sparse | Tiled) -> GpuRecord:
    """Return a record in the form of the GPU kernels."""
    if isinstance(record, Tiled):
        tiles = record.metadata_TBR, record.values_TFR, None, record.scale_GO
        return gpu_record(record.size, record.columns, record.group, LAYOUT, "int4", *tiles)
    tensors = record.metadata_OB, record.values_N, record.starts_O, record.scale_OG
    return gpu_record(len(record.metadata_OB), record.columns, record.group, record.layout, record.values, *tensors)
