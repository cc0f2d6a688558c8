"""Runs that are interrupted, killed or out of disk space: a resume ends at the same bytes."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

import niwaki
from niwaki.compression.job import FullBlocks
from niwaki.compression.places import FINGERPRINT
from niwaki.compression.result_folder import ResultFolder
from niwaki.errors import OutputError, ResumeError
from support.compressions import folder_bytes, interrupt_after, settings
from support.models import file_bytes, tiny_llama, write_texts


def _start(model: Path, out: Path, text: Path) -> subprocess.Popen[bytes]:
    """Start the command line with the recipe of `settings`, in a process that can be killed."""
    command = [
        sys.executable, "-m", "niwaki.cli", "compress", str(model), str(out), "--method", "sparsegpt",
        "--target", "2:4", "--calibration", str(text), "--samples", "6", "--seq-len", "16", "--device", "cpu",
    ]  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _blocks_compressed(out: Path) -> list[int]:
    lines = (out / "niwaki/events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    return [e["index"] for e in events if e["event"] == "block" and not e["replayed"]]


def test_killed_at_any_time_resumes_to_the_same_bytes(text: Path, tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model", blocks=12)
    straight = tmp_path / "straight"
    niwaki.compress(model, straight, **settings(text))
    for number, wanted in enumerate((0, 2, 9)):
        out = tmp_path / f"out-{number}"
        journal = tmp_path / f"out-{number}.partial/niwaki/journal"
        process = _start(model, out, text)
        deadline = time.monotonic() + 120
        while len(list(journal.glob("block-*.json"))) < wanted or not (journal / FINGERPRINT).is_file():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not out.exists()
        niwaki.compress(model, out, resume=True, **settings(text))
        assert file_bytes(out) == file_bytes(straight)
        compressed = _blocks_compressed(out)
        redone = {index for index in compressed if compressed.count(index) > 1}
        assert len(redone) <= 2  # being written and being hashed


def test_partial_journal_and_orphans_are_cleaned(model: Path, text: Path, tmp_path: Path) -> None:
    """A shard that does not match its journalled hash is made again."""
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    interrupt_after(2, model, out, text)
    shard = partial / json.loads((partial / "niwaki/journal/block-00000.json").read_text())["shard"]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    (partial / ".model-00003.safetensors.tmp").write_bytes(b"half")
    (partial / ".tmpAb3dEf").write_bytes(b"half, as safetensors leaves it")
    niwaki.compress(model, out, resume=True, **settings(text))
    niwaki.compress(model, tmp_path / "straight", **settings(text))
    assert file_bytes(out) == file_bytes(tmp_path / "straight")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "seed"),
        ({"target": "0.5"}, r"config \(target\)"),
        ({"options": {"damping_frac": 0.1}}, r"config \(options\)"),
        ({"calibration": {"samples": 5, "seq_len": 16}}, r"data \(calibration tokens\)"),
    ],
)
def test_resume_with_another_config_is_refused(
    model: Path, text: Path, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    out = tmp_path / "out"
    interrupt_after(1, model, out, text)
    before = file_bytes(tmp_path / "out.partial")
    if "calibration" in changes:
        changes = {"calibration": {"files": (str(text),), **changes["calibration"]}}
    with pytest.raises(ResumeError, match=f"changed since it began: .*{named}"):
        niwaki.compress(model, out, resume=True, **settings(text, **changes))
    assert file_bytes(tmp_path / "out.partial") == before


def test_resume_with_another_model_or_text_is_refused(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupt_after(1, model, out, text)
    content = text.read_text()
    write_texts(text, first=5)
    with pytest.raises(ResumeError, match=r"data \(calibration tokens\)"):
        niwaki.compress(model, out, resume=True, **settings(text))
    text.write_text(content)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ResumeError, match=r"model content \(model\.safetensors\)"):
        niwaki.compress(model, out, resume=True, **settings(text))


def test_owl_and_dense_stream_resume_too(model: Path, text: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"target": "0.6", "allocation": "owl", "dense_stream": True, "method": "wanda"}
    interrupt_after(2, model, tmp_path / "out", text, **changes)
    niwaki.compress(model, tmp_path / "out", resume=True, **settings(text, **changes))
    record = niwaki.compress(model, tmp_path / "straight", **settings(text, **changes))
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "straight")
    assert record["result"]["zeros_frac"] == pytest.approx(0.6, abs=1e-3)


def test_an_unfinished_run_is_not_overwritten_silently(model: Path, text: Path, tmp_path: Path) -> None:
    interrupt_after(1, model, tmp_path / "out", text)
    with pytest.raises(OutputError, match="continue it with --resume"):
        niwaki.compress(model, tmp_path / "out", **settings(text))
    niwaki.compress(model, tmp_path / "out", overwrite=True, **settings(text))
    assert (tmp_path / "out/model.safetensors.index.json").exists()


def test_nothing_to_resume(model: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match="nothing to resume"):
        niwaki.compress(model, tmp_path / "out", resume=True, **settings(text))


def test_full_disk_in_the_middle_keeps_what_is_done(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, calls = tmp_path / "out", []

    def filling(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        save_file(*args, **kwargs)

    monkeypatch.setattr("safetensors.torch.save_file", filling)
    with pytest.raises(OutputError, match="No space left on device"):
        niwaki.compress(model, out, **settings(text))
    assert not out.exists()
    assert not list((tmp_path / "out.partial").glob(".*.tmp"))
    monkeypatch.setattr("safetensors.torch.save_file", save_file)
    niwaki.compress(model, out, resume=True, **settings(text))
    niwaki.compress(model, tmp_path / "straight", **settings(text))
    assert file_bytes(out) == file_bytes(tmp_path / "straight")


def test_resume_of_a_finished_out(model: Path, text: Path, tmp_path: Path) -> None:
    out, events = tmp_path / "out", []
    record = niwaki.compress(model, out, **settings(text))
    before = folder_bytes(out)

    def report(event: str, **_: Any) -> None:
        events.append(event)

    assert niwaki.compress(model, out, resume=True, report=report, **settings(text)) == record
    assert events == ["complete"]
    with pytest.raises(ResumeError, match=r"is finished, from other inputs: changed since then: .*seed\."):
        niwaki.compress(model, out, resume=True, **settings(text, seed=1))
    (out / "niwaki/run.json").write_text("{}")
    with pytest.raises(ResumeError, match="cannot be compared"):
        niwaki.compress(model, out, resume=True, **settings(text))
    (out / "niwaki/run.json").write_bytes(before["niwaki/run.json"])
    assert folder_bytes(out) == before


def test_an_interrupt_before_the_first_part_leaves_nothing(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(event: str, **_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        niwaki.compress(model, tmp_path / "out", report=stop, **settings(text))
    assert not list(tmp_path.glob("out*"))


def test_a_finished_block_is_read_once(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_after(3, model, tmp_path / "out", text)
    indices: list[int] = []
    read = FullBlocks.read

    def counting(storage: FullBlocks, folder: ResultFolder, index: int) -> dict[str, Tensor]:
        indices.append(index)
        return read(storage, folder, index)

    monkeypatch.setattr(FullBlocks, "read", counting)
    replayed: list[int] = []

    def report(event: str, **fields: Any) -> None:
        if event == "block" and fields["replayed"]:
            replayed.append(fields["index"])

    niwaki.compress(model, tmp_path / "out", resume=True, report=report, **settings(text))
    assert indices == replayed
    assert len(replayed) >= 3
