"""compressed-tensors, format `pack-quantized`: weight-only codes for transformers and the engines of the vLLM project.

It holds results whose matrices are all 4- or 8-bit codes of one kind (`rtn`, `gptq`): symmetric, or affine with zero
codes. A scale covers `group` columns or a whole row. The library packs (`pack_to_int32`) and describes
(`QuantizationConfig`) the codes, which do not change. Tests load the result with transformers.

Scales are written as float16, and the loader decides their use. For symmetric codes, transformers 5.23 with
compressed-tensors 0.20 casts the scales to the dtype of the model. In float32 and float16 the weights equal those of
niwaki. In bfloat16 a scale keeps 8 of its 11 bits. This loader cannot keep zero codes packed, so config.json of an
affine result says `dequantize`, a key of transformers alone. Loading then decodes the weights in float16 (relative
error up to 2⁻¹¹). The loader cannot load fused experts beside codes, so such results are refused.

Cost: one shard in memory, one pass over the files.

    niwaki export OUT DEST --to compressed-tensors
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from niwaki.compression.run_record import Record, RunRecord
from niwaki.config.events import Event, Report
from niwaki.errors import CheckpointError, InputError
from niwaki.formats.descriptors import read_descriptor
from niwaki.formats.quantized import WEIGHT, QuantizedColumns, read_parts
from niwaki.kernels.scans import scans_for
from niwaki.model.checkpoint import Checkpoint, quantized_config
from niwaki.model.files import copy_file, write_shard, write_text
from niwaki.model.hf import build_skeleton, weight_names
from niwaki.model.shards import INDEX

LIBRARY = "compressed-tensors"
FORMAT = "pack-quantized"
WIDTHS = (4, 8)
GRIDS = ("symmetric", "affine")


@dataclass(frozen=True)
class CodesPlan:
    """The one kind of codes in a result.

    `group` is 0 for one scale per row. `dense` names the linears without codes.
    """

    bits: int
    symmetric: bool
    group: int
    dense: tuple[str, ...]
    nbytes: int


def check(checkpoint: Checkpoint, record: Record | None, type: str | None) -> CodesPlan:
    """Find the kind of codes in `checkpoint`.

    Raises InputError if the format cannot hold it or the library is missing.
    """
    try:
        import compressed_tensors  # noqa: F401
    except ImportError as error:
        raise InputError(f"exporting needs the package {LIBRARY}: pip install {LIBRARY}") from error
    if type is not None:
        raise InputError(f"{LIBRARY} takes the codes as they are: leave --type out")
    if not isinstance(record, RunRecord):
        raise CheckpointError(
            f"{checkpoint.folder} has no niwaki/run.json: expected a folder that `niwaki compress` wrote"
        )
    if not checkpoint.packed:
        raise InputError(
            f"{checkpoint.folder} holds no codes, so there is nothing to export to {LIBRARY}: "
            "compress with --method gptq or rtn, --target 4bit or 8bit and --pack auto"
        )
    if record.result.embeddings:
        raise InputError(
            f"{checkpoint.folder} stores embeddings and LM head as codes, which {LIBRARY} cannot hold: "
            "compress with --embeddings none"
        )
    if stored_dense := record.result.matrices - len(checkpoint.packed):
        raise InputError(
            f"{checkpoint.folder} stores {stored_dense} of its {record.result.matrices} matrices dense (see "
            f"niwaki/blocks.jsonl): {LIBRARY} needs results that are all codes, because loaders fail on others"
        )
    kinds = {_kind(module, about): module for module, about in checkpoint.packed.items()}
    widths = {about["parts"][0]["group"] for about in checkpoint.packed.values()}
    whole = all(about["parts"][0]["group"] == about["shape"][1] for about in checkpoint.packed.values())
    if len(kinds) > 1 or (len(widths) > 1 and not whole):
        raise InputError(
            f"matrices of {checkpoint.folder} differ in code type or group size ({', '.join(sorted(kinds.values()))}): "
            f"{LIBRARY} needs one kind: compress with a single run of rtn or gptq"
        )
    bits, grid = next(iter(kinds))
    skeleton = build_skeleton(checkpoint.config, checkpoint.dtype)
    linears = (name for name, module in skeleton.named_modules() if isinstance(module, nn.Linear))
    names = weight_names(skeleton, [module + WEIGHT for module in checkpoint.packed])
    dense = tuple(name for name in linears if name not in names.modules)
    return CodesPlan(bits, grid == "symmetric", 0 if whole else widths.pop(), dense, checkpoint.nbytes)


def write(checkpoint: Checkpoint, plan: CodesPlan, folder: Path, report: Report) -> dict[str, Any]:
    """Write each shard of `checkpoint` with its codes packed by the library, and index and config.

    Return the format, the version of the library and the bits per weight in the packed matrices, all bytes counted.
    """
    weight_map: dict[str, str] = {}
    total_bytes = code_bytes = 0
    checkpoint.copy_aux_files(folder)
    coded = {checkpoint.tensors[module + WEIGHT].shard for module in checkpoint.packed}
    for number, shard in enumerate(checkpoint.shards):
        if shard not in coded:
            copy_file(checkpoint.folder / shard, folder / shard)
            own_bytes = {name: info.nbytes for name, info in checkpoint.tensors.items() if info.shard == shard}
            weight_map |= dict.fromkeys(own_bytes, shard)
            total_bytes += sum(own_bytes.values())
            continue
        tensors = load_file(checkpoint.folder / shard)
        for module, about in checkpoint.packed.items():
            descriptor = read_descriptor(module, about)
            names = [name for name in descriptor.names() if f"{module}.{name}" in tensors]
            if names:
                own = {name: tensors.pop(f"{module}.{name}") for name in names}
                descriptor.check(own, scans_for(own))
                part = read_parts(own, about["parts"], about["shape"][1])[0]
                packed = {f"{module}.{name}": tensor for name, tensor in _packed(part, about["shape"]).items()}
                code_bytes += sum(tensor.nbytes for tensor in packed.values())
                tensors |= packed
        write_shard(folder / shard, tensors)
        weight_map |= dict.fromkeys(tensors, shard)
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
        report(Event.EXPORT, index=number, of=len(checkpoint.shards))
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")
    write_text(folder / "config.json", quantized_config(checkpoint.config_content(), _quantization(plan)))
    weights = sum(math.prod(about["shape"]) for about in checkpoint.packed.values())
    return {"format": FORMAT, "versions": {LIBRARY: version(LIBRARY)}, "bits": round(8 * code_bytes / weights, 4)}


def _kind(module: str, about: Mapping[str, Any]) -> tuple[int, str]:
    """Return bits and grid of a matrix. Raises InputError with its name if the format has no such codes."""
    if "trellis" in about:
        raise InputError(
            f"{module} is coded by a trellis, which {LIBRARY} has no format for: compress with --method gptq or "
            "rtn, or export to gguf"
        )
    if "parts" not in about:
        raise InputError(
            f"{module} is stored as nonzeros, which {LIBRARY} has no format for in this version: compress with "
            "--pack codes"
        )
    parts = about["parts"]
    bits, grid = parts[0]["bits"], parts[0]["grid"]
    if len(parts) > 1 or bits not in WIDTHS or grid not in GRIDS:
        found = " and ".join(f"{part['bits']}-bit {part['grid']}" for part in parts)
        raise InputError(
            f"{module} is stored as {found} codes: {LIBRARY} takes 4- or 8-bit codes, symmetric or affine, "
            "for a whole matrix (--method gptq or rtn, --target 4bit or 8bit)"
        )
    return bits, grid


def _packed(part: QuantizedColumns, shape: list[int]) -> dict[str, Tensor]:
    """Return the tensors of one matrix [O, I] under the names of the library.

    Codes are centred, then packed in int32.
    """
    from compressed_tensors.compressors.pack_quantized import pack_to_int32

    def centred(codes: Tensor) -> Tensor:
        return (codes.to(torch.int16) - (1 << (part.bits - 1))).to(torch.int8)

    found = {
        "weight_packed": pack_to_int32(centred(part.code_OC), part.bits),
        "weight_scale": part.scale_OG,
        "weight_shape": torch.tensor(shape),
    }
    if part.zero_OG is not None:
        found["weight_zero_point"] = pack_to_int32(centred(part.zero_OG), part.bits, packed_dim=0)
    return found


def _quantization(plan: CodesPlan) -> dict[str, Any]:
    """Return the `quantization_config` of config.json."""
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
    )

    args = QuantizationArgs(
        num_bits=plan.bits,
        symmetric=plan.symmetric,
        strategy="group" if plan.group else "channel",
        group_size=plan.group or None,
    )
    config = QuantizationConfig(
        config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=args, format=FORMAT)},
        format=FORMAT,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=list(plan.dense),
    )
    found: dict[str, Any] = config.model_dump(mode="json")
    return found if plan.symmetric else {**found, "dequantize": True}
