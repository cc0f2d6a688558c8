"""A new predictor is taken only where it is better, and the old one is kept."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import niwaki
from niwaki.cli.app import app
from niwaki.compression.adapt import HISTORY, PREVIOUS, adapt
from niwaki.compression.verify import check_weights
from niwaki.errors import InputError
from niwaki.runtime.contextual.predictor_files import TENSORS, read_shadow, write_shadow
from support.models import Warnings, add_bos, tiny_llama, write_texts

SETTINGS: dict[str, Any] = {"samples": 16, "seq_len": 24, "device": "cpu"}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    tiny_llama(tmp_path / "model", num_attention_heads=8, num_key_value_heads=4)
    text = write_texts(tmp_path / "text.jsonl")
    niwaki.compress(
        tmp_path / "model", tmp_path / "out", method="shadow", target="0.5", device="cpu",
        calibration={"files": (str(text),), "samples": 12, "seq_len": 24},
        options={"unit": "prompt", "min_prompt": 8, "features": "last", "size_frac": 0.5},
    )  # fmt: skip
    return tmp_path / "out"


def test_a_predictor_of_nothing_is_replaced_and_kept(out: Path, tmp_path: Path) -> None:
    made = read_shadow(out)
    generator = torch.Generator().manual_seed(0)
    prior_U = torch.rand(made.layout.size, generator=generator)
    from dataclasses import replace

    write_shadow(out, replace(made, predictor=replace(made.predictor, prior_U=prior_U)))
    broken = (out / TENSORS).read_bytes()
    found = adapt(out, data=str(write_texts(tmp_path / "new.jsonl", first=3)), **SETTINGS)
    assert found["accepted"] and found["kept"]["new"] > found["kept"]["old"]
    assert (out / PREVIOUS).read_bytes() == broken != (out / TENSORS).read_bytes()
    assert json.loads((out / HISTORY).read_text()) == found and found["bos"] == "off"
    assert read_shadow(out).rule == made.rule
    assert check_weights(out), "the new one is the one that the record knows"


def test_a_worse_one_is_not_taken(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Learn from shuffled scores: that predictor knows less than the one that is there."""
    from niwaki.methods import shadow

    learn = shadow.learn

    def blindly(traces: Any, *rest: Any) -> Any:
        from dataclasses import replace

        return learn(replace(traces, score_NU=traces.score_NU.flip(1)), *rest)

    monkeypatch.setattr("niwaki.compression.adapt.shadow.learn", blindly)
    before = (out / TENSORS).read_bytes()
    found = adapt(out, data=str(write_texts(tmp_path / "new.jsonl", first=3)), **SETTINGS)
    assert not found["accepted"] and (out / TENSORS).read_bytes() == before and not (out / PREVIOUS).exists()


def test_the_commands(out: Path, tmp_path: Path) -> None:
    text = str(write_texts(tmp_path / "new.jsonl", first=3))
    adapted = CliRunner().invoke(
        app, ["adapt", str(out), "--data", text, "--samples", "16", "--seq-len", "24", "--bos", "on"]
    )
    assert adapted.exit_code == 0 and "importance held by what is kept" in adapted.output
    assert json.loads((out / HISTORY).read_text())["bos"] == "on"
    arguments = ["--samples", "4", "--prompt-tokens", "16", "--new-tokens", "4", "--device", "cpu"]
    gated = CliRunner().invoke(app, ["calibrate-gate", str(out), "--data", text, *arguments])
    assert gated.exit_code == 0 and "run sparse" in gated.output
    with pytest.raises(InputError, match="expected data to adapt to"):
        adapt(out, data=())
    with pytest.raises(InputError, match="holds no predictor"):
        adapt(tmp_path / "model", data=text)


def test_a_missing_first_token_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Warn at any loss with the token: no small model that needs it has predictors worth a test."""
    tiny_llama(tmp_path / "model", num_attention_heads=8, num_key_value_heads=4, vocab_size=4160)
    add_bos(tmp_path / "model", itself=False)
    text = str(write_texts(tmp_path / "text.jsonl"))
    niwaki.compress(
        tmp_path / "model", tmp_path / "out", method="shadow", target="0.5", device="cpu",
        calibration={"files": (text,), "samples": 12, "seq_len": 24},
        options={"unit": "prompt", "min_prompt": 8, "features": "last", "size_frac": 0.5},
    )  # fmt: skip
    monkeypatch.setattr("niwaki.compression.bos_loss.MAX_FALL", -10.0)
    told: dict[str, Warnings] = {"auto": Warnings(), "on": Warnings()}
    adapt(tmp_path / "out", data=text, report=told["auto"], **SETTINGS)
    adapt(tmp_path / "out", data=text, report=told["on"], bos="on", **SETTINGS)
    assert [len(one.warnings) for one in told.values()] == [1, 0] and "pass --bos on" in told["auto"].warnings[0]
