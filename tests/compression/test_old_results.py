"""Results of version 0.1 are still read: inspected, evaluated, compared, explained, and resumed or refused."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import niwaki
from niwaki.compression.inspect import inspect
from niwaki.compression.run_record import FORMAT, RunRecord, read_lines, read_run, write_record
from niwaki.compression.verify import check_weights
from niwaki.compression.why import why
from niwaki.errors import ResumeError

OLD = Path(__file__).parents[1] / "data" / "results_v0"
RESULTS = ("pruned", "packed", "quantized", "shaped", "shadowed", "chained")
RENAMED = {"ends": "embeddings", "ends_bits": "embeddings_bits", "most_error": "max_error"}
SUMMED = ("kind", "measure", "made", "measured", "allocation", "matrices", "blocks", "worst", "notes", "stages")
WRITTEN_S = 1_767_225_600  # a resume compares when the model was written


def renamed(value: Any) -> Any:
    """Return a summary of version 0.1 with the keys of today."""
    if isinstance(value, dict):
        return {RENAMED.get(key, key): renamed(inner) for key, inner in value.items()}
    return [renamed(inner) for inner in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", RESULTS)
def test_the_records_are_read_and_written_as_they_are(name: str, tmp_path: Path) -> None:
    record, before = read_run(OLD / name), json.loads((OLD / name / "niwaki/run.json").read_text())
    assert record.format == 0 and record.recipe.embeddings == before["recipe"]["ends"]
    assert record.dump() == renamed(before)
    lines = [json.loads(line) for line in (OLD / name / "niwaki/blocks.jsonl").read_text().splitlines()]
    assert [line.dump() for line in read_lines(OLD / name)] == lines
    (tmp_path / "niwaki").mkdir()
    write_record(tmp_path, record)
    assert read_run(tmp_path) == record


def test_new_records_have_a_format_and_later_ones_are_refused(tmp_path: Path) -> None:
    record = read_run(OLD / "pruned")
    (tmp_path / "niwaki").mkdir()
    write_record(tmp_path, record.model_copy(update={"format": FORMAT + 1}))
    with pytest.raises(niwaki.CheckpointError, match="install a newer niwaki"):
        read_run(tmp_path)


@pytest.mark.parametrize("name", RESULTS)
def test_inspect_sums_them_up_as_before(name: str) -> None:
    expected = renamed(json.loads((OLD / "expected" / f"{name}-inspect.json").read_text()))
    summary = json.loads(json.dumps(inspect(OLD / name)))
    assert {key: summary[key] for key in SUMMED} == {key: expected[key] for key in SUMMED}
    assert check_weights(OLD / name)


@pytest.mark.parametrize("name", ["pruned", "packed", "quantized", "shaped", "chained"])
def test_every_matrix_is_explained(name: str) -> None:
    line = read_lines(OLD / name)[-1]
    assert why(OLD / name, f"{line.block}.{line.matrix}")["bytes"] == line.bytes


@pytest.mark.parametrize("name", ["pruned", "packed", "quantized", "shaped", "chained"])
def test_evaluations_give_the_same_numbers(name: str) -> None:
    expected = json.loads((OLD / "expected" / f"{name}-evaluate.json").read_text())
    data = str(OLD / "held.jsonl")
    result = niwaki.evaluate(OLD / name, reference=OLD / "dense", data=[data], seq_len=32, device="cpu")
    assert result["bytes"] == expected["bytes"]
    for measure in ("perplexity", "reference_perplexity", "kl", "top1_agreement"):
        assert result[measure][data] == pytest.approx(expected[measure]["held.jsonl"], rel=1e-4)


def test_they_are_compared(tmp_path: Path) -> None:
    outs = [OLD / name for name in ("packed", "chained", "shadowed")]
    comparison = niwaki.compare(OLD / "dense", outs, data=[str(OLD / "held.jsonl")], seq_len=32, device="cpu", rounds=0)
    methods = [candidate.model.method for candidate in comparison.candidates]
    assert methods == ["sparsegpt+gptq", "comp+gptq", "shadow"]


def test_a_card_is_made_again_from_an_old_record() -> None:
    from niwaki.compression.model_card import model_card

    record = read_run(OLD / "quantized")
    assert isinstance(record, RunRecord)
    card, before = model_card(record), (OLD / "quantized/README.md").read_text()
    assert [line for line in card.splitlines() if "|" in line] == [line for line in before.splitlines() if "|" in line]


@pytest.fixture
def unfinished(tmp_path: Path) -> Path:
    """A folder with the model, its text and a run of version 0.1 that was killed after its first block."""
    for name in ("dense", "unfinished.partial"):
        shutil.copytree(OLD / name, tmp_path / name)
    shutil.copy(OLD / "text.jsonl", tmp_path)
    os.utime(tmp_path / "dense/model.safetensors", (WRITTEN_S, WRITTEN_S))
    return tmp_path


def resume(folder: Path, **changes: Any) -> dict[str, Any]:
    calibration = {"files": (str(folder / "text.jsonl"),), "samples": 8, "seq_len": 32}
    recipe = {"method": "sparsegpt", "target": "2:4", "calibration": calibration, "device": "cpu", **changes}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return niwaki.compress(folder / "dense", folder / "unfinished", resume=True, **recipe)
    finally:
        torch.set_num_threads(threads)


def test_a_resume_of_an_old_run_is_refused_if_something_changed(unfinished: Path) -> None:
    with pytest.raises(ResumeError, match=r"changed since it began: .*config \(target\)") as caught:
        resume(unfinished, target="0.5")
    assert "embeddings" not in str(caught.value) and "ends" not in str(caught.value)
    assert (unfinished / "unfinished.partial").is_dir()


def test_a_resume_of_an_old_run_keeps_its_blocks(unfinished: Path) -> None:
    journal = unfinished / "unfinished.partial/niwaki/journal"
    entries = [json.loads((journal / f"{part}.json").read_text()) for part in ("block-00000", "ends-00000")]
    try:
        record = resume(unfinished)
    except ResumeError as error:  # other versions of packages decide other bytes
        assert set(str(error).partition("began: ")[2].partition(". Restore")[0].split(", ")) <= {
            "version (torch)",
            "version (transformers)",
        }
        return
    for entry in entries:
        assert record["result"]["sha256"][entry["shard"]] == entry["sha256"]
    assert [line.block for line in read_lines(unfinished / "unfinished")] == sorted(7 * [0, 1, 2])
