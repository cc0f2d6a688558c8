"""Result of a recovery on the disk: the files of the compressed model, with the tensors that were learned.

Every file of weights keeps its name and its tensors. What was not learned stays byte for byte: embeddings, towers, and
tensors that no model reads. A packed matrix is written in the form that it had. So every reader of the compressed model
reads the result.

    sha256 = write_result(skeleton, plain, packed, folder)
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from niwaki.formats.packed import PackedTensors
from niwaki.model.checkpoint import STORED_DTYPES, quantization, quantized_config
from niwaki.model.decoder import Decoder
from niwaki.model.files import copy_file, file_sha256, write_shard, write_text
from niwaki.model.hf import split_converted
from niwaki.model.shards import INDEX


def stored_dtypes(skeleton: Decoder) -> dict[str, torch.dtype]:
    """Return the dtype in the file of every parameter."""
    tensors = skeleton.checkpoint.tensors
    return {
        parameter: STORED_DTYPES[tensors[name].dtype]
        for name, parameter in skeleton.names.parameters.items()
        if tensors[name].dtype in STORED_DTYPES
    }


def write_result(
    skeleton: Decoder, plain: Mapping[str, Tensor], packed: Mapping[str, PackedTensors], folder: Path
) -> dict[str, str]:
    """Write all files of a model to `folder` with new weights (by parameter) and records (by module of the model).

    Return the SHA-256 of the files of weights.
    """
    checkpoint = skeleton.checkpoint
    new = _on_disk(skeleton, plain)
    described = dict(checkpoint.packed)
    for place, record in packed.items():
        module = skeleton.names.modules[place]
        described[module] = dict(record.description)
        new |= {f"{module}.{name}": tensor for name, tensor in record.tensors.items()}
    hashes, nbytes = {}, 0
    for shard in checkpoint.shards:
        source, path = checkpoint.folder / shard, folder / shard
        own = {name for name, info in {**checkpoint.tensors, **checkpoint.records}.items() if info.shard == shard}
        if own & new.keys():
            tensors = load_file(source)
            tensors |= {name: tensor for name, tensor in new.items() if name in tensors}
            hashes[shard] = write_shard(path, tensors)
        else:
            copy_file(source, path)
            hashes[shard] = file_sha256(path)
        nbytes += path.stat().st_size
    checkpoint.copy_aux_files(folder)
    if described:
        stored = quantization(described, checkpoint.shapes)
        write_text(folder / "config.json", quantized_config(checkpoint.config_content(), stored))
    if (checkpoint.folder / INDEX).is_file():
        index = json.loads((checkpoint.folder / INDEX).read_text(encoding="utf-8"))
        index["metadata"] = {**index.get("metadata", {}), "total_size": nbytes}
        write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")
    return hashes


def _on_disk(skeleton: Decoder, plain: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return new weights under their names on disk. The conversions of transformers split fused experts again."""
    names, fused, found = skeleton.names, {}, {}
    for name, parameter in names.parameters.items():
        if parameter not in plain:
            continue
        if name in names.converted:
            fused[parameter] = plain[parameter]
        else:
            found[name] = plain[parameter]
    if fused:
        found |= split_converted(skeleton.model, fused, skeleton.checkpoint.tensors)
    return {name: tensor.contiguous() for name, tensor in found.items()}


def packed_bits(packed: Mapping[str, PackedTensors]) -> float | None:
    """Return the mean bits per weight of the packed matrices with all scales and metadata, None if there are none."""
    weights = sum(record.description["shape"][0] * record.description["shape"][1] for record in packed.values())
    return round(8 * sum(record.nbytes for record in packed.values()) / weights, 4) if weights else None
