"""GGUF files as models: what is read back is what was written, and what cannot be read is refused in one line."""

import shutil
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

import niwaki
from niwaki.cli.app import main
from niwaki.errors import CheckpointError
from niwaki.model import gguf_source
from niwaki.model.checkpoint import Checkpoint
from support.gguf_files import CONFIGS, save
from support.models import weights_of, write_texts


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(gguf_source.CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gguf")


@pytest.fixture
def exported(shared: Path, tmp_path: Path) -> Any:
    """Return a function that gives a small model and a GGUF file of it, alone in its folder."""

    def make(name: str = "llama", type: str = "f32") -> tuple[Path, Path]:
        model, dest = shared / name, shared / f"{name} {type}"
        if not model.exists():
            save(CONFIGS[name], model)
        if not dest.exists():
            niwaki.export(model, dest, to="gguf", type=type)
        (tmp_path / "file").mkdir(exist_ok=True)
        return model, Path(shutil.copy(dest / "model.gguf", tmp_path / "file" / "model.gguf"))

    return make


@pytest.fixture(scope="module")
def text(shared: Path) -> Path:
    return write_texts(shared / "text.jsonl")


def perplexity(model: Path, text: Path) -> float:
    found = niwaki.evaluate(model, data=[str(text)], seq_len=32, max_tokens=512, device="cpu")
    return float(next(iter(found["perplexity"].values())))


@pytest.mark.parametrize("name", ["llama", "llama tied", "llama with biases", "qwen2", "qwen3"])
def test_an_exact_file_gives_the_perplexity_of_the_model(name: str, exported: Any, text: Path) -> None:
    model, file = exported(name)
    assert perplexity(file, text) == pytest.approx(perplexity(model, text), rel=1e-6)
    tokenizers = [transformers.AutoTokenizer.from_pretrained(f) for f in (model, Checkpoint.open(file).folder)]
    ids = [tokenizer("The cat's 12 naïve\n  words.<|endoftext|>")["input_ids"] for tokenizer in tokenizers]
    assert ids[0] == ids[1]


@pytest.mark.parametrize("type", ["q8_0", "q4_1", "bf16"])
def test_codes_become_the_values_that_the_library_decodes(type: str, exported: Any) -> None:
    _, file = exported("llama", type)
    checkpoint = Checkpoint.open(file.parent)  # the folder of the file stands for it
    found = weights_of(checkpoint.folder)
    stored = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(file).tensors}
    wanted = torch.from_numpy(stored["blk.1.ffn_down.weight"].copy()).to(checkpoint.dtype)
    assert checkpoint.dtype == (torch.bfloat16 if type == "bf16" else torch.float16)
    assert torch.equal(found["model.layers.1.mlp.down_proj.weight"], wanted)
    about = gguf_source.gguf_source(checkpoint.folder)
    assert about is not None and about["note"].startswith(f"dequantized from {type.upper()}")


def test_a_result_of_a_gguf_says_so_and_is_exported_again(
    exported: Any, text: Path, tmp_path: Path, cache: Path
) -> None:
    _, file = exported("llama", "q8_0")
    given = {"method": "wanda", "target": "2:4", "device": "cpu"}
    given |= {"calibration": {"files": (str(text),), "samples": 2, "seq_len": 16}}
    line = f"{file} is dequantized from Q8_0 to float16"
    assert any(text.startswith(line) for text in niwaki.plan(file, gpu="h100", **given)["warnings"])
    record = niwaki.compress(file, tmp_path / "out", **given)
    about = record["model"]["gguf"]
    assert record["model"]["source"] == str(file) == about["file"] and about["bytes"] == file.stat().st_size
    assert len(about["sha256"]) == 64 and about["types"] == {"F32": 5, "Q8_0": 16} and about["dtype"] == "float16"
    card = (tmp_path / "out/README.md").read_text()
    assert f"`model.gguf`, a GGUF file, dequantized from Q8_0 to float16 (sha256 `{about['sha256']}`)" in card
    assert not (tmp_path / "out" / gguf_source.SOURCE).exists()
    again = niwaki.export(tmp_path / "out", tmp_path / "again", to="gguf")
    assert again["export"]["bytes"] == (tmp_path / "again/model.gguf").stat().st_size
    ids = torch.arange(12)[None]
    logits = [niwaki.load(f, device="cpu").float()(ids).logits for f in (tmp_path / "out", tmp_path / "again")]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-3, atol=1e-3)
    assert len(list(cache.iterdir())) == 2  # one folder per file, nothing half-made


def test_a_file_is_converted_once_and_again_after_it_changed(exported: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, file = exported()
    first = Checkpoint.open(file).folder
    real = gguf_source._convert
    monkeypatch.setattr(gguf_source, "_convert", lambda *_: pytest.fail("converted twice"))
    assert Checkpoint.open(file).folder == first
    monkeypatch.setattr(gguf_source, "_convert", real)
    copy = file.with_name("other.gguf")
    shutil.copy(file, copy)
    assert Checkpoint.open(copy).folder != first


def test_a_conversion_that_ends_early_leaves_nothing(
    exported: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, file = exported()

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf_source.ReadLog, "check", stop)  # all is written by then
    with pytest.raises(KeyboardInterrupt):
        Checkpoint.open(file)
    assert list(cache.iterdir()) == []


def test_a_file_that_changes_during_its_conversion_leaves_nothing(
    exported: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, file = exported()
    complete = gguf_source._complete_tokenizer

    def change(path: Path, reader: Any, tokenizer: Any) -> None:
        complete(path, reader, tokenizer)
        with path.open("r+b") as opened:
            opened.seek(-1, 2)
            opened.write(b"\x55")

    monkeypatch.setattr(gguf_source, "_complete_tokenizer", change)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        Checkpoint.open(file)
    assert list(cache.iterdir()) == []


def written(path: Path, architecture: str = "llama", weights: bool = True, **fields: Any) -> Path:
    """Write a GGUF file with one tensor and any fields."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in fields.items():
        key = name.replace("__", ".")
        if isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_uint32(key, value)
    if weights:
        writer.add_tensor("token_embd.weight", np.ones((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"weights": False, "tokenizer__ggml__model": "gpt2"}, "holds a vocabulary and no weights"),
    ({"general__type": "adapter"}, "is an adapter: merge it into its base model"),
    ({"architecture": "clip"}, "is the projector of images or sound"),
    ({"general__type": "mmproj"}, "is the projector of images or sound"),
    ({"split__count": 2, "split__no": 0}, "is part 1 of 2 of a model: join them first"),
    ({"architecture": "unknown-here"}, "transformers cannot read this GGUF .*unknown-here"),
]


@pytest.mark.parametrize(("given", "message"), WRONG, ids=[message[:24] for _, message in WRONG])
def test_other_files_are_refused_by_what_they_are(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = written(tmp_path / "file.gguf", **given)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_parts_broken_files_and_a_missing_package_are_refused(
    exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, file = exported()
    content = file.read_bytes()
    for size in (20, len(content) // 2, len(content) - 40):
        (tmp_path / "short.gguf").write_bytes(content[:size])
        with pytest.raises(CheckpointError, match="copy or download it again"):
            Checkpoint.open(tmp_path / "short.gguf")
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(CheckpointError, match="is not a GGUF file: it does not begin with GGUF"):
        Checkpoint.open(tmp_path / "text.gguf")
    part = written(tmp_path / "m-00002-of-00003.gguf")
    with pytest.raises(CheckpointError, match="is part 2 of 3 of a model"):
        Checkpoint.open(part)
    shutil.copy(file, file.with_name("second.gguf"))
    with pytest.raises(CheckpointError, match="holds 2 GGUF files: name one"):
        Checkpoint.open(file.parent)
    monkeypatch.setattr(gguf_source, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"needs the package gguf: pip install 'niwaki\[export\]'"):
        Checkpoint.open(file)


def test_positions_that_are_scaled_linearly_stay_so(exported: Any, tmp_path: Path) -> None:
    """Check it, for the settings of other scalings are not in transformers' reader, and change every output."""
    _, file = exported()
    for kind in ("linear", "yarn"):
        reader = gguf.GGUFReader(file)
        writer = gguf.GGUFWriter(tmp_path / f"{kind}.gguf", "llama")
        for name, field in reader.fields.items():
            if not name.startswith(("GGUF.", "general.architecture")):
                kinds = field.types
                writer.add_key_value(name, field.contents(), kinds[0], kinds[-1] if len(kinds) > 1 else None)
        writer.add_string("llama.rope.scaling.type", kind)
        writer.add_float32("llama.rope.scaling.factor", 2.0)
        for tensor in reader.tensors:
            writer.add_tensor(tensor.name, tensor.data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    config = Checkpoint.open(tmp_path / "linear.gguf").config
    assert (config.rope_parameters["rope_type"], config.rope_parameters["factor"]) == ("linear", 2.0)
    with pytest.raises(CheckpointError, match=r"ignores its setting llama\.rope\.scaling\.type = yarn"):
        Checkpoint.open(tmp_path / "yarn.gguf")


def test_a_tensor_that_transformers_would_drop_is_refused(exported: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, file = exported()
    real = gguf_source._read_names
    monkeypatch.setattr(gguf_source, "_read_names", lambda model: set(real(model)) - {"blk.1.ffn_up.weight"})
    with pytest.raises(CheckpointError, match=r"no place for its tensor blk\.1\.ffn_up\.weight in a llama"):
        Checkpoint.open(file)


def test_the_command_line_takes_a_file(
    exported: Any, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, file = exported()
    arguments = ["--data", str(text), "--seq-len", "32", "--max-tokens", "128", "--device", "cpu"]

    def run(*given: str) -> int:
        monkeypatch.setattr(sys, "argv", ["niwaki", *given])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0)

    assert run("evaluate", str(file), *arguments) == 0
    assert "perplexity" in capsys.readouterr().out
    (tmp_path / "not.gguf").write_bytes(b"GGU")
    assert run("evaluate", str(tmp_path / "not.gguf"), *arguments) == 2
    assert "is not a GGUF file" in capsys.readouterr().err


def test_an_unknown_word_splitter_is_refused_and_digits_stand_alone_where_they_should(
    exported: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, file = exported()
    real = gguf_source._field
    for splitter in "unknown-here", "smollm":
        told = lambda reader, name, splitter=splitter: splitter if name == "tokenizer.ggml.pre" else real(reader, name)  # noqa: E731
        monkeypatch.setattr(gguf_source, "_field", told)
        if splitter == "smollm":
            tokenizer = transformers.AutoTokenizer.from_pretrained(Checkpoint.open(file).folder)
            words = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a 12")
            assert [word for word, _ in words] == ["a", "Ġ", "1", "2"]
            continue
        with pytest.raises(CheckpointError, match="cuts words by the rule 'unknown-here'"):
            Checkpoint.open(file)
