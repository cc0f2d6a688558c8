"""The main job end to end: files, resume, refusals, and that nothing is ever half there."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import niwaki
from niwaki.errors import CheckpointError, InputError, OutputError, ResumeError
from support.families import build, families
from support.models import add_tokenizer, file_bytes, tiny_llama, weights_of, write_texts

SMALL = {"samples": 6, "seq_len": 16}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "model", blocks=4)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "text.jsonl")


def settings(text: Path, **changes: Any) -> dict[str, Any]:
    return {
        "method": "sparsegpt",
        "target": "2:4",
        "calibration": {"files": (str(text),), **SMALL},
        "device": "cpu",
        **changes,
    }


def test_result_is_a_normal_folder_with_its_record(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    record = niwaki.compress(model, out, **settings(text))
    assert record == json.loads((out / "niwaki/run.json").read_text())
    assert record["result"]["zeros_frac"] == 0.5
    assert record["recipe"]["seed"] == 0 and record["calibration"]["windows"] == [6, 16]
    lines = [json.loads(line) for line in (out / "niwaki/blocks.jsonl").read_text().splitlines()]
    assert len(lines) == 4 * 7 == record["result"]["matrices"]
    assert [line["block"] for line in lines] == sorted(line["block"] for line in lines)
    weights = weights_of(out)
    for line in lines:
        weight = weights[f"model.layers.{line['block']}.{line['matrix']}.weight"]
        assert int((weight == 0).sum()) == line["zeros"] == weight.numel() // 2
        assert line["bytes"] == weight.numel() * 4
    events = [json.loads(line)["event"] for line in (out / "niwaki/events.jsonl").read_text().splitlines()]
    assert events[0] == "start" and events[-1] == "done" and events.count("block") == 4
    assert not (out / "niwaki/journal").exists()
    assert "sparsity_config" not in (out / "config.json").read_text()
    card = (out / "README.md").read_text()
    assert "library_name: transformers" in card and "50.0000%" in card
    assert not out.with_name("out.partial").exists()


def test_untouched_tensors_are_the_same_bytes(model: Path, text: Path, tmp_path: Path) -> None:
    niwaki.compress(model, tmp_path / "out", **settings(text))
    before, after = weights_of(model), weights_of(tmp_path / "out")
    assert set(before) == set(after)
    for name in before:
        if not name.endswith("proj.weight"):
            assert torch.equal(before[name], after[name])


def test_loads_and_generates_without_niwaki(model: Path, text: Path, tmp_path: Path) -> None:
    niwaki.compress(model, tmp_path / "out", **settings(text))
    script = f"""
import sys
sys.modules["niwaki"] = None  # importing it would fail
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "out")!r})
tokenizer = AutoTokenizer.from_pretrained({str(tmp_path / "out")!r})
ids = model.generate(**tokenizer("The garden", return_tensors="pt"), max_new_tokens=5, do_sample=False)
print(ids.shape[1], float((model.model.layers[0].mlp.up_proj.weight == 0).float().mean()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    length, zeros = done.stdout.split()
    assert int(length) > 5 and float(zeros) == 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes_are_kept(text: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny_llama(tmp_path / "model", dtype=dtype)
    niwaki.compress(model, tmp_path / "out", **settings(text))
    assert {tensor.dtype for tensor in weights_of(tmp_path / "out").values()} == {dtype}


@pytest.mark.parametrize("name", sorted(families()))
def test_every_family_compresses_and_loads(name: str, text: Path, tmp_path: Path) -> None:
    import transformers

    folder = tmp_path / "model"
    config = families()[name].config
    config.vocab_size = 4096  # the sapling's tokenizer
    build(config).save_pretrained(folder)
    add_tokenizer(folder)
    record = niwaki.compress(folder, tmp_path / "out", **settings(text))
    assert record["result"]["zeros_frac"] == 0.5
    assert set(weights_of(tmp_path / "out")) == set(weights_of(folder))
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids_BT = torch.arange(1, 9)[None]
    assert torch.isfinite(loaded(ids_BT).logits).all()


# --- crash safety ----------------------------------------------------------------------------------------


def _start(model: Path, out: Path, text: Path) -> subprocess.Popen[bytes]:
    """The command line with the same recipe as `settings`, in a process that can be killed."""
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
        while len(list(journal.glob("block-*.json"))) < wanted or not journal.is_dir():
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
    _interrupt_after(2, model, out, text)
    shard = partial / json.loads((partial / "niwaki/journal/block-00000.json").read_text())["shard"]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    (partial / ".model-00003.safetensors.tmp").write_bytes(b"half")
    (partial / ".tmpAb3dEf").write_bytes(b"half, as safetensors leaves it")
    niwaki.compress(model, out, resume=True, **settings(text))
    niwaki.compress(model, tmp_path / "straight", **settings(text))
    assert file_bytes(out) == file_bytes(tmp_path / "straight")


def _interrupt_after(blocks: int, model: Path, out: Path, text: Path, **changes: Any) -> None:
    """Stops a run as a user would, once `blocks` blocks are safely on the disk."""

    def report(event: str, **fields: Any) -> None:
        if event == "saved" and fields["part"] == f"block-{blocks - 1:05d}":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        niwaki.compress(model, out, report=report, **settings(text, **changes))
    assert not out.exists()


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
    _interrupt_after(1, model, out, text)
    before = file_bytes(tmp_path / "out.partial")
    if "calibration" in changes:
        changes = {"calibration": {"files": (str(text),), **changes["calibration"]}}
    with pytest.raises(ResumeError, match=f"changed since it began: .*{named}"):
        niwaki.compress(model, out, resume=True, **settings(text, **changes))
    assert file_bytes(tmp_path / "out.partial") == before


def test_resume_with_another_model_or_text_is_refused(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _interrupt_after(1, model, out, text)
    content = text.read_text()
    write_texts(text, first=5)
    with pytest.raises(ResumeError, match=r"data \(calibration tokens\)"):
        niwaki.compress(model, out, resume=True, **settings(text))
    text.write_text(content)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ResumeError, match=r"model \(model\.safetensors\)"):
        niwaki.compress(model, out, resume=True, **settings(text))


def test_owl_and_dense_stream_resume_too(model: Path, text: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"target": "0.6", "allocation": "owl", "dense_stream": True, "method": "wanda"}
    _interrupt_after(2, model, tmp_path / "out", text, **changes)
    niwaki.compress(model, tmp_path / "out", resume=True, **settings(text, **changes))
    record = niwaki.compress(model, tmp_path / "straight", **settings(text, **changes))
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "straight")
    assert record["result"]["zeros_frac"] == pytest.approx(0.6, abs=1e-3)


def test_an_unfinished_run_is_not_overwritten_silently(model: Path, text: Path, tmp_path: Path) -> None:
    _interrupt_after(1, model, tmp_path / "out", text)
    with pytest.raises(OutputError, match="continue it with --resume"):
        niwaki.compress(model, tmp_path / "out", **settings(text))
    niwaki.compress(model, tmp_path / "out", overwrite=True, **settings(text))
    assert (tmp_path / "out/model.safetensors.index.json").exists()


def test_nothing_to_resume(model: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match="nothing to resume"):
        niwaki.compress(model, tmp_path / "out", resume=True, **settings(text))


def test_existing_out_is_refused_and_replaced_only_at_the_end(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    niwaki.compress(model, out, **settings(text))
    before = file_bytes(out)
    with pytest.raises(OutputError, match="already exists"):
        niwaki.compress(model, out, **settings(text, seed=1))
    bad = dict(settings(text, target="0.5"))
    with pytest.raises(KeyboardInterrupt):

        def stop(event: str, **fields: Any) -> None:
            if event == "block" and fields["index"] == 2:
                raise KeyboardInterrupt

        niwaki.compress(model, out, overwrite=True, report=stop, **bad)
    assert file_bytes(out) == before
    niwaki.compress(model, out, overwrite=True, **bad)
    assert file_bytes(out) != before
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out"]


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


def test_disk_that_cannot_hold_the_result_is_refused_first(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("niwaki.compression.run.shutil.disk_usage", lambda path: usage(10, 9, 1))
    with pytest.raises(OutputError, match="the result needs"):
        niwaki.compress(model, tmp_path / "out", **settings(text))
    assert not list(tmp_path.glob("out*"))


def test_two_runs_do_not_share_a_folder(model: Path, text: Path, tmp_path: Path) -> None:
    def again(event: str, **fields: Any) -> None:
        if event == "block":
            with pytest.raises(OutputError, match="another niwaki is working"):
                niwaki.compress(model, tmp_path / "out", resume=True, **settings(text))

    niwaki.compress(model, tmp_path / "out", report=again, **settings(text))


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("place", ["model", "model/inside", ".", "link"])
def test_an_out_that_shares_a_folder_with_the_model_is_refused(
    model: Path, text: Path, tmp_path: Path, place: str
) -> None:
    (tmp_path / "link").symlink_to(model)
    (model / "niwaki").mkdir()
    (model / "niwaki/run.json").write_text("{}")  # the model is itself a result, so it could be replaced
    before = _tree(tmp_path)
    with pytest.raises(OutputError, match=r"share a folder|not a niwaki result"):
        niwaki.compress(model, tmp_path / place, overwrite=True, **settings(text))
    assert _tree(tmp_path) == before


@pytest.mark.parametrize("suffix", [".partial", ".replaced"])
def test_a_model_that_is_named_like_a_working_folder_is_refused(
    model: Path, text: Path, tmp_path: Path, suffix: str
) -> None:
    source = model.rename(tmp_path / f"out{suffix}")
    (source / "niwaki").mkdir()
    (source / "niwaki/run.json").write_text("{}")
    before = _tree(tmp_path)
    with pytest.raises(OutputError, match="share a folder"):
        niwaki.compress(source, tmp_path / "out", overwrite=True, **settings(text))
    assert _tree(tmp_path) == before


@pytest.mark.parametrize("suffix", ["", ".partial", ".replaced"])
def test_only_what_niwaki_wrote_is_overwritten(model: Path, text: Path, tmp_path: Path, suffix: str) -> None:
    mine = tmp_path / f"out{suffix}"
    mine.mkdir()
    niwaki.compress(model, tmp_path / "out", **settings(text))  # an empty folder is nobody's
    shutil.rmtree(tmp_path / "out")
    mine.mkdir(exist_ok=True)
    (mine / "thesis.txt").write_text("years of work")
    for changes in ({"overwrite": True}, {"resume": True}, {}):
        with pytest.raises(OutputError, match=rf"out{suffix} exists and is not a niwaki result"):
            niwaki.compress(model, tmp_path / "out", **changes, **settings(text))
    assert _tree(mine) == {"thesis.txt": b"years of work"}


def test_overwrite_does_not_delete_a_running_run(model: Path, text: Path, tmp_path: Path) -> None:
    def again(event: str, **fields: Any) -> None:
        if event == "block":
            with pytest.raises(OutputError, match="another niwaki is working"):
                niwaki.compress(model, tmp_path / "out", overwrite=True, **settings(text))

    niwaki.compress(model, tmp_path / "out", report=again, **settings(text))


def test_resume_of_a_finished_out(model: Path, text: Path, tmp_path: Path) -> None:
    out, events = tmp_path / "out", []
    record = niwaki.compress(model, out, **settings(text))
    before = _tree(out)

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
    assert _tree(out) == before


def test_an_interrupt_before_the_first_part_leaves_nothing(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(event: str, **_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        niwaki.compress(model, tmp_path / "out", report=stop, **settings(text))
    assert not list(tmp_path.glob("out*"))


def test_the_record_says_what_was_hashed(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    record = niwaki.compress(model, out, **settings(text))
    content = (model / "model.safetensors").read_bytes()
    header = content[: 8 + int.from_bytes(content[:8], "little")]
    assert record["model"]["files"]["model.safetensors"] == {
        "bytes": len(content),
        "header_sha256": hashlib.sha256(header).hexdigest(),
    }
    config = (model / "config.json").read_bytes()
    assert record["model"]["files"]["config.json"]["sha256"] == hashlib.sha256(config).hexdigest()
    for shard, sha256 in record["result"]["sha256"].items():
        assert hashlib.sha256((out / shard).read_bytes()).hexdigest() == sha256


def test_all_files_of_a_result_follow_the_umask(model: Path, text: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        niwaki.compress(model, tmp_path / "out", **settings(text))
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert set(modes.values()) == {0o640}, modes


# --- wrong inputs: nothing is written ---------------------------------------------------------------------


def _poison(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"method": "wandda"}, InputError, "unknown method 'wandda': did you mean 'wanda'"),
        ({"target": "2:3"}, InputError, "needs a multiple of 3 inputs"),
        ({"target": "16bit"}, InputError, "expected 1 to 8 bits per weight"),
        ({"allocation": "owll"}, InputError, "did you mean 'owl'"),
        ({"allocation": "owl"}, InputError, "owl moves unstructured sparsity"),
        ({"options": {"owl_spread_frac": 0.1}}, InputError, "needs the allocation owl"),
        ({"options": {"dampening": 1}}, InputError, "unknown option of sparsegpt"),
        ({"options": {"damping_frac": 7}}, InputError, "must lie in"),
        ({"device": "tpu"}, InputError, "device"),
        ({"device": "cuda:99"}, InputError, "CUDA devices"),
        (
            {"calibration": {"samples": 6, "seq_len": 65}},
            InputError,
            "seq_len 65 is longer than the 64 positions of the model",
        ),
        ({"calibration": {"samples": 10**6, "seq_len": 64}}, InputError, "add text"),
    ],
)
def test_wrong_requests(
    model: Path, text: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    if "calibration" in changes:
        changes = {"calibration": {"files": (str(text),), **changes["calibration"]}}
    with pytest.raises(error, match=message):
        niwaki.compress(model, tmp_path / "out", **settings(text, **changes))
    assert not list(tmp_path.glob("out*"))


def test_a_missing_file_is_told_before_a_window_that_is_too_long(model: Path, text: Path, tmp_path: Path) -> None:
    request: dict[str, Any] = {"method": "wanda", "target": 0.5, "device": "cpu"}
    with pytest.raises(InputError, match="no such text file"):
        niwaki.compress(model, tmp_path / "out", calibration=str(tmp_path / "no.txt"), **request)
    with pytest.raises(InputError, match=r"seq_len 2048 \(the default\) is longer than the 64 positions"):
        niwaki.compress(model, tmp_path / "out", calibration=text, **request)
    assert not list(tmp_path.glob("out*"))


def test_nan_weights_name_the_tensor_and_leave_nothing(model: Path, text: Path, tmp_path: Path) -> None:
    _poison(model)
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.mlp\.up_proj\.weight holds NaN"):
        niwaki.compress(model, tmp_path / "out", **settings(text))
    assert not list(tmp_path.glob("out*"))


def test_missing_weights_are_named(model: Path, text: Path, tmp_path: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"no weights for model\.layers\.1\.mlp\.up_proj\.weight"):
        niwaki.compress(model, tmp_path / "out", **settings(text))
    assert not list(tmp_path.glob("out*"))


def test_tokenizer_of_another_model_is_refused(text: Path, tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model", vocab_size=100)
    with pytest.raises(InputError, match="the tokenizer belongs to another model"):
        niwaki.compress(model, tmp_path / "out", **settings(text))


def test_without_text_the_model_writes_its_own_and_says_so(model: Path, tmp_path: Path) -> None:
    messages: list[str] = []

    def report(event: str, **fields: Any) -> None:
        if event == "warning":
            messages.append(fields["message"])

    record = niwaki.compress(
        model, tmp_path / "out", method="wanda", target="0.5", calibration=SMALL, device="cpu", report=report
    )
    assert "the model samples" in messages[0]
    assert record["calibration"]["source"] == "sampled from the model"


def test_magnitude_needs_no_text(model: Path, tmp_path: Path) -> None:
    record = niwaki.compress(model, tmp_path / "out", method="magnitude", target="0.5", device="cpu")
    assert record["calibration"]["windows"] is None
    assert record["result"]["zeros_frac"] == 0.5


def test_sharded_source_gives_the_same_weights(model: Path, text: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(sharded, max_shard_size="60KB")
    add_tokenizer(sharded)
    assert len(list(sharded.glob("*.safetensors"))) > 3
    niwaki.compress(model, tmp_path / "a", **settings(text))
    niwaki.compress(sharded, tmp_path / "b", **settings(text))
    one, other = weights_of(tmp_path / "a"), weights_of(tmp_path / "b")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_owl_shifts_sparsity_and_keeps_the_budget(model: Path, text: Path, tmp_path: Path) -> None:
    record = niwaki.compress(model, tmp_path / "out", **settings(text, target="0.5", allocation="owl"))
    lines = [json.loads(line) for line in (tmp_path / "out/niwaki/blocks.jsonl").read_text().splitlines()]
    assert len({line["target"] for line in lines}) > 1
    assert record["result"]["zeros_frac"] == pytest.approx(0.5, abs=1e-3)


def test_read_only_parent_is_refused(model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("niwaki.compression.run.Path.mkdir", refuse)
    with pytest.raises(OutputError, match=r"cannot write to .*Permission denied"):
        niwaki.compress(model, tmp_path / "out", **settings(text))


def test_out_below_a_missing_folder_is_refused(model: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="does not exist: create it"):
        niwaki.compress(model, tmp_path / "no/such/out", **settings(text))
