"""Recovery: the loss falls, every zero stays, and what is merged is what was trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import niwaki
from niwaki.compression.recover import recover
from niwaki.errors import ArchitectureError, InputError, OutputError
from support.families import build, families
from support.models import add_tokenizer, file_bytes, tiny_llama, weights_of, write_texts

SMALL: dict[str, Any] = {
    "steps": 8, "batch": 4, "samples": 32, "seq_len": 48, "rank": 4, "rate": 0.02, "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_texts(tmp_path_factory.mktemp("text") / "text.jsonl"))


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recovery")
    model = tiny_llama(folder / "model", dtype=torch.bfloat16)
    niwaki.compress(model, folder / "pruned", method="magnitude", target="2:4", device="cpu")
    return folder / "pruned"


def test_the_loss_falls_and_every_zero_stays(pruned: Path, text: str, tmp_path: Path) -> None:
    before = file_bytes(pruned)
    record = recover(pruned, tmp_path / "out", data=text, **SMALL)
    assert file_bytes(pruned) == before
    assert record["result"]["heldout_loss"] < record["result"]["heldout_loss_before"] - 0.01
    assert record["compressed_from"]["recipe"]["method"] == "magnitude"
    old, new = weights_of(pruned), weights_of(tmp_path / "out")
    assert set(old) == set(new)
    for name, weight in new.items():
        assert weight.dtype == torch.bfloat16
        if "_proj" in name:
            assert torch.equal(weight == 0, old[name] == 0) and not torch.equal(weight, old[name])
        else:
            assert torch.equal(weight, old[name])
    assert record["result"]["zeros_frac"] == 0.5
    recorded = json.loads((tmp_path / "out/niwaki/run.json").read_text())["recover"]
    assert (recorded["rank"], recorded["bos"]) == (4, "off")


def test_the_written_model_has_the_loss_that_was_reported(pruned: Path, text: str, tmp_path: Path) -> None:
    """Merging changes nothing but bf16 rounding."""
    record = recover(pruned, tmp_path / "out", data=[text], **SMALL)
    from niwaki.data.documents import read_texts
    from niwaki.data.texts import calibration_windows, load_tokenizer

    windows = calibration_windows(read_texts([text]), load_tokenizer(pruned), samples=32, seq_len=48, seed=0)[:4]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        losses = [float(model(input_ids=row[None], labels=row[None]).loss) for row in windows]
    assert sum(losses) / 4 == pytest.approx(record["result"]["heldout_loss"], abs=5e-3)


def test_same_seed_same_bytes(pruned: Path, text: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        recover(pruned, tmp_path / name, data=text, **SMALL | {"steps": 2})
    assert file_bytes(tmp_path / "a") == file_bytes(tmp_path / "b")


def test_transposed_weights(text: str, tmp_path: Path) -> None:
    """GPT-2 stores [I, O]."""
    config = families()["gpt2"].config
    config.vocab_size = 4096
    build(config).save_pretrained(tmp_path / "model")
    add_tokenizer(tmp_path / "model")
    niwaki.compress(tmp_path / "model", tmp_path / "pruned", method="magnitude", target="0.5", device="cpu")
    record = recover(tmp_path / "pruned", tmp_path / "out", data=text, **SMALL)
    assert record["result"]["heldout_loss"] < record["result"]["heldout_loss_before"]


def test_a_recovery_that_does_not_help_writes_nothing(pruned: Path, text: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did not lower the held-out loss"):
        recover(pruned, tmp_path / "out", data=text, **SMALL | {"rate": 1e-12, "steps": 1})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"seq_len": 128}, InputError, "longer than the 64 positions of the model"),
        ({"samples": 4}, InputError, "samples of at least 8"),
        ({"steps": 0}, InputError, "at least 1"),
        ({"data": "gone.jsonl"}, InputError, "gone.jsonl"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(
    pruned: Path, text: str, tmp_path: Path, change: dict[str, Any], error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        recover(pruned, tmp_path / "out", **{"data": text, **SMALL, **change})
    assert not list(tmp_path.iterdir())


def test_fused_experts_and_existing_results_are_refused(pruned: Path, text: str, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").touch()
    with pytest.raises(OutputError, match="not a niwaki result"):
        recover(pruned, tmp_path / "mine", data=text, **SMALL)
    config = families()["mixtral"].config
    config.vocab_size = 4096
    build(config).save_pretrained(tmp_path / "moe")
    add_tokenizer(tmp_path / "moe")
    with pytest.raises(ArchitectureError, match="fused experts"):
        recover(tmp_path / "moe", tmp_path / "out", data=text, **SMALL)
