"""The script that runs peers keeps what they decode, and counts their bits."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils.import_utils import is_hqq_available

from benchmarks.quality import peers
from niwaki.cli.demo import sapling


class Quantizer:
    """Fake of HQQ's quantizer: signs as bytes, one scale and one zero point for eight weights."""

    @staticmethod
    def quantize(weight_OI: Tensor, device: str, group_size: int, **options: Any) -> tuple[Tensor, dict[str, Any]]:
        groups_GK = weight_OI.reshape(-1, group_size)
        scale_G1 = groups_GK.abs().mean(1, keepdim=True)
        meta = {"scale": scale_G1, "zero": torch.zeros_like(scale_G1), "shape": weight_OI.shape}
        return (groups_GK > 0).to(torch.uint8), meta

    @staticmethod
    def dequantize(codes_GK: Tensor, meta: dict[str, Any]) -> Tensor:
        assert meta["compute_dtype"] is torch.float32 and meta["scale"].dtype is torch.float32
        return ((2 * codes_GK.float() - 1 - meta["zero"]) * meta["scale"]).reshape(meta["shape"])


@pytest.fixture
def fake_hqq(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a fake of HQQ where the script imports it, after transformers has noted that there is none."""
    is_hqq_available()
    core: Any = ModuleType("hqq.core.quantize")
    core.Quantizer = Quantizer
    core.BaseQuantizeConfig = lambda nbits, group_size: {"weight_quant_params": {"group_size": group_size}}
    for name, module in {"hqq": ModuleType("hqq"), "hqq.core": ModuleType("hqq.core"), core.__name__: core}.items():
        monkeypatch.setitem(sys.modules, name, module)


def test_a_peer_leaves_its_decoded_matrices_in_the_dense_model(
    fake_hqq: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    windows, out = tmp_path / "windows.safetensors", tmp_path / "out"
    save_file({"ids": torch.zeros(2, 8, dtype=torch.int64)}, windows)
    monkeypatch.setattr(peers, "version", lambda name: "1.0")
    case = '{"peer": "hqq", "bits": 1, "group": 8}'
    monkeypatch.setattr(sys, "argv", ["peers", str(sapling()), str(windows), str(out), "--case", case])
    peers.main()
    printed = capsys.readouterr().out.splitlines()[-1]
    assert '"bits": 12.0' in printed  # 8 bits of a byte, and 2 * 16 bits for eight weights
    dense, found = load_file(sapling() / "model.safetensors"), load_file(out / "model.safetensors")
    assert (out / "tokenizer.json").is_file()
    for name, weight in dense.items():
        if name.endswith("proj.weight"):
            scale_G1 = weight.float().reshape(-1, 8).abs().mean(1, keepdim=True).half().float()
            assert torch.equal(found[name].reshape(-1, 8).abs(), scale_G1.expand(-1, 8)), name
        else:
            assert torch.equal(found[name], weight.float()), name


def test_a_matrix_that_a_peer_leaves_out_is_an_error(tmp_path: Path) -> None:
    weights = peers.dense_weights(peers.load(str(sapling()), "cpu"))
    weights.pop("model.layers.3.mlp.up_proj")
    with pytest.raises(AssertionError, match=r"got none for .*layers\.3\.mlp\.up_proj"):
        peers.write(str(sapling()), weights, tmp_path)


def test_bits_of_a_grid_count_zero_points_where_there_are_some() -> None:
    assert peers.grid_bits(4, 64, sym=True) == 4.25
    assert peers.grid_bits(4, 64, sym=False) == 4.3125
