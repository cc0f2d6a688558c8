"""Every command that takes a result refuses a broken one: exit code 2, one line, nothing written, no traceback."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import niwaki
from niwaki.model.shards import INDEX
from support.models import run, tiny_llama, write_texts

MODULE = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model, a packed result and a text."""
    folder = tmp_path_factory.mktemp("entrances")
    write_texts(folder / "text.jsonl")
    tiny_llama(folder / "model", blocks=1)
    four = {"method": "rtn", "target": "4bit", "options": {"group": 16}, "device": "cpu"}
    niwaki.compress(folder / "model", folder / "packed", **four)
    return folder


def described(part: str, value: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"]["modules"][MODULE]["parts"][0][part] = value
        (folder / "config.json").write_text(json.dumps(config))

    return edit


def shard(folder: Path) -> Path:
    """Return the file that holds the scales of MODULE."""
    if not (folder / INDEX).is_file():
        return folder / "model.safetensors"
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][f"{MODULE}.scale_0"]


def not_finite(folder: Path) -> None:
    tensors = load_file(shard(folder))
    tensors[f"{MODULE}.scale_0"] = torch.full_like(tensors[f"{MODULE}.scale_0"], 0x7E00)
    save_file(tensors, shard(folder), metadata={"format": "pt"})


def cut(folder: Path) -> None:
    shard(folder).write_bytes(shard(folder).read_bytes()[:-100])


def no_object(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["modules"] = [MODULE]
    (folder / "config.json").write_text(json.dumps(config))


def odd_generation(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": {"a": 1}}')


BROKEN = {
    "bits": described("bits", 70), "group": described("group", 0), "not_finite": not_finite, "cut": cut,
    "no_object": no_object, "odd_generation": odd_generation,
}  # fmt: skip
SMALL = ["--device", "cpu"]
COMMANDS: dict[str, Callable[[Path, Path, Path], list[object]]] = {
    "evaluate": lambda r, t, o: ["evaluate", r, "--data", t, "--seq-len", 8, "--max-tokens", 16, "--json", o, *SMALL],
    "export": lambda r, t, o: ["export", r, o, "--to", "compressed-tensors"],
    "recover": lambda r, t, o: ["recover", r, o, "--data", t, "--steps", 1, "--seq-len", 16, *SMALL],
    "compress": lambda r, t, o: ["compress", r, o, "--method", "magnitude", "--target", "0.5", *SMALL],
    "serve": lambda r, t, o: ["serve", r, "--port", 0, *SMALL],
    "generate": lambda r, t, o: ["generate", r, "The garden", "--max-new-tokens", 2, *SMALL],
    "compare": lambda r, t, o: ["compare", r.parent / "model", r, "--data", t, "--max-tokens", 16, "--seq-len", 8,
                                "--report", o, *SMALL],
    "bench": lambda r, t, o: ["bench", r.parent / "model", r, "--prompt", 4, "--new", 2, "--context", 4,
                            "--json", o, *SMALL],
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_result_is_refused_by_every_command(
    world: Path, tmp_path: Path, command: str, broken: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if command in ("compare", "bench") and broken in ("group", "no_object", "cut"):
        pytest.skip("these two start processes, and the others show that the reader refuses it")
    result = shutil.copytree(world / "packed", tmp_path / "result")
    shutil.copytree(world / "model", tmp_path / "model")
    BROKEN[broken](result)
    before = sorted(path.name for path in tmp_path.iterdir())
    code, printed, error = run(capsys, *COMMANDS[command](result, world / "text.jsonl", tmp_path / "out"))
    assert code == 2, (printed, error)
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in error + printed, error
    assert str(result) in lines[0] or MODULE in lines[0] or "quantization_config" in lines[0], error
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("text", ["[]", "{", '{"matrices": 3}', "null", '{"format": 10000000000}'])
@pytest.mark.parametrize("why", [[], ["--why", MODULE]])
def test_inspect_refuses_a_broken_record(
    world: Path, tmp_path: Path, text: str, why: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    result = shutil.copytree(world / "packed", tmp_path / "result")
    (result / "niwaki" / "run.json").write_text(text)
    code, printed, error = run(capsys, "inspect", result, *why)
    assert code == 2 and "Traceback" not in error + printed, (printed, error)
    assert error.startswith("error: ") and len(error.strip().splitlines()) == 1
