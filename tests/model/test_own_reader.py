"""Copies that transformers loads for niwaki: no later change of the file reaches them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import modeling_utils

import niwaki
from niwaki.errors import CheckpointError
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.own_reader import own_reader
from niwaki.model.shards import TensorInfo
from niwaki.runtime.load import load_checkpoint
from support.changes import cut, replace, write_in_place, write_with_old_times
from support.models import tiny_llama

SHARD = "model.safetensors"


@pytest.fixture(params=["plain", "packed", "shards"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = tiny_llama(tmp_path / "model", dtype=torch.bfloat16)
    if request.param == "packed":
        niwaki.compress(folder, tmp_path / "out", method="rtn", target="4bit", options={"group": 16}, device="cpu")
        return tmp_path / "out"
    if request.param == "shards":
        transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(
            tmp_path / "cut", max_shard_size="100KB"
        )
        return tmp_path / "cut"
    return folder


def shards_of(model: Path) -> list[Path]:
    return sorted(model.glob("*.safetensors"))


@pytest.mark.parametrize("change", [write_in_place, cut])
def test_a_loaded_model_does_not_follow_its_file(model: Path, change: Callable[[Path], None]) -> None:
    loaded = niwaki.load(model, device="cpu")
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    assert not [line for line in Path("/proc/self/maps").read_text().splitlines() if str(model) in line]
    for path in shards_of(model):
        change(path)
    ids_BT = torch.arange(8)[None]
    assert torch.isfinite(loaded(ids_BT).logits).all()  # a cut map would end the process
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("change", [write_in_place, write_with_old_times, replace, cut])
def test_a_change_during_loading_is_noticed(
    tmp_path: Path, change: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama(tmp_path / "model")
    checkpoint = Checkpoint.open(model)
    read, count = niwaki.model.own_reader.read_run, 0

    def reads(path: Path, run: dict[str, TensorInfo]) -> dict[str, torch.Tensor]:
        nonlocal count
        tensors = read(path, run)
        count += len(tensors)
        if count == len(checkpoint.tensors):  # the last: the log alone can notice it
            change(model / SHARD)
        return tensors

    monkeypatch.setattr("niwaki.model.own_reader.read_run", reads)
    monkeypatch.setattr("niwaki.model.own_reader.RUN_BYTES", 2**10)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        load_checkpoint(checkpoint, device="cpu", hashed=True)
    assert count == len(checkpoint.tensors)


@pytest.mark.parametrize("bound", [{"RUN_BYTES": 1}, {"RUN_BYTES": 5000}, {"RUN_TENSORS": 2}, {}])
def test_tensors_that_are_read_together_are_those_of_the_file(
    tmp_path: Path, bound: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ask for tensors in another order than that of the file, some of them twice."""
    checkpoint = Checkpoint.open(tiny_llama(tmp_path / "model", dtype=torch.bfloat16))
    for name, value in bound.items():
        monkeypatch.setattr(f"niwaki.model.own_reader.{name}", value)
    expected = load_file(checkpoint.folder / SHARD)
    names = sorted(expected, key=lambda name: name[::-1])
    with own_reader(checkpoint.log, hashed=True), modeling_utils.safe_open(checkpoint.folder / SHARD) as file:
        for name in [*names, *names[:3]]:
            assert torch.equal(file.get_tensor(name), expected[name])
    assert len(checkpoint.log.ranges) == len(expected)


def test_what_is_read_twice_must_be_the_same(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model")
    checkpoint = Checkpoint.open(model)
    load_checkpoint(checkpoint, device="cpu", hashed=True)
    assert len(checkpoint.log.ranges) == len(checkpoint.tensors)
    replace(model / SHARD)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        load_checkpoint(checkpoint, device="cpu", hashed=True)


def test_files_of_others_are_opened_by_safetensors(tmp_path: Path) -> None:
    mine, other = tiny_llama(tmp_path / "mine"), tiny_llama(tmp_path / "other", hidden_size=16)
    opener, log = modeling_utils.safe_open, Checkpoint.open(mine).log
    with own_reader(log, hashed=True):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(other)
    assert loaded.config.hidden_size == 16 and not log.ranges and modeling_utils.safe_open is opener


def test_a_transformers_that_opens_otherwise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(tmp_path / "model")
    monkeypatch.delattr(modeling_utils, "safe_open")
    with pytest.raises(CheckpointError, match="opens files of weights in a way that niwaki does not know"):
        niwaki.load(model, device="cpu")
