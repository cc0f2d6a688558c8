"""`niwaki compare` and `niwaki gate` as a pipeline meets them: exit codes, files, one-line errors."""

import json
import xml.etree.ElementTree as Xml
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import niwaki
from niwaki.compression.model_card import UNMEASURED
from support.models import run, tiny_llama, write_texts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    niwaki.compress(tiny_llama(folder / "dense"), folder / "out", method="magnitude", target="0.3", device="cpu")
    write_texts(folder / "data.jsonl", count=3)
    return folder


def command(folder: Path, *more: object) -> list[object]:
    return [
        "compare", folder / "dense", folder / "out", "--data", folder / "data.jsonl", "--seq-len", 32, "--max-tokens",
        1600, "--rounds", 0, "--device", "cpu", *more,
    ]  # fmt: skip


def test_the_exit_code_is_the_verdict(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report, gate = tmp_path / "report", tmp_path / "gate.yaml"
    code, printed, _ = run(capsys, *command(folder, "--report", report))
    assert code == 0 and "nothing was judged" in printed and "perplexity" in printed
    code, printed, _ = run(capsys, "gate", gate, "--init", "--baseline", report / "compare.json")
    assert code == 0 and "# measured" in gate.read_text()
    code, printed, _ = run(capsys, "gate", gate, "--baseline", report / "compare.json")
    assert code == 0 and "passed: all 5 gates" in printed
    before = (report / "compare.json").read_bytes()
    code, printed, errors = run(capsys, *command(folder, "--gate", gate, "--report", report))
    assert code == 2 and "holds a report: choose another folder, or replace it with --overwrite" in errors
    assert (report / "compare.json").read_bytes() == before
    code, printed, _ = run(capsys, *command(folder, "--gate", gate, "--report", report, "--overwrite"))
    assert code == 0 and printed.count("pass out: ") == 5
    strict = tmp_path / "strict.yaml"
    strict.write_text("max_kl: 0.000001\nmax_decode_latency_ratio: 2\n")
    code, printed, _ = run(capsys, *command(folder, "--gate", strict, "--report", report, "--overwrite"))
    assert code == 1 and "FAILED: 2 of 2 gates" in printed
    assert "FAIL out: max_decode_latency_ratio: not measured" in printed
    found = json.loads((report / "compare.json").read_text())
    assert found["passed"] is False and [one["passed"] for one in found["candidates"][0]["gates"]] == [False, False]
    suite = Xml.parse(report / "junit.xml").find("testsuite")
    assert suite is not None and suite.get("failures") == "2"
    code, printed, _ = run(capsys, "gate", strict, "--baseline", report / "compare.json")
    assert code == 1
    code, _, errors = run(capsys, "gate", gate, "--baseline", report / "compare.json", "--candidate", "nope")
    assert code == 2 and "unknown candidate 'nope'" in errors
    code, printed, _ = run(capsys, "gate", gate, "--baseline", report / "compare.json", "--candidate", "out")
    assert code == 0 and "passed: all 5 gates" in printed


def test_a_comparison_is_put_on_the_model_card(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Numbers with intervals, the failed gate and the command, in the place of earlier numbers; paths stay at home."""
    gate, out, words = tmp_path / "gate.yaml", folder / "out", "Ask the garden team."
    gate.write_text("max_kl: 0.000001\nmax_bytes_ratio: 2\n")
    card = (out / "README.md").read_text()
    (out / "README.md").write_text(f"{card}\n{words}\n")
    report = ("--gate", gate, "--report", tmp_path / "report", "--lang", "ja")
    code, _, _ = run(capsys, *command(folder, "--update-card", *report))
    assert code == 1
    found = json.loads((out / "niwaki/comparison.json").read_text())
    whole = found["candidates"][0]["data"][0]["whole"]
    ratio, tokens = whole["perplexity_ratio"], whole["tokens"]
    ends = f"ratio {ratio['value']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"
    values = f"{whole['dense_perplexity']:.3f} | {whole['perplexity']:.3f}"
    text = (out / "README.md").read_text()
    assert f"| data.jsonl, {tokens:,} tokens | perplexity | {values} | {ends} |" in text
    assert "Gates: failed, 1 of 2 pass." in text and "- max_kl: measured" in text
    again = next(line for line in text.splitlines() if line.startswith("    niwaki compare "))
    assert again.startswith("    niwaki compare dense out ") and "--lang ja" in again and "--rounds 0" in again
    assert str(tmp_path) not in text and str(folder) not in text and words in text and UNMEASURED not in text
    (entry,) = ModelCard.load(out / "README.md").data.eval_results
    assert entry.metric_value == pytest.approx(whole["perplexity"], abs=1e-4)


def test_a_candidate_without_a_card_is_refused_before_anything_is_measured(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = ["compare", folder / "out", folder / "dense", "--data", folder / "data.jsonl", "--seq-len", 32]
    code, printed, errors = run(capsys, *wrong, "--rounds", 0, "--update-card", "--report", tmp_path / "report")
    assert code == 2 and printed == "" and "is not a result of niwaki" in errors
    assert not list(tmp_path.iterdir())


WRONG: list[tuple[list[str], str]] = [
    (["compare", "{folder}/gone", "{folder}/out", "--data", "{folder}/data.jsonl"], "no model folder at"),
    (["compare", "{folder}/dense", "{folder}/gone", "--data", "{folder}/data.jsonl"], "no model folder at"),
    (["compare", "{folder}/dense", "{folder}/out"], "give --data FILE or --tasks FILE"),
    (["compare", "{folder}/dense", "{folder}/out", "--data", "no.txt"], "no such text file"),
    (["compare", "{folder}/dense", "{folder}/out", "--tasks", "no.jsonl"], "no such task file"),
    (
        ["compare", "{folder}/dense", "{folder}/out", "--data", "{folder}/data.jsonl", "--seq-len", "65"],
        "pass --seq-len 64 or less",
    ),
    (["compare", "{folder}/dense", "{folder}/out", "--data", "x.txt", "--gate", "{folder}/bad.yaml"], "did you mean"),
    (["gate", "{tmp}/gate.yaml", "--init"], "give --baseline REPORT/compare.json"),
    (["gate", "{tmp}/gate.yaml", "--init", "--baseline", "{folder}/bad.yaml"], "is not a comparison"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_wrong_input_is_one_line_and_exit_code_2(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (folder / "bad.yaml").write_text("max_perplexty_ratio: 1.1\n")
    code, printed, errors = run(capsys, *(part.format(folder=folder, tmp=tmp_path) for part in arguments))
    assert code == 2 and printed == ""
    assert errors.startswith("error: ") and len(errors.strip().splitlines()) == 1
    assert message in errors
    assert not list(tmp_path.iterdir())


def test_a_gate_file_is_not_overwritten_unasked(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report, gate = tmp_path / "report", tmp_path / "gate.yaml"
    run(capsys, *command(folder, "--report", report))
    gate.write_text("max_kl: 1\n")
    begin = ["gate", gate, "--init", "--baseline", report / "compare.json"]
    code, _, errors = run(capsys, *begin)
    assert code == 2 and "already exists" in errors and gate.read_text() == "max_kl: 1\n"
    code, _, _ = run(capsys, *begin, "--overwrite")
    assert code == 0 and "confidence: 0.95" in gate.read_text()


def test_an_interrupt_is_no_verdict(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("niwaki.measure.compare.scoring.score_text", interrupted)
    code, _, errors = run(capsys, *command(folder, "--report", tmp_path / "report"))
    assert code == 130 and "nothing was written" in errors and not list(tmp_path.iterdir())
