"""A linear layer that keeps its weights as codes.

Legend: N tokens, O outputs, I inputs.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.codes import assemble, read_parts


class PackedLinear(nn.Module):
    """y = x Wᵀ + b with W stored as the parts that `described` lists (see `codes`)."""

    def __init__(self, rows: int, columns: int, described: Mapping[str, Any], bias: bool) -> None:
        super().__init__()
        self.out_features, self.in_features = rows, columns
        self.described = described["parts"]
        for number, about in enumerate(self.described):
            width = about["columns"]
            groups = -(-width // about["group"])
            self._store(f"planes_{number}", torch.uint8, about["bits"], rows, -(-width // 8))
            self._store(f"scale_{number}", torch.int16, rows, groups)
            if about["grid"] == "free":
                self._store(f"offset_{number}", torch.int16, rows, groups)
            if about["grid"] == "affine":
                self._store(f"zero_{number}", torch.uint8, about["bits"], 1, -(-rows * groups // 8))
        if len(self.described) > 1:
            self._store("columns", torch.uint8, -(-columns // 8))
        self.bias = nn.Parameter(torch.empty(rows), requires_grad=False) if bias else None

    def _store(self, name: str, dtype: torch.dtype, *shape: int) -> None:
        # Buffers: integers are no parameters, and no cast of the model touches them.
        self.register_buffer(name, torch.empty(shape, dtype=dtype))

    def weight_OI(self, dtype: torch.dtype) -> Tensor:
        """The matrix that the codes stand for."""
        return assemble(read_parts(dict(self.named_buffers()), self.described, self.in_features)).to(dtype)

    def forward(self, x_NI: Tensor) -> Tensor:
        """[..., I] → [..., O]; one matrix is decoded at a time and dropped again."""
        return nn.functional.linear(x_NI, self.weight_OI(x_NI.dtype), self.bias)

    def extra_repr(self) -> str:
        """Shape and widths, as print shows them."""
        widths = " + ".join(f"{about['columns']}×{about['bits']} bit" for about in self.described)
        return f"{self.in_features} → {self.out_features}, {widths}"
