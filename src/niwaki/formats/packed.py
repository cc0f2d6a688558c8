"""Records of compressed matrices: how each is encoded, decoded and counted.

The result of a method for one matrix, in memory, is a `Packed`. It has a kind:

- `dense`: every weight is kept
- `masked`: zeros in place, or packed as nonzeros (see `sparse`)
- `codes`: quantized columns (see `quantized`), or columns coded by a trellis (see `trellis`)
- `sliced`: rows or columns are removed (see `niwaki.model.prunable`)

The form of a packed matrix in a file is a `PackedTensors`. A matrix without one is stored as a plain weight.

    packed = record.pack(torch.bfloat16, "auto")
    weight_OI = decode_record(packed.tensors, packed.description)

Legend: O outputs, I inputs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from niwaki.errors import CheckpointError
from niwaki.formats.descriptors import RECORD_NAMES, read_descriptor
from niwaki.formats.quantized import WEIGHT, QuantizedColumns, assemble, read_parts, stored_tensors
from niwaki.formats.sparse import VALUES, Sparse
from niwaki.formats.sparse_tiles import LAYOUT, Tiled
from niwaki.formats.trellis import TrellisColumns, assemble_trellis, read_trellis, stored_trellis

Kind = Literal["dense", "masked", "codes", "sliced"]
Packing = Literal["auto", "codes", "none"]


@dataclass(frozen=True)
class PackedTensors:
    """Form of a packed matrix in a file: its tensors by name, and the description that a loader needs."""

    tensors: Mapping[str, Tensor]
    description: Mapping[str, Any]

    @classmethod
    def of_codes(cls, parts: Sequence[QuantizedColumns], shape: Sequence[int]) -> "PackedTensors":
        """Return quantized columns of a matrix of `shape` [O, I] as they are stored."""
        description = {"shape": list(shape), "parts": [part.describe() for part in parts]}
        return cls(stored_tensors(parts, shape[1]), description)

    @classmethod
    def of_trellis(cls, parts: Sequence[TrellisColumns], shape: Sequence[int]) -> "PackedTensors":
        """Return trellis-coded columns of a matrix of `shape` [O, I] as they are stored."""
        description = {"shape": list(shape), "trellis": [part.describe() for part in parts]}
        return cls(stored_trellis(parts, shape[1]), description)

    @classmethod
    def of_nonzeros(cls, record: Sparse | Tiled) -> "PackedTensors":
        """Return nonzeros as they are stored."""
        return cls(record.tensors(), record.describe())

    @property
    def nbytes(self) -> int:
        """Return the bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True)
class Packed:
    """A compressed matrix. `weight_OI` is the matrix that every consumer must see after decoding.

    The quantized columns of `codes` are `parts`, or `trellis` if a trellis codes them. The stored shape of a `sliced`
    matrix is `cut`; its removed rows or columns are zero in `weight_OI`. The bias beside the matrix grows by `bias_O`.

    A remark for readers of blocks.jsonl is `note`. Further fields of the line of the matrix there are `detail`.
    """

    kind: Kind
    weight_OI: Tensor
    note: str = ""
    detail: Mapping[str, Any] = field(default_factory=dict)
    parts: Sequence[QuantizedColumns] = ()
    trellis: Sequence[TrellisColumns] = ()
    cut: tuple[int, int] | None = None
    bias_O: Tensor | None = None

    @classmethod
    def codes(
        cls, parts: Sequence[QuantizedColumns], note: str = "", detail: Mapping[str, Any] | None = None
    ) -> "Packed":
        """Return a record of quantized columns; the stored codes are also what computes."""
        return cls("codes", assemble(parts), note, detail or {}, parts)

    @classmethod
    def of_trellis(
        cls, parts: Sequence[TrellisColumns], note: str = "", detail: Mapping[str, Any] | None = None
    ) -> "Packed":
        """Return a record of trellis-coded columns."""
        return cls("codes", assemble_trellis(parts), note, detail or {}, trellis=parts)

    @classmethod
    def masked(
        cls, weight_OI: Tensor, keep_OI: Tensor, note: str = "", detail: Mapping[str, Any] | None = None
    ) -> "Packed":
        """Return a record of `weight_OI` with zeros where `keep_OI` is false."""
        return cls("masked", torch.where(keep_OI, weight_OI, weight_OI.new_zeros(())), note, detail or {})

    def after(self, earlier: "Packed") -> "Packed":
        """Return this record with the note and the detail of an earlier step of a chain."""
        return replace(self, note=join_notes(earlier.note, self.note), detail={**earlier.detail, **self.detail})

    @property
    def coded(self) -> bool:
        """Return whether the matrix has codes to store."""
        return bool(self.parts or self.trellis)

    @property
    def shape(self) -> tuple[int, int]:
        """Return the stored shape [O, I], without removed rows and columns."""
        rows, columns = self.cut or self.weight_OI.shape
        return rows, columns

    def decode(self, dtype: torch.dtype) -> Tensor:
        """Return the [O, I] matrix as a consumer computes with it."""
        return self.weight_OI.to(dtype)

    def plain_nbytes(self, dtype: torch.dtype) -> int:
        """Return the bytes of the matrix as a plain weight of `dtype`."""
        return math.prod(self.shape) * dtype.itemsize

    def nbytes(self, dtype: torch.dtype) -> int:
        """Return the bytes of this record in a file that stores unquantized values as `dtype`."""
        return self.packed_codes().nbytes if self.coded else self.plain_nbytes(dtype)

    def pack(self, dtype: torch.dtype, packing: Packing) -> PackedTensors | None:
        """Return the packed form of the matrix, None if it is stored as a plain weight of `dtype`.

        `packing`: `codes` packs codes only, `auto` takes the smallest form, nonzeros too, `none` packs nothing.
        """
        if packing == "none":
            return None
        forms = [self.packed_codes()] if self.coded else []
        nonzeros = self._nonzeros(dtype) if packing == "auto" else None
        if nonzeros is not None:
            forms.append(PackedTensors.of_nonzeros(nonzeros))
        best = min(forms, key=lambda form: form.nbytes, default=None)
        return best if self.coded or (best is not None and best.nbytes < self.plain_nbytes(dtype)) else None

    def packed_codes(self) -> PackedTensors:
        """Return the stored form of a record of codes."""
        if self.trellis:
            return PackedTensors.of_trellis(self.trellis, self.weight_OI.shape)
        return PackedTensors.of_codes(self.parts, self.weight_OI.shape)

    def _nonzeros(self, dtype: torch.dtype) -> Sparse | Tiled | None:
        if len(self.parts) == 1:
            part = self.parts[0]
            if float((part.code_OC == 2 ** (part.bits - 1)).float().mean()) * part.bits <= 1:
                return None  # one bit per weight for the mask is more than the zeros save
            record = Sparse.encode_codes(part)
            return record if record is None else Tiled.encode(record) or record
        whole = self.kind == "masked" and self.cut is None and dtype in VALUES.values()
        return Sparse.encode(self.weight_OI, dtype) if whole else None


def join_notes(*notes: str) -> str:
    """Return the notes that are not empty, each once."""
    return "; ".join(dict.fromkeys(filter(None, notes)))


def record_names(description: Mapping[str, Any]) -> list[str]:
    """Return the names of the tensors of a packed matrix, without the name of its module."""
    return read_descriptor("a packed matrix", description).names()


def read_sparse(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> Sparse | Tiled:
    """Return stored nonzeros from their tensors."""
    tiled = description["sparse"]["layout"] == LAYOUT
    return Tiled.read(tensors, description) if tiled else Sparse.read(tensors, description)


def decode_record(
    tensors: Mapping[str, Tensor], description: Mapping[str, Any], module: str = "a packed matrix"
) -> Tensor:
    """Return the matrix [O, I] in float32. Raises CheckpointError for a record that its format does not allow."""
    read_descriptor(module, description).check(tensors)
    if "sparse" in description:
        return read_sparse(tensors, description).decode()
    if "trellis" in description:
        return assemble_trellis(read_trellis(tensors, description["trellis"], description["shape"][1]))
    return assemble(read_parts(tensors, description["parts"], description["shape"][1]))


def decode_stored(
    tensors: Mapping[str, Tensor], modules: Mapping[str, Mapping[str, Any]], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint with packed modules as plain `module.weight` again.

    `modules` holds the descriptions {"shape": [O, I], ...} by module name. Modules without tensors here are skipped.
    Raises CheckpointError for a module with some of its tensors, or with others than its description says.
    """
    plain = dict(tensors)
    for module, description in modules.items():
        own = {name: plain.pop(f"{module}.{name}") for name in RECORD_NAMES if f"{module}.{name}" in plain}
        if own and module + WEIGHT in plain:
            raise CheckpointError(f"{module} is packed and has a plain {module}{WEIGHT} too: expected one of them")
        if own:
            plain[module + WEIGHT] = decode_record(own, description, module).to(dtype)
    return plain


def decode_shard(path: Path, modules: Mapping[str, Mapping[str, Any]], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors of a file with packed `modules` as plain weights of `dtype`, without links to the file."""
    return decode_stored({name: tensor.clone() for name, tensor in load_file(path).items()}, modules, dtype)
