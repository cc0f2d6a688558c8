"""The embedded default: the model and texts are there, and its table is measured, not written."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from niwaki.cli import demo
from niwaki.config.presets import PRESETS
from niwaki.config.recipe import load_recipe, make_recipe
from niwaki.data.texts import calibration_windows, evaluation_windows, load_tokenizer
from niwaki.errors import OutputError


def test_demo_compresses_and_compares_the_sapling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS["fast"]["zeros"]["options"], "sparsegpt.exchanges", 1)  # each one takes seconds
    monkeypatch.setattr(demo, "SEQ_LEN", 128)
    monkeypatch.setattr(demo, "SAMPLES", 8)
    monkeypatch.setattr(demo, "EVALUATION_TOKENS", 4 * demo.SEQ_LEN)
    found = demo.run_demo(tmp_path / "new" / "out")
    assert found["zeros_frac"] == 0.5
    dense, pruned = found["perplexity"]
    assert 5 < dense < 40  # a trained model, not a random one (which would score about 4096)
    assert dense < pruned < 5 * dense
    assert 0 < found["kl"] < 3 and 0.3 < found["top1_agreement"] < 1
    assert found["bytes"][0] == (demo.sapling() / "model.safetensors").stat().st_size


def test_make_demo_says_what_it_installs_and_installs_no_more_than_that(tmp_path: Path) -> None:
    """`make test` adds the tools, in a second step."""
    root = Path(__file__).parents[2]

    def steps(target: str) -> list[str]:
        run = ["make", "--dry-run", target, f"VENV={tmp_path}/venv"]
        return subprocess.run(run, cwd=root, capture_output=True, text=True, check=True).stdout.splitlines()

    demo_steps, test_steps = steps("demo"), steps("test")
    said, made = (next(i for i, step in enumerate(demo_steps) if what in step) for what in ("on disk", "-m venv"))
    assert said < made and "1.2 GB on disk" in demo_steps[said]
    assert [step for step in demo_steps if step.endswith("--editable .")]
    assert not [step for step in demo_steps if "dev.lock" in step]
    assert [step for step in test_steps if "dev.lock" in step]


def test_sapling_is_whole() -> None:
    names = {path.name for path in demo.sapling().iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names


def test_a_demo_destroys_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sapling = shutil.copytree(demo.sapling(), tmp_path / "package" / "sapling")
    monkeypatch.setattr(demo, "sapling", lambda: sapling)
    taken = tmp_path / "taken"
    (taken / "niwaki").mkdir(parents=True)
    (taken / "niwaki/run.json").write_text("{}")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    (tmp_path / "new-evaluation.jsonl").write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for out, overwrite, message in [
        (sapling, True, "share a folder"),
        (sapling.parent, True, "share a folder"),
        (tmp_path / "mine", True, "is not a niwaki result"),
        (taken, False, "already exists: choose another folder with --out"),
        (tmp_path / "new", False, r"new-evaluation\.jsonl already exists: choose another folder with --out"),
    ]:
        with pytest.raises(OutputError, match=message):
            demo.run_demo(out, overwrite=overwrite)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_readme_and_example_ask_for_no_more_than_the_demo_texts_hold() -> None:
    tokenizer = load_tokenizer(demo.sapling())
    calibration, evaluation = demo.demo_texts()
    root = Path(__file__).parents[2]
    readme = (root / "README.md").read_text(encoding="utf-8")
    snippet = next(part for part in re.findall(r"```python\n(.*?)```", readme, re.S) if "niwaki.compress(" in part)
    samples, seq_len = (int(re.findall(rf'"{name}": (\d+)', snippet)[0]) for name in ("samples", "seq_len"))
    recipe = make_recipe(load_recipe(root / "examples/sparsegpt-2of4.yaml")).calibration
    for count, length in ((samples, seq_len), (recipe.samples, recipe.seq_len)):
        assert calibration_windows(calibration, tokenizer, samples=count, seq_len=length, seed=0).numel()
    assert len(evaluation_windows(evaluation, tokenizer, seq_len=seq_len)) > 10
