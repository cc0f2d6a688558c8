"""Another basis as the first step of a compression: the record, what stays, resumes, and what is refused."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import niwaki
from niwaki.compression import basis
from niwaki.compression import rotate as rotation
from niwaki.compression.rotate import Ways, rotate
from niwaki.config.sources import ROTATED
from niwaki.data import self_text
from niwaki.errors import ArchitectureError, CheckpointError, InputError, OutputError
from niwaki.model.checkpoint import Checkpoint
from support.families import build, families
from support.models import Warnings, add_tokenizer, tiny_llama, weights_of, write_texts


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(basis, "Ways", partial(Ways, steps=2))


def _recipe(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    text = write_texts(tmp_path / "text.jsonl")
    calibration = {"files": (str(text),), "samples": 4, "seq_len": 16}
    return {"method": "sparsegpt", "target": "2:4", "calibration": calibration, "device": "cpu", **changes}


def test_the_step_is_a_rotation_before_and_names_the_source(tmp_path: Path) -> None:
    model, recipe = tiny_llama(tmp_path / "model", tie_word_embeddings=True), _recipe(tmp_path)
    record = niwaki.compress(model, tmp_path / "out", rotate="all", **recipe)
    assert record["model"]["source"] == str(model) and record["recipe"]["rotate"] == "all"
    assert record["model"]["rotated"]["residual"] == "learned"
    files = recipe["calibration"]["files"]
    rotate(model, tmp_path / "turned", target="2:4", device="cpu", calibration=files, samples=4, seq_len=16, steps=2)
    niwaki.compress(tmp_path / "turned", tmp_path / "apart", **recipe)
    one, other = weights_of(tmp_path / "out"), weights_of(tmp_path / "apart")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out", "turned", "apart", "text.jsonl"}


@pytest.fixture
def writers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Return a list of the models that write text, with their devices, in the order of their beginning."""
    found: list[tuple[str, str]] = []
    load = self_text._load

    def counted(model: str | Path, device: str) -> Any:
        found.append((Path(model).name, device))
        return load(model, device)

    monkeypatch.setenv("NIWAKI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(self_text, "_load", counted)
    return found


def test_text_of_the_model_is_written_once_by_the_source(tmp_path: Path, writers: list[tuple[str, str]]) -> None:
    """Compress in several bases: all compute the same, so that the text of the source serves them all."""
    model, recipe = tiny_llama(tmp_path / "model"), _recipe(tmp_path)
    files = recipe["calibration"]["files"]
    recipe["calibration"] |= {"mix": ("self:0.5",)}
    sources = [niwaki.compress(model, tmp_path / f"out-{way}", rotate=way, **recipe) for way in ("all", "auto", "none")]
    assert [record["model"].get("rotated") is None for record in sources] == [False, False, True]
    rotate(model, tmp_path / "turned", target="2:4", device="cpu", calibration=files, samples=4, seq_len=16, steps=2)
    sources.append(niwaki.compress(tmp_path / "turned", tmp_path / "apart", **recipe))
    rotate(tmp_path / "turned", tmp_path / "again", target="2:4", device="cpu", calibration=files, samples=4, steps=2)
    sources.append(niwaki.compress(tmp_path / "again", tmp_path / "twice", rotate="heads", **recipe))
    assert writers == [("model", "cpu")]
    assert len({record["calibration"]["mix"]["self"]["sha256"] for record in sources}) == 1


def test_the_source_writes_on_the_device_of_the_compression(
    tmp_path: Path, writers: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stop before anything runs there. The text of a GPU is another one than that of the CPU."""

    def stopping(model: str | Path, device: str) -> Any:
        writers.append((Path(model).name, device))
        raise KeyboardInterrupt

    monkeypatch.setattr(self_text, "_load", stopping)
    monkeypatch.setattr(basis, "pick_device", lambda name: torch.device("meta"))
    monkeypatch.setattr(basis, "_too_large", lambda decoder, recipe: "")
    recipe = _recipe(tmp_path)
    recipe["calibration"] |= {"mix": ("self:0.5",)}
    with pytest.raises(KeyboardInterrupt):
        niwaki.compress(tiny_llama(tmp_path / "model"), tmp_path / "out", rotate="auto", **recipe)
    assert writers == [("model", "meta")]


def test_a_model_whose_source_is_gone_or_other_writes_itself(tmp_path: Path) -> None:
    model, files = tiny_llama(tmp_path / "model"), (str(write_texts(tmp_path / "text.jsonl")),)
    options: dict[str, Any] = {"target": "2:4", "device": "cpu", "calibration": files, "samples": 4, "seq_len": 16}
    rotate(model, tmp_path / "turned", steps=2, **options)
    turned = Checkpoint.open(tmp_path / "turned")
    assert turned.before_rotation().folder == model
    assert Checkpoint.open(model).before_rotation().folder == model
    (model / "config.json").rename(model / "away.json")
    assert turned.before_rotation() is turned, "a source that cannot be read"
    tiny_llama(tmp_path / "other", blocks=2).rename(tmp_path / "kept")
    (tmp_path / "model").rename(tmp_path / "moved")
    assert turned.before_rotation() is turned, "no source"
    (tmp_path / "kept").rename(tmp_path / "model")
    assert turned.before_rotation() is turned, "another model in its place"
    record = json.loads((turned.folder / ROTATED).read_text())
    record["model"] |= {"source": str(turned.folder), "files": turned.file_hashes()}
    (turned.folder / ROTATED).write_text(json.dumps(record))
    assert turned.before_rotation() is turned, "a circle"
    (turned.folder / ROTATED).write_text('{"model": 3}')
    with pytest.raises(CheckpointError, match="rotate again"):
        turned.before_rotation()


def test_heads_alone_keep_the_tie(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model", tie_word_embeddings=True)
    record = niwaki.compress(model, tmp_path / "out", rotate="heads", **_recipe(tmp_path))
    assert record["model"]["rotated"]["residual"] == "none"
    assert "lm_head.weight" not in weights_of(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]


def test_an_old_recipe_has_no_such_field(tmp_path: Path) -> None:
    record = niwaki.compress(tiny_llama(tmp_path / "model"), tmp_path / "out", **_recipe(tmp_path))
    assert "rotate" not in record["recipe"] and "rotated" not in record["model"]


def test_auto_turns_the_heads_and_says_if_it_cannot(tmp_path: Path) -> None:
    warned, recipe = Warnings(), _recipe(tmp_path)
    turned = niwaki.compress(tiny_llama(tmp_path / "model"), tmp_path / "out", rotate="auto", **recipe)
    assert turned["model"]["rotated"]["residual"] == "none" and turned["model"]["rotated"]["heads"] == "learned"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rotation, "TOLERANCE", -1.0)  # no model computes the same now
        left = niwaki.compress(tmp_path / "model", tmp_path / "left", rotate="auto", report=warned, **recipe)
        assert "rotated" not in left["model"]
        with pytest.raises(ArchitectureError, match="in another basis"):
            niwaki.compress(tmp_path / "model", tmp_path / "other", rotate="heads", **recipe)
    assert any("the basis stays as it is" in text for text in warned.warnings)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("other")]


def test_a_stream_that_cannot_turn_is_refused(tmp_path: Path) -> None:
    config = families()["opt"].config
    config.vocab_size = 4096
    build(config).save_pretrained(tmp_path / "model")
    add_tokenizer(tmp_path / "model")
    with pytest.raises(ArchitectureError, match="does not turn"):
        niwaki.compress(tmp_path / "model", tmp_path / "out", rotate="all", **_recipe(tmp_path))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]


def test_auto_leaves_a_model_that_memory_cannot_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(basis, "MEMORY_FACTOR", 1e9)
    warned, model = Warnings(), tiny_llama(tmp_path / "model")
    record = niwaki.compress(model, tmp_path / "out", rotate="auto", report=warned, **_recipe(tmp_path))
    assert "rotated" not in record["model"] and any("GB are free" in text for text in warned.warnings)


@pytest.mark.parametrize(("changes", "reason"), [
    ({"calibration": {"samples": 4, "seq_len": 16}}, "text of yours"),
    ({"method": "shortgpt", "target": "0.34"}, "neither prunes single weights"),
    ({"method": "squeeze10", "target": None, "target_bytes": 200_000}, "target_bytes"),
])  # fmt: skip
def test_what_a_basis_cannot_help_is_refused(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        niwaki.compress(tiny_llama(tmp_path / "m"), tmp_path / "out", rotate="all", **_recipe(tmp_path, **changes))


def test_a_resume_goes_on_with_the_same_basis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, recipe = tiny_llama(tmp_path / "model"), _recipe(tmp_path, rotate="all")
    niwaki.compress(model, tmp_path / "whole", **recipe)

    class Stopping:
        def __call__(self, event: str, **fields: Any) -> None:
            if event == "block" and fields["index"] == 1:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        niwaki.compress(model, tmp_path / "out", report=Stopping(), **recipe)
    assert (tmp_path / "out.rotated").is_dir()
    with pytest.raises(OutputError, match="unfinished run"):
        niwaki.compress(model, tmp_path / "out", **recipe)
    monkeypatch.setattr(basis, "rotate_to", None)  # it must not run again
    niwaki.compress(model, tmp_path / "out", resume=True, **recipe)
    one, other = weights_of(tmp_path / "out"), weights_of(tmp_path / "whole")
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert not (tmp_path / "out.rotated").exists()


def test_a_folder_of_the_user_is_not_taken(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model")
    (tmp_path / "out.rotated").mkdir()
    (tmp_path / "out.rotated" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="will not be replaced"):
        niwaki.compress(model, tmp_path / "out", rotate="all", **_recipe(tmp_path))
    assert (tmp_path / "out.rotated" / "mine.txt").is_file()
