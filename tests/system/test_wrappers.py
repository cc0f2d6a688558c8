"""Wrappers end to end: compress the text model, keep the towers, load with every class that knows the type."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import niwaki
from niwaki.data.documents import read_texts
from niwaki.data.texts import evaluation_windows
from niwaki.errors import NiwakiError
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.decoder import Decoder
from niwaki.model.hf import auto_class
from support.models import CPU, write_texts
from support.wrappers import QWEN_VISION, ROPE, TEXT, rename, wrappers, write

RECIPES: dict[str, dict[str, Any]] = {
    "wanda": {"method": "wanda", "target": "2:4", "pack": "auto"},
    "gptq": {"method": "gptq", "target": "4bit", "options": {"group": 16}, "embeddings": "4bit"},
}
IDS = torch.arange(1, 20)[None]


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for shard in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(shard).items()}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_texts(tmp_path_factory.mktemp("text") / "text.jsonl"))


def walked(decoder: Decoder) -> Tensor:
    """Return the logits of IDS, block by block."""
    x_BTD, calls = decoder.embed(IDS)
    for index in range(len(decoder)):
        block = decoder.load(index)
        x_BTD = block.run(calls[index], x_BTD)
        block.release()
    return decoder.logits(IDS, x_BTD)


def compressed(folder: Path, out: Path, text: str, **recipe: Any) -> dict[str, Any]:
    calibration = {"files": (text,), "samples": 4, "seq_len": 16}
    return niwaki.compress(folder, out, device="cpu", calibration=calibration, **recipe)


@pytest.mark.parametrize("method", RECIPES)
@pytest.mark.parametrize("name", ["gemma3", "gemma4", "llava", "mistral3", "qwen2_5_vl", "qwen3_vl"])
def test_the_text_model_is_compressed_and_the_towers_stay(name: str, method: str, text: str, tmp_path: Path) -> None:
    folder, out = write(wrappers()[name], tmp_path / "m", torch.bfloat16), tmp_path / "out"
    record = compressed(folder, out, text, **RECIPES[method])
    assert record["result"]["packed"] == record["result"]["matrices"] == 2 * 7 + 2 * 2 * (name == "gemma4")
    source, result, decoder = stored(folder), stored(out), Decoder(Checkpoint.open(folder), CPU)
    towers = decoder.tower_names
    assert towers and all(torch.equal(source[tower], result[tower]) for tower in towers)
    assert sum(record["towers"].values()) == sum(source[tower].nbytes for tower in towers)
    model = niwaki.load(out, device="cpu")
    assert [type(model).__name__] == decoder.checkpoint.config.architectures
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, auto_class(decoder.checkpoint.config).from_pretrained(out)(IDS).logits)
        wanted = niwaki.load(out, device="cpu", dtype=torch.float32)(IDS).logits
    logits = walked(Decoder(Checkpoint.open(out), CPU))
    assert (logits - wanted).norm() < 0.03 * wanted.norm()  # decoded codes are rounded to bfloat16 once more
    assert (walked(decoder) - wanted).norm() > 0.1 * wanted.norm()
    assert niwaki.generate(out, "the", max_new_tokens=3, device="cpu").startswith("the")
    found = niwaki.evaluate(out, data=text, seq_len=16, max_tokens=64, device="cpu")
    assert all(1 < value < 1e6 for value in found["perplexity"].values())


def test_evaluation_of_a_wrapper_is_that_of_transformers(text: str, tmp_path: Path) -> None:
    folder = write(wrappers()["qwen2_vl"], tmp_path / "m")
    ((_, found),) = niwaki.evaluate(folder, data=text, seq_len=16, max_tokens=64, device="cpu")["perplexity"].items()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    ids_ST = evaluation_windows(read_texts([text]), tokenizer, seq_len=16, max_tokens=64)
    with torch.no_grad():
        logits_STV = model(ids_ST, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits_STV[:, :-1].flatten(0, 1), ids_ST[:, 1:].flatten())
    assert found == pytest.approx(float(loss.exp()), rel=1e-5)


def test_the_old_names_of_a_wrapper_are_kept(text: str, tmp_path: Path) -> None:
    """Read older checkpoints, which have the blocks at `model.layers` and the tower at `visual`."""
    names = {"model.language_model.": "model.", "model.visual.": "visual."}
    folder = rename(write(wrappers()["qwen2_vl"], tmp_path / "m"), names)
    compressed(folder, tmp_path / "out", text, **RECIPES["gptq"])
    result = set(stored(tmp_path / "out"))
    assert "model.layers.0.mlp.up_proj.planes_0" in result and "visual.patch_embed.proj.weight" in result
    assert not any(name.startswith("model.language_model.") for name in result)
    model = niwaki.load(tmp_path / "out", device="cpu")
    (tmp_path / "new").mkdir()
    model.save_pretrained(tmp_path / "new")
    assert torch.equal(niwaki.load(tmp_path / "new", device="cpu")(IDS).logits, model(IDS).logits)


def test_the_text_class_reads_the_result_of_a_wrapper_or_stops_without_niwaki(tmp_path: Path) -> None:
    """Load wrappers that transformers loads as their text model alone, with the text config alone."""
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16}
    layers = {**linear, "linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention"]}
    config = transformers.Qwen3_5Config(
        text_config={**TEXT, **layers, "rope_parameters": {**ROPE, "partial_rotary_factor": 1.0}},
        vision_config={**QWEN_VISION, "out_hidden_size": 64},
        architectures=["Qwen3_5ForConditionalGeneration"],
    )
    folder, out = write(config, tmp_path / "m"), tmp_path / "out"
    niwaki.compress(folder, out, method="rtn", target="4bit", options={"group": 16}, device="cpu")
    whole = niwaki.load(out, device="cpu")
    text = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert [type(whole).__name__, type(text).__name__] == ["Qwen3_5ForConditionalGeneration", "Qwen3_5ForCausalLM"]
    assert torch.equal(whole(IDS).logits, text(IDS).logits)
    script = f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode and "import niwaki" in done.stderr


def test_recovery_keeps_towers_of_another_dtype(text: str, tmp_path: Path) -> None:
    folder = write(wrappers()["llava"], tmp_path / "m", torch.bfloat16)
    tensors = stored(folder)
    tower = next(name for name in Decoder(Checkpoint.open(folder), CPU).tower_names if name.endswith("fc1.weight"))
    save_file({**tensors, tower: tensors[tower].float() + 1e-4}, folder / "model.safetensors", {"format": "pt"})
    compressed(folder, tmp_path / "out", text, method="magnitude", target="50%")
    niwaki.recover(
        tmp_path / "out", tmp_path / "recovered", data=text, seq_len=48, steps=24, batch=4, rate=5e-3,
        device="cpu",
    )  # fmt: skip
    before, after = stored(folder), stored(tmp_path / "recovered")
    assert set(before) == set(after)
    assert after[tower].dtype == torch.float32 and torch.equal(after[tower], before[tower])
    assert niwaki.load(tmp_path / "recovered", device="cpu")(IDS).logits.isfinite().all()


@pytest.mark.parametrize("to", ["gguf", "onnx"])
def test_exports_for_decoders_alone_refuse_a_wrapper(to: str, tmp_path: Path) -> None:
    folder = write(wrappers()["llava"], tmp_path / "m")
    with pytest.raises(NiwakiError, match=r"is a wrapper of type llava \(text_config, vision_config\)"):
        niwaki.export(folder, tmp_path / "out", to=to)


def test_compressed_tensors_of_a_wrapper_load_with_its_class(text: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    folder, out = write(wrappers()["gemma3"], tmp_path / "m"), tmp_path / "out"
    compressed(folder, out, text, **{**RECIPES["gptq"], "embeddings": "none"})
    niwaki.export(out, tmp_path / "export", to="compressed-tensors")
    ignored = json.loads((tmp_path / "export/config.json").read_text())["quantization_config"]["ignore"]
    assert any("vision_tower" in name for name in ignored) and not any("language_model.layers" in n for n in ignored)
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "export")
    wanted, logits = niwaki.load(out, device="cpu")(IDS).logits, model(IDS).logits
    assert (logits - wanted).norm() < 0.01 * wanted.norm()
