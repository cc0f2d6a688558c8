"""Rotation of whole models: the function stays, what cannot turn is refused, and the result is an ordinary model."""

import json
from pathlib import Path

import pytest
import torch
import transformers

import niwaki
from niwaki.compression.rotate import Ways, rotate, turn
from niwaki.config.sources import ROTATED
from niwaki.config.targets import parse_target
from niwaki.errors import ArchitectureError, InputError, OutputError
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.decoder import Decoder
from niwaki.runtime.load import load_checkpoint
from support.families import build, families
from support.models import CPU, Warnings, run, tiny_llama, weights_of, write_texts

QUICK = {"steps": 3}


def _saved(folder: Path, family: str) -> Path:
    """Save a tiny model whose norms have gains of their own and whose matrices have biases that count."""
    model = build(families()[family].config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    model.save_pretrained(folder / family)
    return folder / family


def _turned(folder: Path, ways: Ways, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, object]:
    """Return the logits of a model before and after, on tokens that no step has seen, and what was done."""
    checkpoint = Checkpoint.open(folder)
    model = load_checkpoint(checkpoint, device="cpu", dtype=dtype)
    ids = torch.randint(0, 96, (6, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(ids[:2]).logits
        done = turn(model, Decoder(checkpoint, CPU), ids[2:], ways)
        return before, model(ids[:2]).logits, done


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "phi3"])
@pytest.mark.parametrize("way", ["learned", "hadamard"])
def test_logits_stay_in_float64(tmp_path: Path, family: str, way: str) -> None:
    ways = Ways(parse_target("2:4"), residual=way, heads=way, **QUICK)
    before, after, done = _turned(_saved(tmp_path, family), ways)
    assert float((after - before).norm() / before.norm()) < 1e-6
    assert done.lost.keys() >= {"residual"} | ({"heads", "neurons"} if family != "phi3" else set())


@pytest.mark.parametrize(("family", "reason"), [
    ("opt", "bias"), ("gpt2", "bias|plain matrix"), ("bloom", "bias"), ("mixtral", "plain matrix"),
    ("gemma2", "another basis"),
])  # fmt: skip
def test_a_stream_that_cannot_turn_is_refused_with_the_reason(tmp_path: Path, family: str, reason: str) -> None:
    with pytest.raises(ArchitectureError, match=reason):
        _turned(_saved(tmp_path, family), Ways(parse_target("2:4"), **QUICK), torch.float32)


@pytest.mark.parametrize("family", ["opt", "gemma2"])
def test_heads_and_neurons_turn_where_the_stream_cannot(tmp_path: Path, family: str) -> None:
    ways = Ways(parse_target("2:4"), residual="none", **QUICK)
    before, after, done = _turned(_saved(tmp_path, family), ways)
    assert float((after - before).norm() / before.norm()) < 1e-6
    assert done.lost.keys() == {"heads", "neurons"} and not done.untied


@pytest.mark.parametrize(("family", "residual"), [
    ("llama", "learned"), ("llama", "none"), ("qwen2", "none"), ("opt", "none"), ("gemma2", "none"), ("phi3", "none"),
])  # fmt: skip
def test_scales_keep_the_function_and_lower_the_loss(tmp_path: Path, family: str, residual: str) -> None:
    ways = Ways(parse_target("3bit"), residual=residual, heads="none", scales=True, **QUICK)
    before, after, done = _turned(_saved(tmp_path, family), ways)
    assert float((after - before).norm() / before.norm()) < 1e-6
    lost = done.lost["scales"]
    assert lost[1] < lost[0]


def test_scales_are_for_bits_alone() -> None:
    with pytest.raises(InputError, match="scales help rounding only"):
        Ways(parse_target("2:4"), scales=True)


def test_parts_that_a_model_lacks_are_named(tmp_path: Path) -> None:
    """Fuse queries, keys and values, and gate and up: neither heads nor neurons are matrices of their own."""
    checkpoint, warned = Checkpoint.open(_saved(tmp_path, "phi3")), Warnings()
    model = load_checkpoint(checkpoint, device="cpu", dtype=torch.float32)
    turn(
        model, Decoder(checkpoint, CPU), torch.ones(1, 8, dtype=torch.int64), Ways(parse_target("2:4"), **QUICK), warned
    )
    assert [message.split()[0] for message in warned.warnings] == ["heads", "neurons"]


@pytest.mark.parametrize("target", ["2:4", "0.5", "3bit"])
def test_learning_lowers_the_lost_share_of_every_part(tmp_path: Path, target: str) -> None:
    _, _, done = _turned(_saved(tmp_path, "llama"), Ways(parse_target(target), steps=25, rate=0.02), torch.float32)
    for before, after in done.lost.values():
        assert after < before


def test_the_result_is_an_ordinary_model_that_compresses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, text = tiny_llama(tmp_path / "model", tie_word_embeddings=True), write_texts(tmp_path / "text.jsonl")
    words = ["rotate", model, tmp_path / "out", "--target", "2:4", "--calibration", text, "--samples", "4"]
    code, printed, _ = run(capsys, *words, "--seq-len", "16", "--steps", "2")
    assert code == 0 and "lost share of importance" in printed and "before the head was untied" in printed
    record = json.loads((tmp_path / "out" / ROTATED).read_text())
    assert record["result"]["untied"] and record["bytes"] > record["model"]["bytes"]
    assert not json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]
    ids = torch.randint(0, 4096, (1, 12), generator=torch.Generator().manual_seed(0))
    one, other = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("model", "out"))
    with torch.no_grad():
        torch.testing.assert_close(one(ids).logits, other(ids).logits, rtol=1e-3, atol=1e-4)
    calibration = {"files": (str(text),), "samples": 4, "seq_len": 16}
    pruned = niwaki.compress(
        tmp_path / "out", tmp_path / "pruned", method="sparsegpt", target="2:4", calibration=calibration
    )
    assert pruned["model"]["rotated"]["source"] == str(model) and pruned["model"]["rotated"]["residual"] == "learned"
    card = (tmp_path / "pruned" / "README.md").read_text()
    assert "turned before into another basis | `model`" in card and f"{record['model']['bytes']:,}" in card
    up = weights_of(tmp_path / "pruned")["model.layers.0.mlp.up_proj.weight"]
    assert int((up == 0).sum()) == up.numel() // 2
    with pytest.raises(OutputError, match="already exists"):
        rotate(model, tmp_path / "out", target="2:4", calibration=text)
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="was not left by"):
        rotate(model, tmp_path / "new", target="2:4", calibration=text)
    assert (tmp_path / "new.partial" / "mine.txt").is_file()


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    model, text = tiny_llama(tmp_path / "model"), write_texts(tmp_path / "text.jsonl")
    for name in ("one", "two"):
        rotate(model, tmp_path / name, target="2:4", calibration=text, samples=4, seq_len=16, steps=2, device="cpu")
    one, two = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_wrong_ways_and_no_text_are_refused(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model")
    with pytest.raises(InputError, match="unknown residual"):
        rotate(model, tmp_path / "out", target="2:4", calibration="text.txt", residual="learnd")
    with pytest.raises(InputError, match="no text"):
        rotate(model, tmp_path / "out", target="2:4")
    assert not (tmp_path / "out").exists()
