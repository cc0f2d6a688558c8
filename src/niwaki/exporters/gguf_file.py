"""GGUF: one file with weights, shape and vocabulary, for llama.cpp and engines built on it.

It holds Llama, Mistral, Qwen2 and Qwen3 with one dense layer per block: dense, pruned in place, or smaller. Codes are
decoded first, since GGUF has other codes. Matrices are written in float16 (float32 if they are stored so) or in any
type that the package `gguf` can write (TYPES). Vectors are written in float32. A matrix whose rows do not divide into
the blocks of a type is written in float16, and the record names it with its bytes.

A Llama in GGUF rotates neighbouring values and transformers rotates halves of a head, so rows of q and k are
interleaved. Mistral and Qwen2 are written as a Llama, which computes the same with these weights. The `qwen2` of
llama.cpp needs heads that fill the width. Blocks of different widths become `deci`, the same graph with widths per
block. `deci` has two traps, and both are refused. A block without a dense layer loses the output of its attention,
and the width of a head is read from the first block.

A Mistral with a window gets this window as its context, up to which it is the same model.

Cost: one tensor in memory, one pass over the file.

    niwaki export OUT DEST --to gguf --type q8_0
"""

import math
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, LlamaFileType
from torch import Tensor

from niwaki.compression.run_record import Record
from niwaki.config.events import Event, Report
from niwaki.errors import InputError, NumericalError, unknown
from niwaki.exporters.gguf_shape import GgufLayout, layout_of
from niwaki.exporters.gguf_vocabulary import Vocabulary, read_vocabulary
from niwaki.model.aux_files import STEMS, aux_files
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.files import atomic_file, copy_file

NAME = "model.gguf"
# What gguf.quants can write, most bits first; K-quants are made by llama.cpp itself.
TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "mxfp4", "tq2_0", "tq1_0")
_NAMES_OF_FILES = {"f32": "ALL_F32", "mxfp4": "MOSTLY_MXFP4_MOE"}
FILE_TYPES = {name: LlamaFileType[_NAMES_OF_FILES.get(name, f"MOSTLY_{name.upper()}")] for name in TYPES}
# llama.cpp rounds activations to the type of the weights, so a bf16 model runs more exactly from a float16 file.
DEFAULTS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "f16"}
FALLBACK = GGMLQuantizationType.F16
HEADER_BYTES = 2**20


@dataclass(frozen=True)
class GgufPlan:
    """Content of a file: the layout of the tensors, the type of each, the vocabulary."""

    layout: GgufLayout
    type: str
    kinds: dict[str, GGMLQuantizationType]
    vocabulary: Vocabulary
    packed: int

    @property
    def nbytes(self) -> int:
        """Return the bytes of all tensors, with a margin for the header."""
        return HEADER_BYTES + sum(self.tensor_bytes(name) for name in self.kinds)

    def tensor_bytes(self, name: str) -> int:
        """Return the bytes of one tensor in the file."""
        block, size = gguf.GGML_QUANT_SIZES[self.kinds[name]]
        return math.prod(self.layout.tensors[name].shape) // block * size


def check(checkpoint: Checkpoint, record: Record | None, type: str | None) -> GgufPlan:
    """Plan name and type of each tensor. Raises InputError for a model that llama.cpp cannot run."""
    chosen = DEFAULTS[checkpoint.dtype] if type is None else type
    if chosen not in TYPES:
        raise InputError(unknown("type", chosen, TYPES))
    layout = layout_of(checkpoint)
    kinds = {name: kind_of(tensor.shape, chosen) for name, tensor in layout.tensors.items()}
    rows = layout.tensors["token_embd.weight"].shape[0]
    codes = sum("sparse" not in about for about in checkpoint.packed.values())
    return GgufPlan(layout, chosen, kinds, read_vocabulary(checkpoint.folder, rows), codes)


def kind_of(shape: tuple[int, ...], chosen: str) -> GGMLQuantizationType:
    """Choose the type of a tensor. Vectors stay exact, and rows that do not divide into blocks are float16."""
    wanted = GGMLQuantizationType[chosen.upper()]
    if len(shape) < 2:
        return GGMLQuantizationType.F32
    return FALLBACK if shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] else wanted


def write(checkpoint: Checkpoint, plan: GgufPlan, folder: Path, report: Report) -> dict[str, Any]:
    """Write the file, and the licence of the checkpoint beside it. Tokenizer and config are inside the file."""
    for source in aux_files(checkpoint.folder):
        if source.name.upper().startswith(STEMS):
            copy_file(source, folder / source.name)
    with atomic_file(folder / NAME) as temporary:
        writer = gguf.GGUFWriter(temporary, gguf.MODEL_ARCH_NAMES[plan.layout.arch])
        try:
            _describe(writer, checkpoint, plan)
            for name, tensor in plan.layout.tensors.items():
                size = plan.tensor_bytes(name)
                writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), size, raw_dtype=plan.kinds[name])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for index, (name, tensor) in enumerate(plan.layout.tensors.items()):
                values = tensor.read(checkpoint)
                writer.write_tensor_data(_encoded(name, values, plan.kinds[name]))
                report(Event.EXPORT, index=index, of=len(plan.kinds))
        finally:
            writer.close()
    return _record(plan)


class _Written(np.ndarray):
    """Array that is written by Python: numpy's own `tofile` says of a full disk only how much it wrote."""

    def tofile(self, fid: Any, sep: str = "", format: str = "%s") -> None:
        """Write the bytes to an open file."""
        fid.write(np.ascontiguousarray(self).view(np.ndarray).data.cast("B"))


def _encoded(name: str, values: Tensor, kind: GGMLQuantizationType) -> np.ndarray:
    with np.errstate(over="ignore"):
        data: np.ndarray = gguf.quants.quantize(np.ascontiguousarray(values.float().numpy()), kind)
    if kind is GGMLQuantizationType.F16 and not np.isfinite(data).all():
        raise NumericalError(f"{name} holds values beyond float16: export with --type bf16 or f32")
    return data.view(_Written)


def _describe(writer: gguf.GGUFWriter, checkpoint: Checkpoint, plan: GgufPlan) -> None:
    config, layout = checkpoint.config, plan.layout
    writer.add_type("model")
    writer.add_name(checkpoint.folder.name)
    writer.add_file_type(FILE_TYPES[plan.type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(layout.context)
    writer.add_vocab_size(layout.tensors["token_embd.weight"].shape[0])
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(layout.neurons))
    writer.add_feed_forward_length(_one_or_all(layout.neurons))
    writer.add_head_count(_one_or_all(layout.heads))
    writer.add_head_count_kv(_one_or_all(layout.key_heads))
    writer.add_key_length(layout.head_width)
    writer.add_value_length(layout.head_width)
    writer.add_rope_dimension_count(layout.head_width)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    if layout.linear_factor:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(layout.linear_factor)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    plan.vocabulary.add_to(writer)


def _one_or_all(counts: tuple[int, ...]) -> int | tuple[int, ...]:
    return counts[0] if len(set(counts)) == 1 else counts


def _record(plan: GgufPlan) -> dict[str, Any]:
    """Return the fields of run.json: tensors and bytes by type, tensors of another type, notes."""
    types: dict[str, dict[str, int]] = {}
    for name, kind in plan.kinds.items():
        counts = types.setdefault(kind.name.lower(), {"tensors": 0, "bytes": 0})
        counts["tensors"] += 1
        counts["bytes"] += plan.tensor_bytes(name)
    shapes = {name: tensor.shape for name, tensor in plan.layout.tensors.items() if len(tensor.shape) > 1}
    other = {name: shape for name, shape in shapes.items() if plan.kinds[name].name.lower() != plan.type}
    fallbacks = [
        {"tensor": name, "row": shape[-1], "type": plan.kinds[name].name.lower(), "bytes": plan.tensor_bytes(name)}
        for name, shape in other.items()
    ]
    notes = [*plan.layout.notes, *plan.vocabulary.notes]
    if plan.packed:
        notes.append(f"{plan.packed} matrices of codes are decoded, since GGUF has other codes")
    if fallbacks:
        size = sum(plan.tensor_bytes(name) for name in other)
        notes.append(
            f"{len(fallbacks)} matrices whose rows do not divide into blocks of {plan.type} are f16: {size:,} bytes"
        )
    matrix_bytes = sum(plan.tensor_bytes(name) for name in shapes)
    return {
        "format": f"{gguf.MODEL_ARCH_NAMES[plan.layout.arch]} {plan.type}",
        "type": plan.type,
        "versions": {"gguf": version("gguf")},
        "bits": round(8 * matrix_bytes / sum(map(math.prod, shapes.values())), 4),
        "types": types,
        "fallbacks": fallbacks,
        "vocabulary": {"model": plan.vocabulary.model, "pre": plan.vocabulary.pre},
        "notes": notes,
    }
