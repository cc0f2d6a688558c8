"""Solved questions before each question: which ones, and scores against the same texts written out by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import niwaki
from niwaki.cli.app import app
from niwaki.errors import CalibrationError, InputError
from niwaki.measure.evaluate.tasks import BETWEEN, read_items
from support.models import tiny_llama

ROWS: list[dict[str, Any]] = [
    {"pairs": [[f"Number {k} is", end] for end in (" even.", " odd.")], "gold": k % 2} for k in range(9)
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def examples(context: str) -> list[str]:
    *solved, _ = context.split(BETWEEN)
    return solved


def test_no_question_is_its_own_example_and_nearly_all_share_theirs(tmp_path: Path) -> None:
    path = str(write(tmp_path / "task.jsonl", ROWS))
    plain, items = read_items(path, None), read_items(path, None, 3, 0)
    solved = {"".join(item.pairs[item.gold]) for item in plain}
    for before, item in zip(plain, items, strict=True):
        shown = examples(item.pairs[0][0])
        assert len(set(shown)) == 3 and set(shown) <= solved
        assert "".join(before.pairs[before.gold]) not in shown
        assert [context.split(BETWEEN)[-1] for context, _ in item.pairs] == [context for context, _ in before.pairs]
        assert item.gold == before.gold and [end for _, end in item.pairs] == [end for _, end in before.pairs]
    usual = max({tuple(examples(item.pairs[0][0])) for item in items}, key=lambda one: len(set(one) & solved))
    others = [item for item in items if tuple(examples(item.pairs[0][0])) != usual]
    assert len(others) <= 3 or len({tuple(examples(item.pairs[0][0])) for item in items}) == 4


def test_the_examples_depend_on_seed_and_file_alone(tmp_path: Path) -> None:
    path = str(write(tmp_path / "task.jsonl", ROWS))
    assert read_items(path, 4, 2, 7) == read_items(path, None, 2, 7)[:4]
    assert read_items(path, None, 2, 7) != read_items(path, None, 2, 8)
    assert read_items(path, None, 0, 7) == read_items(path, None)


@pytest.mark.parametrize("seed", range(6))
def test_the_same_question_again_is_no_example_of_itself(tmp_path: Path, seed: int) -> None:
    rows = [{"pairs": list(reversed(row["pairs"])), "gold": 1 - row["gold"]} for row in ROWS]
    for item in read_items(str(write(tmp_path / "twins.jsonl", ROWS + rows)), None, 5, seed):
        own = "".join(item.pairs[item.gold]).split(BETWEEN)[-1]
        assert own not in examples(item.pairs[0][0])
    bare = [{"pairs": [["", f"{number} is {end}"] for end in ("even", "odd")], "gold": 0} for number in range(4)]
    for item in read_items(str(write(tmp_path / "bare.jsonl", bare)), None, 3, seed):
        assert item.pairs[0][1] not in examples(item.pairs[0][0])


def test_scores_are_those_of_the_texts_written_out(tmp_path: Path) -> None:
    dense, path = tiny_llama(tmp_path / "dense", max_position_embeddings=256), write(tmp_path / "task.jsonl", ROWS)
    niwaki.compress(dense, tmp_path / "out", method="magnitude", target="0.4", device="cpu")
    rows = [{"pairs": item.pairs, "gold": item.gold} for item in read_items(str(path), 6, 2, 3)]
    by_hand = write(tmp_path / "written.jsonl", rows)
    own = niwaki.evaluate(tmp_path / "out", tasks=path, limit=6, shots=2, seed=3, reference=dense, device="cpu")
    wanted = niwaki.evaluate(tmp_path / "out", tasks=by_hand, reference=dense, device="cpu")
    assert own["tasks"][str(path)] == wanted["tasks"][str(by_hand)]
    assert (own["shots"], own["seed"]) == (2, 3) and "shots" not in wanted
    paired = niwaki.compare(dense, tmp_path / "out", tasks=path, limit=6, shots=2, seed=3, rounds=0, device="cpu")
    (task,) = paired.candidates[0].tasks
    scores = own["tasks"][str(path)]
    assert (task.accuracy.accuracy, task.accuracy.dense_accuracy) == (
        scores["accuracy"], scores["reference"]["accuracy"],
    )  # fmt: skip
    assert paired.settings.shots == 2 and "--shots 2" in paired.command


def test_wrong_shots(tmp_path: Path) -> None:
    dense, path = tiny_llama(tmp_path / "dense"), write(tmp_path / "task.jsonl", ROWS)
    with pytest.raises(CalibrationError, match="9 examples need at least 10 different questions, it has 9: lower"):
        niwaki.evaluate(dense, tasks=path, shots=9, device="cpu")
    for measure in (niwaki.evaluate, lambda model, **more: niwaki.compare(model, tmp_path / "out", **more)):
        with pytest.raises(InputError, match="shots must be at least 0"):
            measure(dense, tasks=path, shots=-1, device="cpu")
        with pytest.raises(InputError, match=r"--shots is of task files: give --tasks FILE"):
            measure(dense, data=path, shots=1, device="cpu")


def test_the_card_and_the_table_say_how_many(tmp_path: Path) -> None:
    dense, path = tiny_llama(tmp_path / "dense", max_position_embeddings=256), write(tmp_path / "task.jsonl", ROWS)
    niwaki.compress(dense, tmp_path / "out", method="magnitude", target="0.4", device="cpu")
    said = "each after 2 solved ones"
    for shots in (2, 0):
        niwaki.compare(
            dense, tmp_path / "out", tasks=path, shots=shots, rounds=0, update_card=True, device="cpu"
        )  # fmt: skip
        assert (said in (tmp_path / "out" / "README.md").read_text()) == bool(shots)
        words = ["evaluate", str(tmp_path / "out"), "--tasks", str(path), "--shots", str(shots), "--update-card"]
        shown = CliRunner().invoke(app, words, env={"COLUMNS": "300"})
        assert shown.exit_code == 0, shown.output
        assert (said in shown.output) == (said in (tmp_path / "out" / "README.md").read_text()) == bool(shots)
