"""Identity of a model for a resume: the same bytes, at any place and with any times of its files."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import niwaki
from niwaki.compression.places import shaped_of
from niwaki.config.sources import LINEAGE
from niwaki.errors import ResumeError
from niwaki.model import read_log
from niwaki.model.checkpoint import Checkpoint
from support.compressions import folder_bytes, interrupt_after, settings
from support.models import file_bytes, tiny_llama, write_texts

SHARD = "model.safetensors"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "model")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "text.jsonl")


def change(path: Path, place: float) -> None:
    """Change one byte at a share of the file, and put size, modification and access time back."""
    status = path.stat()
    with path.open("r+b") as file:
        at = int(place * (status.st_size - 1))
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)


def test_a_copy_with_other_times_is_the_same_model(model: Path, text: Path, tmp_path: Path) -> None:
    niwaki.compress(model, tmp_path / "straight", **settings(text))
    interrupt_after(1, model, tmp_path / "out", text)
    copy = tmp_path / "elsewhere"
    shutil.copytree(model, copy, copy_function=shutil.copyfile)
    for path in copy.iterdir():
        os.utime(path, (1, 1))
    shutil.rmtree(model)
    events: list[Any] = []
    niwaki.compress(
        copy, tmp_path / "out", resume=True, report=lambda event, **fields: events.append((event, fields)),
        **settings(text),
    )  # fmt: skip
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "straight")
    assert [fields["replayed"] for event, fields in events if event == "block"] == [True, False, False]
    assert niwaki.compress(copy, tmp_path / "out", resume=True, **settings(text))  # finished, and recognized


@pytest.mark.parametrize("place", [0.02, 0.5, 1.0])  # the first block was read before the kill, the last was not
@pytest.mark.parametrize("finished", [False, True])
def test_a_change_with_restored_times_is_named(
    model: Path, text: Path, tmp_path: Path, place: float, finished: bool
) -> None:
    if finished:
        niwaki.compress(model, tmp_path / "out", **settings(text))
    else:
        interrupt_after(1, model, tmp_path / "out", text)
    before = folder_bytes(tmp_path)
    del before[f"model/{SHARD}"]
    with (model / SHARD).open("rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    size = (model / SHARD).stat().st_size
    where = (header + place * (size - 1 - header)) / (size - 1)
    change(model / SHARD, where)
    with pytest.raises(ResumeError, match=r"changed since .*: model content \(model\.safetensors\)\. Restore it"):
        niwaki.compress(model, tmp_path / "out", resume=True, **settings(text))
    after = folder_bytes(tmp_path)
    del after[f"model/{SHARD}"]
    assert after == before, "a refusal loses nothing"
    change(model / SHARD, where)  # back
    assert niwaki.compress(model, tmp_path / "out", resume=True, **settings(text))


def test_a_changed_tokenizer_is_named(model: Path, tmp_path: Path, text: Path) -> None:
    """Check a file that a method without text does not read, and that its result copies."""
    interrupt_after(1, model, tmp_path / "out", text, method="magnitude", calibration={})
    (model / "tokenizer_config.json").write_text((model / "tokenizer_config.json").read_text() + " ")
    with pytest.raises(ResumeError, match=r"model content \(tokenizer_config\.json\)\. Restore"):
        niwaki.compress(
            model, tmp_path / "out", resume=True, **settings(text, method="magnitude", calibration={})
        )  # fmt: skip


def test_a_chain_in_its_second_stage_knows_its_first_model(text: Path, tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model", intermediate_size=96, hidden_size=64)
    chain = {"method": "shortgpt+wanda", "target": "0.34+0.5"}
    niwaki.compress(model, tmp_path / "straight", **settings(text, **chain))

    def stop(event: str, **fields: Any) -> None:
        if event == "saved" and shaped_of(tmp_path / "out").is_dir():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        niwaki.compress(model, tmp_path / "out", report=stop, **settings(text, **chain))
    change(model / SHARD, 0.9)
    with pytest.raises(ResumeError, match=r"model content \(model\.safetensors\)"):
        niwaki.compress(model, tmp_path / "out", resume=True, **settings(text, **chain))
    change(model / SHARD, 0.9)
    os.utime(model / SHARD)
    niwaki.compress(model, tmp_path / "out", resume=True, **settings(text, **chain))
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "straight")


def test_a_chain_that_replaced_its_place_is_finished(text: Path, tmp_path: Path) -> None:
    model, out = tiny_llama(tmp_path / "model", intermediate_size=96, hidden_size=64), tmp_path / "out"
    chain = {"method": "shortgpt+wanda", "target": "0.34+0.5"}

    def events(**given: Any) -> list[str]:
        seen: list[str] = []
        again = {"overwrite": True, "resume": True, "report": lambda event, **fields: seen.append(event)}
        niwaki.compress(model, out, **again, **settings(text, **chain | given))
        return seen

    niwaki.compress(model, out, **settings(text, **chain))
    before = folder_bytes(out)
    assert "block" not in events() and folder_bytes(out) == before
    assert "block" in events(target="0.34+0.25") and folder_bytes(out) != before


def test_a_gguf_file_with_restored_times_is_converted_again(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NIWAKI_CACHE", str(tmp_path / "cache"))
    niwaki.export(tiny_llama(tmp_path / "dense"), tmp_path / "exported", to="gguf", type="f16")
    (tmp_path / "one").mkdir()
    model = next((tmp_path / "exported").glob("*.gguf")).rename(tmp_path / "one/model.gguf")
    plain = {"method": "magnitude", "calibration": {}}
    interrupt_after(1, model, tmp_path / "out", text, **plain)
    (tmp_path / "two").mkdir()
    shutil.copyfile(model, tmp_path / "two/model.gguf")  # a second download
    change(model, 0.95)
    with pytest.raises(ResumeError, match=r"model content \(model\.safetensors\)"):
        niwaki.compress(model, tmp_path / "out", resume=True, **settings(text, **plain))
    niwaki.compress(tmp_path / "two/model.gguf", tmp_path / "out", resume=True, **settings(text, **plain))


def test_large_files_are_hashed_in_pieces(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_log, "_PIECE_BYTES", 1000)
    monkeypatch.setattr(read_log, "_READ_BYTES", 300)
    before = Checkpoint.open(model).fingerprint()
    assert before == Checkpoint.open(model).fingerprint()
    for place in (0.3, 0.9995, 1.0):
        change(model / SHARD, place)
        after = Checkpoint.open(model).fingerprint()
        assert {name for name in before if before[name] != after[name]} == {SHARD}
        change(model / SHARD, place)
    assert before == Checkpoint.open(model).fingerprint()


def test_a_change_between_the_hash_and_the_read_publishes_nothing(model: Path, text: Path, tmp_path: Path) -> None:
    """Check weights that are read as they are in the end, but not as the record names them."""

    def report(event: str, **fields: Any) -> None:
        if event == "start":
            change(model / SHARD, 0.9)

    with pytest.raises(niwaki.errors.CheckpointError, match="changed while it was read"):
        niwaki.compress(model, tmp_path / "out", report=report, **settings(text))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("spoil", [lambda base: change(base / SHARD, 0.9), lambda base: os.utime(base / SHARD)])
def test_the_base_of_an_adapter_counts_by_its_bytes(
    spoil: Callable[[Path], None], model: Path, text: Path, tmp_path: Path
) -> None:
    import peft
    import transformers

    dense: Any = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted: Any = peft.get_peft_model(dense, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "adapter")
    plain = {"method": "magnitude", "calibration": {}, "merge_adapter": True}
    interrupt_after(1, tmp_path / "adapter", tmp_path / "out", text, **plain)
    assert (tmp_path / "out.merged" / LINEAGE).is_file()
    bytes_before = (model / SHARD).read_bytes()
    spoil(model)
    same = (model / SHARD).read_bytes() == bytes_before
    if same:
        niwaki.compress(tmp_path / "adapter", tmp_path / "out", resume=True, **settings(text, **plain))
        return
    with pytest.raises(ResumeError, match=r"model content \(model\.safetensors\)"):
        niwaki.compress(tmp_path / "adapter", tmp_path / "out", resume=True, **settings(text, **plain))
