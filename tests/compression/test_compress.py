"""Results of a compression end to end: files, weights, dtypes, families, records."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import niwaki
from support.compressions import SMALL, settings
from support.families import build, families
from support.models import add_tokenizer, tiny_llama, weights_of


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


def test_without_text_the_model_writes_its_own_and_says_so(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NIWAKI_CACHE", str(tmp_path / "cache"))  # other tests may have kept the same text
    messages: list[str] = []

    def report(event: str, **fields: Any) -> None:
        if event == "warning":
            messages.append(fields["message"])

    record = niwaki.compress(
        model, tmp_path / "out", method="wanda", target="0.5", calibration=SMALL, device="cpu", report=report
    )
    assert "itself (kept in" in messages[0]
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
