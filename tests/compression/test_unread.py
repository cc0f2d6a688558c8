"""Tensors that no module reads, in results: copied byte for byte, named, counted, or left out when asked for."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import niwaki
from niwaki.compression.run_record import read_run
from niwaki.compression.verify import check_weights
from niwaki.errors import InputError
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.decoder import Decoder
from support.models import CPU, tiny_llama, write_texts

MTP = "model.layers.4."
GROUPS = {method: {"options": {"rtn.group": 0}} for method in ("rtn", "wanda+rtn")}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_texts(tmp_path_factory.mktemp("texts") / "text.jsonl"))


@pytest.fixture(scope="module")
def more() -> dict[str, Tensor]:
    """Return a layer for the token after the next, a tower, a counter and fp8 scales."""
    generator = torch.Generator().manual_seed(3)
    return {
        f"{MTP}eh_proj.weight": torch.randn(32, 64, generator=generator),
        f"{MTP}mlp.up_proj.weight": torch.randn(48, 32, generator=generator),
        "vision_tower.weight_scale": torch.randn(16, generator=generator).to(torch.float8_e4m3fn),
        "steps": torch.arange(3),
        "not_finite": torch.tensor([float("nan")]),
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, more: dict[str, Tensor]) -> Path:
    folder = tiny_llama(tmp_path_factory.mktemp("models") / "m", blocks=4)
    path = folder / "model.safetensors"
    save_file({**load_file(path), **more}, path, {"format": "pt"})
    return folder


def compress(model: Path, out: Path, text: str, method: str = "wanda", target: str = "0.5", **fields: Any) -> Path:
    calibration = {"files": [text], "samples": 8, "seq_len": 32}
    niwaki.compress(
        model, out, method=method, target=target, calibration=calibration, **GROUPS.get(method, {}), **fields
    )
    return out


def stored(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of all files, which the index must list."""
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    found = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert weight_map.keys() == found.keys() and set(weight_map.values()) == {
        p.name for p in folder.glob("*.safetensors")
    }
    return found


def same(found: Tensor, wanted: Tensor) -> bool:
    return found.dtype == wanted.dtype and torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.parametrize(("method", "target"), [("wanda", "0.5"), ("rtn", "4bit"), ("wanda+rtn", "0.5+4bit")])
def test_they_are_copied_unchanged_and_named(
    method: str, target: str, model: Path, more: dict[str, Tensor], text: str, tmp_path: Path
) -> None:
    said: list[str] = []

    def report(event: str, **fields: Any) -> None:
        said.extend([fields["message"]] if event == "warning" else [])

    out = compress(model, tmp_path / "out", text, method, target, report=report)
    found = stored(out)
    assert all(same(found[name], tensor) for name, tensor in more.items())
    record = read_run(out)
    assert record.unread is not None and record.unread.kept and record.unread.tensors == len(more)
    assert record.unread.bytes == sum(tensor.nbytes for tensor in more.values())
    assert record.unread.groups["model.layers.4"].tensors == 2
    (message,) = [one for one in said if "no place in the model" in one]
    assert "5 tensors" in message and "model.layers.4 (2 tensors, 0.0 MB)" in message and "vision_tower" in message
    assert "model.layers.4" in (out / "README.md").read_text()
    assert message in (out / "niwaki/events.jsonl").read_text()
    assert check_weights(out) == record.result.bytes
    niwaki.generate(out, "The", max_new_tokens=2, device="cpu")


def test_a_changed_byte_of_them_is_found(model: Path, text: str, tmp_path: Path) -> None:
    out = compress(model, tmp_path / "out", text)
    shard = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]["steps"]
    content = (out / shard).read_bytes()
    (out / shard).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(niwaki.errors.CheckpointError, match=shard):
        check_weights(out)


def test_drop_unused_leaves_them_out_and_says_so(
    model: Path, more: dict[str, Tensor], text: str, tmp_path: Path
) -> None:
    kept, out = compress(model, tmp_path / "kept", text), compress(model, tmp_path / "out", text, drop_unused=True)
    found = stored(out)
    assert not found.keys() & more.keys()
    assert all(same(found[name], tensor) for name, tensor in stored(kept).items() if name not in more)
    record = read_run(out)
    assert record.unread is not None and not record.unread.kept and record.unread.tensors == len(more)
    assert "left out" in (out / "README.md").read_text()


def test_they_take_no_part_in_any_number(model: Path, text: str, tmp_path: Path) -> None:
    plain = tiny_llama(tmp_path / "plain", blocks=4)
    found, wanted = (niwaki.evaluate(str(folder), data=text, seq_len=32, device="cpu") for folder in (model, plain))
    assert found["perplexity"] == wanted["perplexity"]


@pytest.mark.parametrize(("method", "target"), [("comp", "0.3"), ("shortgpt", "0.3")])
def test_layers_behind_removed_blocks_move_down(
    method: str, target: str, model: Path, more: dict[str, Tensor], text: str, tmp_path: Path
) -> None:
    options = {"try_heads": 1, "try_blocks": 2} if method == "comp" else {}
    out = compress(model, tmp_path / "out", text, method, target, options=options)
    left = json.loads((out / "config.json").read_text())["num_hidden_layers"]
    assert method == "comp" or left < 4
    found = stored(out)
    for name, tensor in more.items():
        assert same(found[name.replace(MTP, f"model.layers.{left}.")], tensor)
    assert len(Decoder(Checkpoint.open(out), CPU)) == left


def test_a_resume_copies_what_is_missing_and_ends_with_the_same_bytes(
    model: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from niwaki.compression.result_folder import Writer

    whole, out = compress(model, tmp_path / "whole", text), tmp_path / "out"

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Writer, "copy", killed)
        with pytest.raises(KeyboardInterrupt):
            compress(model, out, text)
    compress(model, out, text, resume=True)
    names = sorted(path.name for path in whole.glob("*.safetensors"))
    assert names == sorted(path.name for path in out.glob("*.safetensors"))
    assert all((whole / name).read_bytes() == (out / name).read_bytes() for name in names)


def test_plan_counts_their_bytes(model: Path, more: dict[str, Tensor]) -> None:
    nbytes = sum(tensor.nbytes for tensor in more.values())
    for method, target in (("rtn", "4bit"), ("comp", "0.3")):
        kept = niwaki.plan(model, method=method, target=target, gpu="cpu", **GROUPS.get(method, {}))
        assert kept["unread"]["bytes"] == nbytes and any("no place in the model" in one for one in kept["warnings"])
        dropped = niwaki.plan(
            model, method=method, target=target, gpu="cpu", drop_unused=True, **GROUPS.get(method, {})
        )
        assert nbytes <= kept["output_bytes"] - dropped["output_bytes"] < nbytes + 1024, "with their header"
        assert kept["output_bits"] == pytest.approx(dropped["output_bits"], rel=1e-3), "headers count"


def test_methods_that_link_the_files_cannot_leave_them_out(model: Path, text: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="shadow keeps the files of the weights as they are: leave drop_unused out"):
        compress(model, tmp_path / "out", text, "shadow", "0.5", drop_unused=True)
