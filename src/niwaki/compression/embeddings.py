"""Embeddings and head as codes: rounded to nearest, so that the file is not mostly what no method compressed.

Affine codes of 4 or 8 bits, a scale and a zero code for every 128 columns of a row (64 where 128 do not divide them),
the range of each searched. On the embeddings of three small models 4-bit affine groups of 128 (4.16 bits) lose as much
as symmetric ones of 64 (4.25 bits). A head that is tied to the embeddings shares their codes. Everything else outside
the blocks stays dense: norms, projections, and embeddings of positions.

The stream of a compression starts from the embeddings as they are stored, a dense stream from the dense ones.

Cost: one pass over the weights, `ROWS` rows at a time; the codes of one matrix are in memory, a byte each.

Legend: O rows (tokens of the vocabulary), I columns, G groups of columns.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from niwaki.config.recipe import Bits, PrunedBits, Recipe, Target
from niwaki.errors import CheckpointError, TargetError
from niwaki.formats.quantized import TILE, WEIGHT, Part, stored_tensors
from niwaki.methods.shared.rounding import groups_of, nearest
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.decoder import Decoder

Ends = Mapping[str, Sequence[str]]
WIDTHS = {"4bit": 4, "8bit": 8}
GROUPS = (128, 64)
ROWS = 128 * TILE  # that are rounded at a time


def ends_to_pack(recipe: Recipe, target: Target, decoder: Decoder) -> Ends:
    """The modules whose weights `recipe.ends` stores as codes, with the names of their tensors on disk; {} for none.

    Raises TargetError for a target or a storage without codes, and for matrices that no group of columns divides;
    CheckpointError if the config ties head and embeddings and the checkpoint stores two different matrices.
    """
    if recipe.ends == "none":
        return {}
    if not isinstance(target, Bits | PrunedBits):
        raise TargetError(
            f"ends {recipe.ends} goes with quantized blocks: expected a target in bits such as 4bit, got {target}: "
            "drop ends, or change the target"
        )
    if recipe.pack == "none":
        raise TargetError(f"ends {recipe.ends} stores codes, and pack none stores none: drop one of the two")
    ends = decoder.end_matrices()
    for module, names in ends.items():
        if not names:
            raise CheckpointError(f"{decoder.checkpoint.folder} has no {module}{WEIGHT}: the checkpoint is incomplete")
        _group(module, decoder.checkpoint.tensors[names[0]].shape[1])
        found = [decoder.checkpoint.read([name])[name] for name in names] if len(names) > 1 else []
        if not all(torch.equal(found[0], other) for other in found[1:]):
            raise CheckpointError(
                f"{decoder.checkpoint.folder}: {' and '.join(names)} differ, but its config ties them: set "
                "tie_word_embeddings to false there, or drop ends"
            )
    return ends


def read_packed(
    checkpoint: Checkpoint, names: Iterable[str], ends: Ends, width: str, device: torch.device
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The tensors `names` of `checkpoint` as they are stored, and a line of the journal for each that became codes.

    Of the names of a module in `ends` the first is stored as codes of `width`, rounded on `device`; copies of it are
    left out.
    """
    owners = {name: module for module, stored in ends.items() for name in stored}
    tensors = checkpoint.read(name for name in names if name not in owners or name == ends[owners[name]][0])
    lines = []
    for module in [owners[name] for name in tensors if name in owners]:
        weight_OI = tensors.pop(ends[module][0])
        part, error = round_rows(weight_OI, WIDTHS[width], _group(module, weight_OI.shape[1]), device)
        codes = stored_tensors([part], weight_OI.shape[1])
        tensors |= {f"{module}.{name}": tensor for name, tensor in codes.items()}
        nbytes = sum(tensor.nbytes for tensor in codes.values())
        lines.append({
            "module": module,
            "shape": list(weight_OI.shape),
            "bytes": nbytes,
            "bits": 8 * nbytes / weight_OI.numel(),
            "error": error,
            "stored": {"shape": list(weight_OI.shape), "parts": [part.describe()]},
        })  # fmt: skip
    return tensors, lines


def round_rows(weight_OI: Tensor, bits: int, group: int, device: torch.device) -> tuple[Part, float]:
    """Every weight at the nearest level of its group, on the CPU, and the relative squared error of the weights."""
    columns = weight_OI.shape[1]
    groups = groups_of(0, columns, bits, "affine", group)
    parts, error, energy = [], 0.0, 0.0
    for rows_OI in weight_OI.split(ROWS):
        wanted_OI = rows_OI.to(device).float()
        (part,) = nearest(wanted_OI, groups, clip=True).storable().parts(torch.arange(columns, device=device))
        error += float((part.decode() - wanted_OI).square().sum(dtype=torch.float64))
        energy += float(wanted_OI.square().sum(dtype=torch.float64))
        parts.append(part)
    whole = Part(
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
    """The widest group that divides the columns."""
    for group in GROUPS:
        if columns % group == 0:
            return group
    raise TargetError(f"ends: groups of {GROUPS[-1]} do not divide the {columns} columns of {module}: drop ends")
