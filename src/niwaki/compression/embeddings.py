"""Embeddings and head as codes, rounded to nearest. Without them, a small file is mostly embeddings.

Codes are affine, of 4 or 8 bits. Every 128 columns of a row share a scale and a zero code (64 where 128 do not divide
the columns). The range of each group is searched. On the embeddings of three small models, 4-bit affine groups of 128
(4.16 bits) lose as much as symmetric groups of 64 (4.25 bits). A head that is tied to the embeddings shares their
codes. Everything else outside the blocks stays dense: norms, projections, and embeddings of positions.

The stream of a compression starts from the embeddings as they are stored. A dense stream starts from the dense ones.

Cost: one pass over the weights, `ROWS` rows at a time. The codes of one matrix are in memory, a byte each.

Legend: O rows (tokens of the vocabulary), I columns, G groups of columns.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from niwaki.compression.run_record import ModuleRecord
from niwaki.config.recipe import Recipe
from niwaki.config.targets import Bits, PrunedBits, Target
from niwaki.errors import TargetError
from niwaki.formats.packed import PackedTensors
from niwaki.formats.quantized import TILE, QuantizedColumns
from niwaki.methods.shared.rounding import groups_of, nearest
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.decoder import Decoder

TensorNames = Mapping[str, Sequence[str]]
WIDTHS = {"4bit": 4, "8bit": 8}
GROUPS = (128, 64)
ROWS = 128 * TILE  # per step of rounding


def embeddings_to_pack(recipe: Recipe, target: Target, decoder: Decoder) -> TensorNames:
    """Return the modules whose weights become codes, with the names of their tensors on disk; {} for none.

    Raises TargetError for a target or a storage without codes, and for matrices that no group of columns divides.
    """
    width = recipe.embeddings
    if width == "none":
        return {}
    if not isinstance(target, Bits | PrunedBits):
        raise TargetError(
            f"embeddings {width} goes with quantized blocks: expected a target in bits such as 4bit, got {target}: "
            "leave the option embeddings out, or change the target"
        )
    if recipe.pack == "none":
        raise TargetError(f"embeddings {width} stores codes, and pack none stores none: leave one of the two out")
    tensor_names = decoder.embedding_matrices()
    if done := next((module for module in tensor_names if module in decoder.checkpoint.packed), None):
        raise TargetError(f"embeddings {width}: {done} is codes already, and stays so: leave the option embeddings out")
    for module, names in tensor_names.items():
        _group(module, decoder.checkpoint.tensors[names[0]].shape[1])
    return tensor_names


def read_packed(
    checkpoint: Checkpoint, names: Iterable[str], modules: TensorNames, width: str, device: torch.device
) -> tuple[dict[str, Tensor], list[ModuleRecord]]:
    """Return the tensors `names` of `checkpoint` as they are stored, and a record of each that became codes.

    A module in `modules` has one or more tensors. The first is stored as codes of `width`, rounded on `device`; its
    copies are left out.
    """
    owners = {name: module for module, own in modules.items() for name in own}
    tensors = checkpoint.read(name for name in names if name not in owners or name == modules[owners[name]][0])
    records = []
    for module in [owners[name] for name in tensors if name in owners]:
        weight_OI = tensors.pop(modules[module][0])
        part, error = round_rows(weight_OI, WIDTHS[width], _group(module, weight_OI.shape[1]), device)
        packed = PackedTensors.of_codes([part], weight_OI.shape)
        tensors |= {f"{module}.{name}": tensor for name, tensor in packed.tensors.items()}
        fields = {
            "module": module,
            "shape": list(weight_OI.shape),
            "bytes": packed.nbytes,
            "bits": 8 * packed.nbytes / weight_OI.numel(),
            "error": error,
            "stored": dict(packed.description),
        }
        records.append(ModuleRecord.model_validate(fields))
    return tensors, records


def round_rows(weight_OI: Tensor, bits: int, group: int, device: torch.device) -> tuple[QuantizedColumns, float]:
    """Round every weight to the nearest level of its group.

    Returns the codes on the CPU, and the relative squared error of the weights.
    """
    columns = weight_OI.shape[1]
    groups = groups_of(0, columns, bits, "affine", group)
    parts, error, energy = [], 0.0, 0.0
    for rows_OI in weight_OI.split(ROWS):
        wanted_OI = rows_OI.to(device).float()
        (part,) = nearest(wanted_OI, groups, clip=True).storable().parts(torch.arange(columns, device=device))
        error += float((part.decode() - wanted_OI).square().sum(dtype=torch.float64))
        energy += float(wanted_OI.square().sum(dtype=torch.float64))
        parts.append(part)
    whole = QuantizedColumns(
        torch.arange(columns),
        bits,
        "affine",
        group,
        torch.cat([part.code_OC.cpu() for part in parts]),
        torch.cat([part.scale_OG.cpu() for part in parts]),
        zero_OG=torch.cat([part.zero_OG.cpu() for part in parts if part.zero_OG is not None]),
    )
    return whole, error / energy if energy else 0.0


def _group(module: str, columns: int) -> int:
    """Return the widest group that divides the columns."""
    for group in GROUPS:
        if columns % group == 0:
            return group
    raise TargetError(
        f"embeddings: groups of {GROUPS[-1]} do not divide the {columns} columns of {module}: leave the option out"
    )
