"""Chains that prune and quantize in one walk: what every method must do, of their records, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import niwaki
from niwaki.errors import InputError, TargetError
from support.models import file_bytes, run, tiny_llama, weights_of, write_texts

CHAINS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sparsegpt+gptq": ("sparsegpt+gptq", "2:4+4bit", {"gptq.group": 32}),
    "sparsegpt+rtn": ("sparsegpt+rtn", "0.5+8bit", {"rtn.group": 0}),
    "wanda+gptq joint": ("wanda+gptq", "2:4+4bit", {"gptq.group": 0, "gptq.joint": True}),
    "wandapp+gptq": ("wandapp+gptq", "0.5+4bit", {"gptq.group": 0, "wandapp.rounds": 1, "wandapp.samples": 2}),
    "besa+gptq": ("besa+gptq", "0.5+4bit", {"gptq.group": 0, "besa.steps": 2}),
    "magnitude+sparsegpt+rtn": ("magnitude+sparsegpt+rtn", "4:8+4bit", {"rtn.group": 16}),
}
CODED = {"2:4+4bit": "int4", "0.5+8bit": "int8", "0.5+4bit": "int4", "4:8+4bit": "int4"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(
        tmp_path_factory.mktemp("chains") / "model",
        blocks=2,
        dtype=torch.bfloat16,
        hidden_size=64,
        intermediate_size=96,
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("text") / "text.jsonl")


def compress(model: Path, out: Path, text: Path, method: str, target: str, options: dict, **more: Any) -> dict:
    calibration = {"files": (str(text),), "samples": 6, "seq_len": 16}
    return niwaki.compress(
        model, out, method=method, target=target, options=options, device="cpu", calibration=calibration,
        **{"pack": "auto", **more},
    )  # fmt: skip


@pytest.fixture(scope="module")
def results(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("results")
    for name, recipe in CHAINS.items():
        compress(model, folder / name, text, *recipe)
    return {name: folder / name for name in CHAINS}


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "niwaki/blocks.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", CHAINS)
def test_lines_and_file_tell_the_same_of_every_record(name: str, results: dict[str, Path]) -> None:
    method, target, _ = CHAINS[name]
    weights, record = weights_of(results[name]), json.loads((results[name] / "niwaki/run.json").read_text())
    lines = lines_of(results[name])
    assert len(lines) == 14 and {line["target"] for line in lines} == {target}
    for line in lines:
        weight = weights[f"model.layers.{line['block']}.{line['matrix']}.weight"]
        assert line["kind"] == "codes" and line["stored"]["sparse"]["values"] == CODED[target]
        assert int((weight == 0).sum()) == line["zeros"]
        assert 0.5 <= line["zeros_frac"] < 0.65 or "besa" in name  # which chooses for every row
        if target.startswith("2:4"):
            assert int((weight != 0).view(len(weight), -1, 4).sum(-1).max()) <= 2
    assert record["result"]["packed"] == record["result"]["sparse_values"][CODED[target]] == 14
    assert record["recipe"]["method"] == method and record["recipe"]["target"] == target
    options = {step: given for step, given in record["options"].items() if step in ("gptq", "rtn")}
    assert [given["symmetric"] for given in options.values()] == [True]
    assert 0.5 <= record["result"]["zeros_frac"] < 0.65


@pytest.mark.parametrize("name", ["sparsegpt+gptq", "besa+gptq"])
def test_a_resumed_run_and_a_second_one_end_at_the_same_bytes(
    name: str, model: Path, text: Path, results: dict[str, Path], tmp_path: Path
) -> None:
    def stop(event: str, **fields: Any) -> None:
        if event == "saved" and fields["part"] == "block-00000":
            raise KeyboardInterrupt

    before = file_bytes(model)
    with pytest.raises(KeyboardInterrupt):
        compress(model, tmp_path / "out", text, *CHAINS[name], report=stop)
    compress(model, tmp_path / "out", text, *CHAINS[name], resume=True)
    assert file_bytes(tmp_path / "out") == file_bytes(results[name])
    assert file_bytes(model) == before


def test_scores_are_those_of_the_mask_not_of_what_rounding_left(results: dict[str, Path]) -> None:
    lines = lines_of(results["wandapp+gptq"])
    for line in lines:
        cut = sum(line["scores"]["cut"]) + line["scores"]["zero"]
        assert cut == 0.5 * line["scores"]["sampled"]
    assert sum(line["zeros"] for line in lines) > 0.5 * sum(line["scores"]["sampled"] for line in lines)


def test_a_structured_method_may_stand_before_both(model: Path, text: Path, tmp_path: Path) -> None:
    options = {"comp.try_blocks": 0, "comp.try_heads": 0, "rtn.group": 0}
    record = compress(model, tmp_path / "out", text, "comp+magnitude+rtn", "0.3+2:4+4bit", options)
    assert record["stages"][0]["recipe"]["method"] == "comp" and record["recipe"]["target"] == "0.3+2:4+4bit"
    assert record["result"]["sparse_values"]["int4"] == record["result"]["matrices"]
    assert record["allocation"].get("shape") is None and record["result"]["zeros_frac"] >= 0.5


@pytest.mark.parametrize(("method", "target", "message"), [
    ("sparsegpt+gptq", "2:4", "sparsegpt+gptq prunes and quantizes: expected a target for each, such as 2:4+4bit"),
    ("sparsegpt+gptq", "4bit", "expected a target for each, such as 2:4+4bit, got 4bit"),
    ("sparsegpt", "2:4+4bit", "expected a chain that does both, such as sparsegpt+gptq, got method sparsegpt"),
    ("gptq", "2:4+4bit", "expected a chain that does both"),
    ("gptq+sparsegpt", "2:4+4bit", "target 2:4+4bit prunes, then quantizes"),
    ("sparsegpt+gptq+rtn", "2:4+4bit", "target 2:4+4bit prunes, then quantizes"),
    ("sparsegpt+wandapp", "2:4+4bit", "expected a chain that does both"),
    ("sparsegpt+squeeze10", "2:4+4bit", "squeeze10 does not leave zeros alone, put gptq or rtn last"),
    ("besa+gptq", "2:4+4bit", "method besa meets a share of zeros such as 0.5, got target 2:4"),
    ("rtn+gptq", "4bit", "gptq cannot take up what another method began, put it first"),
    ("sparsegpt+gptq", "2:4+5bit", "rounds to 2, 3, 4 or 8 bits"),
    ("sparsegpt+gptq", "4bit+2:4", "expected zeros first"),
])  # fmt: skip
def test_what_does_not_go_together_is_one_clear_line(
    method: str, target: str, message: str, model: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises((TargetError, InputError)) as raised:
        compress(model, tmp_path / "out", text, method, target, {})
    assert message in str(raised.value) and "\n" not in str(raised.value)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_grids_without_a_middle_are_refused(
    method: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, error = run(
        capsys, "compress", model, tmp_path / "out", "--method", f"magnitude+{method}", "--target", "2:4+4bit",
        "--set", f"{method}.symmetric=false", "--device", "cpu",
    )  # fmt: skip
    assert code == 2 and f"{method}.symmetric false: weights that were pruned stay zero" in error
    assert not list(tmp_path.glob("out*"))
