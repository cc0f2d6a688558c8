"""A model that changes while it is read is noticed, and nothing is published."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import niwaki
from niwaki.errors import CheckpointError
from niwaki.model.checkpoint import Checkpoint
from support.models import tiny_llama, write_texts

SHARD = "model.safetensors"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "model")


def write_in_place(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-10, os.SEEK_END)
        file.write(b"\x01\x02")


def write_with_old_times(path: Path) -> None:
    status = path.stat()
    write_in_place(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def replace(path: Path) -> None:
    tensors = {name: tensor + 0.5 for name, tensor in load_file(path).items()}
    save_file(tensors, path.with_name("new"), metadata={"format": "pt"})
    path.with_name("new").replace(path)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def remove(path: Path) -> None:
    path.unlink()


def change_config(path: Path) -> None:
    config = path.with_name("config.json")
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-02'))


def change_tokenizer(path: Path) -> None:
    path.with_name("tokenizer.json").write_text(path.with_name("tokenizer.json").read_text() + " ")


CHANGES = [write_in_place, write_with_old_times, replace, cut, remove, change_config, change_tokenizer]
RUNS: list[dict[str, Any]] = [{"method": "magnitude", "target": "0.5"}, {"method": "sparsegpt", "target": "2:4"}]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("settings", RUNS, ids=["without text", "with text"])
def test_a_change_during_a_run_publishes_nothing(
    model: Path, tmp_path: Path, change: Callable[[Path], None], settings: dict[str, Any]
) -> None:
    text = str(write_texts(tmp_path / "text.jsonl"))
    done = False

    def report(event: str, **fields: Any) -> None:
        nonlocal done
        if event == "saved" and not done:
            done = True
            change(model / SHARD)

    if settings["method"] == "sparsegpt":
        settings = settings | {"calibration": {"files": (text,), "samples": 6, "seq_len": 16}}
    with pytest.raises(CheckpointError, match="changed while it was read"):
        niwaki.compress(model, tmp_path / "out", device="cpu", report=report, **settings)
    assert done and not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_the_same_bytes_under_other_times_pass(model: Path, tmp_path: Path) -> None:
    def report(event: str, **fields: Any) -> None:
        if event == "saved":
            os.utime(model / SHARD)
            shutil.copy(model / SHARD, tmp_path / "copy")
            (tmp_path / "copy").replace(model / SHARD)
            os.utime(model / "tokenizer.json")

    niwaki.compress(model, tmp_path / "out", method="magnitude", target="0.5", device="cpu", report=report)
    assert (tmp_path / "out").is_dir()


def test_two_reads_of_one_tensor_must_agree(model: Path) -> None:
    checkpoint = Checkpoint.open(model)
    names = list(checkpoint.tensors)
    checkpoint.read(names)
    checkpoint.log.check()
    replace(model / SHARD)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        checkpoint.read(names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_values_are_those_of_safetensors(tmp_path: Path, dtype: torch.dtype) -> None:
    checkpoint = Checkpoint.open(tiny_llama(tmp_path / "model", dtype=dtype))
    read, wanted = checkpoint.read(checkpoint.tensors), load_file(tmp_path / "model" / SHARD)
    assert read.keys() == wanted.keys()
    assert all(torch.equal(read[name], wanted[name]) and read[name].dtype == dtype for name in wanted)
