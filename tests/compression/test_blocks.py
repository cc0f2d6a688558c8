"""Compression of named blocks, and of the others in a later run."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import niwaki
from niwaki.compression.run_record import RunRecord, read_lines, read_run
from niwaki.compression.why import why
from niwaki.config.recipe import make_recipe
from niwaki.config.targets import format_blocks
from niwaki.errors import CheckpointError, InputError, ResumeError, TargetError
from support.compressions import interrupt_after, settings
from support.models import Warnings, file_bytes, run, tiny_llama, weights_of

CODES = {"method": "gptq", "target": "4bit", "options": {"group": 16}}
LEARNED = {"method": "squeeze10", "target": "3.5bit", "options": {"learn_rounds": 1}, "allocation": "uniform"}
RECIPES: dict[str, dict[str, Any]] = {
    "zeros": {"method": "sparsegpt", "target": "2:4"},
    "bitmap": {"method": "wanda", "target": "0.6", "pack": "auto"},
    "codes": CODES,
    "both": {"method": "sparsegpt+gptq", "target": "2:4+4bit", "options": {"gptq.group": 16}, "pack": "auto"},
    "from the dense model": LEARNED,
    "with its gradients": {"method": "gblm", "target": "0.5"},
    "on its text": {"method": "wanda", "target": "0.5", "calibration": {"samples": 3, "seq_len": 16}},
}


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a folder as they lie in its files."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def of_block(tensors: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if f"layers.{index}." in name}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Return whether names, dtypes and bytes agree."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_two_stages_give_the_bytes_of_one_run(model: Path, text: Path, tmp_path: Path, recipe: dict[str, Any]) -> None:
    """Compare the files: the walk reads the activations of the compressed blocks in both."""
    given = settings(text, **recipe)
    niwaki.compress(model, tmp_path / "whole", **given)
    niwaki.compress(model, tmp_path / "first", **given, blocks="0-1")
    niwaki.compress(tmp_path / "first", tmp_path / "both", **given, blocks="2-3")
    whole, first, both = (stored_tensors(tmp_path / name) for name in ("whole", "first", "both"))
    dense = stored_tensors(model)
    assert same(whole, both)
    for index in (2, 3):
        assert same(of_block(first, index), of_block(dense, index))
    for index in (0, 1):
        assert same(of_block(first, index), of_block(whole, index))
        assert not same(of_block(first, index), of_block(dense, index))
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("whole", "both")]
    assert configs[0] == configs[1]
    assert [line.dump() for line in read_lines(tmp_path / "whole")] == [
        line.dump() for line in read_lines(tmp_path / "both")
    ]


def test_without_the_dense_model_the_source_stands_for_it(model: Path, text: Path, tmp_path: Path) -> None:
    niwaki.compress(model, tmp_path / "first", **settings(text, **LEARNED), blocks="0")
    report = Warnings()
    used = niwaki.compress(
        tmp_path / "first", tmp_path / "used", **settings(text, **LEARNED), blocks="1", report=report
    )
    assert used["dense_source"] == str(model) and not report.warnings
    model.rename(tmp_path / "elsewhere")
    left = niwaki.compress(
        tmp_path / "first", tmp_path / "left", **settings(text, **LEARNED), blocks="1", report=report
    )
    assert "dense_source" not in left
    assert report.warnings == [
        f"{model}, the dense model before the first run, does not exist any more: blocks that earlier runs compressed "
        "count as dense for what this run learns from the dense model"
    ]


def test_codes_of_embeddings_stay(text: Path, tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model", hidden_size=64, tie_word_embeddings=True)
    given = settings(text, **CODES)
    first = niwaki.compress(model, tmp_path / "first", **given, embeddings="8bit", blocks="1")
    with pytest.raises(TargetError, match="embed_tokens is codes already, and stays so: leave the option embeddings"):
        niwaki.compress(tmp_path / "first", tmp_path / "no", **given, embeddings="8bit", blocks="0,2")
    second = niwaki.compress(tmp_path / "first", tmp_path / "second", **given, blocks="0,2")
    niwaki.compress(model, tmp_path / "whole", **given, embeddings="8bit")
    assert second["result"]["embeddings"] == first["result"]["embeddings"]
    before, after, whole = (stored_tensors(tmp_path / name) for name in ("first", "second", "whole"))
    assert after.keys() == whole.keys()
    kept = {name for name in before if "layers" not in name or "layers.1." in name}
    assert {"model.embed_tokens.planes_0", "model.layers.1.mlp.up_proj.planes_0"} <= kept
    assert same({name: before[name] for name in kept}, {name: after[name] for name in kept})
    assert niwaki.evaluate(tmp_path / "second", data=[text], seq_len=16)["perplexity"]


def test_a_second_run_by_another_method_keeps_zeros_and_counts_both(model: Path, text: Path, tmp_path: Path) -> None:
    niwaki.compress(model, tmp_path / "zeros", **settings(text), blocks="3,0")
    record = niwaki.compress(tmp_path / "zeros", tmp_path / "out", **settings(text, **CODES), blocks=[1])
    before, after = stored_tensors(tmp_path / "zeros"), stored_tensors(tmp_path / "out")
    for index in (0, 2, 3):
        assert same(of_block(before, index), of_block(after, index))
    weights = weights_of(tmp_path / "out")
    zeros = {index: sum(int((w == 0).sum()) for w in of_block(weights, index).values()) for index in (0, 2, 3)}
    result, named = record["result"], record["result"]["named"]
    count = named["weights"]
    assert result["weights"] == 4 * count and zeros[0] == zeros[3] == count // 2 and zeros[2] == 0
    coded = sum(int((of_block(weights, 1)[name] == 0).sum()) for name in of_block(weights, 1) if "proj" in name)
    assert result["zeros_frac"] == pytest.approx((count + coded) / (4 * count))
    stored = sum(x.numel() * x.element_size() for n, x in of_block(after, 1).items() if "norm" not in n)
    assert named == {
        "blocks": [1], "weights": count, "zeros_frac": coded / count, "bits": round(8 * stored / count, 4),
        "packed": 7, "matrices": 7,
    }  # fmt: skip
    assert result["bits"] == pytest.approx((3 * 32 + named["bits"]) / 4, abs=1e-3)
    assert [line.target for line in read_lines(tmp_path / "out")[::7]] == ["2:4", "4bit", "as it was", "2:4"]


def test_the_record_the_card_and_inspect_name_both_runs(model: Path, text: Path, tmp_path: Path) -> None:
    niwaki.compress(model, tmp_path / "first", **settings(text), blocks="2-3")
    niwaki.compress(tmp_path / "first", tmp_path / "second", **settings(text, **CODES), blocks="0")
    record = read_run(tmp_path / "second")
    (before,) = record.earlier
    assert isinstance(before, RunRecord)
    assert (before.recipe.method, before.recipe.blocks, record.recipe.blocks) == ("sparsegpt", (2, 3), (0,))
    assert before == read_run(tmp_path / "first")
    assert record.origin.source == str(model) and record.model.source == str(tmp_path / "first")
    card = (tmp_path / "second" / "README.md").read_text()
    for text_of in (
        "| matrices compressed | 7 of 28: blocks 0 |",
        "| run before this one | blocks 2-3: `sparsegpt`, `2:4` |",
        "`model` compressed by niwaki",
        f"all blocks | {record.result.bits:.3f} bits a weight, {record.result.zeros_frac:.4%} zeros |",
    ):
        assert text_of in card
    assert card.index("method: sparsegpt") < card.index("method: gptq")
    found = niwaki.inspect(tmp_path / "second")
    assert found["runs"] == {"0": 0, "1": None, "2": 1, "3": 1} and found["kind"] == "pruned and quantized"
    assert found["made"]["blocks"] == "0" and [run["blocks"] for run in found["earlier"]] == ["2-3"]
    assert found["measured"]["dense_bytes"] == before.model.bytes
    assert why(tmp_path / "second", "1.mlp.up_proj")["chosen_by"] == "no run compressed this block"
    assert "sparsegpt" in why(tmp_path / "second", "2.mlp.up_proj")["chosen_by"]


def test_a_run_that_was_killed_goes_on(model: Path, text: Path, tmp_path: Path) -> None:
    niwaki.compress(model, tmp_path / "first", **settings(text, **CODES), blocks="0-1")
    niwaki.compress(tmp_path / "first", tmp_path / "whole", **settings(text, **CODES), blocks="2-3")
    interrupt_after(3, tmp_path / "first", tmp_path / "out", text, **CODES, blocks="2-3")
    with pytest.raises(ResumeError, match=r"config \(blocks\)"):
        niwaki.compress(tmp_path / "first", tmp_path / "out", **settings(text, **CODES), blocks="3", resume=True)
    niwaki.compress(tmp_path / "first", tmp_path / "out", **settings(text, **CODES), blocks="2-3", resume=True)
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "whole")


def test_a_target_in_bytes_and_its_allocation_are_of_the_named_blocks(model: Path, text: Path, tmp_path: Path) -> None:
    weights = 7168 + 3 * 32 * 48 - 4096
    given = settings(text, method="squeeze10", target=None, target_bytes=round(3.5 / 8 * 2 * weights), blocks="1-2")
    record = niwaki.compress(model, tmp_path / "out", **{**given, "options": {"learn_rounds": 0}})
    assert record["result"]["named"]["weights"] == 2 * weights
    assert record["allocation"]["target_bits"] == pytest.approx(3.5, abs=1e-3)
    assert [len(of_block) for of_block in record["allocation"]["sensitivities"]] == [0, 7, 7, 0]
    assert record["result"]["named"]["bits"] <= 3.5
    stored, dense = stored_tensors(tmp_path / "out"), stored_tensors(model)
    assert all(same(of_block(stored, index), of_block(dense, index)) for index in (0, 3))


def test_owl_spreads_over_the_named_blocks(model: Path, text: Path, tmp_path: Path) -> None:
    record = niwaki.compress(
        model, tmp_path / "out", **settings(text, method="wanda", target="0.5", allocation="owl"), blocks="1-3"
    )
    assert record["result"]["named"]["zeros_frac"] == pytest.approx(0.5, abs=2e-3)
    assert record["result"]["zeros_frac"] == pytest.approx(0.375, abs=2e-3)


@pytest.mark.parametrize(
    ("given", "blocks", "wrong"),
    [
        ({}, "2-9", "blocks 4-9: the model has blocks 0 to 3"),
        ({}, "-1", "blocks '-1': expected numbers and ranges such as 8-23 or 0,3,5-7"),
        ({}, "3-1", "blocks '3-1': expected numbers and ranges"),
        ({}, "0,x", "blocks '0,x': expected numbers and ranges such as 8-23 or 0,3,5-7, got 'x'"),
        ({}, [], "expected at least one block"),
        ({"rotate": "auto"}, "0", "rotate auto changes the weights of every block, and blocks 0 keeps the others"),
        ({"method": "comp", "target": "0.3"}, "0-1", "comp changes the shape of all blocks together: leave blocks 0-1"),
        ({"method": "comp+gptq", "target": "0.3+4bit"}, "0", "comp changes the shape of all blocks together"),
        ({"method": "shadow", "target": "0.5"}, "0", "shadow learns what all blocks together need: leave blocks 0 out"),
        ({"method": "squeeze10", "target": "3bit", "keep_blocks": "0"}, "1-2", "keep_blocks 0: blocks leaves this one"),
    ],
)
def test_wrong_blocks_are_refused_before_any_work(
    model: Path, text: Path, tmp_path: Path, given: dict[str, Any], blocks: Any, wrong: str
) -> None:
    with pytest.raises(InputError, match=re.escape(wrong)):
        niwaki.compress(model, tmp_path / "out", **settings(text, **given), blocks=blocks)
    assert not list(tmp_path.glob("out*"))
    with pytest.raises(InputError, match=re.escape(wrong)):
        niwaki.plan(model, **settings(text, **given), blocks=blocks)


def test_packed_blocks_are_not_compressed_again(model: Path, text: Path, tmp_path: Path) -> None:
    niwaki.compress(model, tmp_path / "first", **settings(text, **CODES), blocks="1-2")
    for blocks, packed in (("0-1", "1"), (None, "1-2")):
        wrong = rf"already packed or quantized in blocks {packed}: choose .* \(--blocks 0,3\)"
        with pytest.raises(CheckpointError, match=wrong):
            niwaki.compress(tmp_path / "first", tmp_path / "out", **settings(text, **CODES), blocks=blocks)


def test_a_plan_counts_the_named_blocks(model: Path, text: Path, tmp_path: Path) -> None:
    given = settings(text, **CODES)
    planned = niwaki.plan(model, **given, blocks="3")
    record = niwaki.compress(model, tmp_path / "first", **given, blocks="3")
    assert planned["output_bytes"] == pytest.approx(record["result"]["bytes"], rel=0.01)
    assert planned["matrix_bits"] == pytest.approx(record["result"]["bits"], rel=1e-3)
    planned = niwaki.plan(tmp_path / "first", **given, blocks="0-1")
    record = niwaki.compress(tmp_path / "first", tmp_path / "second", **given, blocks="0-1")
    assert planned["output_bytes"] == pytest.approx(record["result"]["bytes"], rel=0.01)
    assert planned["matrix_bits"] == pytest.approx(record["result"]["bits"], rel=1e-3)


@pytest.mark.parametrize(
    ("given", "blocks", "written"),
    [("8-10", (8, 9, 10), "8-10"), ("0,3,5-7,6", (0, 3, 5, 6, 7), "0,3,5-7"), (4, (4,), "4"), ("all", None, "")],
)
def test_blocks_are_numbers_and_ranges(given: Any, blocks: tuple[int, ...] | None, written: str) -> None:
    recipe = make_recipe({"method": "wanda", "target": "0.5", "blocks": given})
    assert recipe.blocks == blocks and format_blocks(recipe.blocks or ()) == written
    assert ("blocks" in recipe.dump()) is (blocks is not None)


def test_the_command_line_says_what_was_compressed(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--method", "rtn", "--target", "4bit", "--set", "group=16")
    code, out, _ = run(capsys, "compress", model, tmp_path / "first", *common, "--blocks", "2-3")
    assert code == 0 and "14 matrices of blocks 2-3, 6.317 true bits a weight in 14 of them, 19.158 bits and" in out
    code, out, _ = run(capsys, "compress", tmp_path / "first", tmp_path / "second", *common, "--blocks", "0")
    assert code == 0 and "7 matrices of blocks 0," in out
    _, out, _ = run(capsys, "inspect", tmp_path / "second")
    assert "rtn 4bit in blocks 0, " in out and "earlier run: rtn 4bit in blocks 2-3, " in out
    marks = [line for line in out.splitlines() if "as it was" in line or "earlier run " in line]
    assert [line.split("│")[1].strip() for line in marks] == ["1 as it was", "2 earlier run", "3 earlier run"]
    code, _, error = run(capsys, "compress", model, tmp_path / "no", *common, "--blocks", "-3")
    assert code == 2 and error.count("\n") == 1 and "expected numbers and ranges such as 8-23" in error
    _, out, _ = run(capsys, "plan", model, *common, "--blocks", "3")
    assert "rtn 4bit in blocks 3 on" in out
