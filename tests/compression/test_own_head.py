"""A head that differs from the embeddings although the config ties them: the head of the file is used everywhere."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import niwaki
from niwaki.compression.run_record import read_run
from niwaki.config.recipe import Calibration
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.decoder import Decoder
from support.models import CPU, run, tiny_llama, weights_of, write_texts

HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_texts(tmp_path_factory.mktemp("texts") / "text.jsonl"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_llama(
        tmp_path_factory.mktemp("models") / "m", hidden_size=64, intermediate_size=64, tie_word_embeddings=True
    )
    path = folder / "model.safetensors"
    tensors = load_file(path)
    generator = torch.Generator().manual_seed(5)
    save_file({**tensors, HEAD: 0.05 * torch.randn(4096, 64, generator=generator)}, path, {"format": "pt"})
    return folder


def compress(model: Path, out: Path, text: str, method: str, target: str, **fields: Any) -> Path:
    calibration = Calibration(files=(text,), samples=8, seq_len=32)
    niwaki.compress(model, out, method=method, target=target, calibration=calibration, **fields)
    return out


def logits(model: Any, ids_BT: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids_BT, use_cache=False).logits
    return found


def walked(folder: Path, ids_BT: Tensor) -> Tensor:
    """Return the logits of a model that is read block by block."""
    decoder = Decoder(Checkpoint.open(folder), CPU)
    x_BTD, calls = decoder.embed(ids_BT)
    for index in range(len(decoder)):
        x_BTD = decoder.load(index).run(calls[index], x_BTD)
    return decoder.logits(ids_BT, x_BTD)


IDS_BT = torch.arange(5, 29).view(2, 12)


def test_the_blocks_are_walked_as_transformers_runs_the_model(model: Path) -> None:
    plain = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    wanted = logits(plain, IDS_BT)
    assert not torch.equal(plain.lm_head.weight, plain.model.embed_tokens.weight)
    assert torch.allclose(walked(model, IDS_BT), wanted, atol=1e-5)
    assert torch.equal(logits(niwaki.load(model, device="cpu"), IDS_BT), wanted)


def test_evaluation_equals_transformers(model: Path, text: str) -> None:
    found = next(iter(niwaki.evaluate(str(model), data=text, seq_len=32, max_tokens=256)["perplexity"].values()))
    plain = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids: list[int] = []
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    for line in Path(text).read_text().splitlines():
        ids += [*tokenizer(json.loads(line)["text"])["input_ids"], tokenizer.eos_token_id]
    windows = torch.tensor(ids[:256]).view(-1, 32)
    scores = logits(plain, windows)[:, :-1].flatten(0, 1)
    assert found == pytest.approx(
        math.exp(torch.nn.functional.cross_entropy(scores, windows[:, 1:].flatten())), rel=1e-4
    )


@pytest.mark.parametrize(
    ("method", "target", "fields"),
    [
        ("wanda", "0.5", {}),
        ("rtn", "4bit", {"options": {"group": 64}}),
        ("rtn", "4bit", {"options": {"group": 64}, "embeddings": "8bit"}),
        ("wanda_sp", "0.3", {}),
        ("shortgpt", "0.3", {}),
        ("shadow", "0.5", {"options": {"max_ratio": 9e9}}),
        ("shadow", "0.5", {"options": {"unit": "prompt", "size_frac": 0.2}}),
    ],
    ids=lambda value: str(value),
)
def test_results_keep_the_head_and_say_that_it_is_not_tied(
    method: str, target: str, fields: dict[str, Any], model: Path, text: str, tmp_path: Path
) -> None:
    said: list[str] = []

    def report(event: str, **about: Any) -> None:
        said.extend([about["message"]] if event == "warning" else [])

    out = compress(model, tmp_path / "out", text, method, target, report=report, **fields)
    assert any("lm_head.weight" in message and "tie_word_embeddings" in message for message in said)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    found, wanted = weights_of(out), weights_of(model)
    for name in HEAD, TABLE:
        error = (found[name] - wanted[name]).norm() / wanted[name].norm()
        assert error < 0.01 if fields.get("embeddings") else torch.equal(found[name], wanted[name])
    if fields.get("embeddings"):
        assert [one.module for one in reversed(read_run(out).result.embeddings)] == ["model.embed_tokens", "lm_head"]
    loaded = niwaki.load(out, device="cpu", dense=True)
    assert torch.allclose(logits(loaded, IDS_BT), walked(out, IDS_BT), atol=1e-4)


def test_gguf_holds_both(model: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    niwaki.export(model, tmp_path / "out", to="gguf", type="f32")
    tensors = {
        tensor.name: torch.from_numpy(tensor.data) for tensor in gguf.GGUFReader(tmp_path / "out/model.gguf").tensors
    }
    wanted = weights_of(model)
    assert torch.equal(tensors["output.weight"], wanted[HEAD])
    assert torch.equal(tensors["token_embd.weight"], wanted[TABLE])


def test_compressed_tensors_holds_both(model: Path, text: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    out = compress(model, tmp_path / "out", text, "rtn", "4bit", options={"group": 64})
    niwaki.export(out, tmp_path / "export", to="compressed-tensors")
    assert json.loads((tmp_path / "export/config.json").read_text())["tie_word_embeddings"] is False
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32)
    assert torch.allclose(logits(plain, IDS_BT), walked(out, IDS_BT), atol=1e-2)


def test_a_recovery_keeps_it(model: Path, text: str, tmp_path: Path) -> None:
    out = compress(model, tmp_path / "out", text, "wanda", "0.5")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))  # as an older niwaki left it
    niwaki.recover(out, tmp_path / "recovered", data=text, steps=4, batch=2, seq_len=32, device="cpu", rate=0.01)
    assert torch.equal(weights_of(tmp_path / "recovered")[HEAD], weights_of(model)[HEAD])
    assert json.loads((tmp_path / "recovered/config.json").read_text())["tie_word_embeddings"] is False


def test_equal_values_stay_tied(tmp_path: Path, text: str) -> None:
    folder = tiny_llama(tmp_path / "m", tie_word_embeddings=True)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, HEAD: tensors[TABLE].clone()}, path, {"format": "pt"})
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.config.tie_word_embeddings and not checkpoint.own_head
    decoder = Decoder(checkpoint, CPU)
    decoder.load_outer()
    assert decoder.model.lm_head.weight is decoder.model.model.embed_tokens.weight
    out = compress(folder, tmp_path / "out", text, "wanda", "0.5")
    assert (out / "config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_plan_says_it(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "plan", model, "--method", "wanda", "--target", "0.5", "--gpu", "cpu")
    assert code == 0 and "lm_head.weight differs from the embeddings" in out
