"""A GGUF read back: every tensor, every type, every byte. llama.cpp itself: test_llama_cpp.py."""

import resource
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind

import niwaki
from niwaki.cli.app import main
from niwaki.cli.demo import sapling
from niwaki.compression.recover import recover
from niwaki.errors import InputError, NumericalError, OutputError
from niwaki.exporters.gguf_file import TYPES
from support.gguf_files import CONFIGS, GGUF_SHAPE, fields, gguf_name, in_checkpoint_order, read, save, tensors
from support.models import file_bytes, tiny_llama, weights_of, write_texts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_is_the_one_of_the_checkpoint(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config = CONFIGS[name]
    model = save(config, tmp_path / "model", dtype)
    record = niwaki.export(model, tmp_path / "dest", to="gguf")
    found, wanted = tensors(tmp_path / "dest"), weights_of(model)
    assert sorted(found) == sorted(map(gguf_name, wanted))
    for source, tensor in wanted.items():
        assert torch.equal(in_checkpoint_order(source, found[gguf_name(source)], config), tensor.float()), source
    stored = Kind.F32 if dtype == torch.float32 else Kind.F16  # a float16 holds every bf16 that is not tiny or huge
    for tensor in read(tmp_path / "dest").tensors:
        assert tensor.tensor_type is (stored if len(tensor.shape) == 2 else Kind.F32), tensor.name
    assert record["export"]["bits"] == 8 * dtype.itemsize and not record["export"]["fallbacks"]
    assert sum(counts["bytes"] for counts in record["export"]["types"].values()) == sum(
        tensor.n_bytes for tensor in read(tmp_path / "dest").tensors
    )
    assert record["export"]["bytes"] == (tmp_path / "dest/model.gguf").stat().st_size


def test_the_types_are_those_that_the_library_writes() -> None:
    def writes(kind: Kind) -> bool:
        try:
            gguf.quants.quantize(np.ones((1, 256), np.float32), kind)
        except NotImplementedError:
            return False
        return True

    assert {kind.name.lower() for kind in Kind if writes(kind)} == set(TYPES)


@pytest.mark.parametrize("type", TYPES)
def test_types_and_bytes(type: str, tmp_path: Path) -> None:
    """512 columns are whole blocks for every type; 96 are for those of 32, and 16 for none."""
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 32, "sliding_window": None}
    config = transformers.MistralConfig(**GGUF_SHAPE | {"hidden_size": 512, "intermediate_size": 16} | heads)
    model = save(config, tmp_path / "model")
    record = niwaki.export(model, tmp_path / "dest", to="gguf", type=type)["export"]
    kind = Kind[type.upper()]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    other = []
    for tensor in read(tmp_path / "dest").tensors:
        columns, rows = int(tensor.shape[0]), tensor.n_elements // int(tensor.shape[0])
        if len(tensor.shape) == 1:
            assert tensor.tensor_type is Kind.F32
        elif columns % block:
            assert tensor.tensor_type is Kind.F16
            other.append({"tensor": tensor.name, "row": columns, "type": "f16", "bytes": 2 * rows * columns})
        else:
            assert tensor.tensor_type is kind and tensor.n_bytes == rows * columns // block * size
    assert record["fallbacks"] == other
    assert len(other) == {1: 0, 32: 2, 256: 4}[block]
    assert bool(record["notes"]) == bool(other)
    assert fields(tmp_path / "dest")["general.file_type"] == {"f32": 0, "mxfp4": 38}.get(
        type, getattr(gguf.LlamaFileType, f"MOSTLY_{type.upper()}", None)
    )


def test_eight_bits_err_by_half_a_step_at_most(tmp_path: Path) -> None:
    model = save(CONFIGS["llama"], tmp_path / "model")
    niwaki.export(model, tmp_path / "dest", to="gguf", type="q8_0")
    found = tensors(tmp_path / "dest")
    for source, weight in weights_of(model).items():
        if weight.ndim == 2:
            error = (
                (in_checkpoint_order(source, found[gguf_name(source)], CONFIGS["llama"]) - weight).abs().view(-1, 32)
            )
            step = weight.abs().view(-1, 32).amax(-1, keepdim=True) / 127
            assert (error <= 0.5 * step + 127 * 2**-11 * step).all(), source  # the scale is a float16


def test_biases_of_flap_and_zeros_of_wanda_arrive(tmp_path: Path) -> None:
    text = str(write_texts(tmp_path / "text.jsonl"))
    model = save(CONFIGS["llama"], tmp_path / "model")
    for method in ("flap", "wanda"):
        out, dest = tmp_path / method, tmp_path / f"{method}-gguf"
        niwaki.compress(
            model, out, method=method, target="0.5", device="cpu",
            calibration={"files": text, "samples": 4, "seq_len": 32},
        )  # fmt: skip
        niwaki.export(out, dest, to="gguf", type="q8_0")
        found = tensors(dest)
        for source, tensor in weights_of(out).items():
            values = in_checkpoint_order(source, found[gguf_name(source)], CONFIGS["llama"])
            assert not values[tensor == 0].any(), source
            assert tensor.ndim == 2 or torch.equal(values, tensor.float()), source
        assert any(name.endswith("ffn_down.bias") for name in found) == (method == "flap")


def test_codes_are_decoded_and_the_record_says_so(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model", hidden_size=64, intermediate_size=96)
    out = tmp_path / "four"
    niwaki.compress(model, out, method="rtn", target="4bit", options={"group": 32}, device="cpu")
    record = niwaki.export(out, tmp_path / "dest", to="gguf", type="f32")
    config, stored = transformers.AutoConfig.from_pretrained(model), tensors(tmp_path / "dest")
    for source, tensor in weights_of(out).items():
        assert torch.equal(in_checkpoint_order(source, stored[gguf_name(source)], config), tensor.float()), source
    assert record["export"]["notes"] == ["21 matrices of codes are decoded, since GGUF has other codes"]
    assert "as codes, in the format" not in (tmp_path / "dest/README.md").read_text()


def test_a_model_that_niwaki_did_not_make(tmp_path: Path) -> None:
    record = niwaki.export(sapling(), tmp_path / "dest", to="gguf", type="f16")
    assert sorted(record) == ["export", "files", "format", "model"]
    assert record["export"]["vocabulary"] == {"model": "gpt2", "pre": "gpt-2"}
    card = (tmp_path / "dest/README.md").read_text()
    assert "# sapling, gguf" in card and f"{record['export']['bytes']:,} bytes" in card
    before = file_bytes(tmp_path / "dest")
    niwaki.export(sapling(), tmp_path / "dest", to="gguf", type="f16", overwrite=True)
    assert file_bytes(tmp_path / "dest") == before
    with pytest.raises(OutputError, match="already exists"):
        niwaki.export(sapling(), tmp_path / "dest", to="gguf")


def test_a_recovered_model(tmp_path: Path) -> None:
    """Export a record that is not of a compression."""
    text, model = write_texts(tmp_path / "text.jsonl", count=20), tmp_path / "model"
    tiny_llama(model, dtype=torch.bfloat16)
    niwaki.compress(model, tmp_path / "pruned", method="magnitude", target="0.5", device="cpu")
    settings: dict[str, Any] = {"steps": 8, "batch": 4, "seq_len": 48, "rate": 0.02, "device": "cpu"}
    recover(tmp_path / "pruned", tmp_path / "out", data=str(text), **settings)
    record = niwaki.export(tmp_path / "out", tmp_path / "dest", to="gguf")
    config, stored = transformers.AutoConfig.from_pretrained(model), tensors(tmp_path / "dest")
    for source, tensor in weights_of(tmp_path / "out").items():
        assert torch.equal(in_checkpoint_order(source, stored[gguf_name(source)], config), tensor.float()), source
    assert record["result"]["zeros_frac"] == 0.5 and record["recover"]["steps"] == 8
    assert "# pruned, gguf" in (tmp_path / "dest/README.md").read_text()


def test_the_command_line_prints_bytes_and_notes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama(tmp_path / "model")  # rows of 48
    command = ["niwaki", "export", str(model), str(tmp_path / "dest"), "--to", "gguf", "--type", "q8_0"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stopped:
        main()
    printed = capsys.readouterr()
    assert not stopped.value.code and "gguf llama q8_0, 8.621 true bits" in printed.out
    assert "note: 3 matrices whose rows do not divide into blocks of q8_0 are f16: 9,216 bytes" in printed.err


def test_a_missing_library_and_a_failure_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from niwaki.exporters import gguf_file

    model = tiny_llama(tmp_path / "model")
    encoded, calls = gguf_file._encoded, list[str]()

    def failing(name: str, *rest: Any) -> np.ndarray:
        calls.append(name)
        if len(calls) == 3:
            raise NumericalError("stop")
        return encoded(name, *rest)

    with monkeypatch.context() as patch, pytest.raises(NumericalError, match="stop"):
        patch.setattr(gguf_file, "_encoded", failing)
        niwaki.export(model, tmp_path / "dest", to="gguf")
    assert len(calls) == 3 and not list(tmp_path.glob("dest*"))
    monkeypatch.delitem(sys.modules, "niwaki.exporters.gguf_file")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"to gguf needs the package gguf: pip install gguf"):
        niwaki.export(model, tmp_path / "dest", to="gguf")


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    """numpy's own `tofile` would say how many bytes it wrote, and not why it stopped."""
    model, before = tiny_llama(tmp_path / "model"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, before[1]))
    try:
        with pytest.raises(OutputError, match=r"model\.gguf: File too large\. Free space"):
            niwaki.export(model, tmp_path / "dest", to="gguf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
