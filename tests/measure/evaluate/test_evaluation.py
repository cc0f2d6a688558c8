"""Streamed numbers against the whole model's own forward and against loops written from the definitions."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import niwaki
from niwaki.config.events import Event
from niwaki.data.documents import read_texts
from niwaki.data.texts import evaluation_windows, load_tokenizer
from niwaki.errors import CalibrationError, InputError
from support.models import tiny_llama, write_texts


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Two models with the same vocabulary, and a text."""
    folder = tmp_path_factory.mktemp("evaluation")
    dense = tiny_llama(folder / "dense")
    other = folder / "other"
    niwaki.compress(dense, other, method="magnitude", target="0.3", device="cpu")
    return dense, other, write_texts(folder / "text.jsonl", count=2)


def log_probs(folder: Path, windows_ST: torch.Tensor) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return model(windows_ST, use_cache=False).logits.double().log_softmax(-1)[:, :-1]


def test_perplexity_kl_and_agreement_equal_the_definitions(models: tuple[Path, Path, Path]) -> None:
    dense, other, text = models
    found = niwaki.evaluate(other, reference=dense, data=[str(text)], seq_len=32, max_tokens=320, device="cpu")
    windows_ST = evaluation_windows(read_texts([str(text)]), load_tokenizer(dense), seq_len=32, max_tokens=320)
    model_STV, reference_STV = log_probs(other, windows_ST), log_probs(dense, windows_ST)
    wanted = windows_ST[:, 1:, None]

    def perplexity(logprobs: torch.Tensor) -> float:
        return math.exp(-float(logprobs.gather(2, wanted).mean()))

    key = str(text)
    assert found["tokens"][key] == 320
    assert found["perplexity"][key] == pytest.approx(perplexity(model_STV), rel=1e-5)
    assert found["reference_perplexity"][key] == pytest.approx(perplexity(reference_STV), rel=1e-5)
    kl = (reference_STV.exp() * (reference_STV - model_STV)).sum(-1).mean()
    assert found["kl"][key] == pytest.approx(float(kl), rel=1e-4)
    same = (reference_STV.argmax(-1) == model_STV.argmax(-1)).double().mean()
    assert found["top1_agreement"][key] == pytest.approx(float(same))
    assert found["bytes"] == sum(path.stat().st_size for path in other.glob("*.safetensors"))


def test_a_model_equals_itself(models: tuple[Path, Path, Path]) -> None:
    dense, _, text = models
    found = niwaki.evaluate(dense, reference=dense, data=[str(text)], seq_len=32, max_tokens=128, device="cpu")
    assert found["kl"][str(text)] == 0
    assert found["top1_agreement"][str(text)] == 1


def questions(path: Path) -> list[dict[str, Any]]:
    rows = [
        {"task": "t", "pairs": [["The garden is", " green and wide."], ["The garden is", " on."]], "gold": 0},
        {"task": "t", "pairs": [["One plus one", " is two"], ["One plus one", " is three"]], "gold": 1},
        {
            "task": "t",
            "pairs": [["A longer context, with words that go on,", end] for end in (" ends", " and", " on")],
            "gold": 1,
        },
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def test_task_scores_equal_a_loop_without_padding(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    dense, _, _ = models
    path = tmp_path / "task.jsonl"
    rows = questions(path)
    found = niwaki.evaluate(dense, tasks=[str(path)], device="cpu")["tasks"][str(path)]
    tokenizer = load_tokenizer(dense)
    right = right_norm = 0
    for row in rows:
        scores, normed = [], []
        for context, continuation in row["pairs"]:
            ids = tokenizer(context + continuation, return_tensors="pt")["input_ids"]
            split = len(tokenizer(context)["input_ids"])
            chosen = log_probs(dense, ids)[0].gather(1, ids[0, 1:, None])[split - 1 :, 0].sum()
            scores.append(float(chosen))
            normed.append(float(chosen) / len(continuation))
        right += scores.index(max(scores)) == row["gold"]
        right_norm += normed.index(max(normed)) == row["gold"]
    assert found["items"] == 3
    assert found["accuracy"] == pytest.approx(right / 3)
    assert found["accuracy_norm"] == pytest.approx(right_norm / 3)
    p = right / 3
    assert found["accuracy_stderr"] == pytest.approx(math.sqrt(p * (1 - p) / 2))


def test_limit_and_reference_tasks(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    dense, other, _ = models
    path = tmp_path / "task.jsonl"
    questions(path)
    found = niwaki.evaluate(other, reference=dense, tasks=[str(path)], limit=2, device="cpu")["tasks"][str(path)]
    assert found["items"] == found["reference"]["items"] == 2


def test_wrong_evaluations(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    dense, _, text = models
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"pairs": [["a", "b"]], "gold": 0}\n')
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"pairs": [["a", " word" * 100], ["a", " b"]], "gold": 0}) + "\n")
    small = tiny_llama(tmp_path / "small", vocab_size=4097)
    for arguments, error, message in [
        ({}, InputError, "nothing to evaluate"),
        ({"data": [str(text)], "seq_len": 65}, CalibrationError, "longer than the 64 positions"),
        ({"tasks": [str(bad)]}, CalibrationError, r"bad\.jsonl:1: expected"),
        ({"tasks": [str(tmp_path / "no.jsonl")]}, CalibrationError, "no such task file"),
        ({"tasks": [str(long)]}, CalibrationError, "the continuation alone exceeds"),
        ({"data": [str(text)], "seq_len": 32, "reference": small}, InputError, "different vocabularies"),
        ({"data": [str(text)], "seq_len": 32, "dtype": "float8"}, InputError, "unknown dtype"),
    ]:
        with pytest.raises(error, match=message):
            niwaki.evaluate(dense, device="cpu", **arguments)  # type: ignore[arg-type]


def test_one_file_may_stand_alone(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    dense, _, text = models
    task = tmp_path / "task.jsonl"
    questions(task)
    found = niwaki.evaluate(dense, data=text, tasks=str(task), seq_len=32, max_tokens=64, device="cpu")
    assert found["tokens"] == {str(text): 64}
    assert found["tasks"][str(task)]["items"] == 3


def test_a_gold_outside_the_pairs_is_named(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"pairs": [["a", "b"], ["a", "c"]], "gold": 2}\n')
    with pytest.raises(CalibrationError, match=r"bad\.jsonl:1: gold 2 is not an index of the 2 pairs: expected 0 to 1"):
        niwaki.evaluate(models[0], tasks=bad, device="cpu")


def test_wrong_counts(models: tuple[Path, Path, Path]) -> None:
    for name, value in [("seq_len", 1), ("seq_len", 0), ("max_tokens", 0), ("limit", 0)]:
        with pytest.raises(InputError, match=f"{name} must be at least"):
            niwaki.evaluate(models[0], data=models[2], device="cpu", **{name: value})  # type: ignore[arg-type]


def test_a_missing_file_comes_first_and_a_default_window_fits(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    dense, _, text = models
    with pytest.raises(CalibrationError, match="no such text file"):
        niwaki.evaluate(dense, data=tmp_path / "no.txt", device="cpu")
    messages: list[str] = []

    def report(event: Event, **fields: Any) -> None:
        if event is Event.WARNING:
            messages.append(fields["message"])

    by_default = niwaki.evaluate(dense, data=text, device="cpu", report=report)
    assert by_default == niwaki.evaluate(dense, data=text, device="cpu", seq_len=64)
    assert by_default["seq_len"] == 64
    assert messages == [f"windows of 64 tokens: the default of 1024 is longer than the positions of {dense}"]
