"""`niwaki plan` and `niwaki inspect` as they are typed."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from niwaki.cli import plan as plan_command
from support.models import run, tiny_llama, write_texts


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("commands") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("text") / "text.jsonl")


def planned(model: Path, text: Path, *more: object) -> Sequence[object]:
    return [
        "plan", model, "--method", "gptq", "--target", "4bit", "--set", "group=16", "--calibration", text,
        "--samples", 8, "--seq-len", 16, *more,
    ]  # fmt: skip


def test_plan_prints_a_table_and_the_same_as_json(model: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    money = ("--price-per-hour", 2.5, "--tokens-per-day", 1e7)
    code, printed, _ = run(capsys, *planned(model, text, "--gpu", "h100", *money))
    assert code == 0
    for word in ("weight files", "peak memory of the device", "tokens/s, ceiling", "saved", "not measured"):
        assert word in printed
    for word in ("in the matrices of the blocks", "embeddings and head included", "in the currency of 2.50 an hour"):
        assert word in printed
    code, printed, _ = run(capsys, *planned(model, text, "--gpu", "h100", "--json", *money))
    found = json.loads(printed)
    assert (
        code == 0 and found["recipe"]["options"] == {"group": "16"} and found["money"]["ceiling"]["saved_per_day"] > 0
    )


@pytest.mark.parametrize(
    ("value", "digits", "shown"),
    [
        (228073.4, 3, "228,000"),
        (1203.0, 3, "1,200"),
        (12.345, 2, "12"),
        (0.4049, 2, "0.40"),
        (14.7, 3, "14.7"),
        (0, 3, "0"),
    ],
)
def test_a_prediction_is_shown_with_the_digits_it_has(value: float, digits: int, shown: str) -> None:
    assert plan_command._figures(value, digits) == shown


def test_costs_below_a_cent_are_no_zero() -> None:
    assert [plan_command._cost(value) for value in (0, 0.004, 0.00995, 1234.567)] == [
        "0.00", "less than 0.01", "0.01", "1,234.57",
    ]  # fmt: skip


def test_plan_reads_a_recipe_and_flags_win(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f'method: wanda\ntarget: "2:4"\ncalibration: {{files: ["{text}"], samples: 4, seq_len: 16}}\n')
    code, printed, _ = run(capsys, "plan", model, "--recipe", recipe, "--target", "0.5", "--gpu", "a100", "--json")
    found = json.loads(printed)["recipe"]
    assert code == 0 and (found["method"], found["target"], found["calibration"]["samples"]) == ("wanda", "0.5", 4)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--gpu", "h300"), "did you mean 'h"),
        (("--set", "group=7"), "groups of 7 do not divide"),
        (("--set", "group"), "expected key=value"),
        (("--price-per-hour", -1), "price_per_hour must be 0 or more"),
        (("--gpu", "cpu", "--out", "/nowhere/at/all"), "does not exist"),
    ],
)
def test_what_cannot_work_is_one_line_and_exit_code_2(
    more: tuple[object, ...], message: str, model: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, printed, errors = run(capsys, *planned(model, text, *more))
    assert code == 2 and printed == "" and errors.count("\n") == 1 and message in errors


def test_inspect_prints_json_and_suggests(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--method", "wanda", "--target", "0.5", "--calibration", text, "--samples", 4, "--seq-len", 16]
    code, _, _ = run(capsys, "compress", model, tmp_path / "out", *command, "--device", "cpu")
    assert code == 0
    code, printed, _ = run(capsys, "inspect", tmp_path / "out")
    assert code == 0 and "zeros by depth" in printed and "mlp.down_proj" in printed
    code, printed, _ = run(capsys, "inspect", tmp_path / "out", "--json")
    assert json.loads(printed)["measured"]["zeros_frac"] == pytest.approx(0.5, abs=0.01)
    code, printed, _ = run(capsys, "inspect", tmp_path / "out", "--why", "model.layers.2.mlp.up_proj")
    assert code == 0 and "highest score that was cut" in printed
    code, printed, _ = run(capsys, "inspect", tmp_path / "out", "--why", "model.layers.2.mlp.up_proj", "--json")
    assert code == 0 and json.loads(printed)["cut"] == 768
    code, printed, errors = run(capsys, "inspect", tmp_path / "out", "--why", "model.layers.2.mlp.up_prj")
    assert code == 2 and printed == "" and "did you mean 'model.layers.2.mlp.up_proj'" in errors
    code, _, errors = run(capsys, "inspect", model)
    assert code == 2 and "is not a result of niwaki" in errors
