"""A compression says whether its windows began with the beginning-of-text token, and warns where it is missed."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import niwaki
from niwaki.compression.run_record import read_run
from niwaki.errors import CalibrationError
from support.models import Warnings, add_bos, blind_without_bos, run, tiny_llama

SMALL: dict[str, Any] = {"samples": 8, "seq_len": 24}


def compress(model: Path, out: Path, text: Path, bos: str | None = None, **recipe: Any) -> tuple[Any, list[str]]:
    events = Warnings()
    calibration = {"files": (str(text),), **SMALL, **({} if bos is None else {"bos": bos})}
    recipe = {"method": "wanda", "target": "0.5", **recipe}
    record = niwaki.compress(model, out, calibration=calibration, device="cpu", report=events, **recipe)
    return record, events.warnings


@pytest.fixture
def blind(tmp_path: Path) -> Path:
    """Return a model that needs its bos token, which its tokenizer names and does not put."""
    blind_without_bos(tmp_path / "blind")
    add_bos(tmp_path / "blind", itself=False)
    return tmp_path / "blind"


def losses(model: Path, text: Path) -> tuple[float, float]:
    """Return the losses with and without the token by a whole forward of the first windows."""
    from niwaki.data.documents import read_texts
    from niwaki.data.texts import calibration_windows, load_tokenizer

    ids_ST = calibration_windows(read_texts([str(text)]), load_tokenizer(model), **SMALL, seed=0, bos="off")[:4]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    found = []
    for ids, skip in ((torch.cat([torch.full((4, 1), 4096), ids_ST], 1), 1), (ids_ST, 0)):
        with torch.no_grad():
            logprobs = loaded(ids).logits[:, skip:-1].log_softmax(-1)
        found.append(-float(logprobs.gather(2, ids_ST[:, 1:, None]).mean()))
    return found[0], found[1]


def test_a_model_that_misses_its_token_is_warned_of_with_both_losses(blind: Path, text: Path, tmp_path: Path) -> None:
    record, (warning,) = compress(blind, tmp_path / "out", text)
    with_bos, without = losses(blind, text)
    numbers = [float(number) for number in re.findall(r"\d+\.\d{3}", warning)]
    assert numbers == pytest.approx([without, with_bos], abs=2e-3) and with_bos < 0.75 * without
    assert "token <bos>, which is off: pass --bos on" in warning
    assert record["calibration"]["bos"] == "off" and read_run(tmp_path / "out").recipe.calibration.bos == "auto"
    record, warnings = compress(blind, tmp_path / "on", text, bos="on")
    assert warnings == [] and record["calibration"]["bos"] == "on"
    assert record["calibration"]["windows"] == [8, 24] == read_run(tmp_path / "on").calibration.windows
    add_bos(blind)
    auto, warnings = compress(blind, tmp_path / "auto", text)
    assert warnings == [] and auto["calibration"]["bos"] == "on"
    assert auto["calibration"]["sha256"] == record["calibration"]["sha256"]
    assert read_run(tmp_path / "auto").recipe.calibration.bos == "auto", "the recipe keeps what was asked for"
    assert read_run(tmp_path / "on").recipe.calibration.bos == "on"


def test_a_model_that_does_not_need_it_is_not_warned_of(model: Path, text: Path, tmp_path: Path) -> None:
    record, warnings = compress(model, tmp_path / "out", text)
    assert warnings == [] and record["calibration"]["bos"] == "off"


def test_a_chain_keeps_the_windows_of_its_first_stage(blind: Path, text: Path, tmp_path: Path) -> None:
    add_bos(blind)
    recipe: dict[str, Any] = {"method": "comp+rtn", "target": "0.1+4bit"}
    recipe["options"] = {"comp.multiple": 4, "comp.try_heads": 0, "rtn.group": 16}
    record, _ = compress(blind, tmp_path / "out", text, **recipe)
    assert record["calibration"]["bos"] == "on" == record["stages"][0]["calibration"]["bos"]


def test_without_windows_there_is_nothing_to_say(model: Path, tmp_path: Path) -> None:
    record = niwaki.compress(model, tmp_path / "out", method="magnitude", target="0.5", device="cpu")
    assert record["calibration"]["bos"] is None


def test_records_of_earlier_versions_had_none(model: Path, text: Path, tmp_path: Path) -> None:
    compress(model, tmp_path / "out", text)
    path = tmp_path / "out/niwaki/run.json"
    old = json.loads(path.read_text())
    del old["calibration"]["bos"]
    path.write_text(json.dumps(old))
    record = read_run(tmp_path / "out")
    assert record.calibration.bos == "off" == record.recipe.calibration.bos
    assert record.dump() == old, "and are written as they are"


def test_an_old_run_resumes_where_its_windows_are_the_same(model: Path, text: Path, tmp_path: Path) -> None:
    """The policy is no part of the fingerprint: the tokens are."""
    auto, _ = compress(model, tmp_path / "a", text)
    off, _ = compress(model, tmp_path / "b", text, bos="off")
    assert auto["fingerprint"] == off["fingerprint"]
    assert not any("bos" in name or "calibration)" in name for name in auto["fingerprint"])
    wide = tiny_llama(tmp_path / "wide", blocks=1, vocab_size=4160)
    add_bos(wide, itself=False)
    off, _ = compress(wide, tmp_path / "c", text, bos="off")
    on, _ = compress(wide, tmp_path / "d", text, bos="on")
    assert {name for name in off["fingerprint"] if off["fingerprint"][name] != on["fingerprint"][name]} == {
        "data (calibration tokens)"
    }


def test_on_without_a_token_is_one_clear_line(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = model / "tokenizer_config.json"
    described = json.loads(path.read_text())
    described.pop("bos_token")
    path.write_text(json.dumps(described))
    common = ("--method", "wanda", "--target", "0.5", "--calibration", text, "--samples", 8, "--seq-len", 16)
    code, _, told = run(capsys, "compress", model, tmp_path / "out", *common, "--bos", "on")
    assert code == 2 and "has no beginning-of-text token: set bos_token" in told
    assert not (tmp_path / "out").exists()
    code, _, told = run(capsys, "compress", model, tmp_path / "out", *common, "--bos", "yes")
    assert code == 2 and "bos" in told and "auto" in told
    with pytest.raises(CalibrationError, match="no beginning-of-text token"):
        compress(model, tmp_path / "out", text, bos="on")
