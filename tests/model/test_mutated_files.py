"""Files of strangers: a mutated safetensors file or config is refused with one line, or gives what its bytes say.

How many mutations are tried: see `tests/formats/test_mutated_records.py`.
"""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import niwaki
from niwaki.errors import CheckpointError
from support.mutations import LONG, QUICK, Mutation, mutate_bytes, mutate_json, mutations
from support.packed_folders import WEIGHTS, packed_folder, try_folder


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
    """Refuse what transformers fills with random numbers, and values that it reads without a look at them."""
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
