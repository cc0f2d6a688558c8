"""`niwaki inspect` tells what is in the record of a result, of every kind, and nothing else."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import niwaki
from niwaki.cli.inspect import BARS, print_inspection, print_why
from niwaki.compression.inspect import inspect
from niwaki.compression.why import why
from niwaki.errors import CheckpointError, InputError
from support.models import tiny_llama, weights_of, write_texts

KINDS: dict[str, dict[str, Any]] = {
    "pruned": {"method": "wanda", "target": "0.6", "allocation": "owl"},
    "swept": {"method": "sparsegpt", "target": "2:4", "dense_stream": True},
    "learned": {"method": "besa", "target": "0.5", "options": {"steps": 4}},
    "quantized": {"method": "squeeze10", "target": "2.4bit", "options": {"rounds": 1, "learn_rounds": 0}},
    "kept": {
        "method": "squeeze10",
        "target": "2.4bit",
        "keep_blocks": "1",
        "options": {"rounds": 1, "learn_rounds": 0},
    },
    "binary": {"method": "billm", "target": "8bit", "options": {"salient": 8}},
    "removed": {"method": "shortgpt", "target": "0.3"},
    "narrow": {"method": "comp", "target": "0.4", "options": {"try_blocks": 1, "try_heads": 1}},
    "uneven": {"method": "flap", "target": "0.3"},
    "zeros": {"method": "flap", "target": "0.3", "pack": "none"},
    "chain": {
        "method": "comp+rtn",
        "target": "0.4+4bit",
        "options": {"comp.try_blocks": 0, "comp.try_heads": 0, "rtn.group": 0},
    },
    "contextual": {"method": "shadow", "target": "0.5", "options": {"unit": "prompt", "gradient_windows": 2}},
    "inputs": {"method": "shadow", "target": "0.5", "options": {"gradient_windows": 2}},
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("inspect")
    model = tiny_llama(folder / "model", hidden_size=64, intermediate_size=256, dtype=torch.bfloat16)
    calibration = {"files": (str(write_texts(folder / "text.jsonl")),), "samples": 8, "seq_len": 16}
    for name, recipe in KINDS.items():
        niwaki.compress(model, folder / name, calibration=calibration, device="cpu", **recipe)
    return {name: folder / name for name in KINDS}


def shown(found: dict[str, Any], printer: Any, terminal: bool = False) -> str:
    console = Console(
        file=io.StringIO(), width=100, force_terminal=terminal, color_system="truecolor" if terminal else None
    )
    printer(console, found)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_told_from_its_record(kind: str, results: dict[str, Path]) -> None:
    found = inspect(results[kind])
    record = json.loads((results[kind] / "niwaki/run.json").read_text())
    assert json.loads(json.dumps(found)) == found
    assert found["measured"]["bytes"] == record["result"]["bytes"]
    assert found["measured"]["seconds"] == record["seconds"]
    lines = [json.loads(line) for line in (results[kind] / "niwaki/blocks.jsonl").read_text().splitlines()]
    assert sum(block["bytes"] for block in found["blocks"]) == sum(line["bytes"] for line in lines)
    text = shown(found, print_inspection)
    assert f"{record['result']['bytes']:,}" in text and "\x1b" not in text
    assert any(bar in text for bar in BARS)
    assert f"block {len(found['blocks'])}" not in text


def test_zeros_are_those_in_the_file(results: dict[str, Path]) -> None:
    found, weights = inspect(results["pruned"]), weights_of(results["pruned"])
    for name, row in found["matrices"].items():
        for block, value in enumerate(row["values"]):
            weight = weights[f"model.layers.{block}.{name}.weight"]
            assert value == pytest.approx(float((weight == 0).float().mean()), abs=1e-6)
    assert found["kind"] == "pruned" and found["measure"] == "zeros_frac"


def test_what_is_gone_is_what_the_file_lacks(results: dict[str, Path]) -> None:
    removed = inspect(results["removed"])
    assert [block["gone"] for block in removed["blocks"]].count(True) == 1
    assert "removed" in shown(removed, print_inspection) and "1 removed" not in removed["notes"]
    narrow = inspect(results["narrow"])
    stored = weights_of(results["narrow"])
    dropped = narrow["allocation"]["shape"]["dropped"]
    left = next(block for block in range(3) if block not in dropped)
    share = narrow["matrices"]["mlp.down_proj"]["values"][left]
    assert 1 - stored["model.layers.0.mlp.down_proj.weight"].shape[1] / 256 == pytest.approx(share)


def test_bits_differ_by_need_and_chains_tell_both_stages(results: dict[str, Path]) -> None:
    found = inspect(results["quantized"])
    values = [value for row in found["matrices"].values() for value in row["values"]]
    assert found["measure"] == "bits" and max(values) > min(values)
    chain = inspect(results["chain"])
    assert chain["measure"] == "bits" and chain["stages"][0]["method"] == "comp"
    assert "before that: comp 0.4" in shown(chain, print_inspection)


def test_error_growth_is_shown_by_depth(results: dict[str, Path]) -> None:
    found = inspect(results["swept"])
    assert all(block["error"] > 0 and block["drift"] > 0 for block in found["blocks"])
    assert "drift after each block" in shown(found, print_inspection)
    assert "drift after" not in shown(inspect(results["pruned"]), print_inspection)


def test_a_predictor_tells_what_runs(results: dict[str, Path]) -> None:
    found = inspect(results["contextual"])
    assert found["kind"] == "contextual" and found["matrices"]["neurons"]["value"] == pytest.approx(0.5)
    assert all(0.5 <= value <= 1 for value in found["matrices"]["neurons"]["importance"])
    text = shown(found, print_inspection)
    assert "predictor" in text and re.search(r"reads\W+prompt\b", text)
    with pytest.raises(InputError, match="changed no matrix"):
        why(results["contextual"], "0.mlp.down_proj")
    found = inspect(results["inputs"])
    assert found["kind"] == "contextual" and set(found["matrices"]) > {"o_proj", "down_proj"}
    run = found["matrices"]["gate_proj/up_proj"]
    assert all(0 <= value <= 1 for value in run["values"]) and found["predictor"]["target"] == "0.5"
    text = shown(found, print_inspection)
    assert "perplexity over dense" in text and "by measured damage" in text
    assert "min_prompt 16" in text and "mean_fill" not in text, "settings of the other unit decide nothing"


def test_a_terminal_gets_colour_and_a_narrow_one_fewer_characters(results: dict[str, Path]) -> None:
    found = inspect(results["pruned"])
    assert "\x1b[38;2" in shown(found, print_inspection, terminal=True)
    deep = {name: row | {"values": row["values"] * 100} for name, row in found["matrices"].items()}
    lines = shown(found | {"matrices": deep}, print_inspection, terminal=True).splitlines()
    row = next(line for line in lines if "self_attn.q_proj" in line)
    assert 8 <= sum(row.count(bar) for bar in BARS) <= 100


def test_why_tells_scores_threshold_counts_and_errors(results: dict[str, Path]) -> None:
    found = why(results["pruned"], "model.layers.1.mlp.down_proj")
    weight = weights_of(results["pruned"])["model.layers.1.mlp.down_proj.weight"]
    assert found["cut"] == int((weight == 0).sum()) and found["kept"] == int((weight != 0).sum())
    assert found["scores"]["lost"][0] > 0 and found["errors"]["error"] > 0
    assert found["reasons"][0].startswith("owl: its share of outlier scores is")
    text = shown(found, print_why)
    assert "highest score that was cut" in text and "quantiles" in text and f"{found['cut']:,}" in text
    assert why(results["pruned"], "1.mlp.down_proj") == found
    assert why(results["pruned"], "model.layers.1.mlp.down_proj.weight") == found


@pytest.mark.parametrize(
    ("kind", "matrix", "decided", "reason"),
    [
        ("swept", "0.mlp.up_proj", "inside the sweep, group by group", "uniform: every matrix was given 2:4"),
        ("learned", "0.mlp.up_proj", "a score for every weight", "learned: its rows lose"),
        ("quantized", "0.mlp.up_proj", "no weight was cut", "sensitivity: at two bits"),
        ("kept", "1.mlp.up_proj", "no weight was cut", "block 1 was kept at 4 bits"),
        ("kept", "0.mlp.up_proj", "no weight was cut", "bits are what the blocks kept at 4 bits leave"),
        ("binary", "2.mlp.up_proj", "no weight was cut", "uniform"),
        ("narrow", "0.mlp.down_proj", "whole heads or neurons went", "neurons"),
        ("uneven", "0.mlp.down_proj", "whole heads or neurons went", "the shape that the method computes"),
        ("zeros", "0.self_attn.o_proj", "whole heads or neurons went", "heads stay in block 0"),
        ("chain", "0.mlp.down_proj", "no weight was cut", "uniform"),
    ],
)
def test_what_decided_is_said_where_there_are_no_scores(
    kind: str, matrix: str, decided: str, reason: str, results: dict[str, Path]
) -> None:
    found = why(results[kind], matrix)
    assert decided in found["chosen_by"] and any(reason in told for told in found["reasons"])
    assert (found["scores"] is None) == ("a score" not in decided)
    assert found["chosen_by"].split(". ")[0] in shown(found, print_why)


def test_a_removed_block_says_so(results: dict[str, Path]) -> None:
    gone = next(block["block"] for block in inspect(results["removed"])["blocks"] if block["gone"])
    assert f"block {gone} was removed: its influence" in why(results["removed"], f"{gone}.mlp.up_proj")["reasons"][0]


@pytest.mark.parametrize(
    ("asked", "near"),
    [
        ("model.layers.1.mlp.dwn_proj", "model.layers.1.mlp.down_proj"),
        ("mlp.down_proj", "model.layers.0.mlp.down_proj"),
        ("model.layer.2.self_attn.q_proj", "model.layers.2.self_attn.q_proj"),
    ],
)
def test_a_misspelt_matrix_gets_a_suggestion(asked: str, near: str, results: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="N from 0 to 2") as caught:
        why(results["pruned"], asked)
    assert f"did you mean {near!r}?" in str(caught.value)


def test_folders_that_are_no_results_are_refused(results: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a result of niwaki"):
        inspect(tmp_path)
    broken = tmp_path / "broken" / "niwaki"
    broken.mkdir(parents=True)
    (broken / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        inspect(tmp_path / "broken")
    (broken / "run.json").write_text(json.dumps({"export": {"to": "gguf", "bytes": 1, "sha256": {}}}))
    with pytest.raises(InputError, match="holds no compression"):
        inspect(tmp_path / "broken")


def test_experts_share_a_row() -> None:
    from niwaki.compression.inspect import kind_of

    assert kind_of("mlp.experts.17.down_proj") == "mlp.experts.*.down_proj"
    assert kind_of("mlp.down_proj") == "mlp.down_proj"
