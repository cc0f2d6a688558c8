"""Measured numbers on the model card: where they stand, what a machine reads of them, and what stays."""

import json
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import niwaki
from niwaki.cli.app import main
from niwaki.compression.model_card import UNMEASURED, model_card
from niwaki.compression.run_record import RunRecord
from niwaki.errors import InputError
from niwaki.measure.report.evaluation_card import check_card, put_evaluation
from support.models import tiny_llama, write_texts


@pytest.fixture
def result(tmp_path: Path) -> Path:
    """A compressed model below `tmp_path`."""
    niwaki.compress(tiny_llama(tmp_path / "model"), tmp_path / "out", method="magnitude", target="0.5", device="cpu")
    return tmp_path / "out"


def command(*arguments: object) -> int:
    sys.argv = ["niwaki", *map(str, arguments)]
    try:
        main()
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


def test_evaluate_writes_its_numbers_into_the_card(result: Path, tmp_path: Path) -> None:
    text, task = write_texts(tmp_path / "text.jsonl"), tmp_path / "task.jsonl"
    rows = [{"pairs": [["One plus one", " is two"], ["One plus one", " is"]], "gold": 1} for _ in range(2)]
    task.write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = (result / "README.md").read_text()
    assert UNMEASURED in before
    arguments = ["evaluate", result, "--reference", tmp_path / "model", "--data", text, "--tasks", task]
    scores = tmp_path / "scores.json"
    shape = ["--seq-len", 32, "--max-tokens", 320, "--device", "cpu", "--json", scores, "--update-card"]
    assert command(*arguments, *shape) == 0
    found = json.loads(scores.read_text())
    assert json.loads((result / "niwaki/evaluation.json").read_text()) == found
    card = ModelCard.load(result / "README.md")
    measured = {(entry.dataset_name, entry.metric_type): entry.metric_value for entry in card.data.eval_results}
    assert measured["text.jsonl", "perplexity"] == pytest.approx(found["perplexity"][str(text)], abs=1e-4)
    assert measured["task.jsonl", "accuracy"] == found["tasks"][str(task)]["accuracy"]
    dense = found["reference_perplexity"][str(text)]
    line = f"| text.jsonl, 320 tokens | perplexity | {found['perplexity'][str(text)]:.3f} | {dense:.3f} |"
    assert line in card.text and UNMEASURED not in card.text
    assert str(tmp_path) not in str(card)


def test_numbers_are_replaced_and_words_stay(result: Path, tmp_path: Path) -> None:
    path, text = result / "README.md", write_texts(tmp_path / "text.jsonl")
    path.write_text(path.read_text().replace("# model, ", "# Our model, ") + "\nAsk the garden team.\n")
    for tokens in (128, 64):
        put_evaluation(result, niwaki.evaluate(result, data=text, seq_len=32, max_tokens=tokens, device="cpu"))
    card = path.read_text()
    assert "64 tokens" in card and "128 tokens" not in card
    assert "# Our model, " in card and card.endswith("Ask the garden team.\n")
    assert len(ModelCard.load(path).data.eval_results) == 1


def test_a_card_that_cannot_take_numbers_is_told_before_measuring(result: Path, tmp_path: Path) -> None:
    text = write_texts(tmp_path / "text.jsonl")
    with pytest.raises(InputError, match="is not a result of niwaki"):
        check_card(tmp_path / "model")
    card = (result / "README.md").read_text()
    (result / "README.md").write_text("# Mine\n")
    assert command("evaluate", result, "--data", text, "--seq-len", 32, "--update-card", "--device", "cpu") == 2
    assert (result / "README.md").read_text() == "# Mine\n" != card
    assert not (result / "niwaki/evaluation.json").exists()


def test_the_base_model_is_named_where_the_hub_knows_it(result: Path) -> None:
    record = json.loads((result / "niwaki/run.json").read_text())
    card = ModelCard(model_card(RunRecord.model_validate(record)))
    assert card.data.base_model is None and "| base model | `model`, a local folder |" in card.text
    assert card.data.library_name == "transformers" and "magnitude" in card.data.tags
    record["model"]["source"] = "/cache/models--org--tree/snapshots/0123abc"
    card = ModelCard(model_card(RunRecord.model_validate(record)))
    assert card.data.base_model == "org/tree"
    assert "[org/tree](https://huggingface.co/org/tree) at `0123abc`" in card.text
