"""Files of strangers: a mutated safetensors file or config is refused with one line, or gives what its bytes say.

How many mutations are tried: see `tests/formats/test_mutated_records.py`.
"""

import json
import random
import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import niwaki
from niwaki.errors import CheckpointError, NiwakiError
from niwaki.formats.packed import PackedTensors
from niwaki.model.checkpoint import Checkpoint, quantization, quantized_config
from support.bit_planes import quantized_matrix
from support.models import tiny_llama
from support.mutations import LONG, QUICK, Mutation, mutate_bytes, mutate_json, mutations
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


def changed(folder: Path, changes: list[Mutation]) -> Path:
    """Write a copy of the packed folder with these changes of its weights or its config."""
    source = packed_folder()
    weights, config = (source / WEIGHTS).read_bytes(), json.loads((source / "config.json").read_text())
    for change in changes:
        if change.seed % 4:
            weights = _mutated(weights, change)
        else:
            section = mutate_json(config["quantization_config"], change)
            config = {**config, "quantization_config": section}
    folder.mkdir(exist_ok=True)
    (folder / WEIGHTS).write_bytes(weights)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _mutated(file: bytes, change: Mutation) -> bytes:
    """Return the file with a change; a change that needs a header leaves a file without one as it is."""
    try:
        return mutate_bytes(file, change)
    except (ValueError, IndexError, OverflowError):  # an earlier change broke the header
        return file


def test_the_folder_itself_is_accepted(tmp_path: Path) -> None:
    assert try_folder(packed_folder())


def test_mutated_files_are_refused_or_give_what_their_bytes_say(tmp_path: Path) -> None:
    accepted: list[bool] = []
    QUICK(given(changes=mutations())(lambda changes: accepted.append(try_folder(changed(tmp_path / "m", changes)))))()
    assert any(accepted) and not all(accepted)


@pytest.mark.fuzz
def test_many_mutated_files_are_refused_or_give_what_their_bytes_say(tmp_path: Path, record_property: Any) -> None:
    accepted: list[bool] = []
    LONG(given(changes=mutations())(lambda changes: accepted.append(try_folder(changed(tmp_path / "m", changes)))))()
    record_property("mutations", len(accepted))
    record_property("accepted", sum(accepted))


@pytest.mark.parametrize("loader", ["niwaki", "transformers"])
def test_a_broken_record_never_becomes_a_model(loader: str, tmp_path: Path) -> None:
    """transformers fills missing tensors with random numbers, and reads values without a look at them."""
    load = niwaki.load if loader == "niwaki" else AutoModelForCausalLM.from_pretrained
    shutil.copytree(packed_folder(), tmp_path / "m")
    assert load(tmp_path / "m")(torch.arange(4)[None]).logits.isfinite().all()
    rng = random.Random(0)
    for name, tensor in sorted(load_file(packed_folder() / WEIGHTS).items()):
        if name.rpartition(".")[2] not in ("scale_0", "columns", "starts", "places"):
            continue
        for missing in (False, True):
            tensors = load_file(packed_folder() / WEIGHTS)
            if missing:
                del tensors[name]
            else:
                tensor = tensors[name].flatten()
                tensor[rng.randrange(len(tensor))] = 0x7C00 if "scale" in name else 0 if tensor[0] else 255
                tensor[-1] = -1 if tensor.dtype != torch.uint8 else 255
                tensors[name] = tensor.view(tensors[name].shape)
            save_file(tensors, tmp_path / "m" / WEIGHTS, metadata={"format": "pt"})
            with pytest.raises(CheckpointError, match=name.rpartition(".")[0]):
                load(tmp_path / "m")
