"""How a packed matrix is stored, told by its description: codes (see `codes`) or nonzeros (see `sparse`).

    names = record_names(about)
    weight_OI = decode_record({name: tensors[name] for name in names}, about)

Legend: O outputs, I inputs.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from niwaki.formats.quantized import WEIGHT, assemble, read_parts, stored_names
from niwaki.formats.sparse import Sparse
from niwaki.formats.sparse import stored_shapes as sparse_shapes
from niwaki.formats.sparse_tiles import LAYOUT, Tiled
from niwaki.formats.sparse_tiles import stored_shapes as tile_shapes


def record_names(about: Mapping[str, Any]) -> list[str]:
    """The names of the tensors of a module with this description, as they follow its own."""
    return list(record_shapes(about)) if "sparse" in about else stored_names(about["parts"])


def record_shapes(about: Mapping[str, Any]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of every tensor of nonzeros with this description."""
    return tile_shapes(about) if about["sparse"]["layout"] == LAYOUT else sparse_shapes(about)


def read_sparse(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> Sparse | Tiled:
    """Nonzeros as they are stored."""
    return Tiled.read(tensors, about) if about["sparse"]["layout"] == LAYOUT else Sparse.read(tensors, about)


def decode_record(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> Tensor:
    """The matrix [O, I] in float32."""
    if "sparse" in about:
        return read_sparse(tensors, about).decode()
    return assemble(read_parts(tensors, about["parts"], about["shape"][1]))


def decode_stored(
    tensors: Mapping[str, Tensor], modules: Mapping[str, Mapping[str, Any]], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors of a checkpoint with packed modules as plain `module.weight` again.

    `modules` holds the descriptions {"shape": [O, I], ...} by module name; those without tensors here are skipped.
    """
    found = dict(tensors)
    for module, about in modules.items():
        names = record_names(about)
        if f"{module}.{names[0]}" in found:
            own = {name: found.pop(f"{module}.{name}") for name in names}
            found[module + WEIGHT] = decode_record(own, about).to(dtype)
    return found
