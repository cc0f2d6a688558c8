"""Packed results whose names on disk are not those of the modules: wrappers, and files of a base model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

import niwaki
from niwaki.errors import CheckpointError
from niwaki.runtime.embedding import PackedEmbedding
from niwaki.runtime.linear import PackedLinear
from niwaki.runtime.sparse_linear import SparseLinear
from support.models import write_texts
from support.wrappers import TEXT, rename, wrappers, write


def write_wrapper(folder: Path) -> Path:
    """Write a Gemma 3, whose file has `language_model.model.` where the model has `model.language_model.`."""
    return write(wrappers()["gemma3"], folder)


def write_base(folder: Path) -> Path:
    """Write a Llama whose file has no `model.` before the names, as a base model is saved."""
    return rename(write(transformers.LlamaConfig(**TEXT), folder), {"model.": ""})


MODELS = {"wrapper": (write_wrapper, "language_model.model.layers.0."), "base": (write_base, "layers.0.")}
FORMS: dict[str, dict[str, Any]] = {
    "codes": {"method": "gptq", "target": "4bit", "options": {"group": 16}, "embeddings": "4bit"},
    "planes": {"method": "squeeze10", "target": "2.5bit", "options": {"rounds": 0, "learn_rounds": 0}},
    "two_four": {"method": "magnitude", "target": "2:4", "pack": "auto"},
    "bitmap": {"method": "magnitude", "target": "70%", "pack": "auto"},
}
IDS = torch.arange(1, 13)[None]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_texts(tmp_path_factory.mktemp("text") / "text.jsonl"))


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    save, first = MODELS[request.param]
    return save(tmp_path_factory.mktemp(request.param)), first


def compressed(folder: Path, out: Path, text: str, **recipe: Any) -> Path:
    calibration = {"files": (text,), "samples": 4, "seq_len": 16}
    niwaki.compress(folder, out, calibration=calibration, device="cpu", **recipe)
    return out


@pytest.mark.parametrize("form", FORMS)
def test_renamed_matrices_are_packed_and_every_loader_reads_them(
    form: str, model: tuple[Path, str], text: str, tmp_path: Path
) -> None:
    folder, first = model
    packed = compressed(folder, tmp_path / "packed", text, **FORMS[form])
    plain = compressed(folder, tmp_path / "plain", text, **{**FORMS[form], "pack": "none", "embeddings": "none"})
    lines = [json.loads(line) for line in (packed / "niwaki/blocks.jsonl").read_text().splitlines()]
    assert all(line["note"] == "" and "stored" in line for line in lines)
    names = {name for shard in packed.glob("*.safetensors") for name in load_file(shard)}
    assert f"{first}mlp.up_proj.weight" not in names and any(n.startswith(f"{first}mlp.up_proj.") for n in names)
    again = AutoModelForCausalLM.from_pretrained(packed)
    assert sum(isinstance(module, PackedLinear | SparseLinear) for module in again.modules()) >= 14
    logits = niwaki.load(packed, device="cpu")(IDS).logits
    assert torch.equal(logits, again(IDS).logits)
    if "embeddings" in FORMS[form]:
        assert any(isinstance(module, PackedEmbedding) for module in again.modules())
    else:
        wanted = AutoModelForCausalLM.from_pretrained(plain)(IDS).logits
        assert (logits - wanted).norm() < 0.03 * wanted.norm()  # kernels sum codes in another order
    again.save_pretrained(tmp_path / "saved")
    assert torch.equal(niwaki.load(tmp_path / "saved", device="cpu")(IDS).logits, logits)
    hidden = AutoModel.from_pretrained(packed)(IDS).last_hidden_state
    assert torch.equal(hidden, again.base_model(IDS).last_hidden_state)


def test_a_class_without_a_place_for_packed_matrices_is_refused(tmp_path: Path) -> None:
    """Another class of model would leave random weights where the codes belong."""
    folder = write(transformers.LlamaConfig(**TEXT), tmp_path / "m")
    out = tmp_path / "out"
    niwaki.compress(folder, out, method="rtn", target="4bit", options={"group": 16}, device="cpu")
    config = json.loads((out / "config.json").read_text())
    config |= {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"]}
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"GPTNeoXForCausalLM has no module for the packed model\.layers\.1"):
        AutoModelForCausalLM.from_pretrained(out)
