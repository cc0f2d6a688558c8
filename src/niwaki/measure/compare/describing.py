"""What is known of a model and of the machine before anything runs: files, niwaki's own record, processor, versions."""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from niwaki.errors import CheckpointError
from niwaki.measure.schema import Environment, Kind, Memory, Model
from niwaki.model.decoder import Decoder
from niwaki.runtime.contextual.record import TENSORS, has_shadow

PACKAGES = ("torch", "transformers", "safetensors", "numpy")


def describe(source: str, name: str, decoder: Decoder, dense: Decoder) -> Model:
    """A model without what running it would tell."""
    checkpoint, record = decoder.checkpoint, record_of(decoder.checkpoint.folder)
    recipe = record.get("recipe") or {}
    ends = set(decoder.disk_names(None))
    beside = (checkpoint.folder / TENSORS).stat().st_size if has_shadow(checkpoint.folder) else 0
    return Model(
        name=name,
        source=source,
        kind=_kind(decoder, dense),
        method=recipe.get("method"),
        target=recipe.get("target") or (str(recipe["target_bytes"]) if recipe.get("target_bytes") else None),
        recipe=recipe or None,
        architecture=(checkpoint.config.architectures or [checkpoint.config.model_type])[0],
        blocks=len(decoder),
        file_bytes=checkpoint.nbytes + beside,
        decoder_bytes=sum(info.nbytes for tensor, info in checkpoint.tensors.items() if tensor not in ends),
        load_seconds=None,
        memory=None,
    )


def measured(model: Model, load_seconds: float, memory: Memory) -> Model:
    """The same model after it ran."""
    return model.model_copy(update={"load_seconds": load_seconds, "memory": memory})


def names_of(sources: list[str]) -> list[str]:
    """The last part of every path, or all of it where two would be called the same."""
    short = [Path(source).name or source for source in sources]
    return [name if short.count(name) == 1 else source for name, source in zip(short, sources, strict=True)]


def environment(device: torch.device) -> Environment:
    """The machine and the versions that the numbers come from."""
    return Environment(
        machine=platform.machine(),
        processor=_processor(),
        cores=os.cpu_count() or 1,
        memory_bytes=psutil.virtual_memory().total,
        accelerator=torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        system=platform.platform(terse=True),
        python=platform.python_version(),
        versions={name: version(name) for name in PACKAGES},
    )


def _kind(decoder: Decoder, dense: Decoder) -> Kind:
    checkpoint = decoder.checkpoint
    if has_shadow(checkpoint.folder):
        return "contextual"
    if checkpoint.packed:
        return "packed"
    shapes, dense_shapes = ({n: i.shape for n, i in d.checkpoint.tensors.items()} for d in (decoder, dense))
    same = len(decoder) == len(dense) and all(dense_shapes.get(name) == shape for name, shape in shapes.items())
    return "plain" if same else "structured"


def record_of(folder: Path) -> dict[str, Any]:
    """run.json of a result; nothing for a model that niwaki did not make."""
    path = folder / "niwaki" / "run.json"
    if not path.is_file():
        return {}
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return {"recipe": dict(found["recipe"])}
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not a record of niwaki ({error}): compress again, or remove it") from error


def _processor() -> str:
    about = Path("/proc/cpuinfo")
    if about.is_file():
        for line in about.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
