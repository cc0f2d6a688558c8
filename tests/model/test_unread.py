"""Tensors that no module reads: what they are, their groups, and their names after blocks are gone."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from niwaki.errors import CheckpointError
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.decoder import Decoder
from niwaki.model.unread import Group, Unread
from support.models import CPU, tiny_llama


def with_more(folder: Path, more: dict[str, torch.Tensor]) -> Path:
    """Add tensors to the file of a model, and return its folder."""
    path = folder / "model.safetensors"
    save_file({**load_file(path), **more}, path, {"format": "pt"})
    return folder


def test_what_has_no_place_is_grouped_by_prefix(tmp_path: Path) -> None:
    more = {
        "model.layers.3.eh_proj.weight": torch.ones(4, 8),
        "model.layers.3.mlp.up_proj.weight": torch.ones(2, 8),
        "vision_tower.blocks.0.weight": torch.ones(3),
        "model.visual.patch.weight": torch.ones(2, dtype=torch.bfloat16),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "steps": torch.zeros(1, dtype=torch.int64),
    }
    decoder = Decoder(Checkpoint.open(with_more(tiny_llama(tmp_path / "m"), more)), CPU)
    assert decoder.unread.groups == {
        "model.layers.3": Group(2, 4 * 4 * 8 + 4 * 2 * 8),
        "vision_tower": Group(1, 12),
        "model.visual": Group(1, 4),
        "model.layers.*.self_attn.rotary_emb": Group(2, 32),
        "steps": Group(1, 8),
    }
    assert sorted(decoder.unread.names) == sorted(more) and decoder.unread.nbytes == 192 + 12 + 4 + 32 + 8
    read = {name for index in (None, 0, 1, 2) for name in decoder.disk_names(index)}
    assert read == set(decoder.checkpoint.tensors) - set(more)


def test_layers_behind_the_blocks_move_with_their_numbers() -> None:
    unread = Unread((), {}, ("model.layers",))
    names = ["model.layers.4.w", "model.layers.1.inv_freq", "model.layers.2.inv_freq", "tower.layers.4.w", "mtp.w"]
    assert unread.renamed(names, (0, 2)) == {
        "model.layers.2.w": "model.layers.4.w",
        "model.layers.0.inv_freq": "model.layers.1.inv_freq",
        "tower.layers.4.w": "tower.layers.4.w",
        "mtp.w": "mtp.w",
    }


def test_a_copy_keeps_every_dtype_byte_for_byte(tmp_path: Path) -> None:
    values = torch.arange(24, dtype=torch.uint8)
    kinds = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.int64, torch.bool, torch.complex64)
    more = {f"extra.{number}": (values[:8] % 2 if kind is torch.bool else values.clone()).view(kind)
            for number, kind in enumerate(kinds)}  # fmt: skip
    more["extra.empty"] = torch.zeros(0, 3)
    checkpoint = Checkpoint.open(with_more(tiny_llama(tmp_path / "m"), more))
    sha256 = checkpoint.copy({f"new.{name}": name for name in more}, tmp_path / "copy.safetensors")
    copied = load_file(tmp_path / "copy.safetensors")
    assert len(sha256) == 64 and copied.keys() == {f"new.{name}" for name in more}
    for name, tensor in more.items():
        found = copied[f"new.{name}"]
        assert found.dtype == tensor.dtype and found.shape == tensor.shape
        assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))


def test_a_dtype_that_torch_does_not_know_is_copied(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "m")
    header = b'{"six.bits":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}}'.ljust(72)
    (folder / "more.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"abc")
    names = Checkpoint.open(folder).tensors
    (folder / "model.safetensors").rename(folder / "first.safetensors")
    weight_map = "".join(f'"{name}":"first.safetensors",' for name in names)
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map":{' + weight_map + '"six.bits":"more.safetensors"}}'
    )
    checkpoint = Checkpoint.open(folder)
    checkpoint.copy({"six.bits": "six.bits"}, tmp_path / "copy.safetensors")
    assert (tmp_path / "copy.safetensors").read_bytes().endswith(b"abc")
    assert Decoder(checkpoint, CPU).unread.groups == {"six": Group(1, 3)}


def test_a_weight_in_fp8_is_refused_by_name(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    folder = tiny_llama(tmp_path / "m")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight is stored as F8_E4M3: expected F32"):
        Decoder(Checkpoint.open(folder), CPU)
