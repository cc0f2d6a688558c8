"""Scores of the dense model in a folder: the same numbers, computed once, and never those of other inputs."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import niwaki
from niwaki.config.events import Event
from niwaki.errors import InputError
from niwaki.measure.schema import Comparison
from support.models import tiny_llama, write_texts


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a dense model, two candidates, a text and questions."""
    folder = tmp_path_factory.mktemp("dense-scores")
    dense = tiny_llama(folder / "dense")
    for target in ("0.3", "0.6"):
        niwaki.compress(dense, folder / target, method="magnitude", target=target, device="cpu")
    write_texts(folder / "text.jsonl", count=2)
    rows = [
        {"pairs": [[f"Number {k} is", f" {end}"] for end in ("even.", "odd", "not a number")], "gold": k % 2}
        for k in range(8)
    ]
    (folder / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def compare(models: Path, target: str, scores: Path | None, **more: Any) -> tuple[Comparison, set[str]]:
    """Return the comparison without its date and seconds, and the models whose blocks ran."""
    ran: set[str] = set()

    def report(event: Event, **fields: Any) -> None:
        if event is Event.EVALUATE:
            ran.add(fields["model"])

    settings: dict[str, Any] = {"seq_len": 32, "max_tokens": 320, "rounds": 0, "device": "cpu", "seed": 1}
    found = niwaki.compare(
        models / "dense", models / target, data=models / "text.jsonl", tasks=models / "task.jsonl",
        dense_scores=scores, progress=report, **(settings | more),
    )  # fmt: skip
    return found.model_copy(update={"date": "", "seconds": 0.0}), ran


def test_the_dense_model_runs_once_and_every_number_stays(models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "some" / "scores"
    first, ran_first = compare(models, "0.3", folder)
    files = sorted(folder.glob("*.safetensors"))
    second, ran_second = compare(models, "0.6", folder)
    assert ran_first == {"dense", "0.3"} and ran_second == {"0.6"}
    assert first == compare(models, "0.3", None)[0] and second == compare(models, "0.6", None)[0]
    assert sorted(folder.glob("*.safetensors")) == files and files


def test_only_what_is_new_runs(models: Path, tmp_path: Path) -> None:
    compare(models, "0.3", tmp_path)
    files = set(tmp_path.glob("*.safetensors"))
    for more in ({"shots": 2}, {"limit": 3}, {"seq_len": 16}, {"dtype": "bfloat16"}):
        found, ran = compare(models, "0.3", tmp_path, **more)
        new = set(tmp_path.glob("*.safetensors")) - files
        assert "dense" in ran and new, more
        assert found == compare(models, "0.3", None, **more)[0], more
        files |= new
    assert compare(models, "0.3", tmp_path, seed=5)[1] == {"0.3"}, "the seed of the bootstrap changes no score"


def test_another_model_in_the_same_place_is_not_the_same(models: Path, tmp_path: Path) -> None:
    place = tmp_path / "models"
    place.mkdir()
    for name in ("text.jsonl", "task.jsonl"):
        (place / name).write_bytes((models / name).read_bytes())
    (place / "0.3").symlink_to(models / "0.3")
    found = {}
    for seed in (0, 1):
        tiny_llama(place / "dense", initializer_range=0.02 + seed / 10)
        found[seed] = compare(place, "0.3", tmp_path / "scores")
    assert "dense" in found[1][1] and found[0][0] != found[1][0]


def test_a_damaged_file_is_named(models: Path, tmp_path: Path) -> None:
    compare(models, "0.3", tmp_path)
    for path in tmp_path.glob("*.safetensors"):
        content = path.read_bytes()
        path.write_bytes(content[:-5])
        with pytest.raises(InputError, match=f"{path.name} does not hold the scores that its name promises: delete it"):
            compare(models, "0.3", tmp_path)
        path.write_bytes(content)


def test_of_two_at_a_time_one_computes(models: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda target: compare(models, target, tmp_path), ("0.3", "0.6")))
    assert sorted("dense" in ran for _, ran in found) == [False, True]
    assert [one for one, _ in found] == [compare(models, target, None)[0] for target in ("0.3", "0.6")]
