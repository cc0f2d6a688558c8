"""A tiny model whose matrices are stored in every kind of record, and a check of what a folder of it holds."""

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from niwaki.errors import NiwakiError
from niwaki.formats.packed import PackedTensors
from niwaki.model.checkpoint import Checkpoint, quantization, quantized_config
from support.bit_planes import quantized_matrix
from support.models import tiny_llama
from support.slow_decode import slow_decode
from support.sparse_records import record_of, tiled

WEIGHTS = "model.safetensors"
DTYPES = {"F32": np.float32, "F16": np.float16, "U8": np.uint8, "I16": np.int16, "I32": np.int32}


@cache
def packed_folder() -> Path:
    """Return a tiny model of one block, whose matrices are stored in every kind of record."""
    folder = tiny_llama(Path(mkdtemp(prefix="niwaki-")) / "model", blocks=1)
    tensors = load_file(folder / WEIGHTS)
    modules: dict[str, Any] = {}
    kinds = ["codes", "mixed", "bitmap-float16", "two_four-int4", "tiles", "bitmap-int8", "two_four-float32"]
    names = sorted(name for name, t in tensors.items() if ".layers." in name and t.dim() == 2)
    for number, name in enumerate(names):
        rows, columns = tensors.pop(name).shape
        record = _record(kinds[number % len(kinds)], rows, columns)
        module = name.removesuffix(".weight")
        modules[module] = record.description
        tensors |= {f"{module}.{own}": tensor for own, tensor in record.tensors.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(quantized_config(config, quantization(modules, {})))
    return folder


def _record(kind: str, rows: int, columns: int) -> PackedTensors:
    if kind in ("codes", "mixed"):
        return PackedTensors.of_codes(quantized_matrix(rows, columns, 4, "affine", 8, kind == "mixed"), (rows, columns))
    if kind == "tiles":
        return PackedTensors.of_nonzeros(tiled(rows, columns, 32))
    layout, _, values = kind.partition("-")
    return PackedTensors.of_nonzeros(record_of(rows, columns, values, layout, 8))


def try_folder(folder: Path) -> bool:
    """Return whether a folder is accepted. Fail unless its weights are then what its bytes say."""
    try:
        checkpoint = Checkpoint.open(folder)
        found = checkpoint.read(checkpoint.tensors)
    except NiwakiError as error:
        assert "\n" not in str(error)
        return False
    file = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(file[:8], "little")
    header, data = json.loads(file[8 : 8 + length]), file[8 + length :]
    described = json.loads((folder / "config.json").read_text()).get("quantization_config", {}).get("modules", {})

    def stored(name: str) -> np.ndarray:
        begin, end = header[name]["data_offsets"]
        values = np.frombuffer(data[begin:end], DTYPES[header[name]["dtype"]])
        return np.array(values).reshape(header[name]["shape"])

    for name, tensor in found.items():
        module = name.removesuffix(".weight")
        if module in described:
            names = [key for key in header if key.startswith(module + ".")]
            own = {key.rpartition(".")[2]: torch.from_numpy(stored(key)) for key in names}
            expected, size = slow_decode(PackedTensors(own, described[module]))
            assert (np.abs(tensor.double().numpy() - expected) <= 1e-2 * size).all()
        else:
            assert np.array_equal(tensor.numpy(), stored(name))
    return True
