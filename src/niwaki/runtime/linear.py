"""Linear layer that keeps its weights as codes.

Kernels multiply a few tokens (decode) and read the codes directly. Many tokens (prefill) are multiplied with the matrix
decoded in chunks of rows. On the CPU a chunk fits in the cache (`chunked_matmul`). On a GPU one kernel decodes up to
`DECODED_BYTES`.

Legend: N tokens, O outputs, I inputs, C columns of a part.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from niwaki.formats.descriptors import read_descriptor
from niwaki.formats.quantized import TILE, assemble, centre, pack_codes, part_columns, read_parts, unpack_codes
from niwaki.kernels.cpu_module import cpu_module
from niwaki.kernels.planes import (
    cpu_product,
    decode,
    decoding_pays,
    multiply,
    prepared_layer,
    reaches,
)
from niwaki.kernels.types import PlanePart
from niwaki.runtime.chunked_matmul import multiply_in_chunks
from niwaki.runtime.stored import StoredMatrix, stored_product_op

# Of rows decoded on a GPU. Most matrices (8192² in bf16) are one product; several products need a copy to join.
DECODED_BYTES = 128 * 2**20


class _Prepared(NamedTuple):
    """Parts of a matrix in the form of the kernels, on the CPU also as one `layer`. `planes_TKBR` is their source.

    `order_I` is `PackedLinear._order` on a GPU.
    """

    planes_TKBR: Tensor | None
    parts: list[PlanePart]
    layer: Any
    order_I: Tensor | None


class ReadableLinear(StoredMatrix):
    """Linear layer whose matrix is stored packed, with a `weight` for code of a model that reads it.

    Some families multiply with the weight of a layer themselves, look at its dtype, or initialize it while they load.
    """

    out_features: int
    in_features: int
    bias: nn.Parameter | None

    def __init__(self) -> None:
        super().__init__()
        # It follows casts of the model, and gives the decoded matrix its dtype.
        self.register_buffer("_like", torch.empty(0), persistent=False)

    @property
    def weight(self) -> Tensor:
        """Return a decoded copy of the matrix. Writing into it changes nothing."""
        like = self.get_buffer("_like")
        if next(iter(self.stored().values())).is_meta:
            return torch.empty(self.out_features, self.in_features, dtype=like.dtype, device="meta")
        return self.weight_OI(like.dtype)

    def weight_OI(self, dtype: torch.dtype) -> Tensor:
        """Return the decoded matrix."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Multiply: [..., I] → [..., O] in the dtype of `x`."""
        x_NI = x.reshape(-1, self.in_features)
        if x_NI.is_cuda:
            y_NO = self.gpu_product(x_NI)
        elif torch.compiler.is_compiling():
            y_NO = stored_product_op(x_NI, self._ticket, self.out_features)
        else:
            y_NO = self.cpu_product(x_NI)
        return y_NO.view(*x.shape[:-1], self.out_features)

    def gpu_product(self, x_NI: Tensor) -> Tensor:
        """Return x Wᵀ + b on a GPU, [N, O] in the dtype of `x_NI`."""
        raise NotImplementedError

    def multiply_decoded(self, x_NI: Tensor, step: int, decoded: Callable[[int, int], Tensor]) -> Tensor:
        """Multiply with `step` decoded rows at a time; `decoded(first, last)` returns rows in the dtype of `x_NI`."""
        outputs = []
        for first in range(0, self.out_features, step):
            last = min(first + step, self.out_features)
            bias = None if self.bias is None else self.bias[first:last].to(x_NI.dtype)
            outputs.append(linear(x_NI, decoded(first, last), bias))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


class PackedLinear(ReadableLinear):
    """Product y = x Wᵀ + b with W stored as the parts that `described` lists (see `formats.quantized`).

    An LM head that is tied to packed embeddings has them as `owner`. It reads their tensors, which the file holds once.
    """

    _prepared: "_Prepared | None"

    def __init__(
        self,
        rows: int,
        columns: int,
        described: Mapping[str, Any],
        bias: bool,
        owner: StoredMatrix | None = None,
        name: str = "a packed matrix",
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = rows, columns
        self.described = described["parts"]
        self._owner = () if owner is None else (owner,)  # in a tuple: torch does not register it as a submodule
        if owner is None:
            self.register(read_descriptor(name, {"shape": [rows, columns], **described}))
        else:
            self.descriptor, self._names, self._checked, self._prepared = owner.descriptor, owner._names, None, None
        self.bias = nn.Parameter(torch.empty(rows), requires_grad=False) if bias else None

    def stored(self) -> dict[str, Tensor]:
        """Return the tensors of the matrix by their names in the file."""
        return self._owner[0].stored() if self._owner else super().stored()

    def check(self) -> None:
        """Raise CheckpointError if the tensors are not what their format allows; the owner checks its own."""
        if self._owner:
            self._owner[0].check()
        else:
            super().check()

    def weight_OI(self, dtype: torch.dtype) -> Tensor:
        """Return the decoded matrix."""
        return assemble(read_parts(self.stored(), self.described, self.in_features)).to(dtype)

    def cpu_product(self, x_NI: Tensor) -> Tensor:
        """Return x Wᵀ + b on the CPU: few tokens with the codes and float32 sums over the parts, many decoded."""
        if self._few(x_NI) and not decoding_pays(x_NI, self.described):
            y_NO = cpu_product(self._prepare().layer, x_NI, self.out_features)
        else:
            y_NO = multiply_in_chunks(x_NI, self.out_features, self._prepare().layer, self._rows)
        return y_NO if self.bias is None else y_NO + self.bias

    def _few(self, x_NI: Tensor) -> bool:
        return all(reaches(x_NI, about["group"], about["columns"]) for about in self.described)

    def gpu_product(self, x_NI: Tensor) -> Tensor:
        """Return x Wᵀ + b on a GPU: few tokens by one kernel with float32 sums over the parts, many decoded."""
        if self._few(x_NI):
            return multiply(x_NI, self._prepare().parts, self.bias, self.out_features)
        return self._decoded_product(x_NI)

    def _decoded_product(self, x_NI: Tensor) -> Tensor:
        """Multiply on a GPU: one kernel decodes at most `DECODED_BYTES` of rows per product."""
        prepared, rows = self._prepare(), self.out_features
        x_NI = x_NI if prepared.order_I is None else x_NI[:, prepared.order_I]
        tiles = -(-rows // TILE)
        max_tiles = max(DECODED_BYTES // (TILE * self.in_features * x_NI.element_size()), 1)
        step = TILE * -(-tiles // -(-tiles // max_tiles))  # rows per product, about equal
        return self.multiply_decoded(
            x_NI, step, lambda first, last: decode(prepared.parts, rows, first, last, x_NI.dtype)
        )

    def _whole_bytes(self) -> bool:
        return all(about["group"] >= about["columns"] or about["group"] % 8 == 0 for about in self.described)

    def _rows(self, first: int, last: int) -> Tensor:
        """Return rows [first, last) of the matrix in float32; `first` begins a tile."""
        picked: dict[str, Tensor] = {}
        for name, stored in self.stored().items():
            if name.startswith("planes"):
                picked[name] = stored[first // TILE : -(-last // TILE)]
            elif name.startswith(("scale", "offset")):
                picked[name] = stored[:, first:last]
            elif name == "columns":
                picked[name] = stored
        for number, (part, about) in enumerate(zip(self._prepare().parts, self.described, strict=True)):
            if part.zero_GO is not None:
                picked[f"zero_{number}"] = pack_codes(part.zero_GO[:, first:last], about["bits"])
        return assemble(read_parts(picked, self.described, self.in_features))

    def _prepare(self) -> _Prepared:
        """Return the parts for the kernels. Make them again if the buffers changed: after a load or a move."""
        planes_TKBR = (self._owner[0] if self._owner else self)._buffers["planes_0"]
        if self._prepared is None or self._prepared.planes_TKBR is not planes_TKBR:
            self.check()
            parts = [self._part(number, about) for number, about in enumerate(self.described)]
            on_gpu = parts[0].planes_TKBR.is_cuda
            # Without groups of whole bytes, torch decodes the matrix.
            compiled = not on_gpu and self._whole_bytes() and cpu_module() is not None
            layer = prepared_layer(parts, self.out_features, self.in_features) if compiled else None
            self._prepared = _Prepared(planes_TKBR, parts, layer, self._order() if on_gpu else None)
        return self._prepared

    def _order(self) -> Tensor | None:
        """Return the inputs of the columns of all parts, side by side; None: all, in order."""
        if len(self.described) == 1:
            return None
        return torch.cat(part_columns(self.stored(), self.described, self.in_features))

    def _part(self, number: int, about: Mapping[str, Any]) -> PlanePart:
        buffers = self.stored()
        scale_GO, zero = buffers[f"scale_{number}"], buffers.get(f"zero_{number}")
        mixed = len(self.described) > 1
        columns_C = part_columns(buffers, self.described, self.in_features)[number].int() if mixed else None
        part = PlanePart(
            buffers[f"planes_{number}"],
            scale_GO,
            buffers.get(f"offset_{number}"),
            None if zero is None else unpack_codes(zero, scale_GO.numel()).view(scale_GO.shape),
            columns_C,
            0.0 if about["grid"] in ("free", "affine") else centre(about["bits"], about["grid"]),
            about["columns"],
            about["group"],
        )
        return part.for_gpu() if scale_GO.is_cuda else part

    def extra_repr(self) -> str:
        """Return shape and widths for print."""
        widths = " + ".join(f"{about['columns']}×{about['bits']} bit" for about in self.described)
        return f"{self.in_features} → {self.out_features}, {widths}"
