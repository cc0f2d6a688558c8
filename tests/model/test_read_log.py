"""A model that changes while it is read is noticed, and nothing is published."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import niwaki
from niwaki.errors import CheckpointError
from niwaki.model.checkpoint import Checkpoint
from support.changes import cut, replace, write_in_place, write_with_old_times
from support.models import tiny_llama, write_texts

SHARD = "model.safetensors"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "model")


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


def touch(path: Path) -> None:
    os.utime(path)


def put_copy(path: Path) -> None:
    shutil.copy(path, path.with_name("copy"))
    path.with_name("copy").replace(path)


def touch_tokenizer(path: Path) -> None:
    os.utime(path.with_name("tokenizer.json"))


@pytest.mark.parametrize("same", [touch, put_copy, touch_tokenizer])
def test_the_same_bytes_under_other_times_pass_after_the_read(model: Path, same: Callable[[Path], None]) -> None:
    checkpoint = Checkpoint.open(model)
    checkpoint.read(checkpoint.tensors)
    same(model / SHARD)
    checkpoint.read(checkpoint.tensors)
    checkpoint.log.check()


@pytest.mark.parametrize("change", [touch, put_copy, write_in_place, write_with_old_times, replace])
def test_what_is_read_first_after_a_change_is_refused(model: Path, change: Callable[[Path], None]) -> None:
    """The bytes that were read before may be those of both files, and say nothing of the others."""
    checkpoint = Checkpoint.open(model)
    first, *others = checkpoint.tensors
    checkpoint.read([first])
    change(model / SHARD)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        checkpoint.read(others)


def test_links_and_modes_write_nothing(model: Path, tmp_path: Path) -> None:
    def report(event: str, **fields: Any) -> None:
        if event == "saved":
            (model / SHARD).chmod(0o600 if (model / SHARD).stat().st_mode & 0o077 else 0o644)
            os.link(model / SHARD, tmp_path / str(len(list(tmp_path.iterdir()))))

    niwaki.compress(model, tmp_path / "out", method="magnitude", target="0.5", device="cpu", report=report)
    assert (tmp_path / "out").is_dir()


def test_an_unread_tensor_that_is_copied_belongs_to_the_log(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model")
    checkpoint = Checkpoint.open(model)
    name = min(checkpoint.tensors)
    checkpoint.copy({name: name}, tmp_path / "copy.safetensors")
    write_with_old_times(model / SHARD)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        checkpoint.copy({"last": max(checkpoint.tensors)}, tmp_path / "copy.safetensors")


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
