"""ONNX graphs compute what transformers computes, for any batch and length; what cannot be is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import niwaki
from niwaki.cli.demo import sapling
from niwaki.errors import ArchitectureError, InputError
from support.families import build, families
from support.models import tiny_llama, write_texts


def compare(model: Path, dest: Path) -> float:
    """The largest difference of a logit over several shapes, padded ones too, as a share of the largest logit."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(dest / "model.onnx"), providers=["CPUExecutionProvider"])
    decoder: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for batch, tokens in ((1, 1), (1, 5), (3, 17), (2, 60)):
        ids_BT = torch.randint(0, decoder.config.vocab_size, (batch, tokens), generator=generator)
        mask_BT = torch.ones_like(ids_BT)
        mask_BT[: batch - 1, : tokens // 3] = 0
        with torch.no_grad():
            wanted_BTV = decoder(input_ids=ids_BT, attention_mask=mask_BT).logits
        given = {"input_ids": ids_BT.numpy(), "attention_mask": mask_BT.numpy()}
        found_BTV = torch.from_numpy(session.run(["logits"], given)[0])
        seen_BT = mask_BT.bool()  # what stands before a text is nobody's business
        error = (found_BTV - wanted_BTV)[seen_BT].abs().max() / wanted_BTV[seen_BT].abs().max()
        worst = max(worst, float(error))
    return worst


@pytest.mark.engines
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "opt", "gpt2"])
def test_families_compute_the_same(family: str, tmp_path: Path) -> None:
    build(families()[family].config).save_pretrained(tmp_path / "model")
    niwaki.export(tmp_path / "model", tmp_path / "dest", to="onnx")
    assert compare(tmp_path / "model", tmp_path / "dest") < 1e-5


@pytest.mark.engines
@pytest.mark.parametrize("method", ["comp", "flap", "wanda"])  # flap: widths and biases
def test_a_pruned_sapling_computes_the_same(method: str, tmp_path: Path) -> None:
    text = write_texts(tmp_path / "text.jsonl", count=20)
    out, dest = tmp_path / "out", tmp_path / "dest"
    niwaki.compress(
        sapling(), out, method=method, target="0.3", device="cpu",
        calibration={"files": str(text), "samples": 8, "seq_len": 64},
    )  # fmt: skip
    record = niwaki.export(out, dest, to="onnx")
    assert compare(out, dest) < 1e-5
    assert record["recipe"]["method"] == method and record["export"]["format"].startswith("float32, opset ")
    assert sorted(record["export"]["sha256"]) == ["model.onnx", "model.onnx.data"]
    assert record == json.loads((dest / "niwaki/run.json").read_text())
    card = (dest / "README.md").read_text()
    assert "library_name: onnx" in card and "no\ncache of keys and values" in card
    transformers.AutoTokenizer.from_pretrained(dest)


def test_what_cannot_be_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(tmp_path / "model")
    niwaki.compress(model, tmp_path / "four", method="rtn", target="4bit", options={"group": 16}, device="cpu")
    with pytest.raises(InputError, match=r"stores 21 matrices as codes, which ONNX has no operator for: compress with"):
        niwaki.export(tmp_path / "four", tmp_path / "dest", to="onnx")
    with pytest.raises(InputError, match="leave --type out"):
        niwaki.export(model, tmp_path / "dest", to="onnx", type="f16")

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("an operator\nis unknown")

    monkeypatch.setattr(torch.onnx, "export", broken)
    with pytest.raises(ArchitectureError, match=r"cannot export .* a llama: an operator is unknown"):
        niwaki.export(model, tmp_path / "dest", to="onnx")
    assert not list(tmp_path.glob("dest*"))
