"""One tagged record per compressed matrix: how it is stored, decoded and counted.

Kinds so far: `dense` (every weight kept), `masked` (zeros stored in place, so that any engine loads it, or packed as
nonzeros, see `sparse`), `codes` (quantized columns, see `codes`) and `sliced` (rows or columns gone, see `structure`).

Legend: O outputs, I inputs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from niwaki.formats.quantized import QuantizedColumns, assemble, stored_tensors
from niwaki.formats.sparse import VALUES, Sparse
from niwaki.formats.sparse_tiles import Tiled

Kind = Literal["dense", "masked", "codes", "sliced"]


@dataclass(frozen=True)
class Packed:
    """A compressed matrix. `weight_OI` is what every consumer must see after decoding.

    `parts` is how `codes` are stored; `cut` the shape that is stored of a `sliced` matrix, whose other rows or columns
    are zero in `weight_OI`. `bias_O` is added to the bias beside the matrix.

    `note` tells what a reader of blocks.jsonl should know about how this record came to be; `detail` holds
    further fields of its line there.
    """

    kind: Kind
    weight_OI: Tensor
    note: str = ""
    detail: Mapping[str, Any] = field(default_factory=dict)
    parts: Sequence[QuantizedColumns] = ()
    cut: tuple[int, int] | None = None
    bias_O: Tensor | None = None

    @classmethod
    def codes(
        cls, parts: Sequence[QuantizedColumns], note: str = "", detail: Mapping[str, Any] | None = None
    ) -> "Packed":
        """Quantized columns; what is computed with is what is stored."""
        return cls("codes", assemble(parts), note, detail or {}, parts)

    @classmethod
    def masked(
        cls, weight_OI: Tensor, keep_OI: Tensor, note: str = "", detail: Mapping[str, Any] | None = None
    ) -> "Packed":
        """`weight_OI` with zeros where `keep_OI` is false."""
        return cls("masked", torch.where(keep_OI, weight_OI, weight_OI.new_zeros(())), note, detail or {})

    def after(self, earlier: "Packed") -> "Packed":
        """This record with what an earlier step of a chain had to say about the same matrix."""
        return replace(self, note=join_notes(earlier.note, self.note), detail={**earlier.detail, **self.detail})

    def decode(self, dtype: torch.dtype) -> Tensor:
        """The [O, I] matrix as a consumer computes with it."""
        return self.weight_OI.to(dtype)

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes this record takes in a file that stores unquantized values as `dtype`."""
        if self.parts:
            return sum(tensor.nbytes for tensor in self.tensors().values())
        return math.prod(self.cut or self.weight_OI.shape) * dtype.itemsize

    def pack(self, dtype: torch.dtype, how: str) -> "Stored | None":
        """What is stored instead of the matrix in `dtype`; None if that is the best there is.

        `how`: `codes` packs codes alone, `auto` takes whatever is smallest, nonzeros too.
        """
        found = [Stored(self.tensors(), self.describe())] if self.parts else []
        record = self._sparse(dtype) if how == "auto" else None
        if record is not None:
            found.append(Stored(record.tensors(), record.describe()))
        best = min(found, key=lambda stored: stored.nbytes, default=None)
        return best if self.parts or (best is not None and best.nbytes < self.nbytes(dtype)) else None

    def _sparse(self, dtype: torch.dtype) -> Sparse | Tiled | None:
        if len(self.parts) == 1:
            part = self.parts[0]
            if float((part.code_OC == 2 ** (part.bits - 1)).float().mean()) * part.bits <= 1:
                return None  # a bit for every weight takes more than the zeros do
            record = Sparse.encode_codes(part)
            return record if record is None else Tiled.encode(record) or record
        whole = self.kind == "masked" and self.cut is None and dtype in VALUES.values()
        return Sparse.encode(self.weight_OI, dtype) if whole else None

    def describe(self) -> dict[str, Any]:
        """What a loader needs to read the tensors of a record of codes."""
        return {"shape": list(self.weight_OI.shape), "parts": [part.describe() for part in self.parts]}

    def tensors(self) -> dict[str, Tensor]:
        """What a record of codes stores, by name."""
        return stored_tensors(self.parts, self.weight_OI.shape[1])


@dataclass(frozen=True)
class Stored:
    """What a packed record puts into the file, by name, and what a loader needs to read it."""

    tensors: Mapping[str, Tensor]
    about: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def method_bits(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """{"method_bits": the mean over the weights of all lines of blocks.jsonl that count bits of their own}, or {}.

    Baselines without a packed format write decoded weights, and count what a file of theirs would have to hold.
    """
    counted = [line for line in lines if "method_bytes" in line]
    if not counted:
        return {}
    weights = sum(math.prod(line["shape"]) for line in counted)
    return {"method_bits": round(8 * sum(line["method_bytes"] for line in counted) / weights, 4)}


def join_notes(*notes: str) -> str:
    """The notes that say something, each once."""
    return "; ".join(dict.fromkeys(filter(None, notes)))
