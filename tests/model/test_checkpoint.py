"""Reading: what is refused and how it is said."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import niwaki
from niwaki.errors import CheckpointError
from niwaki.model.checkpoint import Checkpoint, cut_to_shards
from niwaki.model.shards import TensorInfo
from support.models import tiny_llama


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "model")


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no model folder at"):
        Checkpoint.open(tmp_path / "nothing")


def test_hub_id_that_cannot_be_fetched() -> None:
    with pytest.raises(CheckpointError, match="could not be fetched as a hub id"):
        Checkpoint.open("nobody/nothing-here")


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        Checkpoint.open(tmp_path)


def test_pickle_only_is_never_loaded(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"not even a pickle")
    with pytest.raises(CheckpointError, match="pickled weights"):
        Checkpoint.open(model)


def test_unreadable_config(model: Path) -> None:
    (model / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be used"):
        Checkpoint.open(model)


def test_quantized_source_is_refused(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="already quantized"):
        Checkpoint.open(model)


@pytest.mark.parametrize("shard", ["../escape.safetensors", "/etc/passwd", "sub/part.safetensors", "weights.bin"])
def test_shard_names_outside_the_folder_are_refused(model: Path, shard: str) -> None:
    index = {"weight_map": {"model.norm.weight": shard}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"plain \.safetensors file name"):
        Checkpoint.open(model)


def test_missing_shard_and_missing_tensor(model: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "gone.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"misses the shard gone\.safetensors"):
        Checkpoint.open(model)
    index = {"weight_map": {"no.such.weight": "model.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"the index lists no\.such\.weight"):
        Checkpoint.open(model)


def test_truncated_shard(model: Path) -> None:
    shard = model / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        Checkpoint.open(model)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_the_tensor_that_is_not_finite_is_named(model: Path, bad: float) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = bad
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint.open(model)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinite"):
        checkpoint.read(checkpoint.tensors)


def test_fingerprint_changes_with_weights_and_config(model: Path) -> None:
    before = Checkpoint.open(model).fingerprint()
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    after = Checkpoint.open(model).fingerprint()
    assert {name for name in before if before[name] != after[name]} == {"model.safetensors"}


def test_dtype_is_that_of_most_bytes(tmp_path: Path) -> None:
    assert Checkpoint.open(tiny_llama(tmp_path / "half", dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_shards_are_cut_by_bytes_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("niwaki.model.checkpoint.SHARD_BYTES", 10)
    tensors = {name: TensorInfo("s", "U8", (size,), size) for name, size in zip("abcde", [6, 4, 11, 1, 9], strict=True)}
    assert cut_to_shards("abcde", tensors) == [["a", "b"], ["c"], ["d", "e"]]
    assert cut_to_shards([], tensors) == []


def test_a_revision_of_the_hub_is_fetched_and_its_commit_recorded(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run a compression of ORG/NAME@REVISION with a stub of the hub."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--org--name" / "snapshots" / commit
    snapshot.parent.mkdir(parents=True)
    model.rename(snapshot)
    asked: list[tuple[str, str | None]] = []

    def fetch(name: str, *, revision: str | None = None, **_: object) -> str:
        asked.append((name, revision))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    for wanted, revision in ("org/name@v1.0", "v1.0"), ("org/name@refs/pr/3", "refs/pr/3"), ("org/name", None):
        niwaki.compress(
            wanted, tmp_path / "out", method="magnitude", target="0.5", device="cpu", overwrite=True
        )  # fmt: skip
        assert asked.pop() == ("org/name", revision)
        record = json.loads((tmp_path / "out/niwaki/run.json").read_text())["model"]
        assert (record["hub_id"], record["revision"]) == ("org/name", commit)


@pytest.mark.parametrize("wrong", ["org/name@", "org@v1", "org/name@v 1", "a/b/c@v1", "@v1"])
def test_a_malformed_hub_id_is_refused_before_any_fetch(wrong: str) -> None:
    with pytest.raises(CheckpointError, match="org/name@REVISION"):
        Checkpoint.open(wrong)
