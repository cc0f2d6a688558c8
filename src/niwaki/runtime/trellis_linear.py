"""Linear layer that keeps a matrix that a trellis codes (see `formats.trellis`).

Kernels multiply a few tokens (decode) and read the rings directly. Many tokens (prefill) are multiplied with the matrix
decoded in chunks of rows, as in `linear`.

Legend: N tokens, O outputs, I inputs.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.formats.descriptors import read_descriptor
from niwaki.formats.trellis import RING, assemble_trellis, read_trellis, trellis_columns
from niwaki.kernels.cpu_module import cpu_module
from niwaki.kernels.trellis import MAX_CPU_TOKENS, MAX_GPU_TOKENS, cpu_product, decode, multiply, prepared_layer
from niwaki.kernels.types import TrellisPart
from niwaki.runtime.chunked_matmul import multiply_in_chunks
from niwaki.runtime.linear import DECODED_BYTES, PackedLinear, ReadableLinear
from niwaki.runtime.sparse_linear import SparseLinear


class TrellisLinear(ReadableLinear):
    """Product y = x Wᵀ + b with W stored as the trellis-coded columns that `described` lists."""

    def __init__(
        self, rows: int, columns: int, described: Mapping[str, Any], bias: bool, name: str = "a packed matrix"
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = rows, columns
        self.described = described["trellis"]
        self.register(read_descriptor(name, {"shape": [rows, columns], **described}))
        self.bias = nn.Parameter(torch.empty(rows), requires_grad=False) if bias else None

    def weight_OI(self, dtype: torch.dtype) -> Tensor:
        """Return the decoded matrix."""
        return assemble_trellis(read_trellis(self.stored(), self.described, self.in_features)).to(dtype)

    def cpu_product(self, x_NI: Tensor) -> Tensor:
        """Return x Wᵀ + b on the CPU: few tokens with the rings, many with decoded rows."""
        _, layer = self._prepare()
        if layer is not None and len(x_NI) <= MAX_CPU_TOKENS:
            y_NO = cpu_product(layer, x_NI, self.out_features)
        else:
            y_NO = multiply_in_chunks(x_NI, self.out_features, layer, self._rows)
        return y_NO if self.bias is None else y_NO + self.bias

    def gpu_product(self, x_NI: Tensor) -> Tensor:
        """Return x Wᵀ + b on a GPU: many tokens with at most `DECODED_BYTES` of decoded rows per product."""
        parts, _ = self._prepare()
        rows = self.out_features
        if len(x_NI) <= MAX_GPU_TOKENS:
            return multiply(x_NI, parts, self.bias, rows)
        if len(parts) > 1:
            x_NI = x_NI[:, torch.cat([part.columns_C for part in parts if part.columns_C is not None])]
        step = max(DECODED_BYTES // (RING * self.in_features * x_NI.element_size()), 1) * RING
        return self.multiply_decoded(x_NI, step, lambda first, last: decode(parts, rows, first, last, x_NI.dtype))

    def _rows(self, first: int, last: int) -> Tensor:
        """Return rows [first, last) of the matrix in float32; `first` begins a tile."""
        picked = {}
        for name, stored in self.stored().items():
            if name.startswith("rings"):
                picked[name] = stored[first // RING : -(-last // RING)]
            else:
                picked[name] = stored[:, first:last] if name.startswith("scale") else stored
        return assemble_trellis(read_trellis(picked, self.described, self.in_features))

    def _prepare(self) -> tuple[list[TrellisPart], Any]:
        """Return the parts for the kernels, on the CPU also as one layer. Make them again after a load or a move."""
        rings_TCB = self._buffers["rings_0"]
        if self._prepared is None or self._prepared[0] is not rings_TCB:
            self.check()
            stored, count = self.stored(), len(self.described)
            columns = trellis_columns(stored, count, self.in_features)
            parts = [
                TrellisPart(
                    stored[f"rings_{number}"],
                    stored[f"levels_{number}"],
                    stored[f"scale_{number}"][0],
                    columns[number].int() if count > 1 else None,
                )
                for number in range(count)
            ]
            compiled = not parts[0].rings_TCB.is_cuda and cpu_module() is not None
            layer = prepared_layer(parts, self.out_features, self.in_features) if compiled else None
            self._prepared = rings_TCB, parts, layer
        return self._prepared[1], self._prepared[2]

    def extra_repr(self) -> str:
        """Return shape and widths for print."""
        widths = " + ".join(f"{about['columns']}×{about['bits']} bit" for about in self.described)
        return f"{self.in_features} → {self.out_features}, trellis of {widths}"


def packed_class(description: Mapping[str, Any]) -> type[PackedLinear | SparseLinear | TrellisLinear]:
    """Return the layer that multiplies with a packed matrix of this description."""
    if "trellis" in description:
        return TrellisLinear
    return SparseLinear if "sparse" in description else PackedLinear
