"""Models that are pruned and quantized in one record: their size, loading, and every reader of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import niwaki
from niwaki.cli.demo import sapling
from niwaki.compression.inspect import inspect
from niwaki.compression.why import why
from niwaki.errors import InputError
from niwaki.runtime.sparse_linear import SparseLinear
from support.models import run, tiny_llama, write_texts

PROMISED = {"0.5": 0.57, "2:4": 0.57, "2:4+4bit": 0.20}  # of the bf16 bytes of the decoder's weights


def in_blocks(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for name, tensor in tensors.items() if ".layers." in name)


def shards(out: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for shard in sorted(out.glob("*.safetensors")) for name, tensor in load_file(shard).items()}


@pytest.mark.parametrize("target", PROMISED)
def test_file_and_memory_of_the_sapling_are_as_small_as_promised(target: str, tmp_path: Path) -> None:
    method = "magnitude+rtn" if "+" in target else "magnitude"
    niwaki.compress(sapling(), tmp_path / "out", method=method, target=target, pack="auto", device="cpu")
    dense = in_blocks(shards(sapling()))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    found = {"file": in_blocks(shards(tmp_path / "out")), "memory": in_blocks(loaded.state_dict())}
    assert {name: nbytes / dense <= PROMISED[target] for name, nbytes in found.items()} == {
        "file": True,
        "memory": True,
    }
    assert sum(isinstance(module, SparseLinear) for module in loaded.modules()) == 56


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_texts(tmp_path_factory.mktemp("text") / "text.jsonl"))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, text: str) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("both")
    model = tiny_llama(
        folder / "model", blocks=2, dtype=torch.bfloat16, hidden_size=64, intermediate_size=96, attention_bias=True
    )
    for pack in ("auto", "codes", "none"):
        niwaki.compress(
            model, folder / pack, method="sparsegpt+gptq", target="2:4+4bit", pack=pack, device="cpu",
            options={"gptq.group": 32}, calibration={"files": (text,), "samples": 4, "seq_len": 16},
        )  # fmt: skip
    return {pack: folder / pack for pack in ("auto", "codes", "none")}


def test_three_ways_of_storing_hold_the_same_weights(results: dict[str, Path], text: str) -> None:
    kinds = {}
    for pack, out in results.items():
        lines = [json.loads(line) for line in (out / "niwaki/blocks.jsonl").read_text().splitlines()]
        kinds[pack] = {
            next((name for name in ("sparse", "parts") if name in line.get("stored", ())), "dense") for line in lines
        }
    assert kinds == {"auto": {"sparse"}, "codes": {"parts"}, "none": {"dense"}}
    assert in_blocks(shards(results["auto"])) < in_blocks(shards(results["codes"])) < in_blocks(shards(results["none"]))
    found = [
        niwaki.evaluate(out, data=[text], max_tokens=200, seq_len=32, device="cpu")["perplexity"]
        for out in results.values()
    ]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_transformers_loads_generates_and_saves(dtype: torch.dtype, results: dict[str, Path], tmp_path: Path) -> None:
    packed, plain = (AutoModelForCausalLM.from_pretrained(results[pack], dtype=dtype) for pack in ("auto", "codes"))
    ids = torch.arange(10)[None]
    for tokens in (ids, torch.arange(320).view(8, 40)):
        found, wanted = (each(tokens).logits.detach().float() for each in (packed, plain))
        assert float((found - wanted).norm() / wanted.norm()) < (5e-3 if dtype == torch.float32 else 0.05)
    assert packed.generate(ids, max_new_tokens=8, do_sample=False).shape == (1, 18)
    packed.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=dtype)
    assert torch.equal(packed(ids).logits, again(ids).logits)


def test_card_inspection_and_reasons_tell_of_both(results: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    card = (results["auto"] / "README.md").read_text()
    assert "codes of the weights that are left" in card and "target `2:4+4bit`" in card
    assert "- pruned" in card and "- quantized" in card
    found = inspect(results["auto"])
    assert found["kind"] == "pruned and quantized" and found["measure"] == "bits"
    assert [line.partition(":")[0] for line in found["methods"]] == ["sparsegpt", "gptq"]
    reason = why(results["auto"], "1.mlp.up_proj")
    assert reason["chosen_by"].startswith("pruned first; what was left is rounded to codes. sparsegpt: ")
    assert reason["errors"]["error_before_update"] > 0 and reason["target"] == "2:4+4bit"
    code, out, _ = run(capsys, "inspect", results["auto"])
    assert code == 0 and "pruned and quantized, sparsegpt+gptq 2:4+4bit" in out


def test_the_commands_plan_and_generate_take_it(results: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    model = results["auto"].parent / "model"
    code, out, error = run(
        capsys, "plan", model, "--method", "magnitude+rtn", "--target", "2:4+4bit", "--pack", "auto", "--set",
        "rtn.group=32", "--gpu", "h100",
    )  # fmt: skip
    assert code == 0, error
    assert "magnitude+rtn 2:4+4bit" in out
    code, out, error = run(capsys, "generate", results["auto"], "The", "--max-new-tokens", 3, "--device", "cpu")
    assert code == 0 and out.strip(), error


def test_what_cannot_take_it_says_what_to_do(results: dict[str, Path], tmp_path: Path) -> None:
    refused: list[tuple[str, str]] = [
        ("compressed-tensors", "stored as nonzeros"),
        ("onnx", "compress with --pack none"),
    ]
    for to, message in refused:
        with pytest.raises(InputError, match=message) as raised:
            niwaki.export(results["auto"], tmp_path / "out", to=to)
        assert "\n" not in str(raised.value) and not list(tmp_path.glob("out*"))
    done: dict[str, Any] = niwaki.export(results["codes"], tmp_path / "out", to="compressed-tensors")
    assert done["export"]["format"] == "pack-quantized"  # with the codes of zeros in place
