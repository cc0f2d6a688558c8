"""Embeddings and head as codes: what is stored, who reads it, what is refused."""

import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import niwaki
from niwaki.compression.embeddings import ROWS, round_rows
from niwaki.config.recipe import make_recipe
from niwaki.data.documents import read_texts
from niwaki.data.texts import evaluation_windows, load_tokenizer
from niwaki.errors import TargetError
from niwaki.methods.shared.rounding import groups_of, nearest
from niwaki.runtime.embedding import PackedEmbedding
from niwaki.runtime.linear import PackedLinear
from support.families import build, families
from support.models import add_tokenizer, file_bytes, tiny_llama, write_texts

FITTING = {"hidden_size": 64, "intermediate_size": 96, "initializer_range": 0.5}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Tied and untied."""
    folder = tmp_path_factory.mktemp("models")
    return {tied: tiny_llama(folder / str(tied), tie_word_embeddings=tied, **FITTING) for tied in (True, False)}


def compress(model: Path, out: Path, text: Path, **changes: Any) -> dict[str, Any]:
    recipe = {
        "method": "gptq",
        "target": "4bit",
        "options": {"group": 32},
        "embeddings": "4bit",
        "device": "cpu",
        **changes,
    }
    calibration = {"files": (str(text),), "samples": 4, "seq_len": 16}
    return niwaki.compress(model, out, calibration=calibration, **recipe)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, models: dict[bool, Path], text: Path) -> dict[bool, Path]:
    folder = tmp_path_factory.mktemp("results")
    for tied, model in models.items():
        compress(model, folder / str(tied), text)
    return {tied: folder / str(tied) for tied in models}


def tensors_of(out: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for shard in sorted(out.glob("*.safetensors")) for name, tensor in load_file(shard).items()}


@pytest.mark.parametrize("tied", [True, False])
def test_the_file_holds_codes_and_the_record_counts_them(tied: bool, results: dict[bool, Path]) -> None:
    out = results[tied]
    tensors, result = tensors_of(out), json.loads((out / "niwaki/run.json").read_text())["result"]
    ends = ["model.embed_tokens"] if tied else ["model.embed_tokens", "lm_head"]
    assert sorted(end["module"] for end in result["embeddings"]) == sorted(ends)
    counted = 0
    for end in result["embeddings"]:
        stored = {name: tensor for name, tensor in tensors.items() if name.startswith(end["module"] + ".")}
        assert sorted(name.rsplit(".", 1)[1] for name in stored) == ["planes_0", "scale_0", "zero_0"]
        assert sum(tensor.nbytes for tensor in stored.values()) == end["bytes"]
        assert 0 < end["error"] < 0.02
        counted += end["bytes"]
    weights = len(ends) * 4096 * 64
    assert result["embeddings_bits"] == round(8 * counted / weights, 4) == 4.3125  # 4 + (16 + 4) / 64
    assert not [name for name in tensors if name.startswith("lm_head")] if tied else True
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert sorted(index["weight_map"]) == sorted(tensors)
    assert result["bytes"] == sum(path.stat().st_size for path in out.glob("*.safetensors"))


@pytest.mark.parametrize("tied", [True, False])
def test_every_reader_sees_the_same_model(tied: bool, results: dict[bool, Path], text: Path) -> None:
    out = results[tied]
    packed = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert isinstance(packed.get_input_embeddings(), PackedEmbedding)
    assert isinstance(packed.get_output_embeddings(), PackedLinear)
    assert not [name for name, p in packed.named_parameters() if p.dim() > 1]
    found = niwaki.evaluate(out, data=[str(text)], seq_len=32, max_tokens=320, device="cpu")
    windows = evaluation_windows(read_texts([str(text)], "text"), load_tokenizer(out), seq_len=32, max_tokens=320)
    with torch.no_grad():
        losses = [packed(row[None], labels=row[None]).loss for row in windows]
    assert math.exp(torch.stack(losses).mean()) == pytest.approx(found["perplexity"][str(text)], rel=1e-3)
    assert niwaki.generate(out, "The import", max_new_tokens=3, device="cpu")


def test_the_walk_starts_from_the_embeddings_that_are_stored(
    models: dict[bool, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from niwaki.compression import job

    seen = {}

    class Watched(job.Stream):
        def __init__(self, *args: Any, name: str, **kwargs: Any) -> None:
            super().__init__(*args, name=name, **kwargs)
            seen[name] = (self.ids_ST, self.hidden.read(slice(0, len(self))).clone())

    monkeypatch.setattr(job, "Stream", Watched)
    compress(models[True], tmp_path / "out", text, dense_stream=True)
    tables = {
        "dense": AutoModelForCausalLM.from_pretrained(models[True]).model.embed_tokens.weight.data,
        "compressed": AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.embed_tokens.weight_OI(
            torch.float32
        ),
    }
    for name, table in tables.items():
        ids, hidden = seen[name]
        torch.testing.assert_close(hidden, table[ids])
    drifts = [json.loads(line)["drift"] for line in (tmp_path / "out/niwaki/blocks.jsonl").read_text().splitlines()]
    assert all(drift > 0 for drift in drifts)


@pytest.mark.parametrize("tied", [True, False])
def test_a_killed_run_resumes_to_the_same_bytes(
    tied: bool, models: dict[bool, Path], results: dict[bool, Path], text: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from niwaki.compression import job

    real, blocks = job.compress_blocks, []

    def dies(*args: Any, save: Any, **kwargs: Any) -> None:
        def save_one(block: Any, lines: Any) -> None:
            save(block, lines)
            blocks.append(block.index)
            if len(blocks) == 2:
                raise KeyboardInterrupt

        real(*args, save=save_one, **kwargs)

    monkeypatch.setattr(job, "compress_blocks", dies)
    with pytest.raises(KeyboardInterrupt):
        compress(models[tied], tmp_path / "out", text)
    monkeypatch.setattr(job, "compress_blocks", real)
    compress(models[tied], tmp_path / "out", text, resume=True)
    assert file_bytes(tmp_path / "out") == file_bytes(results[tied])


@pytest.mark.parametrize("family", ["opt", "gpt_neox", "gpt2", "gemma3", "bloom"])
@pytest.mark.parametrize("tied", [True, False])
def test_other_families(family: str, tied: bool, text: Path, tmp_path: Path) -> None:
    """Scaled embeddings, positions that stay dense, disk names that transformers translates."""
    config = copy.deepcopy(families()[family].config)
    config.vocab_size, config.tie_word_embeddings = 4096, tied
    for name in ("hidden_size", "n_embd", "word_embed_proj_dim"):
        if hasattr(config, name):
            setattr(config, name, 64)
    build(config).save_pretrained(tmp_path / "model")
    add_tokenizer(tmp_path / "model")
    if family == "gpt2":  # as on the hub: names without their first part
        tensors = load_file(tmp_path / "model/model.safetensors")
        save_file(
            {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()},
            tmp_path / "model/model.safetensors",
            metadata={"format": "pt"},
        )
    record = compress(
        tmp_path / "model", tmp_path / "out", text, method="rtn", options={"group": 16}, embeddings="8bit"
    )
    assert record["result"]["embeddings_bits"] == 8 + 24 / 64 and len(record["result"]["embeddings"]) == 2 - tied
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert isinstance(packed.get_output_embeddings(), PackedLinear)
    found = niwaki.evaluate(tmp_path / "out", data=[str(text)], seq_len=32, max_tokens=320, device="cpu")
    windows = evaluation_windows(
        read_texts([str(text)], "text"), load_tokenizer(tmp_path / "out"), seq_len=32, max_tokens=320
    )
    with torch.no_grad():
        losses = [packed(row[None], labels=row[None]).loss for row in windows]
    assert math.exp(torch.stack(losses).mean()) == pytest.approx(found["perplexity"][str(text)], rel=2e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "magnitude", "target": "0.5", "options": {}}, r"expected a target in bits such as 4bit, got 0\.5"),
        ({"pack": "none"}, "embeddings 4bit stores codes, and pack none stores none"),
        ({"embeddings": "5bit"}, r"recipe: embeddings: .*got '5bit'"),
    ],
)
def test_what_does_not_go_together_is_refused(
    changes: dict[str, Any], message: str, models: dict[bool, Path], text: Path, tmp_path: Path
) -> None:
    with pytest.raises(niwaki.InputError, match=message):
        compress(models[False], tmp_path / "out", text, **changes)
    assert not list(tmp_path.iterdir())


def test_the_card_tells_and_an_export_refuses(results: dict[bool, Path], tmp_path: Path) -> None:
    card = (results[False] / "README.md").read_text()
    assert "| true bits a weight in embeddings and head | 4.312 |" in card
    with pytest.raises(
        niwaki.InputError, match=r"stores embeddings and LM head as codes.*compress with --embeddings none"
    ):
        niwaki.export(results[False], tmp_path / "out", to="compressed-tensors")
    assert not list(tmp_path.iterdir())


def test_columns_that_no_group_divides_are_refused(text: Path, tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model")
    with pytest.raises(TargetError, match=r"groups of 64 do not divide the 32 columns of model\.embed_tokens"):
        compress(model, tmp_path / "out", text, options={"group": 16})
    assert not list(tmp_path.glob("out*"))


def test_equal_copies_of_a_tied_matrix_are_stored_once(models: dict[bool, Path], text: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(models[False], model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    compress(model, tmp_path / "out", text)
    assert not [name for name in tensors_of(tmp_path / "out") if name.startswith("lm_head")]


def test_rows_are_rounded_in_pieces_as_they_would_be_at_once() -> None:
    weight = torch.randn(ROWS + 40, 64, generator=torch.Generator().manual_seed(0))
    part, error = round_rows(weight, 4, 64, torch.device("cpu"))
    whole = nearest(weight, groups_of(0, 64, 4, "affine", 64), clip=True).storable()
    assert torch.equal(part.decode(), whole.parts(torch.arange(64))[0].decode())
    assert error == pytest.approx(float((whole.values_OI - weight).square().sum() / weight.square().sum()), rel=1e-5)


def test_the_name_of_version_0_1_still_works() -> None:
    old = make_recipe({"method": "rtn", "target": "4bit", "ends": "8bit"})
    assert old == make_recipe({"method": "rtn", "target": "4bit", "embeddings": "8bit"})
    assert "ends" not in old.model_dump()
