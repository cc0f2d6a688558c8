"""ONNX: one graph from tokens to logits, for onnxruntime and engines built on it.

`torch.onnx.export` (on `torch.export`, with onnxscript) traces the model that transformers builds. It covers each
decoder that it can trace: dense, pruned in place, or smaller. Inputs are `input_ids` and `attention_mask` [B, T], the
output is `logits` [B, T, V], with free B and T. The graph is in float32 for each checkpoint, because some operators of
onnxruntime have no half-precision kernel on the CPU. It has no cache of keys and values, which `torch.export` cannot
trace in transformers. So each new token costs a pass over all tokens.

Cost: the whole model in memory in float32, and again while it is written.

    niwaki export OUT DEST --to onnx
"""

import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnxscript  # noqa: F401 (torch.onnx needs it and would fail late without it)
import torch

from niwaki.compression.run_record import Record
from niwaki.config.events import Event, Report
from niwaki.errors import ArchitectureError, InputError
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.complete import names_of
from niwaki.model.files import sync_file
from niwaki.model.hf import only_errors, wrapped_parts
from niwaki.model.unread import unread_note
from niwaki.runtime.load import load_checkpoint

NAME = "model.onnx"
LIBRARIES = ("onnx", "onnxscript", "torch", "transformers")
TRACED = (2, 7)  # batch and tokens of the traced call; 0 and 1 would become constants


@dataclass(frozen=True)
class OnnxPlan:
    """Plan of a graph: the bytes of the weights in float32, and the number of tensors that have no place in it."""

    nbytes: int
    unread: int


def check(checkpoint: Checkpoint, record: Record | None, type: str | None) -> OnnxPlan:
    """Plan the graph. Raises InputError for codes, or for a `type` of weights."""
    if type is not None:
        raise InputError("an ONNX graph is written in float32: leave --type out")
    if towers := wrapped_parts(checkpoint.config):
        raise InputError(
            f"{checkpoint.folder} is a wrapper of type {checkpoint.config.model_type} ({', '.join(towers)}): niwaki "
            "writes ONNX for decoders alone"
        )
    if checkpoint.packed:
        raise InputError(
            f"{checkpoint.folder} stores {len(checkpoint.packed)} matrices as codes, which ONNX has no operator for: "
            "compress with --pack none, or export to gguf"
        )
    names = names_of(checkpoint)
    weights = sum(torch.Size(checkpoint.tensors[name].shape).numel() for name in names.parameters)
    return OnnxPlan(4 * weights, len(names.unread))


def write(checkpoint: Checkpoint, plan: OnnxPlan, folder: Path, report: Report) -> dict[str, Any]:
    """Write the graph, a separate file of its weights, config and tokenizer."""
    checkpoint.copy_aux_files(folder)
    # float() of transformers refuses each quantization_config, even one that only holds shapes
    model: Any = torch.nn.Module.float(load_checkpoint(checkpoint, device="cpu", hashed=True))
    model.config.use_cache = False
    program = _traced(model, checkpoint)
    report(Event.EXPORT, index=0, of=2)
    program.save(folder / NAME, external_data=True)
    for path in folder.glob(f"{NAME}*"):
        sync_file(path)
    report(Event.EXPORT, index=1, of=2)
    opset = program.model.opset_imports[""]
    return {
        "format": f"float32, opset {opset}",
        "versions": {name: version(name) for name in LIBRARIES},
        "bits": 32.0,
        "inputs": ["input_ids", "attention_mask"],
        "outputs": ["logits"],
        "notes": [unread_note(plan.unread)] if plan.unread else [],
    }


def _traced(model: Any, checkpoint: Checkpoint) -> Any:
    """Trace the model. Raises ArchitectureError with one line for a model that the exporter cannot trace."""
    ids_BT = torch.arange(1, 1 + TRACED[0] * TRACED[1]).view(TRACED) % model.config.get_text_config().vocab_size
    given = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    try:
        # The exporter warns about operators of packages that are not installed.
        with only_errors("torch.onnx"), warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return torch.onnx.export(
                model, kwargs=given, dynamic_shapes=dict.fromkeys(given, axes), input_names=list(given),
                output_names=["logits"], dynamo=True, verbose=False,
            )  # fmt: skip
    except Exception as error:  # torch.export and onnxscript raise their own, and plain ones
        reason = " ".join(str(error).split())[:200]
        raise ArchitectureError(
            f"torch.onnx cannot export {checkpoint.folder}, a {model.config.model_type}: {reason}"
        ) from error
