"""Wrong requests, models and texts: one clear error, and nothing is written."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import niwaki
from niwaki.errors import CheckpointError, InputError
from support.compressions import settings
from support.models import tiny_llama


def _poison(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"method": "wandda"}, InputError, "unknown method 'wandda': did you mean 'wanda'"),
        ({"target": "2:3"}, InputError, "needs a multiple of 3 inputs"),
        ({"target": "16bit"}, InputError, "expected 1 to 8 bits per weight"),
        ({"allocation": "owll"}, InputError, "did you mean 'owl'"),
        ({"allocation": "owl"}, InputError, "owl moves unstructured sparsity"),
        ({"options": {"owl_spread_frac": 0.1}}, InputError, "needs the allocation owl"),
        ({"options": {"dampening": 1}}, InputError, "unknown option of sparsegpt"),
        ({"options": {"damping_frac": 7}}, InputError, "must lie in"),
        ({"device": "tpu"}, InputError, "device"),
        ({"device": "cuda:99"}, InputError, "CUDA devices"),
        (
            {"calibration": {"samples": 6, "seq_len": 65}},
            InputError,
            "seq_len 65 is longer than the 64 positions of the model",
        ),
        ({"calibration": {"samples": 10**6, "seq_len": 64}}, InputError, "add text"),
    ],
)
def test_wrong_requests(
    model: Path, text: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    if "calibration" in changes:
        changes = {"calibration": {"files": (str(text),), **changes["calibration"]}}
    with pytest.raises(error, match=message):
        niwaki.compress(model, tmp_path / "out", **settings(text, **changes))
    assert not list(tmp_path.glob("out*"))


def test_a_missing_file_is_told_before_a_window_that_is_too_long(model: Path, text: Path, tmp_path: Path) -> None:
    request: dict[str, Any] = {"method": "wanda", "target": 0.5, "device": "cpu"}
    with pytest.raises(InputError, match="no such text file"):
        niwaki.compress(model, tmp_path / "out", calibration=str(tmp_path / "no.txt"), **request)
    with pytest.raises(InputError, match="seq_len 65 is longer than the 64 positions"):
        niwaki.compress(model, tmp_path / "out", calibration={"files": [str(text)], "seq_len": 65}, **request)
    assert not list(tmp_path.glob("out*"))


def test_a_default_window_that_is_too_long_is_lowered_and_said(model: Path, text: Path, tmp_path: Path) -> None:
    messages: list[str] = []

    def report(event: str, **fields: Any) -> None:
        messages.append(str(fields.get("message")))

    calibration = {"files": [str(text)], "samples": 4}
    request: dict[str, Any] = {"method": "wanda", "target": 0.5, "device": "cpu", "calibration": calibration}
    record = niwaki.compress(model, tmp_path / "out", report=report, **request)
    assert record["calibration"]["windows"] == [4, 64]
    assert "windows of 64 tokens: the default of 2048 is longer than the positions of the model" in messages
    own = {"files": [str(text)], "samples": 4, "seq_len": 64}
    niwaki.compress(model, tmp_path / "own", **{**request, "calibration": own})
    own_files, files = (
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.safetensors")} for name in ("own", "out")
    )
    assert files and files == own_files
    niwaki.plan(str(model), method="wanda", target=0.5, calibration=calibration)


def test_nan_weights_name_the_tensor_and_leave_nothing(model: Path, text: Path, tmp_path: Path) -> None:
    _poison(model)
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.mlp\.up_proj\.weight holds NaN"):
        niwaki.compress(model, tmp_path / "out", **settings(text))
    assert not list(tmp_path.glob("out*"))


def test_missing_weights_are_named(model: Path, text: Path, tmp_path: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks 1 tensor of the model: model\.layers\.1\.mlp\.up_proj\.weight"):
        niwaki.compress(model, tmp_path / "out", **settings(text))
    assert not list(tmp_path.glob("out*"))


def test_tokenizer_of_another_model_is_refused(text: Path, tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model", vocab_size=100)
    with pytest.raises(InputError, match="the tokenizer belongs to another model"):
        niwaki.compress(model, tmp_path / "out", **settings(text))
