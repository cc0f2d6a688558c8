"""Flags win over the recipe file, options and calibration are merged; slips are refused at once."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import pytest
import typer

from niwaki.cli.app import app
from niwaki.cli.demo import sapling
from niwaki.cli.options import first_given, given, hidden_alias, recipe_values
from niwaki.config.devices import may_have_gpu
from niwaki.errors import InputError
from support.models import run


def test_flags_win_and_the_rest_stays(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("method: gptq\ntarget: 4bit\noptions: {group: 64, clip: true}\ncalibration: {samples: 9}\n")
    found = recipe_values(recipe, {"seq_len": 5, "samples": None}, ["group=32"], target="2bit", seed=None)
    assert found["method"] == "gptq" and found["target"] == "2bit" and "seed" not in found
    assert found["options"] == {"group": "32", "clip": True}
    assert found["calibration"] | {"samples": 9, "seq_len": 5} == found["calibration"]


def test_without_a_recipe_only_what_was_given_is_there() -> None:
    assert recipe_values(None, {}, None, method="rtn") == {"method": "rtn", "calibration": {}, "options": {}}
    assert given(a=1, b=None) == {"a": 1}


@pytest.mark.parametrize("pair", ["group", "=3"])
def test_options_are_key_value(pair: str) -> None:
    with pytest.raises(InputError, match="expected key=value"):
        recipe_values(None, {}, [pair])


WANDA = ["--method", "wanda", "--target", "0.5"]
SLIPS = [
    ["compress", "nowhere", "out", "--method", "wanda", "--target", "0.5"],
    ["compress", "SAPLING", "out", "--method", "wandaa", "--target", "0.5"],
    ["compress", "SAPLING", "out", "--method", "wanda", "--target", "7"],
    ["compress", "SAPLING", "out", "--method", "comp+gptq", "--target", "0.2+9bit"],
    ["compress", "SAPLING", "out", "--method", "wanda", "--target", "0.5", "--calibration", "none.jsonl"],
    ["compress", "SAPLING", "out", "--recipe", "broken.yaml"],
    ["compress", "SAPLING", "broken.yaml", "--method", "wanda", "--target", "0.5"],
    ["plan", "nowhere", "--method", "wanda", "--target", "0.5"],
    ["evaluate", "nowhere", "--data", "text.txt"],
    ["evaluate", "SAPLING", "--tasks", "none.jsonl"],
    ["compare", "SAPLING", "nowhere", "--data", "text.txt"],
    ["compare", "SAPLING", "SAPLING", "--data", "text.txt", "--gate", "broken.yaml"],
    ["gate", "gate.yaml", "--baseline", "none.json"],
    ["inspect", "nowhere"],
    ["inspect", "nowhere", "--why", "model.layers.0.mlp.up_proj"],
    ["generate", "nowhere", "text"],
    ["export", "nowhere", "out", "--to", "gguf"],
    ["recover", "nowhere", "--data", "text.txt"],
    ["rotate", "nowhere", "out", "--target", "2:4", "--calibration", "text.txt"],
    ["rotate", "SAPLING", "out", "--target", "2:4"],
    ["rotate", "SAPLING", "out", "--target", "two", "--calibration", "text.txt"],
    ["methods", "wandaa"],
    # Jobs that cannot be done, for reasons that headers and sizes tell.
    ["compress", "SAPLING", "out", *WANDA, "--calibration", "text.txt"],
    ["compress", "SAPLING", "out", *WANDA, "--samples", str(10**13)],
    ["compress", "SAPLING", "out", "--method", "squeeze10", "--target-bytes", "10KB", "--calibration", "text.txt"],
    ["compress", "SAPLING", "out", *WANDA, "--blocks", "8-99"],
    ["compress", "SAPLING", "out", *WANDA, "--calibration", "text.txt", "--seq-len", "99999"],
    ["plan", "SAPLING", "--method", "squeeze10", "--target-bytes", "9GB"],
    ["compress", "deep", "out", *WANDA],
    ["plan", "deep", *WANDA],
    ["evaluate", "deep", "--data", "text.txt"],
    ["compare", "SAPLING", "deep", "--data", "text.txt"],
    ["generate", "deep", "text"],
    ["export", "deep", "out", "--to", "gguf"],
    ["serve", "deep"],
    ["bench", "SAPLING", "deep"],
]
# Refused early where no driver of a GPU is installed.
GPU_SLIPS = [
    ["compress", "SAPLING", "out", *WANDA, "--device", "cuda"],
    ["evaluate", "SAPLING", "--data", "text.txt", "--device", "cuda:1"],
    ["serve", "SAPLING", "--device", "cuda"],
]
RUN = """
import json, sys
from niwaki.cli import app as cli
for line in json.load(sys.stdin):
    sys.argv = ["niwaki", *line]
    try:
        cli.main()
    except SystemExit as done:
        assert done.code == 2, line
    assert "torch" not in sys.modules and "transformers" not in sys.modules, line
"""


def test_slips_are_refused_before_torch_is_loaded(tmp_path: Path) -> None:
    """Check for one line each, exit code 2 and nothing written, all in one process that never imports torch."""
    (tmp_path / "broken.yaml").write_text("method: [")
    (tmp_path / "text.txt").write_text("some text")
    shutil.copytree(sapling(), tmp_path / "deep")
    config = json.loads((sapling() / "config.json").read_text())
    (tmp_path / "deep/config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**9}))
    before = sorted(tmp_path.iterdir())
    slips = [*SLIPS, *([] if may_have_gpu() else GPU_SLIPS)]
    lines = [[str(sapling()) if word == "SAPLING" else word for word in line] for line in slips]
    found = subprocess.run(
        [sys.executable, "-c", RUN], input=json.dumps(lines), cwd=tmp_path, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    told = found.stderr.splitlines()
    assert len(told) == len(slips) and all(line.startswith("error: ") for line in told), found.stderr
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("command", "old", "new"),
    [("compress", "--ends", "--embeddings"), ("plan", "--ends", "--embeddings"), ("bench", "--forms", "--variants")],
)
def test_an_old_spelling_works_and_help_does_not_show_it(
    command: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    _, printed, _ = run(capsys, command, "--help")
    assert new in printed and old not in printed
    options = {name for one in typer.main.get_command(app).commands[command].params for name in one.opts}  # type: ignore[attr-defined]
    assert {old, new} <= options


def test_a_hidden_alias_sets_what_the_new_spelling_sets() -> None:
    command = typer.Typer()
    values = []

    @command.command()
    def store(new: str | None = None, old: Annotated[str | None, hidden_alias("--old")] = None) -> None:
        values.append(first_given(new, old))

    for line in (["--new", "4bit"], ["--old", "4bit"], ["--new", "4bit", "--old", "8bit"], []):
        command(line, standalone_mode=False)
    assert values == ["4bit", "4bit", "4bit", None]
