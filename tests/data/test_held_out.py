"""Held-out text of another source: it judges what is learned, and is never learned or counted in statistics."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import niwaki
from niwaki.compression.run_record import read_run
from niwaki.config.events import Event, silent
from niwaki.config.recipe import Calibration
from niwaki.data.texts import CalibrationWindows, digest, windows_for
from niwaki.errors import CalibrationError, InputError
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.decoder import Decoder
from support.models import CPU, file_bytes, run, tiny_llama, write_texts

LEARN = {"rounds": 2, "samples": 4, "batch": 1, "target": "both"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("held") / "model", blocks=2)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIWAKI_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def texts(tmp_path: Path) -> tuple[str, str]:
    return tuple(str(write_texts(tmp_path / f"{first}.jsonl", first=first)) for first in (0, 5))


def _windows(model: Path, samples: int = 16, **given: Any) -> CalibrationWindows:
    return windows_for(Calibration(samples=samples, seq_len=12, **given), Decoder(Checkpoint.open(model), CPU), seed=3,
                       report=silent)  # fmt: skip


def _rows(windows: CalibrationWindows) -> list[tuple[int, ...]]:
    return [tuple(row) for row in windows.ids_ST.tolist()]


@pytest.mark.parametrize("held_out", ["other", "own", "mixed", "self", "self in the mix", "self alone"])
def test_held_out_windows_come_from_their_source_and_are_not_learned(
    model: Path, texts: tuple[str, str], held_out: str
) -> None:
    own, other = texts
    given: dict[str, Any] = {"files": (own,)}
    given |= {"mixed": {"mix": f"{other}:0.5"}, "self in the mix": {"mix": "self:0.5"}}.get(held_out, {})
    given = {} if held_out == "self alone" else given
    source = {"other": other, "own": own, "mixed": other}.get(held_out, "self")
    plain, found = (_windows(model, **given, **more) for more in ({}, {"held_out": source}))
    assert torch.equal(plain.ids_ST, found.ids_ST), "the calibration stays as it was"
    assert found.held is not None and plain.held is None
    assert len(found.held.ids_ST) == 2
    assert not set(_rows(found.held)) & set(_rows(found))
    files = () if source == "self" else (source,)
    assert set(_rows(found.held)) <= set(_rows(_windows(model, 18, files=files)))
    assert found.held.source == ("sampled from the model" if source == "self" else source)
    assert found.sha256 != plain.sha256 == digest(plain.ids_ST)


def test_it_decides_the_error_and_leaves_statistics_alone(model: Path, texts: tuple[str, str], tmp_path: Path) -> None:
    """Compare the masks of the first block, which follow from statistics alone, and its errors."""
    records = {}
    for name, held_out in (("plain", None), ("held", texts[1])):
        text = {"files": (texts[0],), "samples": 16, "seq_len": 12}
        niwaki.compress(
            model, tmp_path / name, method="wandapp", target="0.5", device="cpu", options=LEARN,
            calibration=text | ({"held_out": held_out} if held_out else {}),
        )  # fmt: skip
        records[name] = read_run(tmp_path / name)
    zeros = [Checkpoint.open(tmp_path / name).read(["model.layers.0.mlp.up_proj.weight"]) for name in records]
    plain, held = (next(iter(tensors.values())) for tensors in zeros)
    assert torch.equal(plain == 0, held == 0) and not torch.equal(plain, held)
    errors = [
        json.loads((tmp_path / name / "niwaki/blocks.jsonl").read_text().splitlines()[0])["heldout_error_start"]
        for name in records
    ]
    assert errors[0] != pytest.approx(errors[1], rel=1e-3)
    calibration = records["held"].calibration
    assert calibration.held_out["source"] == texts[1] and calibration.held_out["windows"] == 2
    assert calibration.sha256 == records["plain"].calibration.sha256
    assert records["held"].recipe.calibration.held_out == texts[1]
    for part in ("recipe", "calibration"):
        assert "held_out" not in json.dumps(records["plain"].dump()[part])
    assert records["held"].fingerprint != records["plain"].fingerprint


def test_a_resume_ends_at_the_same_bytes(model: Path, texts: tuple[str, str], tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "method": "wandapp", "target": "0.5", "device": "cpu", "options": LEARN,
        "calibration": {"files": (texts[0],), "samples": 16, "seq_len": 12, "held_out": texts[1]},
    }  # fmt: skip

    def stop(event: str, **fields: Any) -> None:
        if event == Event.BLOCK and fields["index"] == 0:
            raise KeyboardInterrupt

    niwaki.compress(model, tmp_path / "whole", **given)
    with pytest.raises(KeyboardInterrupt):
        niwaki.compress(model, tmp_path / "out", report=stop, **given)
    niwaki.compress(model, tmp_path / "out", resume=True, **given)
    assert file_bytes(tmp_path / "out") == file_bytes(tmp_path / "whole")


def test_the_command_line_takes_it_and_refuses_what_cannot_be(
    model: Path, texts: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["plan", model, "--target", "0.5", "--calibration", texts[0], "--samples", "16", "--seq-len", "12"]
    code, out, _ = run(capsys, *base, "--method", "wandapp", "--held-out", texts[1], "--json")
    assert code == 0 and json.loads(out)["recipe"]["calibration"]["held_out"] == texts[1]
    code, _, problem = run(capsys, *base, "--method", "wanda", "--held-out", "self")
    assert code == 2 and "held_out self judges what is learned inside blocks, and wanda learns nothing" in problem
    code, _, problem = run(capsys, *base, "--method", "wandapp", "--held-out", "gone.jsonl")
    assert code == 2 and "no such text file: gone.jsonl" in problem
    with pytest.raises(CalibrationError, match="is one of 2 calibration files"):
        _windows(model, files=texts, held_out=texts[0])
    with pytest.raises(InputError, match="squeeze10 learns nothing there"):
        niwaki.compress(
            model, tmp_path / "out", method="squeeze10", target="4bit", options={"learn_rounds": 0},
            calibration={"files": (texts[0],), "held_out": texts[1]},
        )  # fmt: skip
