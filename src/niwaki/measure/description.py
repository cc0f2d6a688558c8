"""Descriptions of a model (its files and niwaki's record) and of the machine (processor, package versions)."""

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from niwaki.compression.run_record import RunRecord, read_record
from niwaki.measure.schema import Environment, Kind, Model
from niwaki.model.decoder import Decoder
from niwaki.runtime.contextual.predictor_files import TENSORS, has_shadow

PACKAGES = ("torch", "transformers", "safetensors", "numpy")


def describe_model(source: str, name: str, decoder: Decoder, dense: Decoder) -> Model:
    """Describe a model that has not run: no loading time, no memory."""
    checkpoint, recipe = decoder.checkpoint, read_recipe(decoder.checkpoint.folder)
    inside = [name for index in range(len(decoder)) for name in decoder.disk_names(index)]
    predictor_bytes = (checkpoint.folder / TENSORS).stat().st_size if has_shadow(checkpoint.folder) else 0
    return Model(
        name=name,
        source=source,
        kind=_kind(decoder, dense),
        method=recipe.get("method"),
        target=recipe.get("target") or (str(recipe["target_bytes"]) if recipe.get("target_bytes") else None),
        recipe=recipe or None,
        architecture=(checkpoint.config.architectures or [checkpoint.config.model_type])[0],
        blocks=len(decoder),
        file_bytes=checkpoint.nbytes + predictor_bytes,
        decoder_bytes=sum(checkpoint.tensors[name].nbytes for name in inside),
        load_seconds=None,
        memory=None,
    )


def short_name(source: str, sources: Sequence[str]) -> str:
    """Return the last part of a path, or the whole path if another one ends in the same part."""
    short = [Path(one).name or one for one in sources]
    name = Path(source).name or source
    return name if short.count(name) == 1 else source


def describe_environment(device: torch.device) -> Environment:
    """Describe this machine and the versions of the packages."""
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


def read_recipe(folder: Path) -> dict[str, Any]:
    """Return the recipe in run.json of a result, {} for a model that niwaki did not compress.

    Raises CheckpointError for a broken record.
    """
    record = read_record(folder)
    return record.recipe.model_dump(mode="json") if isinstance(record, RunRecord) else {}


def _processor() -> str:
    about = Path("/proc/cpuinfo")
    if about.is_file():
        for line in about.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
